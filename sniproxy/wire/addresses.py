"""Addresses, as the kernel gives them and as a PROXY header of either version has them."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

__all__ = ["Address", "parse_host"]

# Host and port as the kernel gives them: the first two items of a Python socket address.
Address: TypeAlias = tuple[str, int]


# To read and write two IPv6 addresses costs as much as to read a hello. Those that we listen
# on are few and come with every connection, and clients come back; 256 of both are some 50 KB.
@lru_cache(maxsize=256)
def parse_host(host: str) -> tuple[int, str, bytes]:
    """Read an address, without scope, and IPv4 without the IPv6 coat it may wear.

    Returns:
        4 or 6, the address as text, and its 4 or 16 bytes.

    Raises:
        ValueError: It is no IP address.
    """
    address: IPv4Address | IPv6Address
    if ":" not in host:
        address = IPv4Address(host)
    else:
        # "fe80::1%eth0": what is behind the sign means something on this host only (RFC 4007
        # section 11), and the header has no place for it.
        address = IPv6Address(host.partition("%")[0])
        # On a dual-stack listener an IPv4 client appears as ::ffff:192.0.2.1 (RFC 4291 section
        # 2.5.5.2). For the backend it is what it is.
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    return address.version, str(address), address.packed
