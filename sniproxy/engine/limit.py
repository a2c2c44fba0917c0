"""How many connections are open, and how many there may be."""

import sys
from collections.abc import Callable

import trio


class ConnectionLimit:
    """Counts the open connections. Whoever accepts them keeps to the limit.

    Attributes:
        open: How many there are.
        capacity: How many there may be.
    """

    def __init__(self, capacity: int = sys.maxsize) -> None:
        self.open = 0
        self.capacity = capacity
        self._waiting: dict[Callable[[], None], None] = {}
        self._emptied: trio.Event | None = None

    def is_place_wanted(self) -> bool:
        """Tell whether somebody waits for the next connection to end."""
        return bool(self._waiting)

    def wait_for_room(self, look: Callable[[], None]) -> None:
        """Have `look` called, once, when the next connection has ended. Several may wait."""
        self._waiting[look] = None

    def let_look(self) -> None:
        """Let those look who wait for the next connection to end: there may be a place."""
        waiting, self._waiting = self._waiting, {}
        for look in waiting:
            look()

    def add(self) -> None:
        """Count one more."""
        self.open += 1

    def remove(self) -> None:
        """Count one less."""
        self.open -= 1
        if self._waiting:
            self.let_look()
        if not self.open and self._emptied is not None:
            self._emptied.set()

    async def wait_until_empty(self) -> None:
        """Wait until no connection is open. Several may wait."""
        while self.open:
            if self._emptied is None or self._emptied.is_set():
                self._emptied = trio.Event()
            await self._emptied.wait()
