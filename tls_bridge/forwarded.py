"""Where a client comes from, as the one in front of us says: a PROXY header, or Forwarded."""

import ipaddress
import re

from mutual_tls.dial import Endpoint
from sniproxy.engine.listener import Address

# "PROXY TCP6 ffff:...:ffff ffff:...:ffff 65535 65535\r\n": proxy-protocol.txt §2.1 has 107 bytes
# as the longest line.
_LONGEST = 107
_PREFIX = b"PROXY "
_LINE = re.compile(rb"PROXY TCP[46] ([0-9a-fA-F:.]+) [0-9a-fA-F:.]+ ([0-9]{1,5}) [0-9]{1,5}")

# RFC 7239 §4: the first `for` of the field.
_FOR = re.compile(rb'(?:^|[;,])\s*for="?([^",;]+)"?', re.IGNORECASE)


def read_proxy_v1(data: bytes) -> tuple[tuple[str, int] | None, bytes] | None:
    """Take a PROXY header of version 1 off the beginning of a stream, if there is one.

    Returns:
        The client's address, None if the header has none or there is no header, and what follows;
        None if more bytes have to come first.
    """
    if data[: len(_PREFIX)] != _PREFIX[: len(data)]:
        return None, data
    line, end, rest = data.partition(b"\r\n")
    if not end:
        # Too long a line is no header; what reads the hello will say so.
        return None if len(data) < _LONGEST else (None, data)
    if (match := _LINE.fullmatch(line)) is None:
        return None, rest
    try:
        host = str(ipaddress.ip_address(match[1].decode()))
    except ValueError:
        return None, rest
    return (host, int(match[2])), rest


def show_forwarded(address: Address) -> tuple[bytes, bytes]:
    """Return the field that tells the next hop of a client's address: RFC 7239 §6.

    An IPv6 address stands in brackets, and what has a colon in it stands in quotation marks.
    """
    host, port = address[:2]
    if ":" in host:
        literal = ipaddress.IPv6Address(host.partition("%")[0])
        host = str(literal.ipv4_mapped or literal)
    return b"Forwarded", f'for="{Endpoint(host, port)}"'.encode()


def forwarded_for(headers: list[tuple[bytes, bytes]]) -> tuple[str, int] | None:
    """Return the address of the client that a Forwarded field names; None if none does."""
    for name, value in headers:
        if name == b"forwarded" and (match := _FOR.search(value)):
            try:
                host, port = Endpoint.parse(match[1].decode("ascii"))
                return str(ipaddress.ip_address(host)), port
            except (ValueError, UnicodeDecodeError):
                return None
    return None
