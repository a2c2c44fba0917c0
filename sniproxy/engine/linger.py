"""Sockets that have had our last bytes and our end, kept until these have arrived.

To close a TCP socket with bytes unread, or to receive any afterwards, sends a reset (RFC 9293
§3.10.7.1 and RFC 2525 §2.17), and a reset can overtake what was sent before it. So what the peer
still says is read and thrown away until it ends, too, or has had time enough.
"""

from _socket import MSG_DONTWAIT, SO_LINGER, SOL_SOCKET, socket
from collections.abc import Callable, Iterator
from select import EPOLLERR, EPOLLET, EPOLLIN, EPOLLPRI, EPOLLRDHUP

import trio

from sniproxy.engine import tcp
from sniproxy.engine.deadlines import Deadlines
from sniproxy.engine.ending import Ending
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.tcp import LINGER_0

_EVENTS = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET

# Bytes read at a time, and bytes after which others have their turn.
_CHUNK = 1 << 16
_TURN = 1 << 20

# What a relayed connection has moved so far: whom its end is told to, as the relay has it, and the
# bytes of the two directions.
Moved = tuple[Callable[..., None], int, int]

# How many bytes were under way to a peer at the last look, and for how many seconds as many.
Progress = tuple[int, float]
_NO_PROGRESS: Progress = -1, 0.0  # nobody has looked

# All that is read here goes nowhere.
_buffer = bytearray(_CHUNK)

# Seconds between two looks at what a peer has acknowledged: nothing announces that.
_LOOK_EVERY = 0.25

# Seconds after the peer has acknowledged our end until the socket is closed, whatever the peer
# does. Its kernel has everything by then; but a reset makes some kernels throw away what the
# program has not read yet, so it gets a moment. nginx takes as long (lingering_timeout).
_AFTER_END = 5.0


