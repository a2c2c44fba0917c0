"""Where a client wanted to go whose connection was redirected to us."""

import errno
import ipaddress
import socket as std
import struct
from _socket import socket
from typing import Final

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h: the one number for both families.
_SO_ORIGINAL_DST: Final = 80

# struct sockaddr_in and sockaddr_in6, ip(7) and ipv6(7): the family, the port in network order, the
# address; in IPv6 with the flow information before, and the scope behind.
_IPV4: Final = struct.Struct("=H2s4s8x")
_IPV6: Final = struct.Struct("=H2s4x16sI")

# Nothing is known of the connection; or connection tracking is not even loaded.
_UNKNOWN: Final = frozenset({errno.ENOENT, errno.ENOPROTOOPT})


class NotRedirectedError(Exception):
    """Nobody redirected the connection: the client asked for our own address and port."""


def original_destination(sock: socket) -> tuple[str, int]:
    """Return the address and the port that an accepted connection was made to.

    An IPv4 client of an IPv6 socket has an IPv4 destination. The scope of a link-local address is
    known only for a socket that is bound to a device; its number then stands behind a `%`.

    Raises:
        NotRedirectedError: to our own.
        OSError: a system call failed.
    """
    own_host, own_port = sock.getsockname()[:2]
    own = ipaddress.ip_address(own_host.partition("%")[0])
    if isinstance(own, ipaddress.IPv6Address) and own.ipv4_mapped is not None:
        own = own.ipv4_mapped
    try:
        if own.version == 4:
            # The kernel answers at this level for IPv6 sockets as well, if their client has IPv4.
            name = sock.getsockopt(std.SOL_IP, _SO_ORIGINAL_DST, _IPV4.size)
            _, port_bytes, packed = _IPV4.unpack(name)
            scope = 0
        else:
            name = sock.getsockopt(std.IPPROTO_IPV6, _SO_ORIGINAL_DST, _IPV6.size)
            _, port_bytes, packed, scope = _IPV6.unpack(name)
    except OSError as error:
        if error.errno in _UNKNOWN:
            raise NotRedirectedError("the connection was not redirected") from None
        raise
    address = ipaddress.ip_address(packed)
    port = int.from_bytes(port_bytes, "big")
    # Of a connection that is tracked, but was left as it is, the kernel tells that.
    if (address, port) == (own, own_port):
        raise NotRedirectedError("the connection was made to the port that listens here")
    return f"{address}%{scope}" if scope else str(address), port
