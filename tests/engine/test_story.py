"""Coroutines that the loop drives: what they wait for, and how they end."""

import _socket
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
from trio.testing import trio_test

from sniproxy.engine.loop import EventLoop
from sniproxy.engine.story import Stories, Story
from tests.support.sockets import plain, unix_pair
from tests.support.story import stories, tell, told


@contextmanager
def pair() -> Iterator[tuple[socket.socket, _socket.socket]]:
    far, near = unix_pair()
    near.setblocking(False)
    inside = plain(near)
    with far:
        yield far, inside
    inside.close()


@asynccontextmanager
async def waiting(it: Stories, log: list[str], near: _socket.socket) -> AsyncIterator[Story]:
    """A story that waits for a socket to become readable, until it is told otherwise."""
    story = Story(it)

    async def run() -> None:
        try:
            await story.readable(near)
            log.append("went on")
        except ZeroDivisionError:
            log.append("thrown")
        finally:
            log.append("ended")

    it.begin(story, run())
    await trio.testing.wait_all_tasks_blocked(0.01)
    yield story


async def read(story: Story, near: _socket.socket) -> bytes:
    while True:
        try:
            return near.recv(100)
        except BlockingIOError:
            await story.readable(near)


@trio_test
async def test_it_begins_at_once_and_waits_for_what_it_wants_to_read() -> None:
    with pair() as (far, near):
        async with stories() as it:
            log: list[bytes] = []
            story = Story(it)

            async def run() -> None:
                log.append(b"begun")
                log.append(await read(story, near))
                log.append(await read(story, near))

            it.begin(story, run())
            assert log == [b"begun"]
            for word in b"one", b"two":
                await trio.testing.wait_all_tasks_blocked(0.01)
                far.send(word)
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert log == [b"begun", b"one", b"two"]


