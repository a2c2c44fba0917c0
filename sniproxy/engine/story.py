"""What a connection does until it is relayed: a coroutine that the loop drives.

A connection that is relayed reacts to events, and remembers little. Before that it has a story: it
waits for its client, connects, shakes hands. As a coroutine that can be read from top to bottom. It
waits for its sockets and for the time; all else is left to tasks of trio's.

A task of trio's for each connection was tried: making it, and its turns in trio's scheduler, which
each waits for the loop to let go of the thread, were a tenth of a TLS handshake.

The law: try first, and wait when the kernel says EAGAIN. The sockets are watched edge-triggered,
once for the whole story, and an event that nobody waits for is forgotten.

And: whoever loops over what a peer sends asks `has_had_its_turn`. A peer that sends faster than it
is read never lets the kernel say EAGAIN; all others, and the time limits, would wait for it.
"""

import heapq
import itertools
import types
from _socket import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import Final, Self, TypeVar

import trio

from sniproxy.engine.loop import EventLoop

_EVENTS: Final = EPOLLIN | EPOLLRDHUP | EPOLLOUT | EPOLLET

_ENDING: Final = EPOLLHUP | EPOLLERR
_READABLE: Final = EPOLLIN | EPOLLRDHUP | _ENDING
_WRITABLE: Final = EPOLLOUT | _ENDING

# Timers that were cancelled stay where they are until they are more than the others, and than this.
_FEW: Final = 64

# Steps in a row that a story may take before the others have their turn. A handshake waits after
# each; one of the longest kind, 16 KiB of nothing but KeyUpdates, takes 20 ms.
_MOST_STEPS: Final = 2

T = TypeVar("T")


