"""Addresses → the first line of a connection, PROXY protocol version 1.

Law: two addresses in, at most 107 bytes out. Source: proxy-protocol.txt at haproxy.org, section
2.1, "Human-readable header format". The header is sent before the bytes of the client and says
what the kernel would have told the backend, had the client connected to it directly.
"""

from typing import Final

from .addresses import Address, parse_host

__all__ = ["proxy_v1_header"]

# The rest of the line "may be omitted by the sender", and the receiver uses what its own kernel
# says of the connection.
_UNKNOWN: Final = b"PROXY UNKNOWN\r\n"


def proxy_v1_header(source: Address | None, destination: Address | None) -> bytes:
    """Return the header for a connection.

    Args:
        source: The client's address, or None where the kernel can't say.
        destination: The address the client connected to, or None likewise.

    Returns:
        One line with its CR LF, of 56 bytes at most for TCP4, 104 for TCP6. `PROXY UNKNOWN` where
        an address is missing, or where the two are not of one family: the grammar has no mixture.

    Raises:
        ValueError: A host is no IP address. A bug of the caller's; the kernel gives no others.
    """
    if source is None or destination is None:
        return _UNKNOWN
    version, client, _ = parse_host(source[0])
    server_version, server, _ = parse_host(destination[0])
    if version != server_version:
        return _UNKNOWN
    return f"PROXY TCP{version} {client} {server} {source[1]} {destination[1]}\r\n".encode("ascii")