class Linger:
    """One such socket. It belongs to this object from now on.

    Args:
        sock: a TCP socket whose sending half has been shut down.
        on_end: called once, when the socket has been given up.
        most: bytes that are read at the most; a peer that sends more is cut off. None: no limit.
        until_acknowledged: whether the socket stays open, after the end of the peer, for as long as
            the peer has not acknowledged all; who asks for that closes it then.

    Attributes:
        sock: the socket.
        peer_has_ended: whether the peer has said all that it had to say.
        ending: how it ended, if that was not by the peer's end or for lack of time.
        moved, final: what its connection has moved, and how that will have ended, for last words.
    """

    __slots__ = (
        "_is_over",
        "_left",
        "_loop",
        "_on_end",
        "ending",
        "final",
        "moved",
        "peer_has_ended",
        "sock",
        "until_acknowledged",
    )

    def __init__(
        self,
        loop: EventLoop,
        sock: socket,
        on_end: Callable[["Linger"], None],
        *,
        most: int | None = None,
        until_acknowledged: bool = False,
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._on_end = on_end
        self._left = most
        self.until_acknowledged = until_acknowledged
        self.peer_has_ended = False
        self.ending: Ending | None = None
        self.moved: Moved | None = None
        self.final = Ending.FINISHED
        self._is_over = False

    def start(self, *, is_watched: bool) -> None:
        """Throw away what is there, and have the loop tell of more.

        Args:
            is_watched: whether the loop watches the socket already, for reading.

        Raises:
            OSError: the kernel can't watch it (ENOMEM, ENOSPC); it is reset.
        """
        self._is_over = False
        if is_watched:
            self._loop.set_watcher(self.sock.fileno(), self)
            self.on_event(0)  # what was told to another watcher is not told again
        else:
            try:
                self._loop.watch(self.sock.fileno(), self, _EVENTS)
            except OSError:
                self.abort()
                raise

    def on_event(self, events: int) -> None:
        """Throw away what the peer has said."""
        if self._is_over or self.peer_has_ended:
            if events & EPOLLERR:
                self._close(Ending.NEAR_RESET)
            return
        size = 0
        while size < _TURN:
            try:
                received = self.sock.recv_into(_buffer, _CHUNK, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:  # ECONNRESET
                return self._close(Ending.NEAR_RESET)
            if not received:
                self.peer_has_ended = True
                if not self.until_acknowledged or not tcp.unacknowledged(self.sock):
                    self.close()
                return
            size += received
            if self._left is not None:
                self._left -= received
                if self._left <= 0:
                    return self.close()
        self._loop.call_soon(self)

    def expire(self) -> None:
        """Close the socket: the peer has had time enough."""
        # What is there is thrown away, so that the peer sees an end and no reset.
        self.on_event(0)
        self.close()

    def close(self) -> None:
        """Close the socket, if that has not been done."""
        self._close(None)

    def suspend(self) -> None:
        """Let it stand still until `start`."""
        self._is_over = True  # a turn that has been asked for is none of its
        self._loop.unwatch(self.sock.fileno())

    def let_go(self) -> None:
        """Close the socket, which was suspended, for another process has it; tell nobody."""
        self._loop.close(self.sock)

    def abort(self, ending: Ending = Ending.CUT) -> None:
        """Close the socket with a reset, if it has not been closed."""
        if not self._is_over:
            self.sock.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            self._close(ending)

    def _close(self, ending: Ending | None) -> None:
        if not self._is_over:
            self._is_over = True
            self.ending = ending
            self._loop.close(self.sock)
            self._on_end(self)


class LastWords:
    """Peers on their way to the end of what was said to them, each at its own pace.

    Args:
        on_fault: called with every exception that nobody expected.
        no_progress_seconds: how long a peer may leave what there is for it unread; 0 is for ever.

    Attributes:
        is_place_wanted: tells whether somebody waits for a place. While that is so, nobody who has
            received all stays.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_fault: Callable[[Exception], None],
        no_progress_seconds: float = 0.0,
    ) -> None:
        self._loop = loop
        self._on_fault = on_fault
        self._no_progress_seconds = no_progress_seconds
        # For whom bytes are under way: how many when they were looked at, and since when as many.
        self._sending: dict[Linger, tuple[int, float]] = {}
        self._added = trio.lowlevel.ParkingLot()
        self.is_place_wanted: Callable[[], bool] = lambda: False
        # Who has received all, and does not end.
        self._received: Deadlines[Linger] = Deadlines(_AFTER_END, on_fault)

    def add(
        self,
        sock: socket,
        on_end: Callable[[Ending | None], None],
        moved: Moved,
        *,
        peer_has_ended: bool,
        is_watched: bool = True,
        final: Ending = Ending.FINISHED,
        progress: Progress | None = _NO_PROGRESS,
    ) -> None:
        """Keep `sock` until the peer has received all.

        Args:
            sock: a TCP socket whose sending half has been shut down; owned from now on.
            on_end: called once, when it has been given up, with how it ended, if not as it should.
            moved: what its connection has moved.
            peer_has_ended: whether the end of what the peer says has been read.
            is_watched: whether the loop watches the socket already, for reading.
            final: how the connection will have ended, if the peer receives all.
            progress: what another process knew of that, as `suspend` has it.
        """

        def forget(linger: Linger) -> None:
            has_received = self._sending.pop(linger, None) is None
            self._received.discard(linger)
            on_end(None if has_received else linger.ending)

        linger = Linger(self._loop, sock, forget, until_acknowledged=True)
        linger.peer_has_ended = peer_has_ended
        linger.moved, linger.final = moved, final
        if peer_has_ended and not tcp.unacknowledged(sock):
            return linger.close()
        self._keep(linger, progress)
        linger.start(is_watched=is_watched)

    async def run(self) -> None:
        """Close the sockets of those who have received all, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._received.run)
            while True:
                if not self._sending:
                    await self._added.park()
                for linger in list(self._sending):
                    try:
                        self._look_after(linger)
                    except Exception as error:  # noqa: BLE001 - it ends one connection alone
                        self._on_fault(error)
                        linger.abort()
                await trio.sleep(_LOOK_EVERY)

    def moved(self) -> Iterator[Moved]:
        """Yield what the connections have moved whose peers are still here."""
        for linger in (*self._sending, *self._received.items()):
            assert linger.moved is not None
            yield linger.moved

    def __contains__(self, linger: Linger) -> bool:
        """Tell whether it can be suspended."""
        return linger in self._sending or linger in self._received

    def items(self) -> list[Linger]:
        """Return all that can be suspended."""
        return [*self._sending, *self._received.items()]

    def suspend(self, linger: Linger) -> Progress | None:
        """Let one stand still, so that another process can go on with it, by `add`.

        Returns:
            How far it was; None if its peer has received all.
        """
        linger.suspend()
        if linger in self._received:
            self._received.discard(linger)
            return None
        left, since = self._sending.pop(linger)
        return left, trio.current_time() - since

    def resume(self, linger: Linger, progress: Progress | None) -> None:
        """Go on with one that was suspended.

        Raises:
            OSError: the kernel can't watch it (ENOMEM, ENOSPC); it is reset.
        """
        self._keep(linger, progress)
        linger.start(is_watched=False)

    def _keep(self, linger: Linger, progress: Progress | None) -> None:
        if progress is None:
            linger.until_acknowledged = False
            self._received.add(linger)
        else:
            left, seconds = progress
            self._sending[linger] = left, trio.current_time() - seconds
            if self._added:
                self._added.unpark()

    def make_room(self) -> bool:
        """Let go who received all the longest ago; return whether there was anybody."""
        if (linger := self._received.oldest()) is not None:
            linger.expire()
            return True
        return False

    def abort_all(self) -> None:
        """Reset those who have not received all; close the others."""
        for linger in list(self._sending):
            linger.abort()
        for linger in self._received.items():
            linger.close()

    def _look_after(self, linger: Linger) -> None:
        now = trio.current_time()
        before, since = self._sending[linger]
        left = tcp.unacknowledged(linger.sock)
        if not left:
            if linger.peer_has_ended:
                return linger.close()
            del self._sending[linger]
            linger.until_acknowledged = False
            self._received.add(linger)
            if self.is_place_wanted():
                linger.expire()
        elif left != before:
            self._sending[linger] = left, now
            tcp.expect_answers(linger.sock, now - since)
        elif 0 < self._no_progress_seconds <= now - since:
            linger.abort(Ending.HALF_CLOSED)
        else:
            tcp.spare_slow_reader(linger.sock, now - since)
