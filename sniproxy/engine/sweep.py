"""The watch over connections on which nothing moves: now and then all of them are looked at.

A timer for each connection, set anew with every byte, would be on the path of every byte.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import trio

from sniproxy.engine.loop import EventLoop

# Seconds between two looks. Connections that have a time limit are looked at more often if that is
# short, so that none lives longer than a quarter above its limit.
_EVERY = 10.0
_LOOKS_IN_LIMIT = 4

# Connections that are looked at before others have their turn: less than a millisecond.
_BATCH = 1000


class Swept(ABC):
    """A watcher that is looked at."""

    __slots__ = ()

    @abstractmethod
    def sweep(self, pause: float, idle_seconds: float, half_closed_seconds: float) -> None:
        """End the connection if nothing was moved for too long; `pause` is since the last look."""

    @abstractmethod
    def abort(self) -> None:
        """End it, because `sweep` raised an exception that nobody expected."""


class Sweep:
    """Looks at connections, again and again.

    Args:
        loop: which watches them.
        on_fault: called with every exception that nobody expected.
        idle_seconds: how long nothing may move; 0 is for ever.
        half_closed_seconds: the same, once one of the directions has ended.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_fault: Callable[[Exception], None],
        idle_seconds: float,
        half_closed_seconds: float,
    ) -> None:
        self._loop = loop
        self._on_fault = on_fault
        self._limits = idle_seconds, half_closed_seconds

    @property
    def pause(self) -> float:
        """Seconds between two looks."""
        return min([_EVERY, *(each / _LOOKS_IN_LIMIT for each in self._limits if each)])

    async def run(self) -> None:
        """Look, until cancelled."""
        pause = self.pause
        while True:
            await trio.sleep(pause)
            await self.look(pause)

    async def look(self, pause: float) -> None:
        """Have each connection compare what it has moved with what it had moved the last time."""
        for number, watcher in enumerate(self._loop.watchers(), 1):
            if isinstance(watcher, Swept):
                try:
                    watcher.sweep(pause, *self._limits)
                except Exception as error:  # noqa: BLE001 - it ends one connection alone
                    self._on_fault(error)
                    watcher.abort()
            if number % _BATCH == 0:
                await trio.lowlevel.checkpoint()
