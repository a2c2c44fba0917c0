"""Pairs of sockets, and the bytes that move between them: in both directions, in order, whole.

Everything that affects what a peer gets to see lives here. The laws:

- What one peer sends reaches the other unchanged, or the other sees a reset.
- The end of what one peer sends becomes the end of what the other receives, after all bytes
  before it. The opposite direction lives on.
- A connection holds no more than `_CHUNK` bytes and a pipe for each direction, and when nothing is
  under way neither: what can't be sent is not read, so back-pressure reaches the sender.

Both sockets are watched edge-triggered: an event says only that something changed. So a direction
moves bytes until its source has none (a short read says so as well as EAGAIN does, epoll(7)), or
its sink takes none (it is `stalled` until EPOLLOUT), or it has had its turn. Reads are short at
urgent data, too, which TLS does not know and a stream of bytes can't carry: it is answered with a
reset.

Two gears. Small traffic is copied through one buffer that all share: two calls for each message.
A source that fills the buffer again and again is spliced through a pipe instead, so that the bytes
never enter this process.
"""

import errno
import os
import struct
from _socket import AF_UNIX, MSG_DONTWAIT, SHUT_WR, SO_LINGER, SO_SNDBUF, SOL_SOCKET, socket
from collections.abc import Callable
from enum import StrEnum
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP

from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import Pipe, PipePool

READ_EVENTS = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET
_READ_WRITE_EVENTS = READ_EVENTS | EPOLLOUT
_ENDING = EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR
_MORE_THAN_DATA = EPOLLOUT | _ENDING

# The shared buffer: four full TLS records (16 KiB), two of the largest pieces that a Unix socket
# takes (32 KiB), and small enough to stay in the processor's cache between recv and send.
_CHUNK = 1 << 16

# Bytes that a direction may move before the others have their turn: one full pipe, some 0.2 ms.
_TURN = 1 << 20

# What is much, in one turn: half of what the buffer takes. Not all of it, for on loopback a TCP
# segment has 65,483 bytes, and one at a time may be waiting.
_BULK = 1 << 15

# The credit of a direction. Each read in a turn that has moved much earns one, and a turn that has
# not loses all; with this many the next bytes are spliced, for a pipe is worth its system calls
# only where much is waiting.
_SPLICE_CREDIT = 2
# In high gear a turn that moved less than that costs one, so that a sender who pauses for breath
# is not taken for a chat, while one who has gone over to chatting soon is.
_FULL_CREDIT = _SPLICE_CREDIT + 4

# What a Unix socket that is spliced to may hold. It is given twice as much as is asked for,
# socket(7), so a full pipe, where net.core.wmem_max allows. It says that it is writable when three
# quarters are gone: with the 208 KiB that it has by default, both ends wait for each other in turn.
# A TCP socket finds its own measure.
_UNIX_SEND_BUFFER = _TURN // 2

_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

# What splice(2) says where it is not to be had: these sockets can't, or a sandbox forbids it.
_NO_SPLICE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})

# struct linger {1, 0}: close(2) sends a reset and drops what was not sent, socket(7).
LINGER_0 = struct.pack("ii", 1, 0)


class Ending(StrEnum):
    """How a connection ended."""

    FINISHED = "finished"  # both ends had said all they had to say
    NEAR_RESET = "near_reset"  # the near end broke it off, or went away without reading all
    FAR_RESET = "far_reset"
    CUT = "cut"  # by us


# To find a member of an Enum, Python 3.11 runs a function written in Python. Once is enough.
_FINISHED, _NEAR_RESET, _FAR_RESET = Ending.FINISHED, Ending.NEAR_RESET, Ending.FAR_RESET

# What is told of a connection that has ended: bytes that went from the near end to the far one,
# bytes that went back, and how it ended.
OnEnd = Callable[[int, int, Ending], None]


class Relay:
    """All relayed connections of a process."""

    def __init__(self, loop: EventLoop, pipes: PipePool) -> None:
        self.loop = loop
        self.pipes = pipes
        self.buffer = memoryview(bytearray(_CHUNK))
        self.can_splice = True

    def join(
        self,
        near: socket,
        far: socket,
        on_end: OnEnd,
        near_events: int | None = None,
        first: bytes = b"",
    ) -> None:
        """Relay between two connected stream sockets until both directions have ended.

        The sockets belong to the relay from now on, whatever happens.

        Args:
            near: the socket that is likely to have something to say already.
            far: the other one, not watched by the loop.
            on_end: called once, when both sockets have been given up, with the bytes that went
                there and those that came back, and how it ended.
            near_events: what has happened to `near` so far, if the loop watches it already, for
                `READ_EVENTS`. What was told to another watcher will not be told again.
            first: what the far end is to hear before all that the near end says, and not counted;
                far less than the send buffer of a socket holds.

        Raises:
            OSError: the kernel can't watch them (ENOMEM, ENOSPC); both are reset.
        """
        up = _Flow(self, near, far, on_end, _NEAR_RESET)
        down = _Flow(self, far, near, on_end, _FAR_RESET)
        up.back, down.back = down, up
        try:
            # Before anything else: a far end that has just been woken finds it when it looks.
            if first:
                up.send_first(first)
            elif near_events is None:
                up.pump()
            if near_events is not None and up.back is not None:
                self.loop.set_watcher(near.fileno(), up)
                up.watched = True
                up.on_event(near_events)
            if up.back is not None:  # else it is over already
                down.watch()
                if not up.watched:
                    up.watch()
        except BaseException:
            up.abort()
            raise

    def abort_all(self) -> None:
        """Reset every connection."""
        for watcher in self.loop.watchers():
            if isinstance(watcher, _Flow):
                watcher.abort()


