"""The loop: turns, other tasks, and what a fault may not do."""

import _socket
import os
import select
import socket
import time

import pytest
import trio
from trio.testing import trio_test

from sniproxy.engine import loop as loop_module
from sniproxy.engine.loop import EventLoop


class Recorder:
    """A watcher that keeps what it is told, and can do something about it."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.aborted = 0

    def on_event(self, events: int) -> None:
        self.events.append(events)

    def abort(self) -> None:
        self.aborted += 1


class Faulty(Recorder):
    def on_event(self, events: int) -> None:
        super().on_event(events)
        raise ZeroDivisionError


async def until(condition: "Recorder", count: int) -> None:
    with trio.fail_after(5):
        while len(condition.events) < count:
            await trio.lowlevel.checkpoint()


@trio_test
async def test_a_fault_ends_its_watcher_alone() -> None:
    faults: list[Exception] = []
    loop = EventLoop(faults.append)
    faulty, other = Faulty(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(faulty)
        loop.call_soon(other)
        await until(other, 1)
        assert [type(fault) for fault in faults] == [ZeroDivisionError]
        assert (faulty.aborted, other.aborted) == (1, 0)
        nursery.cancel_scope.cancel()
    loop.shut()


@trio_test
async def test_a_fault_at_an_event_ends_its_watcher_alone() -> None:
    faults: list[Exception] = []
    loop = EventLoop(faults.append)
    pipes = [os.pipe() for _ in range(3)]
    watchers = [Recorder(), Faulty(), Recorder()]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        for (reader, writer), watcher in zip(pipes, watchers, strict=True):
            loop.watch(reader, watcher, select.EPOLLIN | select.EPOLLET)
            os.write(writer, b"x")
        for watcher in watchers:
            await until(watcher, 1)
        assert [type(fault) for fault in faults] == [ZeroDivisionError]
        assert [watcher.aborted for watcher in watchers] == [0, 1, 0]
        nursery.cancel_scope.cancel()
    loop.shut()
    for end in (end for pipe in pipes for end in pipe):
        os.close(end)


@trio_test
async def test_a_fault_in_a_turn_ends_neither_those_before_nor_those_behind_it() -> None:
    faults: list[Exception] = []
    loop = EventLoop(faults.append)
    before, faulty, behind = Recorder(), Faulty(), Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        for times in 1, 2:
            for watcher in before, faulty, behind:
                loop.call_soon(watcher)
            await until(behind, times)
            assert before.events == faulty.events == behind.events == [0] * times
        assert [type(fault) for fault in faults] == [ZeroDivisionError] * 2
        assert (before.aborted, faulty.aborted, behind.aborted) == (0, 2, 0)
        nursery.cancel_scope.cancel()
    loop.shut()


@trio_test
async def test_who_has_asked_for_a_turn_is_aborted_when_the_loop_is_cancelled() -> None:
    loop = EventLoop(lambda error: None)
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())

    class Closer(Recorder):
        def abort(self) -> None:
            super().abort()
            loop.close(plain)

    had_its_turn, asks, closes = Recorder(), Recorder(), Closer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(had_its_turn)
        await until(had_its_turn, 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for watcher in asks, closes:
            loop.call_soon(watcher)
        nursery.cancel_scope.cancel()
    assert [each.events for each in (had_its_turn, asks, closes)] == [[0], [], []]
    assert [each.aborted for each in (had_its_turn, asks, closes)] == [0, 1, 1]
    # And whom it closes then is closed.
    assert plain.fileno() == -1
    loop.shut()
    far.close()


@trio_test
async def test_who_is_watched_is_aborted_when_the_loop_is_cancelled() -> None:
    loop = EventLoop(lambda error: None)
    recorder = Recorder()
    near, far = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.watch(near.fileno(), recorder, select.EPOLLIN)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (recorder.events, recorder.aborted) == ([], 1)
    loop.shut()
    near.close()
    far.close()


@trio_test
async def test_who_asks_again_and_again_is_aborted_when_the_loop_is_cancelled() -> None:
    loop = EventLoop(lambda error: None)

    class Endless(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            loop.call_soon(self)

    endless = Endless()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(endless)
        await until(endless, 10)
        nursery.cancel_scope.cancel()
    assert endless.aborted == 1
    loop.shut()


@trio_test
async def test_an_endless_watcher_leaves_others_their_turn() -> None:
    loop = EventLoop(lambda error: None)

    class Endless(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            loop.call_soon(self)

    endless, other = Endless(), Recorder()
    reader, writer = os.pipe()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(endless)
        loop.watch(reader, other, select.EPOLLIN | select.EPOLLET)
        os.write(writer, b"x")
        await until(other, 1)  # which is a task of trio's that has its turn, too
        assert endless.events
        nursery.cancel_scope.cancel()
    loop.shut()
    os.close(reader)
    os.close(writer)


@trio_test
async def test_a_closed_socket_is_told_nothing_in_the_same_turn() -> None:
    loop = EventLoop(lambda error: None)
    ends = [socket.socketpair() for _ in range(2)]
    near = [_socket.socket(end.family, end.type, 0, end.detach()) for end, _ in ends]

    class Closer(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            for sock in near:
                loop.close(sock)

    watchers = [Closer(), Closer()]
    for sock, watcher in zip(near, watchers, strict=True):
        loop.watch(sock.fileno(), watcher, select.EPOLLIN)
    for _, far in ends:
        far.send(b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert sum(len(watcher.events) for watcher in watchers) == 1
        assert [sock.fileno() for sock in near] == [-1, -1]
        nursery.cancel_scope.cancel()
    loop.shut()
    for _, far in ends:
        far.close()


@trio_test
async def test_whom_a_task_closes_in_the_middle_of_a_turn_is_closed() -> None:
    # At the checkpoint that a turn ends with, other tasks run, and the loop is awake already.
    loop = EventLoop(lambda error: None)
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())
    asleep = trio.Event()

    class Busy(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            if asleep.is_set():
                return
            loop.call_soon(self)

    async def close() -> None:
        await until(busy, 1000)
        asleep.set()
        loop.close(plain)

    busy = Busy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(busy)
        nursery.start_soon(close)
        with trio.fail_after(5):
            assert await trio.socket.from_stdlib_socket(far).recv(1) == b""
        nursery.cancel_scope.cancel()
    loop.shut()
    far.close()


@trio_test
async def test_what_a_task_closes_at_a_checkpoint_is_closed_in_that_turn() -> None:
    """While others keep the loop busy: it does not wait until they rest."""
    loop = EventLoop(lambda error: None)
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())

    class Busy(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            loop.call_soon(self)

    busy = Busy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.call_soon(busy)
        await until(busy, 10)
        loop.close(plain)
        turns = len(busy.events)
        while plain.fileno() >= 0:
            await trio.lowlevel.checkpoint()
            # The turn that was under way, and those up to the next checkpoint.
            assert len(busy.events) < turns + 100_000
        assert far.recv(1) == b""
        nursery.cancel_scope.cancel()
    loop.shut()
    far.close()


@trio_test
async def test_what_a_task_closes_at_the_last_checkpoint_before_a_rest_is_closed() -> None:
    loop = EventLoop(lambda error: None)
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())
    had_its_turn = trio.Event()

    class Slow(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            time.sleep(2 * loop_module._TURN)  # so that other tasks run before the loop sleeps
            had_its_turn.set()

    async def close() -> None:
        await had_its_turn.wait()
        loop.close(plain)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked(0.01)
        loop.call_soon(Slow())
        with trio.fail_after(5):
            assert await trio.socket.from_stdlib_socket(far).recv(1) == b""
        nursery.cancel_scope.cancel()
    loop.shut()
    far.close()


@pytest.mark.parametrize("is_told", [False, True])
@trio_test
async def test_what_is_closed_in_a_turn_has_given_its_descriptor_back_when_tasks_run(
    is_told: bool,
) -> None:
    """A task may open others, and there may be no descriptor to spare."""
    loop = EventLoop(lambda error: None)
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())
    had_its_turn = trio.Event()
    found: list[int] = []

    class SlowCloser(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            time.sleep(2 * loop_module._TURN)
            loop.close(plain)
            had_its_turn.set()

    async def look() -> None:
        await had_its_turn.wait()
        found.append(plain.fileno())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked(0.01)
        if is_told:
            loop.watch(plain.fileno(), SlowCloser(), select.EPOLLIN)
            far.send(b"x")
        else:
            loop.call_soon(SlowCloser())
        with trio.fail_after(5):
            await had_its_turn.wait()
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert found == [-1]
    loop.shut()
    far.close()


@trio_test
async def test_a_task_may_ask_for_a_turn_or_close_while_the_loop_sleeps() -> None:
    loop = EventLoop(lambda error: None)
    recorder = Recorder()
    near, far = socket.socketpair()
    plain = _socket.socket(near.family, near.type, 0, near.detach())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        loop.call_soon(recorder)
        await until(recorder, 1)
        assert recorder.events == [0]
        await trio.testing.wait_all_tasks_blocked(0.01)
        loop.close(plain)
        with trio.fail_after(5):
            assert await trio.socket.from_stdlib_socket(far).recv(1) == b""
        nursery.cancel_scope.cancel()
    loop.shut()
    far.close()


@trio_test
async def test_the_loop_is_woken_once_and_only_while_it_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time is a system call, and most of those who ask do so in a turn."""
    loop = EventLoop(lambda error: None)
    write, woken = os.eventfd_write, 0

    def count(fd: int, value: int) -> None:
        nonlocal woken
        woken += 1
        write(fd, value)

    class Twice(Recorder):
        def on_event(self, events: int) -> None:
            super().on_event(events)
            if len(self.events) < 2:
                loop.call_soon(self)

    monkeypatch.setattr(os, "eventfd_write", count)
    watchers = [Twice() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for times in 1, 2:
            for watcher in watchers:
                watcher.events.clear()
                loop.call_soon(watcher)
            assert woken == times
            for watcher in watchers:
                await until(watcher, 2)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert woken == times
        near, far = socket.socketpair()
        loop.watch(near.fileno(), woken_by_event := Twice(), select.EPOLLIN | select.EPOLLET)
        far.send(b"x")
        await until(woken_by_event, 2)
        assert woken == 2
        nursery.cancel_scope.cancel()
    loop.shut()
    near.close()
    far.close()


class Epoll:
    """An epoll set that keeps how long its user was ready to wait."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.waits: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        self.waits.append(timeout)
        return self._epoll.poll(timeout, most)


class LetsTasksRun(Recorder):
    def __init__(self, loop: EventLoop) -> None:
        super().__init__()
        self._loop = loop

    def on_event(self, events: int) -> None:
        super().on_event(events)
        self._loop.let_tasks_run()


@trio_test
async def test_the_next_event_is_waited_for_unless_a_task_is_to_run() -> None:
    loop = EventLoop(lambda error: None)
    loop._epoll = epoll = Epoll(loop._epoll)  # type: ignore[assignment]
    near, far = socket.socketpair()
    other, other_far = socket.socketpair()
    recorder = Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        loop.watch(near.fileno(), recorder, select.EPOLLIN | select.EPOLLET)
        await trio.testing.wait_all_tasks_blocked(0.01)

        async def waits_after_event() -> list[float]:
            epoll.waits.clear()
            far.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            return epoll.waits

        short = loop_module._SHORT_WAIT
        assert await waits_after_event() == [short, short]
        loop.watch(other.fileno(), LetsTasksRun(loop), select.EPOLLIN | select.EPOLLET)
        epoll.waits.clear()
        other_far.send(b"x")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert epoll.waits == [short, 0]
        # And that is over with the next one.
        assert await waits_after_event() == [short, short]
        assert len(recorder.events) == 2
        nursery.cancel_scope.cancel()
    loop.shut()
    for end in near, far, other, other_far:
        end.close()
