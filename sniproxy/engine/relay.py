"""Pairs of sockets, and the bytes that move between them: in both directions, in order, whole.

Everything that affects what a peer gets to see lives here. The laws:

- What one peer sends reaches the other unchanged, or the other sees a reset; but see below for the
  far end.
- The end of what one peer sends becomes the end of what the other receives, after all bytes
  before it. The opposite direction lives on.
- The far end may close with bytes unread, as servers do that close first. Its last words are
  delivered all the same, at the near end's pace, and then an end. What the near end still says is
  read and thrown away, so that no reset overtakes them.
- A near end that breaks off, with a reset, takes the far end along at once.
- A connection holds no more than `_CHUNK` bytes and a pipe for each direction, and when nothing is
  under way neither: what can't be sent is not read, so back-pressure reaches the sender.

Both sockets are watched edge-triggered: an event says only that something changed. So a direction
moves bytes until its source has none (a short read says so as well as EAGAIN does, epoll(7)), or
its sink takes none (it is `stalled` until EPOLLOUT), or it has had its turn. Reads are short at
urgent data, too, which TLS does not know and a stream of bytes can't carry: it is answered with a
reset.

There are two ways. Small traffic is copied through one buffer that all share: two calls for each
message. A source that fills the buffer again and again is spliced through a pipe instead, so that
the bytes never enter this process.
"""

import contextlib
import errno
import os
from _socket import SO_LINGER, SO_SNDBUF, socket
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import trio

from sniproxy.engine import tcp
from sniproxy.engine.ending import Ending
from sniproxy.engine.kernel import (
    AF_UNIX,
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    MSG_DONTWAIT,
    SHUT_WR,
    SOL_SOCKET,
)
from sniproxy.engine.linger import LastWords, Moved
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import Pipe, PipePool
from sniproxy.engine.sweep import Sweep, Swept
from sniproxy.engine.tcp import LINGER_0

READ_EVENTS: Final = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET
_ENDING: Final = EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR
_MORE_THAN_DATA: Final = EPOLLOUT | _ENDING
_GONE: Final = EPOLLPRI | EPOLLHUP | EPOLLERR

# The shared buffer: four full TLS records (16 KiB), two of the largest pieces that a Unix socket
# takes (32 KiB), and small enough to stay in the processor's cache between recv and send.
_CHUNK: Final = 1 << 16

# Bytes that a direction may move before the others have their turn: one full pipe, some 0.2 ms.
_TURN: Final = 1 << 20

# What is much, in one turn: half of what the buffer takes. Not all of it, for on loopback a TCP
# segment has 65,483 bytes, and one at a time may be waiting.
_BULK: Final = 1 << 15

# The credit of a direction. Each read in a turn that has moved much earns one, and a turn that has
# not loses all. With this many the next bytes are spliced: a pipe is worth its system calls only
# where much is waiting.
_SPLICE_CREDIT: Final = 2
# While it splices, a turn that moved less costs one. So a sender who pauses is spliced on, and one
# who has gone over to small messages is soon copied again.
_FULL_CREDIT: Final = _SPLICE_CREDIT + 4

# What a Unix socket that is spliced to may hold. It is given twice as much as is asked for,
# socket(7), so a full pipe, where net.core.wmem_max allows. It says that it is writable when three
# quarters are gone: with the 208 KiB that it has by default, both ends wait for each other in turn.
# A TCP socket finds its own measure.
_UNIX_SEND_BUFFER: Final = _TURN // 2

_SPLICE_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

# What splice(2) says where it is not to be had: these sockets can't, or a sandbox forbids it.
_NO_SPLICE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})

# To find a member of an Enum, Python 3.11 runs a function written in Python. Once is enough.
_FINISHED: Final = Ending.FINISHED
_NEAR_RESET: Final = Ending.NEAR_RESET
_FAR_RESET: Final = Ending.FAR_RESET

# Called when a connection has ended: bytes that went from the near end to the far one,
# bytes that went back, and how it ended.
OnEnd = Callable[[int, int, Ending], None]


