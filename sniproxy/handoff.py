"""For backends in Python: accept the clients that sniproxy hands over.

    listener = handoff.listen("/srv/hosts/two.example/handoff-socket")
    client, address = listener.accept()

The client is an ordinary TCP socket, and its ClientHello has not been read yet. What is sent, and
how servers use this, is in docs/handing-over.md. This file needs nothing but Python, on Linux, and
nothing else of sniproxy: it may be copied.
"""

import contextlib
import errno
import os
import select
import socket
import stat
import struct
import time
from array import array
from collections import OrderedDict
from typing import Any

__all__ = ["Listener", "listen"]

# As many descriptors as one message carries, SCM_MAX_FD in unix(7). So there is room, too, for the
# credentials that come in front of one if SO_PASSCRED is set, by PassCredentials= in a unit; and if
# it does not come, there was no place for it in this process.
_ROOM = socket.CMSG_SPACE(253 * array("i").itemsize)

# Connections whose message has not come yet. The daemon's comes within a moment, so more than a few
# are of somebody else, and the oldest one goes.
_MOST_SILENT = 64

# What does not wait gives up after so many that were no client, and is told again that somebody is
# there. So nobody can keep a loop from its other work.
_MOST_AT_ONCE = 64

_NO_LINGER = struct.pack("@ii", 0, 0)


