"""Clients whose backend is away, or has no room for them, and when to look for it again.

Linux tells nobody that a socket has come into being, or that its backlog has room again; so there
are looks. They are one for all who wait for the same backend: who came first is looked up, and only
if there is a backend for them, the next one. Looks become less frequent, and all of them together
are given little time, so that hosts that are down cost the others nothing.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import islice
from time import perf_counter
from typing import Protocol, TypeVar

import trio

Value = TypeVar("Value")

# For all the seconds of looks in vain, others have fifty times as many: two percent. Each backend
# has its share of them; so one that takes long to look for pays for that alone.
_REST = 50

# What a look takes at least, with waking up for it, where there are several; and at most, through
# as many links as Linux follows. If it seems to have taken more, this process had to wait for a
# processor; and of that, too, only a part is believed at once.
_SHORTEST, _LONGEST = 0.0001, 0.005
_BELIEVED = 0.25

# Looks of several queues that are about as many seconds apart are made together, for to wake up
# costs more than a look. Quick ones are not: a server that is full has room within a millisecond.
_TOGETHER = 0.05

# Seconds of looks at a time, after which others have their turn, and clients who are connected at a
# time to a backend that is there: what a batch of new connections takes.
_AT_ONCE = 0.001
_BATCH = 16


class Guest(Protocol):
    """Somebody who waits for a backend.

    Attributes:
        since: Since when, by trio's clock.
    """

    since: float

    def on_away(self) -> None:
        """Take note that the backend is not there."""

    def try_again(self) -> str | None:
        """Look for the backend once more.

        Returns:
            The entry of the hosts directory that is waited for; None if the waiting is over.
        """

    def give_way(self) -> None:
        """End: there is no room for somebody who is not served."""

    def abort(self) -> None:
        """End, because `try_again` raised an exception that nobody expected, or all end."""


class _Queue:
    """Those who wait for one backend, the oldest first; and in seconds, the pause, and a look."""

    __slots__ = ("guests", "pause", "spent")

    def __init__(self, pause: float) -> None:
        self.guests: dict[Guest, None] = {}
        self.pause = pause
        self.spent = 0.0  # on average, of late


class WaitingRoom:
    """Everybody who waits for a backend.

    Args:
        first_pause: seconds until the first look at a backend. Each pause is twice the one before.
        last_pause: the longest one.
        on_fault: called with every exception that `try_again` lets escape; the guest is aborted.
    """

    def __init__(
        self, first_pause: float, last_pause: float, on_fault: Callable[[Exception], None]
    ) -> None:
        self._first_pause = first_pause
        self._last_pause = last_pause
        self._on_fault = on_fault
        self._queues: dict[str, _Queue] = {}
        # When to look next, by trio's clock: each queue once, and those that have become empty.
        self._due: list[tuple[float, str]] = []
        self._entries: dict[Guest, str] = {}
        # Those who are restored come one by one. All are sorted when somebody looks.
        self._is_sorted = True
        self._added = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, guest: Guest, entry: str) -> None:
        """Let `guest` wait for the backend of an entry of the hosts directory."""
        self._entries[guest] = entry
        queue = self._queues.get(entry)
        if queue is None:
            queue = self._queues[entry] = _Queue(self._first_pause)
            heappush(self._due, (trio.current_time() + queue.pause, entry))
            self._added.unpark()
        queue.guests[guest] = None

    def discard(self, guest: Guest) -> None:
        """Forget `guest`, if it waits."""
        if (entry := self._entries.pop(guest, None)) is not None:
            del self._queues[entry].guests[guest]

    def restore(self, guest: Guest, entry: str) -> None:
        """Let a guest wait who has waited before, and not behind the others."""
        self.add(guest, entry)
        self._is_sorted = False

    def _sort(self) -> None:
        if not self._is_sorted:
            self._entries = _by_age(self._entries)
            for queue in self._queues.values():
                queue.guests = _by_age(queue.guests)
            self._is_sorted = True

    def entry(self, guest: Guest) -> str | None:
        """Return what a guest waits for; None if it does not wait."""
        return self._entries.get(guest)

    def oldest(self) -> Guest | None:
        """Return who has waited the longest; None if nobody waits."""
        self._sort()
        return next(iter(self._entries), None)

    def tell_away(self, guest: Guest) -> None:
        """Tell those who wait for the same as `guest` that it is not there."""
        if (entry := self._entries.get(guest)) is not None:
            for other in list(self._queues[entry].guests):
                if other is not guest:
                    other.on_away()

    def guests(self) -> list[Guest]:
        """Return all who wait, the oldest first."""
        self._sort()
        return list(self._entries)

    async def run(self) -> None:
        """Look for the backends, until cancelled."""
        while True:
            with trio.CancelScope() as waiting:
                if self._due:
                    waiting.deadline = self._due[0][0]
                await self._added.park()
            now = trio.current_time()
            until = perf_counter() + _AT_ONCE
            while self._due and self._due[0][0] <= now and perf_counter() < until:
                self._look(heappop(self._due)[1])

    def _look(self, entry: str) -> None:
        """Look for one backend."""
        self._sort()
        queue = self._queues[entry]
        pause = 2 * queue.pause
        spent = 0.0
        for guest in list(islice(queue.guests, _BATCH)):
            began = perf_counter()
            wanted = self._try_again(guest)
            if wanted == entry:
                spent = perf_counter() - began
                break
            pause = self._first_pause
            self.discard(guest)
            if wanted is not None:
                self.add(guest, wanted)
        if queue.guests:
            queue.pause = min(pause, self._last_pause)
            queue.spent += _BELIEVED * (min(spent, _LONGEST) - queue.spent)
            others = len(self._queues) - 1
            share = max(queue.spent * (1 + others), _SHORTEST * others)
            rest = max(queue.pause, _REST * share)
            due = trio.current_time() + rest
            if rest >= _TOGETHER and others:
                due = round(due / _TOGETHER) * _TOGETHER
            heappush(self._due, (due, entry))
        else:
            del self._queues[entry]

    def _try_again(self, guest: Guest) -> str | None:
        try:
            return guest.try_again()
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            self._on_fault(error)
            guest.abort()
            return None


def _by_age(guests: dict[Guest, Value]) -> dict[Guest, Value]:
    return dict(sorted(guests.items(), key=lambda each: each[0].since))
