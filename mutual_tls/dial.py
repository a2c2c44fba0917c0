"""Connecting: names to addresses, one address after the other, and what went wrong."""

import errno
import ipaddress
import os
import socket as std
from _socket import socket
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import trio

from mutual_tls.exhausted import EXHAUSTED
from sniproxy.engine.listener import CLIENT_OPTIONS
from sniproxy.engine.story import Story

# Seconds until the next address is tried beside those that have not answered: RFC 8305 §5,
# "Connection Attempt Delay", "SHOULD be ... 250 milliseconds".
_ATTEMPT_EVERY = 0.25

# Addresses of one name that are tried: with 250 ms each there is no time for more.
_MOST_ADDRESSES = 16

# Seconds between two attempts at a Unix socket whose backlog is full.
_RETRY = 0.02

# What connect(2) says of a non-blocking socket that is not connected yet, and of one that is.
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EINTR})
_CONNECTED = frozenset({0, errno.EISCONN})

# And where somebody is there and does not want it: at once, or right after the handshake of TCP.
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})

# What getaddrinfo(3) says of one address.
Found = tuple[int, int, int, str, tuple[str, int]]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class DialReason(StrEnum):
    """Why there is no connection."""

    UNRESOLVED = "unresolved"  # the name has no address
    REFUSED = "refused"  # nobody listens there, or accepts
    UNREACHABLE = "unreachable"  # no route, or no answer
    FORBIDDEN = "forbidden"  # the address is not one to connect to