class Listener(socket.socket):
    """A listening Unix socket; clients that are handed over there are accepted from it.

    It is used as a listening TCP socket is. Two things differ:

    - `fileno()` is of an epoll(7) instance, which is readable when `accept` has something to do:
      the message with the client may come after the connection. It is there to be waited for.
    - After fork(2) each process that accepts needs a listener of its own: see `dup`.

    What others send is dropped, and keeps nobody waiting.

    Args:
        fileno: A listening Unix stream socket, as systemd passes it from descriptor 3 on; owned
            from now on, non-blocking and close-on-exec.

    Raises:
        ValueError: It is none. It stays open, as it does with OSError.
        OSError: A system call failed.
    """

    def __init__(self, fileno: int) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno)
        try:
            options = socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_ACCEPTCONN
            found = [self.getsockopt(socket.SOL_SOCKET, option) for option in options]
            if found != [socket.AF_UNIX, socket.SOCK_STREAM, 1]:
                raise ValueError(f"descriptor {fileno} is no listening Unix stream socket")
            self._timeout = socket.getdefaulttimeout()
            # By descriptor, the oldest first. All that are here are registered.
            self._silent: OrderedDict[int, socket.socket] = OrderedDict()
            self._epoll = select.epoll()
            self._epoll.register(fileno, select.EPOLLIN)
            os.set_inheritable(fileno, False)
            # Whatever the timeout is: another process that holds it, too, may be the first to take
            # a connection that epoll announced.
            super().setblocking(False)
        except BaseException:
            super().detach()
            raise

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next client that is handed over.

        Returns:
            Its TCP socket, with the default timeout and not inheritable, and its address, as
            getpeername(2) has it: of IPv4, ("192.0.2.7", 55724).

        Raises:
            BlockingIOError: There is none now, and this listener does not wait.
            TimeoutError: There was none in time.
            OSError: A system call failed, as with any socket: EMFILE, for example. The client
                whose turn it was is kept.
        """
        timeout = self._timeout
        ends = None if timeout is None else time.monotonic() + timeout
        turn = 0
        while True:
            turn += 1
            door = super().fileno()
            if door < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            left = None if ends is None else max(0.0, ends - time.monotonic())
            # One at a time: the next one is another, if several are ready.
            ready = self._epoll.poll(left, 1)
            if ready and (accepted := self._hear(*ready[0], door)):
                return accepted
            if left == 0 and (not ready or turn >= _MOST_AT_ONCE):
                if timeout == 0:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                raise TimeoutError("timed out")

    def _hear(self, descriptor: int, events: int, door: int) -> tuple[socket.socket, Any] | None:
        """Let in a connection, or one that was silent have its say; return the client, if any."""
        if descriptor == door:
            try:
                peer, _ = super().accept()
            except BlockingIOError:
                if events & select.EPOLLHUP:  # after shutdown(2), what accept(2) says if it waits
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
                return None
            peer.setblocking(False)
        else:
            waits = self._silent.pop(descriptor, None)
            if waits is None:  # it is another thread's
                return None
            peer = waits
            # By hand: it would stay if another process held the connection, too.
            self._epoll.unregister(descriptor)
        try:
            descriptors = _peek(peer)
        except BlockingIOError:
            self._wait_for(peer)
            return None
        except OSError:
            self._wait_for(peer)
            raise
        # What lies there, unread, goes with the connection.
        peer.close()
        return _client(descriptors)

    def _wait_for(self, peer: socket.socket) -> None:
        self._epoll.register(peer, select.EPOLLIN)
        self._silent[peer.fileno()] = peer
        while len(self._silent) > _MOST_SILENT:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        descriptor, peer = self._silent.popitem(last=False)
        self._epoll.unregister(descriptor)
        peer.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to accept; -1 if closed.

        It is good for nothing else; `dup` and `detach` are for the socket.
        """
        return self._epoll.fileno() if super().fileno() >= 0 else -1

    def dup(self) -> "Listener":
        """Return another listener on the same socket: for another process, after fork(2).

        Clients come to the one or to the other.
        """
        descriptor = os.dup(super().fileno())
        try:
            return Listener(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Close it; the path stays. Who is in its queue, or has not spoken yet, is not served."""
        super().close()
        self._let_go()

    def detach(self) -> int:
        """Close it, but for the descriptor of the Unix socket, and return that."""
        descriptor = super().detach()
        self._let_go()
        return descriptor

    def _let_go(self) -> None:
        while self._silent:
            self._forget_oldest()
        self._epoll.close()

    # What is below has a timeout of its own: it never waits.

    def settimeout(self, value: float | None) -> None:
        """Set for how many seconds `accept` waits; None: for ever."""
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = None if value is None else float(value)

    def gettimeout(self) -> float | None:
        """Return for how many seconds `accept` waits; None: for ever."""
        return self._timeout

    @property
    def timeout(self) -> float | None:
        """For how many seconds `accept` waits; None: for ever."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """Set whether `accept` waits."""
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        """Return whether `accept` waits."""
        return self._timeout != 0


def listen(path: str | os.PathLike[str], *, backlog: int = 128, mode: int = 0o666) -> Listener:
    """Return a listener at `path`, which is `handoff-socket` in the directory of a host.

    A socket on which nobody listens any more is replaced.

    Args:
        path: Where it is to be.
        backlog: How many clients may wait to be accepted. 128 is what Python takes for sockets.
        mode: Of the new socket. The daemon needs to write. Who else may is best said by the
            directory. The umask(2) of the process, so of its other threads, differs meanwhile.

    Raises:
        OSError: A system call failed; EADDRINUSE: somebody listens there, or it is no socket.
    """
    where = os.fspath(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        # With its mode from the first moment, so not by chmod(2).
        umask = os.umask(~mode & 0o777)
        try:
            try:
                listening.bind(where)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_abandoned(where):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(where)
                listening.bind(where)
        finally:
            os.umask(umask)
        listening.listen(backlog)
        listener = Listener(listening.fileno())
        listening.detach()
    return listener


def _is_abandoned(path: str) -> bool:
    """Whether a Unix socket is there on which nobody listens."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        # EAGAIN, for one, means that the queue is full.
        return client.connect_ex(path) == errno.ECONNREFUSED


def _peek(peer: socket.socket) -> list[int]:
    """Return the descriptors of the message that a connection has brought, and leave it there.

    Raises:
        BlockingIOError: It is not there yet.
        OSError: EMFILE: this process has no place for them. They are not lost: try again.
    """
    # Bytes are there, or the end is: a message without bytes is none, unix(7).
    look = socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
    try:
        _, ancillary, flags, _ = peer.recvmsg(1, _ROOM, look)
    except ConnectionError:
        return []
    descriptors = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data)
    if flags & socket.MSG_CTRUNC and not descriptors:
        # If there is a place, it was kept from us for another reason, such as a security module.
        os.close(os.dup(peer.fileno()))
    return list(descriptors)


def _client(descriptors: list[int]) -> tuple[socket.socket, Any] | None:
    """Return the connected TCP socket that is alone there, and its peer's address, or close all."""
    sockets = [sock for descriptor in descriptors if (sock := _as_socket(descriptor))]
    if len(descriptors) == len(sockets) == 1:
        [client] = sockets
        is_ip = client.family in (socket.AF_INET, socket.AF_INET6)
        # ENOTCONN: it has been reset already, or was never connected.
        with contextlib.suppress(OSError):
            if is_ip and (client.type, client.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP):
                client.settimeout(socket.getdefaulttimeout())
                return client, client.getpeername()
    for sock in sockets:
        sock.close()
    return None


def _as_socket(descriptor: int) -> socket.socket | None:
    """Return it as a socket; close it if it is none."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return None
    # Else, for who has asked for it, close(2) waits until all has been sent, socket(7).
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    return sock