class FlowState(NamedTuple):
    """Where one direction of a connection stands, for a process that goes on with it.

    Attributes:
        moved: Bytes that the sink has taken.
        swept: What that was when the connection was looked at the last time; -1 if it was not.
        quiet: Seconds for which nothing was moved then, as the upward direction counts them.
        credit: As it is.
        ended: Whether the source has said all.
        pending: What was read and not taken by the sink; or, if the far end reads no more, how it
            will have ended.
        piped: Bytes in a pipe.
        pipe: The two ends of that, if there are any.
    """

    moved: int
    swept: int
    quiet: float
    credit: int
    ended: bool
    pending: bytes | Ending | None
    piped: int
    pipe: tuple[int, int] | None


class Suspended:
    """A relayed connection that stands still, so that another process can go on with it.

    Nothing is asked of its sockets any more, and whatever happens to them is told to nobody.

    Args:
        flow: its upward direction.

    Attributes:
        near, far: The sockets.
        on_end: Whom its end is told to.
    """

    def __init__(self, flow: "_Flow") -> None:
        down = flow.back
        assert down is not None
        assert flow.on_end is not None
        self._up, self._down = flow, down
        self.near, self.far = flow.source, flow.sink
        self.on_end: OnEnd = flow.on_end
        for each in flow, down:
            if each.asked:
                # Before another process has the descriptors: closing them would not take them out
                # of the epoll set then.
                flow.relay.loop.unwatch(each.source.fileno())
            each.back = None  # a turn that has been asked for is none of theirs

    def states(self) -> tuple[FlowState, FlowState]:
        """Return where its directions stand, the upward one first."""
        return self._up.state(), self._down.state()

    def resume(self) -> None:
        """Go on."""
        up, down = self._up, self._down
        up.face(down)
        for each in up, down:
            each.stalled = each.piped > 0 or isinstance(each.pending, bytes)
        try:
            for each, other in (down, up), (up, down):
                each.asked = EPOLLOUT if other.stalled else 0
                # What holds is told at once: that there are bytes, or room for some, or an end.
                each.watch()
        except OSError:  # ENOMEM, ENOSPC
            up.abort()

    def close(self) -> None:
        """Close what another process has now, and tell nobody."""
        up, down = self._up, self._down
        for each in up, down:
            if each.pipe is not None:
                each.relay.pipes.scrap(each.pipe)
                each.pipe = None
            each.relay.loop.close(each.source)


