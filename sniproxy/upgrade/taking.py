"""The new copy's side: it takes everything from the old one."""

import contextlib
import os
import time
from collections.abc import Callable
from select import EPOLLIN
from typing import Final

import trio

from sniproxy.service.eventlog import Seconds
from sniproxy.service.fatal import FatalError
from sniproxy.service.notify import Counts
from sniproxy.session import Sessions
from sniproxy.upgrade.letters import (
    BATCH,
    DONE,
    END,
    GIVEN,
    NEVER_MIND,
    READY,
    START,
    TAKEN,
    YES,
    Message,
    UpgradeError,
    Way,
    read_memory,
)
from sniproxy.upgrade.portable import Revived, revive

# Seconds that the old copy may take until it lets us begin; it does so in its loop.
_PATIENCE: Final = 10.0


class Taking:
    """Takes over from an old copy that has said L.

    Args:
        way: to the old copy; owned from now on.
        sessions: where the connections go.
        on_over: called when the old copy gives no more.

    Attributes:
        is_over: Whether that is so.
        is_whole: Whether it has given all that it had, or has died.
        guardian: The way to it, if it stays.
    """

    def __init__(self, way: Way, sessions: Sessions, on_over: Callable[[], None]) -> None:
        self._way = way
        self._sessions = sessions
        self._on_over = on_over
        self._batch: list[Revived] = []
        self._fds: list[int] = []  # those of the batch
        self._reserved = 0
        self._taken = 0
        self._began = 0.0
        self._refusal = ""
        self._has_refused: str | None = None  # why, if what came of the batch is still to be heard
        self.is_over = self.is_whole = False
        self.guardian: Way | None = None
        self._start = trio.Event()
        sessions.loop.watch(way.fileno(), self, EPOLLIN)
        with contextlib.suppress(OSError):  # it has gone, and that will be told
            way.send(READY)

    async def wait_for_start(self) -> None:
        """Wait until clients may be accepted.

        Raises:
            FatalError: the old copy goes on; it may have said why.
        """
        with trio.move_on_after(_PATIENCE):
            await self._start.wait()
        if not self._start.is_set():
            self._refusal = "it does not answer"
        if self._refusal:
            self._leave()
            raise FatalError(f"unable to take over from process {self._way.pid}: {self._refusal}")

    def on_event(self, events: int) -> None:
        """React to what the old copy says."""
        try:
            while not self.is_over:
                self._understand(self._way.receive())
        except BlockingIOError:
            return
        except (UpgradeError, OSError, LookupError, TypeError, ValueError) as error:
            self.refuse(str(error))

    def abort(self) -> None:
        """Take no more, because of a bug."""
        self.refuse("a bug")

    def _understand(self, message: Message) -> None:
        if message.letter == START:
            self._begin(message.content["open"])
        elif message.letter == BATCH:
            self._take(message)
        elif message.letter == GIVEN:
            self._own()
            if self._has_refused is not None:
                self._end(self._has_refused, is_alone=False)
        elif message.letter == NEVER_MIND:
            self._drop()
            self._end(str(message.content.get("why")), is_alone=False)
        elif message.letter == DONE:
            self._add_counts(message)
            if message.content.get("stays"):
                self.guardian = self._way
            self._end(None, is_alone=True)
        elif message.letter == END:
            # It is dead, or it would have said so. We have what it has sent, and the listening
            # socket.
            self._own()
            self._end("the old copy has died", is_alone=True)
        else:
            message.close()
            raise UpgradeError(f"the old copy says {message.letter!a}")

    def _begin(self, many: int) -> None:
        limit = self._sessions.limit
        if many > limit.capacity:
            raise UpgradeError(f"{many} connections are more than {limit.capacity}")
        self._began = time.monotonic()
        # Nobody else is to have their places.
        self._reserved = many
        limit.open += many
        self._start.set()
        with contextlib.suppress(OSError):  # it has gone, and that is still to be read
            self._way.send(YES)

    def _take(self, message: Message) -> None:
        memory, *self._fds = message.fds
        records, blob = read_memory(memory)
        self._batch = [revive(self._sessions, record, self._fds, blob) for record in records]
        with contextlib.suppress(OSError):  # it has gone, and that is still to be read
            self._way.send(TAKEN)

    def _own(self) -> None:
        batch, self._batch, self._fds = self._batch, [], []
        self._taken += len(batch)
        for each in batch:
            if self._reserved:
                self._reserved -= 1
            else:
                self._sessions.limit.add()
            try:
                each.begin()
            except Exception as error:  # noqa: BLE001 - a bug met by one ends that one alone
                self._sessions.log.bug(error)

    def _drop(self) -> None:
        self._batch = []
        while self._fds:
            os.close(self._fds.pop())

    def _add_counts(self, message: Message) -> None:
        counted, _ = read_memory(message.fds.pop(0))
        counts = Counts(**counted["counts"])
        self._sessions.served += counts.served
        self._sessions.refused += counts.refused
        if self._sessions.figures is not None and counted["figures"] is not None:
            self._sessions.figures.add(counted["figures"])

    def refuse(self, why: str) -> None:
        """Take no more, and say so."""
        if self.is_over or self._has_refused is not None:
            return
        with contextlib.suppress(OSError):
            self._way.send(NEVER_MIND, why=why)
        if self._batch:
            # We have said T: if the old copy has heard that, nobody else has these.
            self._has_refused = why
            return
        self._drop()
        self._end(why, is_alone=False)

    def _end(self, why: str | None, *, is_alone: bool) -> None:
        """Go on with what we have; or with nothing, if it has not begun."""
        if not self._start.is_set() and not is_alone:
            self._refusal = str(why)
            self._start.set()
            return
        self._start.set()
        for _ in range(self._reserved):
            self._sessions.limit.remove()
        self._reserved = 0
        self._leave()
        self._sessions.log.event(
            "taken_over",
            pid=self._way.pid,
            taken=self._taken,
            seconds=Seconds(time.monotonic() - self._began if self._began else 0.0),
            detail=why,
        )
        self.is_whole = is_alone
        self._on_over()

    def _leave(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._sessions.loop.unwatch(self._way.fileno())
            if self.guardian is None:
                self._way.close()
