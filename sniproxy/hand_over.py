"""A client's connection itself, given to a backend: the other way of serving one.

The hello has been looked at only, and is still in the socket. So a backend that gets the
descriptor, SCM_RIGHTS in unix(7), can serve the client as if it had accepted it: it sees the real
address, and no byte passes by here.

A socket can do more than carry bytes. connect(2) frees it from its peer, and then it can connect
elsewhere or listen, in the network of whoever made the listening socket, where the backend may have
no way to. So it gets a filter, SO_ATTACH_FILTER in socket(7), that lets in only what is for our
port, and no answer to a connect, and that can't be taken away. Accepted sockets inherit it; to make
one for each would cost as much as all the rest of handing over. Newer kernels want CAP_NET_ADMIN
for that; who has it not does without.

Nor is the backend to hold us up. It has the same socket as we for a moment, and can set SO_LINGER:
if it has closed the socket before we do, our close(2) waits for the client, who may be its friend.
A signal ends the wait, and such a backend gets nothing more for a while.
"""

import array
import ctypes
import errno
import signal
import struct
import time
from _socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_TCP,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SO_LINGER,
    SO_RCVTIMEO,
    SOL_SOCKET,
    TCP_USER_TIMEOUT,
    inet_pton,
    socket,
)
from collections.abc import Iterable
from typing import Final

from sniproxy.engine.loop import Closable
from sniproxy.service import libc
from sniproxy.service.bpf import SO_ATTACH_FILTER, SO_LOCK_FILTER, Instruction, Program
from sniproxy.service.signals import do_nothing

# asm-generic/socket.h: it is the same number.
_SO_GET_FILTER: Final = SO_ATTACH_FILTER

# Instructions: load four bytes, two or one, keep some bits, compare, return.
_LOAD_FOUR, _LOAD_TWO, _LOAD_ONE = 0x20, 0x28, 0x30
_AND: Final = 0x54
_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_WHOLE, _NOTHING = 0xFFFFFFFF, 0

# RFC 9293 §3.1: where a segment has its destination port, and its flags; SYN and ACK of these.
_DESTINATION_PORT, _FLAGS = 2, 13
_SYN_ACK: Final = 0x12

# Where the destination address is, from the beginning of the header of IP: SKF_NET_OFF in
# linux/filter.h, and RFC 791 §3.1 and RFC 8200 §3.
_NETWORK: Final = 0xFFF00000
_DESTINATION: Final = {AF_INET: _NETWORK + 16, AF_INET6: _NETWORK + 24}

# With no byte at all a message on a stream carries nothing, unix(7). What it is says nothing.
_DATA: Final = [b"\0"]

# Seconds after which a close(2) that waits is interrupted: a hundred times what it takes else.
_LONGEST_CLOSE: Final = 0.001

# Seconds for which the hosts of somebody who makes us wait get no client. So that takes a
# ten-thousandth of our time.
_PENALTY: Final = 10.0

# struct linger: not zero if it is on, and seconds.
_LINGER: Final = struct.Struct("ii")

# struct timeval: what accept(2) gives a socket whose listener has none, socket(7).
_NO_TIMEOUT: Final = struct.pack("@ll", 0, 0)


