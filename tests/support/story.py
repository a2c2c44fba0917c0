"""Coroutines that a story drives, for tests that are tasks of trio's; and the other way round."""

from _socket import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from sniproxy.engine.loop import EventLoop
from sniproxy.engine.story import Stories, Story

T = TypeVar("T")


@asynccontextmanager
async def stories() -> AsyncIterator[Stories]:
    """All that stories need; a fault in one fails the test."""
    faults: list[Exception] = []
    loop = EventLoop(faults.append)
    try:
        async with trio.open_nursery() as nursery:
            it = Stories(loop, nursery, faults.append)
            nursery.start_soon(loop.run)
            nursery.start_soon(it.run)
            yield it
            it.abort_all()
            nursery.cancel_scope.cancel()
    finally:
        # At once: what the collector closes later is missed by whoever counts descriptors.
        loop.shut()
    if faults:
        raise faults[0]


async def tell(it: Stories, run: Callable[[Story], Awaitable[T]]) -> Callable[[], T]:
    """Have a story drive a coroutine; return a function that returns, or raises, what it did."""
    results: list[T] = []
    errors: list[Exception] = []
    is_over = trio.Event()
    story = Story(it)

    async def keep() -> None:
        try:
            results.append(await run(story))
        except Exception as error:  # noqa: BLE001 - it is raised in the test
            errors.append(error)
        finally:
            is_over.set()

    def result() -> T:
        if errors:
            raise errors[0]
        return results[0]

    it.begin(story, keep())
    try:
        await is_over.wait()
    finally:
        story.abort()
    return result


async def told(run: Callable[[Story], Awaitable[T]]) -> T:
    """Return what a coroutine returns that a story drives, alone in its loop."""
    with trio.fail_after(5):
        async with stories() as it:
            result = await tell(it, run)
    return result()


class TrioStory(Story):
    """What a task of trio's can pass for a story: it waits by means of trio."""

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop

    def has_had_its_turn(self) -> bool:
        return False  # the test that uses it says when it is over

    async def readable(self, sock: socket) -> None:
        await trio.lowlevel.wait_readable(sock.fileno())

    async def writable(self, sock: socket) -> None:
        await trio.lowlevel.wait_writable(sock.fileno())

    def time_limit(self, seconds: float) -> trio.CancelScope:  # type: ignore[override]
        return trio.move_on_after(seconds)