class Relay:
    """All relayed connections of a process.

    Args:
        idle_seconds: after so many seconds without a byte a connection is reset; 0 is never.
        half_closed_seconds: the same for a connection one of whose directions has ended.
        on_fault: called with every exception that nobody expected.
    """

    def __init__(
        self,
        loop: EventLoop,
        pipes: PipePool,
        on_fault: Callable[[Exception], None],
        idle_seconds: float = 0.0,
        half_closed_seconds: float = 0.0,
    ) -> None:
        self.loop = loop
        self.pipes = pipes
        self.buffer = memoryview(bytearray(_CHUNK))
        self.can_splice = True
        self.last_words = LastWords(loop, on_fault, half_closed_seconds)
        self.sweep = Sweep(loop, on_fault, idle_seconds, half_closed_seconds)

    def join(
        self,
        near: socket,
        far: socket,
        on_end: OnEnd,
        near_events: int | None = None,
        first: bytes = b"",
        moved: int = 0,
    ) -> None:
        """Relay between two connected stream sockets until both directions have ended.

        The sockets belong to the relay from now on, whatever happens.

        Args:
            near: a TCP socket, likely to have something to say already.
            far: a Unix socket, not watched by the loop.
            on_end: called once, when both sockets have been given up, with the bytes that went
                there and those that came back, and how it ended.
            near_events: what has happened to `near` so far, if the loop watches it already, for
                `READ_EVENTS`. What was told to another watcher will not be told again.
            first: what the far end is to hear before what is in the near end's socket; far less
                than the send buffer of a socket holds.
            moved: bytes of the near end that the far end has had already, or that are in `first`.

        Raises:
            OSError: the kernel can't watch them (ENOMEM, ENOSPC); both are reset.
        """
        up = _Flow(self, near, far, on_end)
        down = _Flow(self, far, near, None)
        up.face(down)
        up.moved = moved
        try:
            # Before anything else: a far end that has just been woken finds it when it looks.
            if first:
                up.send_first(first, is_all=moved > 0 and near_events is None)
            elif near_events is None:
                up.pump()
            if near_events is not None and not up.is_over():
                self.loop.set_watcher(near.fileno(), up)
                up.asked = READ_EVENTS
                up.on_event(near_events)
            if not up.is_over():
                down.watch()
                if not up.asked & EPOLLIN:
                    up.watch()
        except BaseException:
            up.abort()
            raise

    def connections(self) -> list["_Flow"]:
        """Return those that can be suspended."""
        return [
            each
            for each in self.loop.watchers()
            if isinstance(each, _Flow) and each.on_end is not None and each.can_be_suspended()
        ]

    def adopt(
        self, near: socket, far: socket, on_end: OnEnd, states: tuple[FlowState, FlowState]
    ) -> Suspended:
        """Return a connection that another process has suspended, to be resumed here."""
        up = _Flow(self, near, far, on_end)
        down = _Flow(self, far, near, None)
        up.face(down)
        for flow, state in zip((up, down), states, strict=True):
            flow.moved, flow.swept, flow.ended = state.moved, state.swept, state.ended
            flow.quiet = round(state.quiet / self.sweep.pause)
            # What it has not earned here: the sockets are only fit for splice(2) where that began.
            flow.credit = min(state.credit, _SPLICE_CREDIT - 1)
            flow.pending, flow.piped = state.pending, state.piped
            if state.pipe is not None:
                flow.pipe = self.pipes.adopt(*state.pipe)
        return Suspended(up)

    async def run(self) -> None:
        """Look after connections on which nothing moves, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.last_words.run)
            nursery.start_soon(self.sweep.run)

    def moved(self) -> Iterator[Moved]:
        """Yield what each connection has moved so far: its `on_end`, and bytes there and back."""
        for watcher in self.loop.watchers():
            if isinstance(watcher, _Flow) and watcher.on_end is not None:
                back = watcher.back
                if back is not None:
                    yield watcher.on_end, watcher.moved, back.moved
        yield from self.last_words.moved()

    def abort_all(self) -> None:
        """Reset every connection."""
        for watcher in self.loop.watchers():
            if isinstance(watcher, _Flow):
                watcher.abort()
        self.last_words.abort_all()


class _Flow:
    """One direction: the bytes that `source` sends and `sink` receives.

    That from the near end is the one that knows `on_end`, and what concerns both. They are of one
    class all the same: for two, Python would have to find out at each step which of them it is.
    """

    __slots__ = (
        "asked",
        "back",
        "credit",
        "ended",
        "ending",
        "moved",
        "on_end",
        "pending",
        "pipe",
        "piped",
        "quiet",
        "relay",
        "sink",
        "source",
        "stalled",
        "swept",
    )

    def __init__(self, relay: Relay, source: socket, sink: socket, on_end: OnEnd | None) -> None:
        self.relay = relay
        self.source = source
        self.sink = sink
        self.on_end = on_end  # None if the source is the far end
        self.back: _Flow | None = None  # the opposite direction; None once it is all over
        self.moved = 0  # bytes that the sink has taken
        self.swept = -1  # what that was when it was looked at the last time
        self.quiet = 0  # sweeps in a row that found nothing moved in both directions
        self.credit = 0
        # Read, and not yet taken by the sink. Or, once the far end reads no more, how it will have
        # ended: from then on what the near end says is thrown away.
        self.pending: bytes | Ending | None = None
        self.pipe: Pipe | None = None
        self.piped = 0  # bytes in the pipe
        self.stalled = False  # the sink takes nothing until EPOLLOUT
        # What stands behind the last byte of the source: an end (EPOLLRDHUP); and it will not read
        # either (EPOLLHUP), or has an error (EPOLLERR), which may come up behind its last bytes.
        self.ending = 0
        self.ended = False  # the source has said all
        # What the loop is to tell of the source: EPOLLIN and so on, once it is watched, and
        # EPOLLOUT for `back`'s sake.
        self.asked = 0

    def face(self, back: "_Flow") -> None:
        """Make the two directions of a connection known to each other."""
        self.back, back.back = back, self

    def is_over(self) -> bool:
        """Tell whether both sockets have been given up."""
        return self.back is None

    def watch(self) -> None:
        """Have the loop tell what happens to the source, and what is there already."""
        # The same number for all: one made anew would be a tenth of an idle connection's memory.
        self.asked = self.asked | READ_EVENTS if self.asked else READ_EVENTS
        self.relay.loop.watch(self.source.fileno(), self, self.asked)

    def can_be_suspended(self) -> bool:
        """Tell whether all is set up, and nothing is over."""
        back = self.back
        return back is not None and bool(self.asked & back.asked & EPOLLIN)

    def state(self) -> FlowState:
        """Return where it stands."""
        pipe = None if self.pipe is None else (self.pipe.read_end, self.pipe.write_end)
        return FlowState(
            self.moved,
            self.swept,
            self.quiet * self.relay.sweep.pause,
            self.credit,
            self.ended,
            self.pending,
            self.piped,
            pipe,
        )

    def on_event(self, events: int) -> None:
        """React to what happened to the source; 0 is another turn."""
        if self.back is None or (events & _MORE_THAN_DATA and not self._note(events, self.back)):
            return
        if not (self.stalled or self.ended):
            self.pump()

    def _note(self, events: int, back: "_Flow") -> bool:
        """Take note of what an event says besides that there is data; return whether to go on."""
        if events & EPOLLOUT:
            if back.stalled:
                back.stalled = False
                back.pump()
            if self.back is None or events == EPOLLOUT:
                return False
        self.ending |= events & _ENDING
        if self.ending & _GONE:
            self._source_gone(back)
        return self.back is not None

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
                return self._source_failed()
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
                        return self._source_failed()
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
        pending = self.pending
        if not isinstance(pending, bytes):
            self._discard()
            return False
        try:
            sent = self.sink.send(pending, MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._sink_failed()
            return False
        self.moved += sent
        if sent < len(pending):
            self.pending = pending[sent:]
            self._stall()
            return False
        self.pending = None
        return True

    def _stall(self) -> None:
        back = self.back
        assert back is not None
        self.stalled = True
        if not back.asked & EPOLLOUT:
            # Asked for at the first stall only: a Unix socket tells with every read of its peer
            # that it is writable, and most connections never want to know.
            back.asked |= EPOLLOUT
            if back.asked & EPOLLIN:
                self.relay.loop.change(self.sink.fileno(), back.asked)
        if self.ending & EPOLLERR:
            self._source_gone(back)

    def return_pipe(self, pipe: Pipe) -> None:
        """Give the pipe back; bytes in it are lost."""
        if self.piped:
            self.relay.pipes.scrap(pipe)
            self.piped = 0
        else:
            self.relay.pipes.give(pipe)
        self.pipe = None

    def send_first(self, first: bytes, *, is_all: bool) -> None:
        """Send `first`, and what else the source has said so far, for the sink to wake up once.

        If that is not all, the loop tells when it is asked to watch the source.

        Args:
            first: as for `join`.
            is_all: whether there is nothing else that one would wait for.
        """
        self.pending = first
        if not is_all:
            try:
                self.pending = first + self.source.recv(_CHUNK, MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError:
                return self.abort(_NEAR_RESET)
        if self._send_pending() or self.stalled:
            self.moved -= len(first)

    # How it ends. The two ends differ: a client that breaks off wants no answer, and a backend that
    # does has often given one.

    def _source_gone(self, back: "_Flow") -> None:
        """React to `ending`: the source is gone, or about to be, and not only silent."""
        if self.ending & EPOLLPRI:
            self.abort(_FAR_RESET if self.on_end is None else _NEAR_RESET)
        elif self.on_end is None:
            if self.ending & EPOLLERR or back.pending is not None or back.piped:
                back.lose_sink(_FAR_RESET)
            elif not back.ended:
                back.lose_sink(_FINISHED)
        elif self.ending & EPOLLERR and (self.ended or self.stalled):
            # No read will bring the error up soon, and a reset is not to wait for the far end.
            self.abort(_NEAR_RESET)
        elif self.ended and self.ending & EPOLLHUP:
            self._finish()

    def _source_failed(self) -> None:
        """React to an error of the source, behind its last byte."""
        back = self.back
        assert back is not None
        if self.on_end is not None:
            return self.abort(_NEAR_RESET)
        # ECONNRESET: it has closed with bytes unread, unix(7).
        back.lose_sink(_FAR_RESET)
        if self.back is not None:
            self._end()

    def _sink_failed(self) -> None:
        """React to an error of the sink: it takes no more."""
        if self.on_end is None:
            self.abort(_NEAR_RESET)
        else:
            self.lose_sink(_FAR_RESET)

    def lose_sink(self, ending: Ending) -> None:
        """From now on throw away what the near end says, since the far end reads no more of it.

        Args:
            ending: how the connection will have ended, when the far end has said its last words.
        """
        if isinstance(self.pending, Ending):
            return  # that is known
        self.pending = ending
        if self.pipe is not None:
            self.return_pipe(self.pipe)
        self.stalled = False
        back = self.back
        assert back is not None
        if back.ended:
            self._finish()
        elif not self.ended:
            self._discard()

    def _discard(self) -> None:
        """Read what the near end says, and throw it away."""
        discarded = 0
        while discarded < _TURN:
            try:
                size = self.source.recv_into(self.relay.buffer, _CHUNK, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                return self.abort(_NEAR_RESET)
            if not size:
                self.ended = True
                return
            discarded += size
        self.relay.loop.call_soon(self)

    def _end(self) -> None:
        """Pass on the end of the source."""
        self.ended = True
        self.swept = -1  # an end is something that was moved
        back = self.back
        assert back is not None
        if back.ended or (self.on_end is not None and self.ending & EPOLLHUP):
            return self._finish()
        try:
            self.sink.shutdown(SHUT_WR)
        except OSError:  # ENOTCONN: reset meanwhile
            return self._sink_failed()
        if back.pending is not None and isinstance(back.pending, Ending):
            self._finish()

    def _finish(self) -> None:
        """End the connection: both directions have ended, or the far end is gone."""
        back = self.back
        assert back is not None
        up, down = (self, back) if self.on_end is not None else (back, self)
        if up.pending is None and down.pending is None and not down.piped:
            up.close(_FINISHED)
        elif isinstance(up.pending, Ending):
            up.deliver_last_words(down, up.pending)
        else:
            # The near end has gone away without reading what we hold for it.
            up.abort(_NEAR_RESET)

    def deliver_last_words(self, back: "_Flow", ending: Ending) -> None:
        """Close the far socket, and keep the near one until its peer has received all."""
        on_end, up, down = self.on_end, self.moved, back.moved
        assert on_end is not None
        self._give_up_far(back)
        # Once more does no harm, and where both ends had ended already nobody has done it.
        with contextlib.suppress(OSError):  # ENOTCONN: reset meanwhile
            self.source.shutdown(SHUT_WR)
        self.relay.last_words.add(
            self.source,
            lambda other: on_end(up, down, other or ending),
            (on_end, up, down),
            peer_has_ended=self.ended,
            final=ending,
        )

    def abort(self, ending: Ending = Ending.CUT) -> None:
        """Reset both peers, so that neither takes the cut for an end."""
        back = self.back
        if back is not None:
            for sock in (self.source, self.sink):
                # On a Unix socket this does nothing: such a peer sees an end, or ECONNRESET where
                # it left us something unread.
                sock.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            (self if self.on_end is not None else back).close(ending)

    def close(self, ending: Ending) -> None:
        """Close both sockets."""
        back, on_end = self.back, self.on_end
        assert back is not None
        assert on_end is not None
        self._give_up_far(back)
        self.relay.loop.close(self.source)
        on_end(self.moved, back.moved, ending)

    def _give_up_far(self, back: "_Flow") -> None:
        """Close the far socket, and give back what was needed to relay."""
        if self.pipe is not None:
            self.return_pipe(self.pipe)
        if back.pipe is not None:
            back.return_pipe(back.pipe)
        self.relay.loop.close(self.sink)
        # Without the cycle the memory is free at once, not when the collector comes round.
        self.back = back.back = None

    def sweep(self, pause: float, idle_seconds: float, half_closed_seconds: float) -> None:
        """End the connection if nothing was moved for too long; `pause` is since the last look."""
        back = self.back
        if back is None or self.on_end is None:  # the other direction speaks for both
            return
        if self.moved != self.swept or back.moved != back.swept:
            tcp.expect_answers(self.source, self.quiet * pause)
            self.swept, back.swept = self.moved, back.moved
            self.quiet = 0
            return
        self.quiet += 1
        seconds = self.quiet * pause
        is_half_closed = self.ended or back.ended or isinstance(self.pending, Ending)
        if is_half_closed and 0 < half_closed_seconds <= seconds:
            self.abort(Ending.HALF_CLOSED)
        elif 0 < idle_seconds <= seconds:
            self.abort(Ending.IDLE)
        elif back.moved:
            tcp.spare_slow_reader(self.source, seconds)


# Not by inheriting: where this is compiled, it could inherit only from what is compiled, too.
Swept.register(_Flow)