class DialError(Exception):
    """There is no connection; the message says why.

    Attributes:
        reason: a word for it.
        errno: what connect(2) has said, if that is why.
    """

    def __init__(self, reason: DialReason, detail: str, number: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.errno = number


class Endpoint(NamedTuple):
    """Where to connect: a host (a name, or an IP address) and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Return what HOST:PORT means; an IPv6 address stands in brackets, RFC 3986 §3.2.2.

        Raises:
            ValueError: it means nothing.
        """
        host, colon, digits = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif ":" in host or "[" in host or "]" in host:
            raise ValueError("an IPv6 address stands in brackets: [2001:db8::1]:443")
        if not colon or not host:
            raise ValueError("it is not HOST:PORT")
        return cls(host, parse_port(digits))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_port(text: str) -> int:
    """Return the number of a port.

    Raises:
        ValueError: it is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536):
        raise ValueError(f"{text!a} is no port, a number up to 65535")
    if not int(text):
        raise ValueError("there is no port 0")
    return int(text)


async def resolve(
    story: Story, endpoint: Endpoint
) -> list[tuple[std.AddressFamily, tuple[str, int]]]:
    """Return the addresses of an endpoint, as the system resolves it: IPv6 and IPv4 in turn.

    An address is no name, and is not looked up. Nothing is kept.

    Raises:
        DialError: it has none.
        OSError: there is no descriptor left to find out, or the like.
    """
    if (literal := address_family(endpoint.host)) is not None:
        return [(literal, (endpoint.host, endpoint.port))]
    kinds: dict[std.AddressFamily, list[tuple[str, int]]] = {}
    try:
        found = await story.in_trio(_getaddrinfo, endpoint)
    except RuntimeError as error:  # no thread can be started
        raise OSError(errno.ENOMEM, str(error)) from None
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            raise
        detail = getattr(error, "strerror", None) or str(error)
        raise DialError(DialReason.UNRESOLVED, f"{endpoint.host}: {detail}") from None
    for family, _, _, _, address in found:
        # A scope of a link-local address stays in the text.
        kinds.setdefault(std.AddressFamily(family), []).append(address[:2])
    # RFC 8305 §4: "the first address of the second family", and so on in turn.
    queues = list(kinds.items())
    longest = max((len(addresses) for _, addresses in queues), default=0)
    turns = [
        (family, addresses[number])
        for number in range(longest)
        for family, addresses in queues
        if number < len(addresses)
    ]
    return turns[:_MOST_ADDRESSES]


class _Lookup:
    """A name that is being looked up, and what came of it."""

    def __init__(self) -> None:
        self.is_over = trio.Event()
        self.found: list[Found] | None = None
        self.error: Exception | None = None


# Those who want the same name at the same time wait for one thread. There are 40 of them, and where
# a name server is silent each is taken for as long as glibc waits, whatever our own limit is: some
# clients of one such name would keep all other names from being looked up.
_under_way: dict[Endpoint, _Lookup] = {}


async def _getaddrinfo(endpoint: Endpoint) -> list[Found]:
    while (lookup := _under_way.get(endpoint)) is not None:
        await lookup.is_over.wait()
        if lookup.error is not None:
            raise lookup.error
        if lookup.found is not None:
            return lookup.found
        # Whoever had asked is not there any more.
    lookup = _under_way[endpoint] = _Lookup()
    try:
        lookup.found = await trio.socket.getaddrinfo(  # type: ignore[assignment]
            endpoint.host, endpoint.port, type=std.SOCK_STREAM, flags=std.AI_ADDRCONFIG
        )
    except Exception as error:
        lookup.error = error
        raise
    finally:
        del _under_way[endpoint]
        lookup.is_over.set()
    assert lookup.found is not None
    return lookup.found


def address_family(host: str) -> std.AddressFamily | None:
    """Return what kind of address it is; None if it is a name, or has a scope."""
    for family in std.AF_INET, std.AF_INET6:
        try:
            std.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return family
    return None


async def dial(
    story: Story,
    endpoint: Endpoint,
    is_forbidden: Callable[[IPAddress], bool] | None = None,
    *,
    options: Sequence[tuple[int, int, int]] = (),
    bind: Callable[[socket], None] = lambda sock: None,
) -> socket:
    """Return a non-blocking socket that is connected to the endpoint.

    Args:
        story: which waits for it.
        endpoint: where to.
        is_forbidden: addresses that are left out.
        options: what is set before connecting, each as for setsockopt(2): level, name and value.
        bind: called with each socket then, to give it an address.

    Raises:
        DialError: nobody could be reached.
        OSError: there is no descriptor left, an option can't be set, or the like.
        Whatever `bind` raises.
    """
    addresses = await resolve(story, endpoint)
    if is_forbidden is not None:
        allowed = [each for each in addresses if not is_forbidden(ipaddress.ip_address(each[1][0]))]
        if addresses and not allowed:
            detail = f"{endpoint.host} is {addresses[0][1][0]}"
            raise DialError(DialReason.FORBIDDEN, detail)
        addresses = allowed
    return await _dial_in_turn(story, addresses, endpoint, options, bind)


async def dial_unix(story: Story, path: str) -> socket:
    """Return a non-blocking socket that is connected to a Unix socket.

    Raises:
        DialError: nobody listens there.
    """
    sock = socket(std.AF_UNIX, std.SOCK_STREAM | std.SOCK_NONBLOCK | std.SOCK_CLOEXEC)
    try:
        # While its backlog is full; nothing tells when that has changed.
        while (number := sock.connect_ex(path)) == errno.EAGAIN:
            await story.sleep(_RETRY)
        if number:
            raise DialError(DialReason.REFUSED, f"{path}: {os.strerror(number)}")
    except OSError as error:  # the path is too long
        sock.close()
        raise DialError(DialReason.REFUSED, f"{path}: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _dial_in_turn(
    story: Story,
    addresses: Sequence[tuple[std.AddressFamily, tuple[str, int]]],
    endpoint: Endpoint,
    options: Sequence[tuple[int, int, int]],
    bind: Callable[[socket], None],
) -> socket:
    """Connect to whichever answers first; each has a quarter of a second before the next begins."""
    attempts: dict[socket, tuple[str, int]] = {}  # that are under way
    errors: list[int] = []
    connected = None
    try:
        for number, (family, address) in enumerate(addresses, 1):
            if (newest := _begin(family, address, options, bind, errors)) is None:
                continue
            attempts[newest] = address
            if number == len(addresses):
                break  # there is no other to make room for
            with story.time_limit(_ATTEMPT_EVERY):
                connected = await _first_connected(story, attempts, errors, newest)
            if connected is not None:
                return connected
        connected = await _first_connected(story, attempts, errors)
        if connected is not None:
            return connected
    finally:
        for sock in attempts:
            if sock is not connected:
                story.loop.close(sock)
    for number in EXHAUSTED.intersection(errors):
        raise OSError(number, os.strerror(number))
    refused = [number for number in errors if number in _REFUSED]
    reason = DialReason.REFUSED if refused else DialReason.UNREACHABLE
    number = [*refused, *errors, errno.EHOSTUNREACH][0]
    raise DialError(reason, f"{endpoint}: {os.strerror(number)}", number)


def _begin(
    family: std.AddressFamily,
    address: tuple[str, int],
    options: Sequence[tuple[int, int, int]],
    bind: Callable[[socket], None],
    errors: list[int],
) -> socket | None:
    """Begin to connect; if there is no socket to be had, its error number goes to the list.

    Raises:
        OSError: an option can't be set.
        Whatever `bind` raises.
    """
    try:
        sock = socket(family, std.SOCK_STREAM | std.SOCK_NONBLOCK | std.SOCK_CLOEXEC, 0)
    except OSError as error:
        errors.append(error.errno or errno.EMFILE)
        return None
    try:
        for option in (*CLIENT_OPTIONS, *options):  # a dead peer is noticed as a dead client is
            sock.setsockopt(*option)
        bind(sock)
    except OSError:
        # Without a mark the connection would be redirected to us; it must not begin.
        sock.close()
        raise
    number = sock.connect_ex(address)
    if number in _UNDER_WAY or number == 0:
        return sock
    sock.close()
    errors.append(number)
    return None


async def _first_connected(
    story: Story,
    attempts: dict[socket, tuple[str, int]],
    errors: list[int],
    newest: socket | None = None,
) -> socket | None:
    """Wait until one is connected, and return it; None if all have failed, or the newest has.

    Those that have failed are closed, and leave their error number.
    """
    while True:
        for sock, address in list(attempts.items()):
            # connect(2) says how it goes: once 0 where it was under way, or what went wrong.
            number = sock.connect_ex(address)
            if number in _CONNECTED:
                if not _is_its_own_peer(sock, address):
                    return sock
                number = errno.ECONNREFUSED
            if number not in _UNDER_WAY:
                del attempts[sock]
                story.loop.close(sock)
                errors.append(number)
        if not attempts or (newest is not None and newest not in attempts):
            return None
        await story.any_writable(list(attempts))


def _is_its_own_peer(sock: socket, address: tuple[str, int]) -> bool:
    """Tell whether a socket is connected to itself, since nobody else listens there.

    Where a port of this machine is one that the kernel hands out, it may hand out that very one for
    the connection, and RFC 9293 §3.5 has both ends of a connection open at once. It would say back
    what it hears, and keep the service from its port.
    """
    own = sock.getsockname()
    return bool(own[1] == address[1] and own == sock.getpeername())


def is_local(address: IPAddress) -> bool:
    """Tell whether it is an address of this machine or link, or none that one connects to."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
    )