@trio_test
async def test_it_waits_until_more_can_be_written() -> None:
    with pair() as (far, near):
        async with stories() as it:
            sizes: list[int] = []

            async def run(story: Story) -> None:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        near.send(bytes(1 << 16))
                # What can be read is not what is waited for.
                far.send(b"x")
                await story.writable(near)
                sizes.append(near.send(b"more"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell, it, run)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert sizes == []
                while not sizes:
                    far.recv(1 << 20)
                    await trio.testing.wait_all_tasks_blocked(0.01)
    assert sizes == [4]


@trio_test
async def test_an_event_of_another_socket_is_not_what_is_waited_for() -> None:
    with pair() as (far, near), pair() as (other_far, other):
        async with stories() as it:

            async def run(story: Story) -> bytes:
                with story.time_limit(0.02):
                    await story.readable(other)
                return await read(story, near)

            async with trio.open_nursery() as nursery:
                results: list[bytes] = []

                async def keep() -> None:
                    results.append((await tell(it, run))())

                nursery.start_soon(keep)
                await trio.sleep(0.05)
                other_far.send(b"other")
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert results == []
                far.send(b"near")
        assert results == [b"near"]


@trio_test
async def test_what_happened_while_it_did_something_else_is_found_by_trying() -> None:
    with pair() as (far, near):

        async def run(story: Story) -> tuple[bytes, bytes]:
            first = await read(story, near)
            far.send(b"two")
            await story.sleep(0.02)  # in which the edge is told, to nobody
            return first, await read(story, near)

        far.send(b"one")
        assert await told(run) == (b"one", b"two")


@trio_test
async def test_the_time_is_over_and_it_goes_on_behind_the_limit() -> None:
    with pair() as (_, near):

        async def run(story: Story) -> list[bool]:
            with story.time_limit(5) as outer, story.time_limit(0.01) as inner:
                await story.readable(near)
            return [outer.is_over, inner.is_over]

        assert await told(run) == [False, True]


@trio_test
async def test_the_outer_limit_ends_what_is_within_the_inner_one_too() -> None:
    with pair() as (_, near):

        async def run(story: Story) -> list[str]:
            log = []
            with story.time_limit(0.01) as outer:
                with story.time_limit(5) as inner:
                    await story.readable(near)
                log.append("never reached")
            return [*log, f"{outer.is_over} {inner.is_over}"]

        assert await told(run) == ["True False"]


@trio_test
async def test_nobody_but_the_limit_catches_the_end_of_the_time() -> None:
    with pair() as (_, near):

        async def run(story: Story) -> bool:
            with story.time_limit(0.01) as limit:
                with contextlib.suppress(Exception):
                    await story.readable(near)
                pytest.fail("it was caught")
            return limit.is_over

        assert await told(run)


@trio_test
async def test_a_limit_that_was_kept_ends_nothing_later() -> None:
    async def run(story: Story) -> bool:
        with story.time_limit(0.02) as limit:
            await story.sleep(0.001)
        await story.sleep(0.05)
        return limit.is_over

    assert not await told(run)


@trio_test
async def test_timers_expire_in_the_order_of_their_times() -> None:
    async with stories() as it:
        log: list[int] = []
        for number in 3, 1, 2:
            it.after(number / 100, lambda number=number: log.append(number))  # type: ignore[misc]
        it.after(0.015, lambda: log.append(0)).cancel()
        await trio.sleep(0.06)
        assert log == [1, 2, 3]


@trio_test
async def test_an_earlier_timer_does_not_wait_for_the_others() -> None:
    async with stories() as it:
        log: list[str] = []
        it.after(5, lambda: log.append("late"))
        await trio.testing.wait_all_tasks_blocked()
        it.after(0.01, lambda: log.append("early"))
        await trio.sleep(0.03)
        assert log == ["early"]


@trio_test
async def test_cancelled_timers_do_not_pile_up() -> None:
    async with stories() as it:
        it.after(60, lambda: None)  # so that those behind it are not at the front
        for _ in range(10_000):
            it.after(61, lambda: None).cancel()
        assert len(it._timers) < 200
        kept = [it.after(61, lambda: None) for _ in range(1000)]
        for _ in range(10_000):
            it.after(62, lambda: None).cancel()
        assert 1000 < len(it._timers) < 2500
        for timer in kept:
            timer.cancel()
        assert len(it._timers) < 200


@trio_test
async def test_what_only_trio_can_wait_for() -> None:
    async def double(number: int) -> int:
        await trio.sleep(0.01)
        if not number:
            raise ZeroDivisionError
        return 2 * number

    async def run(story: Story) -> list[int]:
        with pytest.raises(ZeroDivisionError):
            await story.in_trio(double, 0)
        return [await story.in_trio(double, number) for number in (1, 2)]

    assert await told(run) == [2, 4]


@trio_test
async def test_at_the_time_limit_the_task_of_trio_is_cancelled() -> None:
    log: list[str] = []

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            log.append("cancelled")

    async def run(story: Story) -> bool:
        with story.time_limit(0.01) as limit:
            await story.in_trio(wait)
        await story.sleep(0.01)
        return limit.is_over

    assert await told(run)
    assert log == ["cancelled"]


@trio_test
async def test_an_exception_is_thrown_where_it_waits() -> None:
    with pair() as (_, near):
        async with stories() as it:
            log: list[str] = []
            async with waiting(it, log, near) as story:
                story.throw(ZeroDivisionError())
                assert log == ["thrown", "ended"]
                story.throw(ZeroDivisionError())  # it is over, and that is no fault
            assert log == ["thrown", "ended"]


@trio_test
async def test_it_is_aborted_where_it_waits_alone_or_with_all_others() -> None:
    with pair() as (_, near), pair() as (_, other):
        async with stories() as it:
            log: list[str] = []
            async with waiting(it, log, near) as story, waiting(it, log, other):
                story.abort()
                assert log == ["ended"]
                it.abort_all()
                assert log == ["ended"] * 2


@trio_test
async def test_whoever_waits_is_aborted_when_the_loop_ends() -> None:
    with pair() as (_, near):
        log: list[str] = []
        loop = EventLoop(lambda error: None)
        async with trio.open_nursery() as nursery:
            it = Stories(loop, nursery, lambda error: None)
            nursery.start_soon(loop.run)
            async with waiting(it, log, near):
                nursery.cancel_scope.cancel()
        assert log == ["ended"]
        loop.shut()


@trio_test
async def test_a_fault_ends_its_story_alone() -> None:
    with pair() as (far, near):
        log: list[str] = []
        faults: list[Exception] = []
        loop = EventLoop(faults.append)
        async with trio.open_nursery() as nursery:
            it = Stories(loop, nursery, faults.append)
            nursery.start_soon(loop.run)
            faulty = Story(it)

            async def run() -> None:
                raise ZeroDivisionError

            it.begin(faulty, run())
            async with waiting(it, log, near):
                assert [type(fault) for fault in faults] == [ZeroDivisionError]
                far.send(b"x")
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert log == ["went on", "ended"]
            nursery.cancel_scope.cancel()
        loop.shut()


@trio_test
async def test_nothing_is_left_of_stories_that_are_over() -> None:
    before = os.listdir("/proc/self/fd")
    async with stories() as it:
        for _ in range(3):
            with pair() as (far, near):
                far.send(b"x")

                async def run(story: Story, near: _socket.socket = near) -> None:
                    with story.time_limit(5):
                        assert await read(story, near) == b"x"

                (await tell(it, run))()
        assert not it._under_way
        assert not it._timers
    assert os.listdir("/proc/self/fd") == before
