"""One trio task over an epoll set of its own, in which every connection is served.

A trio task per connection would cost more than all the rest of a connection together: making
it, and some ten microseconds for each wake-up. So the descriptors live in an epoll set of ours,
and trio sees one descriptor only: that of the set itself. What happens to a descriptor is told
to its watcher, a plain object with a method that never waits.

While events keep coming the task does not go back to trio for each of them. It waits in its own
`epoll_wait`, briefly, and gives trio's other tasks their turn every few milliseconds; at once where
one of them was woken by an event. A task that takes part in a connection waits here for its socket,
and not in trio, where it would not be heard in that time.

Rejected: a thread for the relay. It was as quick for a byte there and back, but it fights the
accepting thread for the interpreter lock, and a connection cost half as much again.
"""

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

# How long epoll_wait may hold the thread while traffic is hot, in seconds. A peer on the same
# machine or network answers well within it; a signal or a timer of trio's waits no longer. With a
# quarter of it a round trip took a fifth more of the processor.
_SHORT_WAIT: Final = 0.004

# How long trio's other tasks may have to wait while events come, in seconds. A pass through its
# scheduler costs some 10 µs: every 2 ms that is half a percent.
_TURN: Final = 0.002

# Events taken from the kernel at a time. Enough to spread the cost of the call, few enough that
# a signal or a pause of the listener takes effect soon.
_EVENTS: Final = 128


class Watcher(Protocol):
    """Someone who is told what happens to a descriptor."""

    def on_event(self, events: int) -> None:
        """React to `events`, a mask of EPOLL* bits, without ever waiting.

        The mask is 0 when the watcher asked for another turn with `EventLoop.call_soon`.
        """

    def abort(self) -> None:
        """End, because `on_event` raised an exception that nobody expected."""


class Closable(Protocol):
    """A socket, or what stands for one."""

    def fileno(self) -> int:
        """Return its descriptor."""

    def close(self) -> None:
        """Close it."""


class EventLoop:
    """Descriptors, their watchers, and the task that brings them together.

    `on_fault` is called with every exception that a watcher lets escape; the watcher is then
    aborted and the loop goes on: a bug met by one connection ends that connection alone.

    Attributes:
        close_each: Closes what is to be closed together.
    """

    def __init__(self, on_fault: Callable[[Exception], None]) -> None:
        self._on_fault = on_fault
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}
        self._runnable: deque[Watcher] = deque()
        self._pending_closes: list[Closable] = []
        self.close_each = _close_each
        # Other tasks ask for a turn too. The edge of a write wakes the set; nobody reads.
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._waker, select.EPOLLIN | select.EPOLLET)
        self._awake = False
        self._tasks_are_due = False

    def watch(self, fd: int, watcher: Watcher, events: int) -> None:
        """Tell `watcher` of `events` on `fd` from now on, and of EPOLLHUP and EPOLLERR.

        Raises:
            OSError: ENOMEM or ENOSPC, see epoll_ctl(2).
        """
        self._epoll.register(fd, events)
        self._watchers[fd] = watcher

    def change(self, fd: int, events: int) -> None:
        """Replace the events asked for; those that hold already are told again."""
        self._epoll.modify(fd, events)

    def set_watcher(self, fd: int, watcher: Watcher) -> None:
        """Give the events of `fd`, which is watched already, to another watcher."""
        self._watchers[fd] = watcher

    def take_over(self, fd: int, watcher: Watcher, events: int) -> None:
        """Tell `watcher` of `events` on `fd` from now on, whether it is watched already or not.

        Raises:
            OSError: as `watch`.
        """
        if fd in self._watchers:
            self.change(fd, events)
            self._watchers[fd] = watcher
        else:
            self.watch(fd, watcher, events)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, which stays open."""
        del self._watchers[fd]
        self._epoll.unregister(fd)

    def watcher(self, fd: int) -> Watcher | None:
        """Return who watches `fd`; None if nobody does."""
        return self._watchers.get(fd)

    def watchers(self) -> list[Watcher]:
        """Return all watchers, one for each descriptor."""
        return list(self._watchers.values())

    @property
    def pending_closes(self) -> int:
        """How many sockets are still open although they have been closed here."""
        return len(self._pending_closes)

    def close(self, sock: Closable) -> None:
        """Forget `sock`, watched or not, and close it when the events there are have been told.

        Not at once: its number could go to a new socket while events of the old one are still
        in the list that is being worked through. Closing takes it out of the epoll set, too.
        """
        self._watchers.pop(sock.fileno(), None)
        self._pending_closes.append(sock)
        if not self._awake:
            self._wake()

    def call_soon(self, watcher: Watcher) -> None:
        """Give `watcher` another turn when all that is ready now has had one."""
        self._runnable.append(watcher)
        if not self._awake:
            self._wake()

    def let_tasks_run(self) -> None:
        """Give trio's tasks their turn at once, and do not hold the thread before they rest."""
        self._tasks_are_due = True

    async def run(self) -> None:
        """Serve until cancelled; whoever is left then is aborted."""
        poll = self._epoll.poll
        runnable, pending = self._runnable, self._pending_closes
        try:
            while True:
                self._awake = False
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self._awake = True
                self._tasks_are_due = False
                turn_ends = time.monotonic() + _TURN
                while (
                    events := poll(0 if runnable or self._tasks_are_due else _SHORT_WAIT, _EVENTS)
                ) or runnable:
                    self._dispatch(events)
                    # Before somebody opens others in a turn: there may be no descriptor to spare.
                    if pending:
                        self._close_pending()
                    if runnable:
                        self._give_turns()
                        if pending:
                            self._close_pending()
                    if self._tasks_are_due or time.monotonic() > turn_ends:
                        await trio.lowlevel.checkpoint()
                        turn_ends = time.monotonic() + _TURN
                # Whom other tasks closed at that checkpoint: nothing more may come to wake us.
                self._close_pending()
        finally:
            for watcher in [*self._runnable, *self._watchers.values()]:
                watcher.abort()
            self._close_pending()

    def shut(self) -> None:
        """Close the set itself. Nothing may be asked of it afterwards."""
        self._close_pending()
        self._epoll.close()
        os.close(self._waker)

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        watchers = self._watchers
        for fd, mask in events:
            # None: the waker's own, or closed earlier in this turn.
            if (watcher := watchers.get(fd)) is not None:
                try:
                    watcher.on_event(mask)
                except Exception as error:  # noqa: BLE001 - it ends one connection alone
                    self._fault(watcher, error)

    def _give_turns(self) -> None:
        runnable = self._runnable
        # Only as many as there are now: one that asks again has its turn after new events.
        for _ in range(len(runnable)):
            watcher = runnable.popleft()
            try:
                watcher.on_event(0)
            except Exception as error:  # noqa: BLE001 - as above
                self._fault(watcher, error)

    def _fault(self, watcher: Watcher, error: Exception) -> None:
        self._on_fault(error)
        watcher.abort()

    def _close_pending(self) -> None:
        if self._pending_closes:
            self.close_each(self._pending_closes)
            self._pending_closes.clear()

    def _wake(self) -> None:
        self._awake = True
        os.eventfd_write(self._waker, 1)


def _close_each(socks: Iterable[Closable]) -> None:
    for sock in socks:
        sock.close()
