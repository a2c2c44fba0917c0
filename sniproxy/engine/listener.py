"""The listening socket: taken over from whoever bound it, checked, and accepted from.

Others bind: a supervisor, inetd, `sniproxy-listen`. We find the socket on a descriptor, and before
anything else make sure of what it is, because the usual mistake is to start the program by hand in
a terminal.
"""

import contextlib
import errno
import os
import socket
import stat
import struct
import time
from _socket import socket as Socket  # noqa: N812 - the plain type; socket.socket costs twice as much
from collections.abc import Callable
from select import EPOLLEXCLUSIVE, EPOLLIN
from typing import Final

import trio

from sniproxy.engine import tcp
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop

# What accept(2) says of a peer. Of one on a Unix socket it says nothing of use.
Address = tuple[str, int] | tuple[str, int, int, int]

# Multipath TCP, RFC 8684; linux/in.h. systemd.socket(5) has SocketProtocol=mptcp.
_IPPROTO_MPTCP: Final = 262

# Connections accepted before those that are being served have their turn: the cost of some fifty
# round trips through the relay.
_BATCH: Final = 32

# Of several processes that wait for the same socket one is woken, not all.
_EVENTS: Final = EPOLLIN | EPOLLEXCLUSIVE

# At the end the queue is emptied. It holds no more than net.core.somaxconn, 4096 by default; the
# bound is for clients who come faster than we accept.
_LAST_BATCH: Final = 4096

# What accept(2) says of the one connection that was next; it is to be tried again at once.
_ONE_IS_LOST: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,  # a firewall rule
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)

# Everything else, EMFILE, ENFILE, ENOBUFS and ENOMEM above all, will be the same the next moment,
# while the listener stays readable: to ask again at once would spin. Seconds until we do: long
# enough to cost nothing, too short to be noticed as an outage.
_PAUSE: Final = 0.1

# Seconds between two looks at O_NONBLOCK, if clients come; and until then what accept may wait for
# one who is not there: struct timeval, a microsecond, which the kernel rounds up to its next tick.
_NONBLOCK_CHECK_EVERY: Final = 1.0
_SHORTEST: Final = struct.pack("@ll", 0, 1)

# Keep-alive. A client that vanished, a phone that lost its network, is noticed after 60 + 6 x 10
# seconds without an answer. Most home routers and mobile networks forget a silent connection after
# some minutes; one probe a minute also keeps it alive there. One that vanishes amid a download is
# noticed after tcp.USER_TIMEOUT.
CLIENT_OPTIONS: tuple[tuple[int, int, int], ...] = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, tcp.USER_TIMEOUT),
)

# What the kernel says of an option of TCP that it does not have for Multipath TCP.
_NOT_FOR_MPTCP: Final = frozenset({errno.EOPNOTSUPP, errno.ENOPROTOOPT})


class NotListeningError(Exception):
    """The descriptor is no listening TCP socket; the message says what it is instead."""


