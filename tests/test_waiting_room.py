"""Who waits for a backend, and how often it is looked for. On a clock that does not wait."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy import waiting_room
from sniproxy.waiting_room import WaitingRoom


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Looks:
    """What looks cost, and how many there were at each backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spent = 0.0
        self.of: Counter[str] = Counter()
        monkeypatch.setattr(waiting_room, "perf_counter", lambda: self.spent)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


class Guest:
    """A client who waits for `entry` until somebody says otherwise."""

    def __init__(self, looks: Looks, entry: str, *, costs: float = 0.00005) -> None:
        self.wants: str | None = entry
        self.since = trio.current_time()
        self.looked_at: list[float] = []
        self.is_aborted = self.is_told = False
        self._looks = looks
        self.costs = costs

    def try_again(self) -> str | None:
        self.looked_at.append(trio.current_time())
        self._looks.spent += self.costs
        if self.wants == "bug":
            raise RuntimeError
        if self.wants is not None:
            self._looks.of[self.wants] += 1
        return self.wants

    def on_away(self) -> None:
        self.is_told = True

    def give_way(self) -> None:
        raise AssertionError

    def abort(self) -> None:
        self.is_aborted = True


@asynccontextmanager
async def running(
    on_fault: Callable[[Exception], None] = lambda error: None,
) -> AsyncIterator[WaitingRoom]:
    room = WaitingRoom(0.001, 0.1, on_fault)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.run)
        await trio.testing.wait_all_tasks_blocked()
        yield room
        nursery.cancel_scope.cancel()


@trio_test
async def test_one_look_serves_all_who_wait_for_the_same(clock: MockClock, looks: Looks) -> None:
    async with running() as room:
        guests = [Guest(looks, "a") for _ in range(200)]
        for guest in guests:
            room.add(guest, "a")
        await trio.sleep(10)
        assert looks.of["a"] == len(guests[0].looked_at) < 120
        assert not any(guest.looked_at for guest in guests[1:])
        assert room.guests() == guests
        # It is there: all are connected, those who came first first.
        for guest in guests:
            guest.wants = None
        await trio.sleep(0.2)
        assert len(room) == 0
        assert all(len(guest.looked_at) == 1 for guest in guests[1:])
        at = [guest.looked_at[-1] for guest in guests]
        assert at == sorted(at)


@trio_test
async def test_a_hundred_that_are_away_take_two_percent(clock: MockClock, looks: Looks) -> None:
    async with running() as room:
        for number in range(100):
            room.add(Guest(looks, str(number)), str(number))
        await trio.sleep(60)
        assert 0.5 < looks.spent < 0.021 * 60
        # All alike, and each twice in a second or so.
        assert min(looks.of.values()) > 60 * 1.5
        assert max(looks.of.values()) < 1.5 * min(looks.of.values())


@trio_test
async def test_not_even_those_that_are_slow_to_look_at_take_more(
    clock: MockClock, looks: Looks
) -> None:
    async with running() as room:
        for number in range(10):
            room.add(Guest(looks, str(number), costs=0.005), str(number))
        room.add(Guest(looks, "quick"), "quick")
        await trio.sleep(60)
        assert looks.spent < 0.022 * 60
        # Who takes long pays for that alone.
        assert looks.of["quick"] > 9 * 60


@trio_test
async def test_one_look_that_took_long_delays_nobody_else(clock: MockClock, looks: Looks) -> None:
    async with running() as room:
        slow, other = Guest(looks, "a", costs=0.2), Guest(looks, "b")
        for guest in slow, other:
            room.add(guest, "a" if guest is slow else "b")
        await trio.sleep(0.05)
        slow.costs = 0.00005  # it was the machine
        await trio.sleep(3)
        assert looks.of["b"] > 25
        assert looks.of["a"] > 15


@trio_test
async def test_all_who_wait_for_it_hear_that_it_is_away(clock: MockClock, looks: Looks) -> None:
    async with running() as room:
        guests = [Guest(looks, "a") for _ in range(3)]
        for guest in guests:
            room.tell_away(guest)
            room.add(guest, "a")
        room.tell_away(guests[0])
        assert [guest.is_told for guest in guests] == [False, True, True]


@trio_test
async def test_who_turns_out_to_wait_for_something_else_holds_up_nobody(
    clock: MockClock, looks: Looks
) -> None:
    async with running() as room:
        first, second = Guest(looks, "a"), Guest(looks, "a")
        for guest in first, second:
            room.add(guest, "a")
        await trio.sleep(1)
        first.wants, second.wants = "b", None
        await trio.sleep(0.2)
        assert room.guests() == [first]
        assert len(second.looked_at) == 1
        assert room.oldest() is first
        room.discard(first)
        room.discard(first)
        looked_at = len(first.looked_at)
        await trio.sleep(1)
        assert len(first.looked_at) == looked_at


@trio_test
async def test_who_comes_back_is_looked_at_soon(clock: MockClock, looks: Looks) -> None:
    async with running() as room:
        guest = Guest(looks, "a")
        for _ in range(3):
            room.add(guest, "a")
            await trio.sleep(0.002)
            assert guest.looked_at[-1] == pytest.approx(trio.current_time(), abs=0.002)
            room.discard(guest)
            await trio.sleep(1)
            assert room.oldest() is None


@trio_test
async def test_a_bug_ends_one_wait_alone(clock: MockClock, looks: Looks) -> None:
    faults: list[Exception] = []
    async with running(faults.append) as room:
        broken, other = Guest(looks, "bug"), Guest(looks, "a")
        for guest in broken, other:
            room.add(guest, "a")
        await trio.sleep(1)
        assert broken.is_aborted
        assert [type(fault) for fault in faults] == [RuntimeError]
        assert room.guests() == [other]
        assert other.looked_at