class Stories:
    """All stories of a process, and their timers.

    Args:
        loop: drives them.
        nursery: where what only trio can wait for has its tasks.
        on_fault: called with every exception that a story lets escape, which ends it alone.
    """

    def __init__(
        self, loop: EventLoop, nursery: trio.Nursery, on_fault: Callable[[Exception], None]
    ) -> None:
        self.loop = loop
        self.nursery = nursery
        self.on_fault = on_fault
        self._under_way: dict[Story, None] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._sleep = trio.CancelScope()

    def begin(self, story: "Story", coroutine: Coroutine[object, None, None]) -> None:
        """Drive a coroutine, which waits by means of `story`, until it waits for the first time."""
        self._under_way[story] = None
        story._begin(coroutine)  # noqa: SLF001

    def forget(self, story: "Story") -> None:
        """Forget a story that is over."""
        self._under_way.pop(story, None)

    def abort_all(self) -> None:
        """End all stories where they are."""
        for story in list(self._under_way):
            story.abort()

    def after(self, seconds: float, expire: Callable[[], None]) -> "Timer":
        """Have `expire` called after so many seconds, unless the timer is cancelled before."""
        timer = Timer(self, expire)
        when = trio.current_time() + seconds
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        if when < self._sleep.deadline:
            self._sleep.deadline = when
        return timer

    async def run(self) -> None:
        """Let timers expire, until cancelled."""
        timers = self._timers
        while True:
            deadline = timers[0][0] if timers else float("inf")
            with trio.CancelScope(deadline=deadline) as self._sleep:
                await trio.sleep_forever()
            now = trio.current_time()  # who sleeps again meanwhile has another turn
            while timers and timers[0][0] <= now:
                _, _, timer = heapq.heappop(timers)
                if timer.expire is None:
                    self._cancelled -= 1
                else:
                    expire, timer.expire = timer.expire, None
                    expire()

    def count_cancelled(self) -> None:
        """Count a timer that has been cancelled, and clear them away when they are many."""
        self._cancelled += 1
        timers = self._timers
        while timers and timers[0][2].expire is None:
            heapq.heappop(timers)
            self._cancelled -= 1
        if self._cancelled > max(_FEW, len(timers) // 2):
            timers[:] = [each for each in timers if each[2].expire is not None]
            heapq.heapify(timers)
            self._cancelled = 0


class Timer:
    """Something that is to be done at some time."""

    __slots__ = ("_stories", "expire")

    def __init__(self, stories: Stories, expire: Callable[[], None]) -> None:
        self._stories = stories
        self.expire: Callable[[], None] | None = expire  # None once it is over

    def cancel(self) -> None:
        """Do not do it, if it has not been done yet."""
        if self.expire is not None:
            self.expire = None
            self._stories.count_cancelled()


class Story:
    """What one coroutine can wait for."""

    __slots__ = ("_awaited", "_coroutine", "_steps", "_wanted", "loop", "stories")

    def __init__(self, stories: Stories) -> None:
        self.stories = stories
        self.loop = stories.loop
        self._coroutine: Coroutine[object, None, None] | None = None
        # What it waits for: the watcher of a socket, itself for any of its sockets, or what else
        # was agreed; None while it runs. And the events that count.
        self._awaited: object = None
        self._wanted = 0
        self._steps = 0  # since it has waited

    # Not `async`, which would make one more coroutine: what they return is awaited at once.

    def readable(self, sock: socket) -> Awaitable[None]:
        """Wait until a socket that had nothing to read may have something, or its end.

        Raises:
            OSError: ENOMEM or ENOSPC, see epoll_ctl(2).
        """
        self._awaited, self._wanted = self._watch(sock), _READABLE
        return _pause()

    def writable(self, sock: socket) -> Awaitable[None]:
        """Wait until a socket that took no more, or was to be connected, may have changed.

        Raises:
            OSError: as above.
        """
        self._awaited, self._wanted = self._watch(sock), _WRITABLE
        return _pause()

    async def any_writable(self, socks: list[socket]) -> None:
        """Wait until any of these sockets may have changed, as above.

        Raises:
            OSError: as above.
        """
        for sock in socks:
            self._watch(sock)
        self._awaited, self._wanted = self, _WRITABLE
        await _pause()

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        self._awaited = timer = self.stories.after(seconds, self._go_on)
        try:
            await _pause()
        finally:
            timer.cancel()

    def has_had_its_turn(self) -> bool:
        """Count a step that was taken without waiting; tell whether it is time to `give_turns`."""
        self._steps += 1
        return self._steps > _MOST_STEPS

    async def give_turns(self) -> None:
        """Wait until all that is ready now has had its turn."""
        self._awaited = turn = _Watcher(self)
        self.loop.call_soon(turn)
        await _pause()

    async def in_trio(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Wait for an async function that waits by means of trio; return what it returns.

        Raises:
            Whatever it raises.
        """
        scope = trio.CancelScope()
        results: list[T] = []
        errors: list[Exception] = []

        async def do() -> None:
            with scope:
                try:
                    results.append(await function(*args))
                except Exception as error:  # noqa: BLE001 - it goes on where it is waited for
                    errors.append(error)
            if self._awaited is scope:
                self._go_on()

        self._awaited = scope
        self.stories.nursery.start_soon(do)
        self.loop.let_tasks_run()
        try:
            await _pause()
        except BaseException:
            scope.cancel()
            raise
        if errors:
            raise errors[0]
        return results[0]

    def time_limit(self, seconds: float) -> "TimeLimit":
        """Return a context manager that ends what is done within it after so many seconds."""
        return TimeLimit(self, seconds)

    def throw(self, error: BaseException) -> None:
        """Raise an exception where the coroutine waits. To be called from outside of it."""
        if self._coroutine is not None:
            self._go_on(error)

    def abort(self) -> None:
        """End the coroutine where it waits; what it does at its end must not wait."""
        coroutine, self._coroutine, self._awaited = self._coroutine, None, None
        self.stories.forget(self)
        if coroutine is not None:
            coroutine.close()

    def _begin(self, coroutine: Coroutine[object, None, None]) -> None:
        self._coroutine = coroutine
        self._go_on()

    def _go_on(self, error: BaseException | None = None) -> None:
        coroutine = self._coroutine
        if coroutine is None:
            return
        self._awaited = None
        self._steps = 0
        try:
            if error is None:
                coroutine.send(None)
            else:
                coroutine.throw(error)
        except StopIteration:
            self._coroutine = None
            self.stories.forget(self)
        except Exception as fault:  # noqa: BLE001 - a bug met by one connection ends it alone
            self._coroutine = None
            self.stories.forget(self)
            self.stories.on_fault(fault)

    def _watch(self, sock: socket) -> "_Watcher":
        fd = sock.fileno()
        watcher = self.loop.watcher(fd)
        if watcher is None:
            watcher = _Watcher(self)
            self.loop.watch(fd, watcher, _EVENTS)
        assert isinstance(watcher, _Watcher)
        return watcher

    def on_event(self, watcher: "_Watcher", events: int) -> None:
        """Go on, if that is what was waited for."""
        # No events: it is a turn that was asked for.
        is_wanted = events & self._wanted or not events
        if is_wanted and (self._awaited is watcher or self._awaited is self):
            self._go_on()


class _Watcher:
    """Watches one socket of a story, from the first time that it is waited for; or has its turn."""

    __slots__ = ("_story",)

    def __init__(self, story: Story) -> None:
        self._story = story

    def on_event(self, events: int) -> None:
        """Tell the story."""
        self._story.on_event(self, events)

    def abort(self) -> None:
        """End the story."""
        self._story.abort()


class _TimeIsOver(BaseException):
    """Raised in a coroutine at its time limit; nobody but that limit is to catch it."""

    def __init__(self, limit: "TimeLimit") -> None:
        super().__init__()
        self.limit = limit


class TimeLimit:
    """Ends what is done within it when the time is over, quietly.

    Attributes:
        is_over: Whether that has happened.
    """

    __slots__ = ("_seconds", "_story", "_timer", "is_over")

    def __init__(self, story: Story, seconds: float) -> None:
        self._story = story
        self._seconds = seconds
        self.is_over = False

    def __enter__(self) -> Self:
        self._timer = self._story.stories.after(self._seconds, self._expire)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._timer.cancel()
        return isinstance(error, _TimeIsOver) and error.limit is self

    def _expire(self) -> None:
        self.is_over = True
        self._story.throw(_TimeIsOver(self))


@types.coroutine
def _pause() -> Generator[None, None, None]:
    """Wait until the story goes on."""
    yield