class _Flow:
    """One direction: the bytes that `source` sends and `sink` receives."""

    __slots__ = (
        "back",
        "credit",
        "ended",
        "ending",
        "moved",
        "on_end",
        "pending",
        "pipe",
        "piped",
        "relay",
        "reset_ending",
        "sink",
        "source",
        "stalled",
        "watched",
        "write_watched",
    )

    def __init__(
        self, relay: Relay, source: socket, sink: socket, on_end: OnEnd, reset_ending: Ending
    ) -> None:
        self.relay = relay
        self.source = source
        self.sink = sink
        self.on_end = on_end
        self.reset_ending = reset_ending  # how it has ended if the source breaks it off
        self.moved = 0  # bytes that the sink has taken
        self.back: _Flow | None = None  # the opposite direction; None once both sockets are closed
        self.credit = 0
        self.pending: bytes | None = None  # read, and not yet taken by the sink
        self.pipe: Pipe | None = None
        self.piped = 0  # bytes in the pipe
        self.stalled = False  # the sink takes nothing until EPOLLOUT
        # What stands behind the last byte of the source: an end (EPOLLRDHUP); and it will not read
        # either (EPOLLHUP), or has an error (EPOLLERR), which may come up behind its last bytes.
        self.ending = 0
        self.ended = False  # the end has been passed on
        self.watched = False  # the source is in the loop
        self.write_watched = False  # EPOLLOUT is asked for on the *source*, for `back`'s sake

    def watch(self) -> None:
        """Have the loop tell what happens to the source, and what is there already."""
        self.watched = True
        events = _READ_WRITE_EVENTS if self.write_watched else READ_EVENTS
        self.relay.loop.watch(self.source.fileno(), self, events)

    def on_event(self, events: int) -> None:
        """React to what happened to the source; 0 is another turn."""
        if self.back is None or (events & _MORE_THAN_DATA and not self._note(events, self.back)):
            return
        if not (self.stalled or self.ended):
            self.pump()

    def _note(self, events: int, back: "_Flow") -> bool:
        """Take in what an event says besides that there is data; return whether to go on."""
        if events & EPOLLOUT:
            if back.stalled:
                back.stalled = False
                back.pump()
            if self.back is None or events == EPOLLOUT:
                return False
        self.ending |= events & _ENDING
        if events & EPOLLPRI or (self.ending & EPOLLERR and (self.ended or self.stalled)):
            # No read will bring the error up soon, and it is not to wait.
            self.abort(self.reset_ending)
        elif self.ended and self.ending & EPOLLHUP:
            self._finish()
        return self.back is not None

    def abort(self, ending: Ending = Ending.CUT) -> None:
        """Reset both peers, so that neither takes the cut for an end."""
        if self.back is not None:
            for sock in (self.source, self.sink):
                # On a Unix socket this does nothing: such a peer sees an end, or ECONNRESET where
                # it left us something unread.
                sock.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            self._close(ending)

    def send_first(self, first: bytes) -> None:
        """Send `first` and what the source has said so far, for the sink to wake up once.

        If that is not all, the loop tells when it is asked to watch the source.
        """
        try:
            self.pending = first + self.source.recv(_CHUNK, MSG_DONTWAIT)
        except BlockingIOError:
            self.pending = first
        except OSError:
            return self.abort(self.reset_ending)
        if self._send_pending() or self.pending:
            self.moved -= len(first)

    def pump(self) -> None:
        """Move bytes until the source has none, the sink takes none, or the turn is over."""
        if self.pending is not None and not self._send_pending():
            return
        if self.piped or (self.credit >= _SPLICE_CREDIT and self.relay.can_splice):
            pipe = self.pipe or self.relay.pipes.take()
            if pipe is not None:
                return self._pump_spliced(pipe)
        buffer = self.relay.buffer
        moved = 0
        while True:
            try:
                size = self.source.recv_into(buffer, _CHUNK, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                return self.abort(self.reset_ending)
            if not size:
                return self._end()
            try:
                sent = self.sink.send(buffer[:size], MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self._sink_failed()
            self.moved += sent
            if sent < size:
                self.pending = bytes(buffer[sent:size])
                return self._stall()
            moved += size
            if moved < _BULK:
                self.credit = 0
            else:
                self.credit += 1
                if self.credit == _SPLICE_CREDIT and self.relay.can_splice:
                    return self._start_splicing()
            if size < _CHUNK and not self.ending:
                return
            if moved >= _TURN:
                return self.relay.loop.call_soon(self)

    def _start_splicing(self) -> None:
        # splice(2) has no MSG_DONTWAIT for the socket's side.
        self.source.setblocking(False)
        self.sink.setblocking(False)
        if self.sink.family == AF_UNIX:
            self.sink.setsockopt(SOL_SOCKET, SO_SNDBUF, _UNIX_SEND_BUFFER)
        self.relay.loop.call_soon(self)

    def _pump_spliced(self, pipe: Pipe) -> None:
        self.pipe = pipe
        source, sink = self.source.fileno(), self.sink.fileno()
        moved = 0
        while True:
            if not self.piped:
                if moved >= _TURN:
                    self.relay.loop.call_soon(self)
                    break
                try:
                    self.piped = os.splice(source, pipe.write_end, _TURN, flags=_SPLICE_FLAGS)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno not in _NO_SPLICE:
                        return self.abort(self.reset_ending)
                    self.relay.can_splice = False
                    self.relay.loop.call_soon(self)
                    break
                if not self.piped:
                    self.return_pipe(pipe)
                    return self._end()
            try:
                sent = os.splice(pipe.read_end, sink, self.piped, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                return self._stall()
            except OSError as error:
                if error.errno not in _NO_SPLICE:
                    return self._sink_failed()
                self.relay.can_splice = False
                self.pending = os.read(pipe.read_end, self.piped)
                self.piped = 0
                self.relay.loop.call_soon(self)
                break
            self.piped -= sent
            self.moved += sent
            moved += sent
        self.return_pipe(pipe)
        self.credit = _FULL_CREDIT if moved >= _BULK else self.credit - 1

    def _send_pending(self) -> bool:
        """Send what was read and not taken; return whether all of it went."""
        assert self.pending is not None
        try:
            sent = self.sink.send(self.pending, MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._sink_failed()
            return False
        self.moved += sent
        if sent < len(self.pending):
            self.pending = self.pending[sent:]
            self._stall()
            return False
        self.pending = None
        return True

    def _stall(self) -> None:
        back = self.back
        assert back is not None
        if self.ending & EPOLLERR:
            # The source was reset, and that is not to wait for the sink.
            return self.abort(self.reset_ending)
        self.stalled = True
        if not back.write_watched:
            # Asked for at the first stall only: a Unix socket tells with every read of its peer
            # that it is writable, and most connections never want to know.
            back.write_watched = True
            if back.watched:
                self.relay.loop.change(self.sink.fileno(), _READ_WRITE_EVENTS)

    def _end(self) -> None:
        """Pass on the end of the source."""
        self.ended = True
        back = self.back
        assert back is not None
        if back.ended or self.ending & EPOLLHUP:
            return self._finish()
        try:
            self.sink.shutdown(SHUT_WR)
        except OSError:  # ENOTCONN: reset meanwhile
            self.abort(back.reset_ending)

    def _finish(self) -> None:
        """Close both sockets: all that was sent has arrived."""
        back = self.back
        assert back is not None
        if back.pending is not None or back.piped:
            # The source has gone away without reading what we hold for it.
            self.abort(self.reset_ending)
        else:
            self._close(_FINISHED)

    def _sink_failed(self) -> None:
        """Tear down: the sink takes no more, and what was meant for it is lost."""
        # It may have spoken before it went: one that refuses an upload says why in its last words.
        # What can be passed on at once is.
        self.stalled = True
        self.pending = b""  # whatever it was: something is lost
        back = self.back
        assert back is not None
        if not (back.stalled or back.ended):
            back.ending |= EPOLLRDHUP
            back.pump()
        self.abort(back.reset_ending)

    def return_pipe(self, pipe: Pipe) -> None:
        """Give the pipe back; bytes in it are lost."""
        if self.piped:
            self.relay.pipes.scrap(pipe)
        else:
            self.relay.pipes.give(pipe)
        self.pipe = None

    def _close(self, ending: Ending) -> None:
        back = self.back
        assert back is not None
        if self.pipe is not None:
            self.return_pipe(self.pipe)
        if back.pipe is not None:
            back.return_pipe(back.pipe)
        self.relay.loop.close(self.source)
        self.relay.loop.close(self.sink)
        # Without the cycle the memory is free at once, not when the collector comes round.
        self.back = back.back = None
        up, down = (self, back) if self.reset_ending is _NEAR_RESET else (back, self)
        self.on_end(up.moved, down.moved, ending)
