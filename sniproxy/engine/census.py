"""How many connections are open, and how many there may be."""

import sys
from collections.abc import Callable

import trio


class Census:
    """Counts connections in and out.

    Attributes:
        open: How many there are.
        capacity: How many there may be; whoever lets them in sees to it.
        on_room: Called, once, when the next one has left; None if nobody waits for that.
    """

    def __init__(self, capacity: int = sys.maxsize) -> None:
        self.open = 0
        self.capacity = capacity
        self.on_room: Callable[[], None] | None = None
        self._emptied: trio.Event | None = None

    def enter(self) -> None:
        """Count one in."""
        self.open += 1

    def leave(self) -> None:
        """Count one out."""
        self.open -= 1
        if self.on_room is not None:
            on_room, self.on_room = self.on_room, None
            on_room()
        if not self.open and self._emptied is not None:
            self._emptied.set()

    async def empty(self) -> None:
        """Wait until nobody is left."""
        while self.open:
            self._emptied = trio.Event()
            await self._emptied.wait()
