"""Addresses → the first line of a connection, PROXY protocol version 1.

Law: two addresses in, at most 107 bytes out. Source: proxy-protocol.txt at haproxy.org, section
2.1, "Human-readable header format". The header is sent before the bytes of the client and says
what the kernel would have told the backend, had the client connected to it directly.
"""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

__all__ = ["Address", "proxy_v1_header"]

# Host and port as the kernel gives them: the first two items of a Python socket address.
Address: TypeAlias = tuple[str, int]

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
    version, client = _family_and_text(source[0])
    server_version, server = _family_and_text(destination[0])
    if version != server_version:
        return _UNKNOWN
    return f"PROXY TCP{version} {client} {server} {source[1]} {destination[1]}\r\n".encode("ascii")


# To read and write two IPv6 addresses costs as much as to read a hello. Those that we listen
# on are few and come with every connection, and clients come back; 256 of both are some 50 KB.
@lru_cache(maxsize=256)
def _family_and_text(host: str) -> tuple[int, str]:
    """Return 4 or 6 and the address, without scope, and IPv4 without the IPv6 coat it may wear."""
    if ":" not in host:
        return 4, str(IPv4Address(host))
    # "fe80::1%eth0": what is behind the sign means something on this host only (RFC 4007 section
    # 11), and the header has no place for it.
    address = IPv6Address(host.partition("%")[0])
    # On a dual-stack listener an IPv4 client appears as ::ffff:192.0.2.1 (RFC 4291 section
    # 2.5.5.2). For the backend it is what it is.
    if address.ipv4_mapped is not None:
        return 4, str(address.ipv4_mapped)
    return 6, str(address)
