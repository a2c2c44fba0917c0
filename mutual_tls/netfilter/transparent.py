"""Sockets with an address that is not ours: IP_TRANSPARENT, ip(7). It takes CAP_NET_RAW.

`mark` and the route of `route` see to it that the answers come back here.
"""

import socket as std
from _socket import socket
from typing import Final

# linux/in.h and linux/in6.h; Python has no names for them.
_IP_TRANSPARENT: Final = 19
_IPV6_TRANSPARENT: Final = 75
_IP_BIND_ADDRESS_NO_PORT: Final = 24


def transparent(family: int) -> tuple[int, int, int]:
    """Return the option by which a socket may have any address, as for setsockopt(2)."""
    if family == std.AF_INET6:
        return std.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1
    return std.IPPROTO_IP, _IP_TRANSPARENT, 1


def bind_as(sock: socket, address: str, port: int) -> None:
    """Give a socket that is going to connect the address of somebody else.

    Args:
        sock: a TCP socket.
        address: as the kernel tells it of an accepted socket.
        port: its port; 0 for any that is free towards whom we connect to.

    Raises:
        OSError: EADDRINUSE, something here has that port already; or as for bind(2).
    """
    sock.setsockopt(*transparent(sock.family))
    # Another connection may have the same, to another port of this machine.
    sock.setsockopt(std.SOL_SOCKET, std.SO_REUSEADDR, 1)
    if not port:
        # The port is chosen by connect(2), which knows the other end. By bind(2), each would be
        # used once, as if to all others.
        sock.setsockopt(std.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, port))
