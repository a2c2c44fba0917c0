"""Deadlines: a bug met by one who expires ends that one alone."""

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.engine.deadlines import Deadlines


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Item:
    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.happened: list[str] = []

    def expire(self) -> None:
        self.happened.append("expired")
        if self.fault is not None:
            raise self.fault

    def abort(self) -> None:
        self.happened.append("aborted")


@trio_test
async def test_a_fault_is_told_of_and_ends_that_one_alone(clock: MockClock) -> None:
    faults: list[Exception] = []
    deadlines: Deadlines[Item] = Deadlines(1.0, faults.append)
    fault = ZeroDivisionError()
    faulty, other = Item(fault), Item()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        for item in faulty, other:
            deadlines.add(item)
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert faults == [fault]
    assert faulty.happened == ["expired", "aborted"]
    assert other.happened == ["expired"]