class HandOver:
    """Gives clients of one listening socket to backends.

    Args:
        listening: a listening socket of plain TCP. It keeps the filter, which does it no harm.

    Attributes:
        is_guarded: Whether what is given away can do no more than carry bytes.

    Raises:
        OSError: the filter can't be set, though we may; or there is no timer. ENOSYS: the service
            manager's filter of system calls has no setitimer(2).
    """

    def __init__(self, listening: socket) -> None:
        self._program = Program.of(_filter(listening))
        self._size = len(self._program.code())
        try:
            self._program.attach(listening)
        except PermissionError:
            # A copy before us may have had the right.
            self.is_guarded = self._is_attached(listening)
        else:
            self.is_guarded = True
        self._fd = array.array("i", [-1])
        self._rights = [(SOL_SOCKET, SCM_RIGHTS, self._fd)]
        self._suspects: dict[int, float] = {}
        self._penalties: dict[int, float] = {}
        # Else all clients would inherit them, and have to be rid of them: to read waits no longer
        # than a moment, and bytes may not stay unacknowledged for two minutes, which is wrong for a
        # reader who pauses; see `tcp.spare_slow_reader`.
        listening.setsockopt(SOL_SOCKET, SO_RCVTIMEO, _NO_TIMEOUT)
        listening.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, 0)
        # That of the process: a signal that is ignored interrupts nothing.
        signal.signal(signal.SIGALRM, do_nothing)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def give(self, client: socket, backend: socket, owner: int) -> OSError | None:
        """Give the backend the client's socket, as accept(2) would have made it for the backend.

        It has keep-alive, and small pieces are sent at once.

        Args:
            client: in blocking mode, with its usual low-water mark; it stays open here.
            backend: just connected; it stays open, too.
            owner: the uid of the backend's directory.

        Returns:
            None; or why the backend could not get it. Then the client can be relayed as any other.
            EPIPE: the backend has closed. ETOOMANYREFS: too many descriptors are on their way to
            backends that do not accept.
        """
        if self._penalties and self._has_penalty(owner):
            return OSError(errno.EPERM, "a backend of the same owner has used SO_LINGER against us")
        self._fd[0] = client.fileno()
        try:
            if self.is_guarded:
                # Who was in the queue before the listening socket had the filter has none.
                if not client.getsockopt(SOL_SOCKET, _SO_GET_FILTER, self._size):
                    self._program.attach(client)
                client.setsockopt(SOL_SOCKET, SO_LOCK_FILTER, 1)
            backend.sendmsg(_DATA, self._rights, MSG_DONTWAIT | MSG_NOSIGNAL)
        except OSError as error:
            return error
        return None

    @staticmethod
    def close_each(socks: Iterable[Closable]) -> None:
        """Close them, those that were given away among them; none makes that wait for long."""
        # Again and again: a signal may come before the wait.
        signal.setitimer(signal.ITIMER_REAL, _LONGEST_CLOSE, _LONGEST_CLOSE)
        for sock in socks:
            sock.close()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def kept(self, client: socket, owner: int) -> "Kept":
        """Return what `close_each` is to close now in the place of a client that was given away."""
        return Kept(client, owner, self._suspects, self._penalties)

    def _has_penalty(self, owner: int) -> bool:
        now = time.monotonic()
        for each in [each for each, until in self._penalties.items() if until <= now]:
            del self._penalties[each]
        return owner in self._penalties

    def _is_attached(self, sock: socket) -> bool:
        """Tell whether a socket has just this filter."""
        found = ctypes.create_string_buffer(self._size)
        # In and out it is a number of instructions.
        length = ctypes.c_uint32(self._program.length)
        try:
            fixed = sock.fileno(), SOL_SOCKET, _SO_GET_FILTER
            libc.call("getsockopt", *fixed, found, ctypes.byref(length))
        except OSError:  # it has a longer one
            return False
        return found.raw == self._program.code() and length.value == self._program.length


class Kept:
    """Our descriptor of a socket that a backend has, too. Nothing but to close it may wait."""

    __slots__ = ("_client", "_owner", "_penalties", "_suspects")

    def __init__(
        self,
        client: socket,
        owner: int,
        suspects: dict[int, float],
        penalties: dict[int, float],
    ) -> None:
        self._client = client
        self._owner = owner
        self._suspects = suspects
        self._penalties = penalties

    def fileno(self) -> int:
        """Return its number."""
        return self._client.fileno()

    def close(self) -> None:
        """Close it, and take note if the backend makes that wait."""
        owner = self._owner
        began = time.monotonic()
        # Both have to be seen: a close takes long as well where the processor is taken away, and
        # honest backends have SO_LINGER, too. It is asked for where a close has taken long before.
        lingers = False
        if self._suspects and self._suspects.get(owner, 0.0) > began:
            option = self._client.getsockopt(SOL_SOCKET, SO_LINGER, _LINGER.size)
            lingers = all(_LINGER.unpack(option))
        self._client.close()
        # Half, for a signal comes sometime in that time.
        if time.monotonic() - began >= _LONGEST_CLOSE / 2:
            self._suspects[owner] = began + _PENALTY
            if lingers:
                self._penalties[owner] = began + _PENALTY


def _filter(listening: socket) -> list[Instruction]:
    """Return what lets a segment in that is for where we listen, unless it answers a connect."""
    host, port = listening.getsockname()[:2]
    family = listening.family
    address = inet_pton(family, host.partition("%")[0])
    wanted = [(_LOAD_TWO, _DESTINATION_PORT, port)]
    if any(address):  # else it is any of ours, and nobody else gets that port for another one
        words = struct.unpack(f"!{len(address) // 4}I", address)
        start = _DESTINATION[family]
        wanted += [(_LOAD_FOUR, start + 4 * number, word) for number, word in enumerate(words)]
    last: list[Instruction] = [
        (_LOAD_ONE, 0, 0, _FLAGS),
        (_AND, 0, 0, _SYN_ACK),
        (_IF_EQUAL, 1, 0, _SYN_ACK),
        (_RETURN, 0, 0, _WHOLE),
        (_RETURN, 0, 0, _NOTHING),
    ]
    instructions: list[Instruction] = []
    for left, (load, offset, value) in zip(range(len(wanted), 0, -1), wanted, strict=True):
        to_nothing = 2 * (left - 1) + len(last) - 1
        instructions += [(load, 0, 0, offset), (_IF_EQUAL, 0, to_nothing, value)]
    return instructions + last
