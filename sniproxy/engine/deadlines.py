"""Those who wait for something, each for the same time at the most."""

from collections.abc import Callable
from operator import itemgetter
from typing import Generic, Protocol, TypeVar

import trio


class Expiring(Protocol):
    """Someone with a deadline."""

    def expire(self) -> None:
        """End, because the deadline has passed."""

    def abort(self) -> None:
        """End, because `expire` raised an exception that nobody expected."""


Item = TypeVar("Item", bound=Expiring)


class Deadlines(Generic[Item]):
    """Items that wait, the oldest first, each no longer than `seconds`.

    As all have the same time, the order in which they came is the order of their deadlines. So
    adding and removing costs an entry in a dict, and one task with one timer serves all.

    Args:
        seconds: how long each may wait.
        on_fault: called with every exception that `expire` lets escape; the item is aborted then.
    """

    def __init__(self, seconds: float, on_fault: Callable[[Exception], None]) -> None:
        self._seconds = seconds
        self._on_fault = on_fault
        self._deadlines: dict[Item, float] = {}
        # Those who are restored come one by one. All are sorted when somebody looks.
        self._is_sorted = True
        self._added = trio.lowlevel.ParkingLot()
        self._sleep = trio.CancelScope()

    def __contains__(self, item: Item) -> bool:
        return item in self._deadlines

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, item: Item) -> float:
        """Let `item` wait from now on; return its deadline, on trio's clock."""
        deadline = self._deadlines[item] = trio.current_time() + self._seconds
        if self._added:
            self._added.unpark()
        return deadline

    def restore(self, item: Item, deadline: float) -> None:
        """Let an item wait that has waited before, until its deadline, on trio's clock."""
        self._deadlines[item] = deadline
        self._is_sorted = False
        self._sleep.deadline = min(self._sleep.deadline, deadline)
        self._added.unpark()

    def deadline(self, item: Item) -> float:
        """Return until when `item`, which waits, may do so, on trio's clock."""
        return self._deadlines[item]

    def discard(self, item: Item) -> None:
        """Forget `item`, if it waits."""
        self._deadlines.pop(item, None)

    def oldest(self) -> Item | None:
        """Return the item that has waited the longest; None if none waits."""
        return next(iter(self._sorted()), None)

    def since(self, item: Item) -> float:
        """Return since when `item`, which waits, has done so, on trio's clock."""
        return self._deadlines[item] - self._seconds

    def items(self) -> list[Item]:
        """Return all that wait, the oldest first."""
        return list(self._sorted())

    def _sorted(self) -> dict[Item, float]:
        if not self._is_sorted:
            self._deadlines = dict(sorted(self._deadlines.items(), key=itemgetter(1)))
            self._is_sorted = True
        return self._deadlines

    async def run(self) -> None:
        """Let items expire, until cancelled."""
        while True:
            if not self._deadlines:
                await self._added.park()
            # Who is added while we sleep has a later deadline, but for those who are restored.
            with trio.CancelScope(deadline=next(iter(self._sorted().values()), 0.0)) as scope:
                self._sleep = scope
                await trio.sleep_forever()
            now = trio.current_time()
            while (item := self.oldest()) is not None and self._deadlines[item] <= now:
                del self._deadlines[item]
                try:
                    item.expire()
                except Exception as error:  # noqa: BLE001 - a bug met by one ends that one alone
                    self._on_fault(error)
                    item.abort()
