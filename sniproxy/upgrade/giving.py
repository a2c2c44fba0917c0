"""The old copy's side: it listens for a new one, and gives that everything."""

import contextlib
import os
import socket as std
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from select import EPOLLIN
from typing import Any, Final

import trio

from sniproxy.engine.listener import Listener
from sniproxy.engine.loop import EventLoop
from sniproxy.service.eventlog import Seconds
from sniproxy.session import Sessions
from sniproxy.upgrade.letters import (
    BATCH,
    DONE,
    END,
    GIVEN,
    HELLO,
    LISTEN,
    MOST_DESCRIPTORS,
    NEVER_MIND,
    READY,
    START,
    TAKEN,
    VERSION,
    YES,
    Letter,
    Message,
    UpgradeError,
    Way,
    accept,
    check_hello,
    write_memory,
)
from sniproxy.upgrade.portable import Parcel, Portable, suspend_each

# Descriptors of one connection, at the most: two sockets, and a pipe for each direction.
_MOST_OF_ONE: Final = 6

# Seconds that a batch may stand still until the new copy has it; it takes some milliseconds. With
# another look it is less than a second.
_BATCH_PATIENCE: Final = 0.5

# Seconds for every other answer. It is Python's start that takes the longest.
_PATIENCE: Final = 10.0

# Seconds between two looks at that.
_LOOK_EVERY: Final = 0.1

# Looks for connections in vain, one in each turn of the loop, until it is believed that there are
# none: who was accepted last is connected in the next turn.
_LOOKS: Final = 3


class Door:
    """Waits for a new copy, one at a time, or for the word of the first process.

    Args:
        listener: of clients, which the new copy gets, too.
        sessions: what it is given.
        on_given: called with the process id of the new copy, when that has all.

    Attributes:
        on_failure: Called with its process id when a new copy has not taken all.
        stays: Whether this process stays when one has; then the way to it stays open.
        successor: That way.
    """

    def __init__(
        self, listener: Listener, sessions: Sessions, on_given: Callable[[int], None]
    ) -> None:
        self.on_failure: Callable[[int], None] = lambda pid: None
        self._peer = 0  # the process id of the last one
        self.stays = False
        self.successor: Way | None = None
        self._listening: std.socket | None = None
        self._facts: dict[str, Any] = {}
        self._fds: list[int] = []
        self._listener = listener
        self._sessions = sessions
        self._on_given = on_given
        self._giving: _Giving | None = None
        self._began = trio.lowlevel.ParkingLot()
        self._loop: EventLoop = sessions.loop

    def open(self, listening: std.socket, facts: dict[str, Any], fds: list[int]) -> None:
        """Wait for a new copy.

        Args:
            listening: where it connects; owned from now on.
            facts: what it is told to begin with.
            fds: descriptors that belong to that.
        """
        self._listening, self._facts, self._fds = listening, facts, fds
        self._loop.watch(listening.fileno(), self, EPOLLIN)

    async def run(self) -> None:
        """See to it that nobody is waited for too long, until cancelled."""
        while True:
            if self._giving is None:
                await self._began.park()
            await trio.sleep(_LOOK_EVERY)
            if self._giving is not None:
                self._giving.look_at_clock()

    def on_event(self, events: int) -> None:
        """Let a new copy in."""
        if self._listening is not None and (way := accept(self._listening)) is not None:
            self._loop.unwatch(self._listening.fileno())
            sockets = [self._listener.fileno(), self._listening.fileno(), *self._fds]
            self._begin(way, HELLO, sockets)

    def give(self, sock: std.socket, pid: int) -> None:
        """Give all to a copy that the first process has met, and which is process `pid`."""
        if self._giving is not None:
            return sock.close()
        way = Way(sock)
        way.pid = pid  # the sockets were made by the first process
        self._begin(way, READY, [])

    def _begin(self, way: Way, expected: Letter, sockets: list[int]) -> None:
        fixed = self._sessions, self._listener, self._facts, sockets
        self._giving = _Giving(way, *fixed, expected, self._on_over, stays=self.stays)
        self._peer = way.pid
        self._began.unpark()

    def abort(self) -> None:
        """Nothing: what is wrong with one copy is not with the next."""

    def close(self) -> None:
        """Let nobody in any more; who was being given all keeps what it has."""
        if self._giving is not None:
            self._giving.give_up("the old copy was asked to end")
        if self._listening is not None and self._listening.fileno() != -1:
            self._loop.unwatch(self._listening.fileno())
            self._listening.close()

    def _on_over(self, way: Way | None) -> None:
        """Go on, or end if the copy at the other end of `way` has all."""
        self._giving = None
        if way is None:
            if self._listening is not None:
                self._loop.watch(self._listening.fileno(), self, EPOLLIN)
            self.on_failure(self._peer)
        else:
            if self._listening is not None:
                self._listening.close()
            self.successor = way
            self._on_given(way.pid)


