"""The relay against a model: whatever two peers do, and in whatever order.

The model of a direction is a number: how many bytes were sent. What is received has to be the
beginning of that, and the end comes after the last of them; after a reset it may come before.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import TypeVar

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay
from tests.support.daemon import PATIENCE
from tests.support.sockets import plain, reset, tcp_pair, unix_pair
from tests.support.strategies import steady

T = TypeVar("T")

# What is sent, again and again. A prime: no buffer of any size holds it a whole number of times.
_PERIOD = 1_000_003
_NOISE = Random(7).randbytes(_PERIOD) * 2

# More than both sockets' buffers, the relay's and a pipe hold, so that everything stalls at times.
_MOST = 4 << 20

_SIDES = st.sampled_from(["client", "backend"])
_OTHER = {"client": "backend", "backend": "client"}


class Running:
    """A relay in a thread of its own, so that the peers may wait in this one."""

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=[self._main])
        self._thread.start()
        assert self._started.wait(PATIENCE)

    async def _main(self) -> None:
        self.loop = EventLoop(self.faults.append)
        self.pipes = PipePool(limit=1)
        self.limit = ConnectionLimit()
        self.relay = self.make_relay()
        self._token = trio.lowlevel.current_trio_token()
        self._end = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.loop.run)
            nursery.start_soon(self.relay.run)
            self._started.set()
            await self._end.wait()
            nursery.cancel_scope.cancel()
        self.loop.shut()
        self.pipes.close()

    def make_relay(self) -> Relay:
        return Relay(self.loop, self.pipes, self.faults.append)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the thread of the relay."""
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def wait_until_empty(self) -> None:
        """Wait until no connection is left."""

        async def empty() -> None:
            with trio.fail_after(PATIENCE):
                await self.limit.wait_until_empty()

        trio.from_thread.run(empty, trio_token=self._token)

    def close(self) -> None:
        """End."""
        self.call(self._end.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class Peers(RuleBasedStateMachine):
    """A client and a backend with the relay between them."""

    running: Running

    @initialize(small=st.booleans())
    def connect(self, small: bool) -> None:
        client, near = tcp_pair()
        backend, far = unix_pair()
        if small:
            for sock in (client, near, backend, far):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.ends = {"client": client, "backend": backend}
        self.sent = dict.fromkeys(self.ends, 0)
        self.received = dict.fromkeys(self.ends, 0)
        self.has_ended = dict.fromkeys(self.ends, False)
        self.is_broken = False
        self.given = plain(near), plain(far)
        running = self.running

        def join() -> None:
            running.limit.add()
            running.relay.join(*self.given, lambda *_: running.limit.remove())

        running.call(join)

    @precondition(lambda self: not self.is_broken)
    @rule(side=_SIDES, size=st.integers(1, 1 << 18), times=st.integers(1, 6))
    def send(self, side: str, size: int, times: int) -> None:
        """Send as much as is taken."""
        if self.has_ended[side]:
            return
        self.ends[side].setblocking(False)
        for _ in range(times):
            begin = self.sent[side] % _PERIOD
            size = min(size, _MOST - self.sent[side])
            with contextlib.suppress(BlockingIOError):
                data = _NOISE[begin : begin + size]
                self.sent[side] += self.ends[side].send(data)

    @precondition(lambda self: not self.is_broken)
    @rule(side=_SIDES, size=st.integers(1, 1 << 19))
    def receive(self, side: str, size: int) -> None:
        """Receive something, or the end, where one of them has to come; else there is nothing."""
        other = _OTHER[side]
        if self.sent[other] > self.received[side] or self.has_ended[other]:
            self.take(side, size)
        else:
            self.ends[side].setblocking(False)
            with pytest.raises(BlockingIOError):
                self.ends[side].recv(1)

    @precondition(lambda self: not self.is_broken)
    @rule(side=_SIDES)
    def end(self, side: str) -> None:
        """Say that there is no more to come."""
        if not self.has_ended[side]:
            self.ends[side].shutdown(socket.SHUT_WR)
            self.has_ended[side] = True

    @precondition(lambda self: not (self.is_broken or all(self.has_ended.values())))
    @rule(side=_SIDES)
    def break_off(self, side: str) -> None:
        """Go away, with a reset where there is such a thing."""
        self.go_away(side)
        self.is_broken = True
        del self.ends[side]

    def go_away(self, side: str) -> None:
        if side == "client":
            reset(self.ends[side])
        else:
            self.ends[side].close()

    @precondition(lambda self: self.is_broken)
    @rule()
    def receive_what_is_left(self) -> None:
        """Whoever is still there may receive some of what was on the way, or the news."""
        for side in self.ends:
            with contextlib.suppress(ConnectionResetError):
                self.take(side, 10_000)

    @invariant()
    def no_bug(self) -> None:
        assert self.running.faults == []

    def take(self, side: str, size: int = 1 << 20) -> bool:
        """Receive, and compare; False at the end."""
        sock = self.ends[side]
        sock.settimeout(PATIENCE)
        data = sock.recv(min(size, _PERIOD))
        begin = self.received[side] % _PERIOD
        assert data == _NOISE[begin : begin + len(data)]
        self.received[side] += len(data)
        other = _OTHER[side]
        assert self.received[side] <= self.sent[other]
        if not data and not self.is_broken:
            assert self.has_ended[other]
            assert self.received[side] == self.sent[other]
        return bool(data)

    def teardown(self) -> None:
        if not hasattr(self, "ends"):
            return
        if not self.is_broken:
            for side in self.ends:
                self.end(side)
        for side in self.ends:
            # What was broken off comes as an end or as a reset; both, after nothing but what was
            # sent.
            with contextlib.suppress(ConnectionResetError if self.is_broken else ZeroDivisionError):
                while self.take(side):
                    pass
        for sock in self.ends.values():
            sock.close()
        self.running.wait_until_empty()
        assert [sock.fileno() for sock in self.given] == [-1, -1]
        self.no_bug()


@pytest.fixture
def _running() -> Iterator[None]:
    Peers.running = Running()
    yield
    Peers.running.close()


@pytest.mark.usefixtures("_running")
def test_whatever_the_peers_do_nothing_is_lost_and_nothing_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    run_state_machine_as_test(
        Peers, settings=settings(steady, max_examples=80, stateful_step_count=25)
    )
    # All but the pipe that is kept for the next who needs it.
    assert len(os.listdir("/proc/self/fd")) <= before + 2