def take_listening_socket(fd: int, *, may_be_unix: bool = False) -> Socket:
    """Return the listening TCP socket, or Unix socket if that may be, that `fd` refers to.

    The result has a descriptor of its own, non-blocking and close-on-exec; `fd` stays as it is.
    Accepted sockets inherit what is set on a listening one, tcp(7): no delay, keep-alive, and the
    time that bytes may stay unacknowledged.

    Raises:
        NotListeningError: it is something else.
        OSError: a system call failed.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        if error.errno == errno.EBADF:
            raise NotListeningError("it is closed") from None
        raise
    if not stat.S_ISSOCK(mode):
        raise NotListeningError(f"it is {_kind_of_file(fd, mode)}")
    listener = Socket(fileno=os.dup(fd))  # which is close-on-exec, unlike dup(2)'s
    try:
        if kind := _kind_of_socket(listener, may_be_unix=may_be_unix):
            raise NotListeningError(f"it is {kind}")
        # O_NONBLOCK is shared with the other holders of the socket. They need it as we do: a
        # connection that epoll announced may be gone by the time of accept, taken by another copy.
        listener.setblocking(False)
        # And another holder may take it away: systemd does, for each service that it starts on the
        # socket. Then accept waits, but not for long.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SHORTEST)
        _set_client_options(listener)
    except BaseException:
        listener.close()
        raise
    return listener


def _kind_of_file(fd: int, mode: int) -> str:
    if os.isatty(fd):
        return "a terminal"
    for test, kind in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
    ):
        if test(mode):
            return kind
    return "not a socket"


def _set_client_options(listener: Socket) -> list[tuple[int, int, int]]:
    """Set what clients are to inherit; return what this kernel does not have for Multipath TCP.

    That is TCP_USER_TIMEOUT, as of Linux 6.18, and before 6.10 the times of keep-alive, too.

    Raises:
        OSError: a system call failed.
    """
    if listener.family == socket.AF_UNIX:
        return []
    missing = []
    for option in CLIENT_OPTIONS:
        try:
            listener.setsockopt(*option)
        except OSError as error:
            if error.errno not in _NOT_FOR_MPTCP or not is_multipath(listener):
                raise
            missing.append(option)
    return missing


def is_multipath(sock: Socket) -> bool:
    """Tell whether it is a socket of Multipath TCP."""
    return _protocol(sock) == _IPPROTO_MPTCP


def _protocol(sock: Socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)


def _kind_of_socket(sock: Socket, *, may_be_unix: bool) -> str | None:
    """Say what `sock` is, if it is no listening socket of a kind that may be."""
    is_unix = sock.family == socket.AF_UNIX
    if is_unix and not (may_be_unix and sock.type == socket.SOCK_STREAM):
        return "a Unix socket"
    if sock.type == socket.SOCK_DGRAM:
        return "a UDP socket"
    is_ip = sock.family in (socket.AF_INET, socket.AF_INET6)
    is_tcp = is_ip and _protocol(sock) in (socket.IPPROTO_TCP, _IPPROTO_MPTCP)
    if not (is_tcp or is_unix):
        return "not a TCP socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return f"a {'Unix' if is_unix else 'TCP'} socket that does not listen"
    return None


class Listener:
    """Accepts from a listening socket whenever the loop says that someone is waiting.

    Args:
        sock: as `take_listening_socket` returns it; owned from now on.
        limit: the open connections; `on_accept` counts them in.
        on_accept: called with every accepted socket, in blocking mode, and its peer's address.
        on_full: called when somebody waits at the door and there is no room; returns whether it
            made some. If not, accepting pauses until a connection ends.
        on_exhausted: called with the reason when the machine has nothing left for one more, once
            until it has again. Then, too, `on_full` is asked to help.
        has_timeouts: whether `sock` has those that accepted sockets inherit. If not, it is made
            sure each time that accept does not wait.
    """

    def __init__(
        self,
        loop: EventLoop,
        sock: Socket,
        limit: ConnectionLimit,
        on_accept: Callable[[Socket, Address], None],
        on_full: Callable[[], bool],
        on_exhausted: Callable[[OSError], None],
        *,
        has_timeouts: bool = True,
    ) -> None:
        self._loop = loop
        self._socket: Socket | None = sock
        self._family = sock.family
        # Who does not speak Multipath TCP is a plain TCP client, and has all options.
        self._has_timeouts = has_timeouts
        self._not_inherited = _set_client_options(sock) if has_timeouts else []
        self._limit = limit
        self._on_accept = on_accept
        self._on_full = on_full
        self._on_exhausted = on_exhausted
        self._watched = False
        self._is_held = False
        self._exhausted = False
        self._next_check = 0.0
        self._pause = trio.Event()

    def on_event(self, events: int) -> None:
        """Accept a batch, or make room for the next one."""
        limit = self._limit
        if limit.open < limit.capacity:
            self._accept(_BATCH)
        elif not self._on_full():
            # Not told any more that somebody waits, as there is no use in it.
            self._unwatch()
            limit.wait_for_room(self._resume)
        # Else the next turn accepts, when those who made room have been closed.

    def abort(self) -> None:
        """Nothing: one connection went wrong, not the listener."""

    async def run(self) -> None:
        """Accept until closed or cancelled."""
        while self._socket is not None:
            self._resume()
            await self._pause.wait()
            self._pause = trio.Event()
            await trio.sleep(_PAUSE)

    def fileno(self) -> int:
        """Return the descriptor of the listening socket; -1 if it is closed."""
        return -1 if self._socket is None else self._socket.fileno()

    def hold(self) -> None:
        """Accept nobody until `unhold`; who comes waits in the queue."""
        self._is_held = True
        self._unwatch()

    def unhold(self) -> None:
        """Accept again."""
        self._is_held = False
        self._resume()

    def leave(self) -> None:
        """Close the socket, and leave who is in the queue to another process that holds it."""
        if self._socket is not None:
            self._unwatch()
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Accept what is in the queue, then close: from now on nobody is let in here.

        Another process that holds the same socket, a supervisor or the next copy, goes on with it.
        """
        if self._socket is not None:
            self._accept(_LAST_BATCH)
            self.leave()

    def _accept(self, batch: int) -> None:
        assert self._socket is not None
        # accept() of the plain type; typeshed has not heard of it.
        accept = self._socket._accept  # type: ignore[attr-defined]  # noqa: SLF001
        # Who has just left has not given the descriptors back yet. If that is all the room there
        # is, we are told once more when they have.
        room = self._limit.capacity - self._limit.open - self._loop.pending_closes
        if not self._has_timeouts:
            self._socket.setblocking(False)
        for _ in range(min(batch, room)):
            try:
                fd, address = accept()
            except BlockingIOError:
                now = time.monotonic()
                if now >= self._next_check:
                    # There is no telling whether it had to wait for that.
                    self._next_check = now + _NONBLOCK_CHECK_EVERY
                    self._socket.setblocking(False)
                return
            except OSError as error:
                if error.errno in _ONE_IS_LOST:
                    continue
                self._report(error)
                if not self._on_full():
                    self._unwatch()
                    self._pause.set()
                return
            self._exhausted = False
            client = Socket(self._family, socket.SOCK_STREAM, 0, fd)
            for option in self._not_inherited:
                with contextlib.suppress(OSError):  # it does speak Multipath TCP
                    client.setsockopt(*option)
            self._on_accept(client, address)

    def _report(self, error: OSError) -> None:
        if not self._exhausted:
            self._exhausted = True
            self._on_exhausted(error)

    def _resume(self) -> None:
        if self._socket is not None and not self._watched and not self._is_held:
            try:
                self._loop.watch(self._socket.fileno(), self, _EVENTS)
            except OSError as error:  # ENOMEM, ENOSPC
                self._report(error)
                self._pause.set()
            else:
                self._watched = True

    def _unwatch(self) -> None:
        if self._watched:
            assert self._socket is not None
            self._loop.unwatch(self._socket.fileno())
            self._watched = False