class _Giving:
    """One attempt."""

    def __init__(
        self,
        way: Way,
        sessions: Sessions,
        listener: Listener,
        facts: dict[str, Any],
        sockets: list[int],
        expected: Letter,
        on_over: Callable[[Way | None], None],
        *,
        stays: bool,
    ) -> None:
        self._way = way
        self._stays = stays
        self._sessions = sessions
        self._listener = listener
        self._facts = facts
        self._sockets = sockets
        self._on_over = on_over
        self._expected = expected
        self._since = time.monotonic()
        self._began = 0.0
        self._candidates: Iterator[Portable] = iter(())
        self._batch: list[Portable] = []
        self._given = self._looks = 0
        self._longest = 0.0
        self._is_over = False
        self._watched = way.fileno()
        sessions.loop.watch(self._watched, self, EPOLLIN)

    def on_event(self, events: int) -> None:
        """React to what the new copy says; 0 is another turn."""
        try:
            if events == 0:
                if not self._is_over and not self._batch:
                    self._give_next()
                return
            while not self._is_over:
                message = self._way.receive()
                message.close()  # nothing is in any
                self._understand(message)
        except BlockingIOError:
            return
        except (UpgradeError, OSError) as error:
            self.give_up(str(error))

    def abort(self) -> None:
        """Give up, because of a bug."""
        self.give_up("a bug")

    def look_at_clock(self) -> None:
        """Give up if the answer takes too long."""
        patience = _BATCH_PATIENCE if self._expected is TAKEN else _PATIENCE
        if not self._is_over and time.monotonic() - self._since > patience:
            self.give_up("the new copy does not answer")

    def _understand(self, message: Message) -> None:
        if message.letter == END:
            raise UpgradeError("the new copy has ended")
        if message.letter == NEVER_MIND:
            raise UpgradeError(str(message.content.get("why")))
        if message.letter != self._expected:
            raise UpgradeError(f"the new copy says {message.letter!a}")
        if self._expected is HELLO:
            check_hello(message)
            told = {"version": VERSION, "facts": self._facts, "workers": 0}
            self._say(LISTEN, READY, self._sockets, **told)
        elif self._expected is READY:
            self._began = time.monotonic()
            self._say(START, YES, open=self._sessions.limit.open)
        elif self._expected is YES:
            self._give_next()
        elif self._expected is TAKEN:
            # From here on it is theirs, whatever happens.
            self._longest = max(self._longest, time.monotonic() - self._since)
            for each in self._batch:
                each.close()
            self._given += len(self._batch)
            self._batch = []
            self._say(GIVEN, END)
            self._sessions.loop.call_soon(self)  # the others have their turn in between

    def _say(
        self, letter: Letter, expected: Letter, fds: list[int] | None = None, **content: Any
    ) -> None:
        self._way.send(letter, fds, **content)
        self._expected, self._since = expected, time.monotonic()

    def _give_next(self) -> None:
        """Give a batch; or look once more, and end when there is nobody."""
        parcel = Parcel()
        records = []
        try:
            for each in self._suspend():
                self._batch.append(each)
                records.append(each.describe(parcel))
                if 1 + len(parcel.fds) + _MOST_OF_ONE > MOST_DESCRIPTORS:
                    break
            if records:
                self._looks = 0
                memory = write_memory(records, parcel.blob)
                try:
                    self._say(BATCH, TAKEN, [memory, *parcel.fds])
                finally:
                    os.close(memory)
                return
        except OSError as error:
            return self.give_up(str(error))
        self._looks += 1
        if self._looks < _LOOKS:
            # Not before: if the new copy hung, nobody would be let in.
            self._listener.hold()
            self._sessions.loop.call_soon(self)
        else:
            self._end()

    def _suspend(self) -> Iterator[Portable]:
        """Yield those who are to be given, until a look has found nobody."""
        # No `yield from`: who stops amid that ends what it yields from, too, and all would be
        # looked at anew for the next batch.
        while (each := next(self._candidates, None)) is not None:
            yield each
        self._candidates = suspend_each(self._sessions)
        while (each := next(self._candidates, None)) is not None:
            yield each

    def _end(self) -> None:
        """Tell what was counted, and leave."""
        sessions = self._sessions
        figures = None if sessions.figures is None else sessions.figures.tell()
        counted = {"counts": asdict(sessions.counts()), "figures": figures}
        memory = write_memory(counted)
        # The supervisor first: who has started the new copy is told by that when it has all.
        self._listener.leave()
        self._on_over(self._way)
        with contextlib.suppress(OSError):  # it has just died
            self._way.send(DONE, [memory], stays=self._stays)
        os.close(memory)
        sessions.log.event(
            "upgraded",
            pid=self._way.pid,
            given=self._given,
            left=sessions.limit.open,
            seconds=Seconds(time.monotonic() - self._began),
            longest=Seconds(self._longest),
        )
        self._leave()

    def give_up(self, why: str) -> None:
        """Go on with what there is."""
        if self._is_over:
            return
        batch, self._batch = self._batch, []
        for each in batch:
            each.resume()
        try:
            self._way.send(NEVER_MIND, why=why)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has gone
        except OSError:
            # It has not heard it. If we closed the way it would believe that we are dead, and that
            # the batch is its own.
            self._way.keep_open()
        self._leave()
        self._sessions.log.upgrade_failed(why, self._way.pid, self._given)
        self._listener.unhold()
        self._on_over(None)

    def _leave(self) -> None:
        self._is_over = True
        self._sessions.loop.unwatch(self._watched)
        if not self._stays:
            self._way.close()
