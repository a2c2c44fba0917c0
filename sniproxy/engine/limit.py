"""How many connections are open, and how many there may be."""

import sys
from collections.abc import Callable

import trio


class ConnectionLimit:
    """Counts the open connections. Whoever accepts them keeps to the limit.

    Attributes:
        open: How many there are.
        capacity: How many there may be.
        on_room: Called, once, when the next connection has ended; None if nobody waits for that.
    """

    def __init__(self, capacity: int = sys.maxsize) -> None:
        self.open = 0
        self.capacity = capacity
        self.on_room: Callable[[], None] | None = None
        self._emptied: trio.Event | None = None

    def is_place_wanted(self) -> bool:
        """Tell whether somebody waits for the next connection to end."""
        return self.on_room is not None

    def add(self) -> None:
        """Count one more."""
        self.open += 1

    def remove(self) -> None:
        """Count one less."""
        self.open -= 1
        if self.on_room is not None:
            on_room, self.on_room = self.on_room, None
            on_room()
        if not self.open and self._emptied is not None:
            self._emptied.set()

    async def wait_until_empty(self) -> None:
        """Wait until no connection is open."""
        while self.open:
            self._emptied = trio.Event()
            await self._emptied.wait()
