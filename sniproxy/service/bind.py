"""Opening listening sockets, where no supervisor does that."""

import contextlib
import errno
import os
import re
import socket
import stat
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple

from sniproxy.service.fatal import FatalError, UsageError

# An IPv6 address has colons of its own, so it stands in brackets, as in a URL (RFC 3986 §3.2.2).
_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<v4>[^\[\]:]*)):(?P<port>[0-9]{1,5})", re.ASCII)

_HIGHEST_PORT = 65535

# More than any kernel lets wait: it takes net.core.somaxconn instead, listen(2). SOMAXCONN is what
# that was by default where this Python was built.
_LONGEST_QUEUE = (1 << 31) - 1


# Bytes of a path in struct sockaddr_un, without the NUL behind it, unix(7).
_LONGEST_PATH = 107


class Endpoint(NamedTuple):
    """Where to listen."""

    family: socket.AddressFamily
    address: tuple[Any, ...]  # as socket.getaddrinfo gives it
    dual_stack: bool


def parse(where: str) -> Endpoint:
    """Return what `ADDRESS:PORT` stands for.

    Raises:
        ValueError: it is no numeric address and port; the message says what is wrong.
    """
    match = _ADDRESS.fullmatch(where)
    if match is None:
        raise ValueError("not of the form ADDRESS:PORT (an IPv6 address stands in brackets)")
    port = int(match["port"])
    if port > _HIGHEST_PORT:
        raise ValueError(f"no port is higher than {_HIGHEST_PORT}")
    if match["v6"] is None and match["v4"]:
        family, host = socket.AF_INET, match["v4"]
    else:
        family, host = socket.AF_INET6, match["v6"] if match["v6"] is not None else "::"
    try:
        # Numeric: a name may have many addresses, and none before the network is up. getaddrinfo
        # alone would take 127.1 and 2130706433 for addresses, and * for loopback.
        _ = IPv4Address(host) if family == socket.AF_INET else IPv6Address(host)
        [(_, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except (ValueError, socket.gaierror):
        version = "IPv4" if family == socket.AF_INET else "IPv6"
        raise ValueError(f"{host!a} is not a numeric {version} address") from None
    # The option means something for the wildcard address only.
    return Endpoint(family, address, dual_stack=address[0] == "::")


def listen(where: str) -> socket.socket:
    """Return a socket that listens on `ADDRESS:PORT`.

    Raises:
        FatalError: the message says which address, and why.
    """
    try:
        endpoint = parse(where)
    except ValueError as error:
        message = f"unable to listen on {where!a}: {error}"
        raise UsageError(message) from None
    try:
        try:
            listening = socket.socket(endpoint.family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or not where.startswith(":"):
                raise
            # A kernel without IPv6: all addresses are those of IPv4.
            return listen(f"0.0.0.0{where}")
        try:
            # A port whose last connections are still in TIME_WAIT can be had at once.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if endpoint.family == socket.AF_INET6:
                only = not endpoint.dual_stack
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            listening.bind(endpoint.address)
            listening.listen(_LONGEST_QUEUE)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise FatalError.of(f"listen on {where}", error) from None
    return listening


def check(where: str) -> str:
    """Return `where`, if one can listen there: `ADDRESS:PORT`, or a path, which has a slash in it.

    Raises:
        ValueError: the message says what is wrong.
    """
    if "/" in where:
        return check_path(where)
    parse(where)
    return where


def check_path(path: str) -> str:
    """Return `path`, if a Unix socket can have it.

    Raises:
        ValueError: the message says what is wrong.
    """
    if "/" not in path:
        raise ValueError("a path has a slash in it, if only in front: ./NAME")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"the path of a socket has {_LONGEST_PATH} bytes at most")
    return path


def listen_anywhere(where: str) -> socket.socket:
    """Return a socket that listens on `ADDRESS:PORT`, or a Unix socket that does at a path.

    Raises:
        FatalError: the message says where, and why not.
    """
    if "/" not in where:
        return listen(where)
    # Whoever reaches it may connect, as on a TCP port, and as systemd makes sockets: 0666. Its
    # directory says who that is.
    return listen_unix(where, socket.SOCK_STREAM, 0o666)


def listen_unix(path: str, kind: int, mode: int) -> socket.socket:
    """Return a Unix socket that listens at a path, in the place of one that nobody listens at.

    Args:
        path: where.
        kind: SOCK_STREAM, for one.
        mode: who may connect.

    Raises:
        FatalError: as above.
    """
    listening = socket.socket(socket.AF_UNIX, kind)
    try:
        try:
            _bind_unix(listening, path, mode)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _check_abandoned(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            _bind_unix(listening, path, mode)
        listening.listen(_LONGEST_QUEUE)
    except OSError as error:
        listening.close()
        raise FatalError.of(f"listen on {path}", error) from None
    return listening


def _bind_unix(listening: socket.socket, path: str, mode: int) -> None:
    # From the first moment on, so not by chmod(2).
    before = os.umask(0o777 & ~mode)
    try:
        listening.bind(path)
    finally:
        os.umask(before)


def _check_abandoned(path: str) -> None:
    """Check that a Unix socket is there, and that nobody listens any more.

    Raises:
        OSError: it is something else, or somebody does, or nobody can say.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        # 0 is not all that means that there is somebody: EAGAIN, the queue is full; EPROTOTYPE,
        # it is for datagrams, or packets; as that nobody listens comes first.
        if client.connect_ex(path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
