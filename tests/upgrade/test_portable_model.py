"""The relay against its model, while connections go from one process to another, and back."""

import os
import time
from collections.abc import Iterator
from typing import ClassVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from sniproxy.config import Config
from sniproxy.engine.relay import Relay
from sniproxy.hosts import HostsDirectory
from sniproxy.log import Log
from sniproxy.session import Sessions
from sniproxy_hostname import directory_namer
from tests.engine.test_relay_model import _SIDES, Peers, Running
from tests.support.daemon import eventually
from tests.support.strategies import steady
from tests.upgrade.moving import Batch

# What may happen while it stands still. Few break off: that is the end of an example.
_MEANWHILE = st.sampled_from([*[""] * 8, "send", "send", "flood", "flood", "end", "break_off"])


class Copy(Running):
    """A copy of the daemon, as far as connections are concerned that are relayed."""

    def make_relay(self) -> Relay:
        relay = super().make_relay()
        hosts = HostsDirectory(directory_namer(hashed=False))
        hosts.close()  # nobody is looked up
        self.sessions = Sessions(Config(), self.loop, relay, hosts, Log(), self.limit)
        return relay


class Moving(Peers):
    """A client and a backend, with one copy or the other between them."""

    copies: ClassVar[list[Copy]]

    def __init__(self) -> None:
        super().__init__()
        self.running = self.copies[0]

    @initialize(copying=st.sampled_from([None, None, 0, 1]))
    def choose(self, copying: int | None) -> None:
        """Splice, but for one of them perhaps."""
        for number, copy in enumerate(self.copies):
            copy.relay.can_splice = number != copying

    def break_off(self, side: str) -> None:
        """Go away; here this is no rule."""
        self.go_away(side)
        self.is_broken = True
        del self.ends[side]

    @precondition(lambda self: not self.is_broken)
    @rule(side=_SIDES)
    def flood(self, side: str) -> None:
        """Send until all on the way is full."""
        for _ in range(5):
            self.send(side, 1 << 19, 6)
            time.sleep(0.001)

    @rule(goes=st.booleans(), word=_MEANWHILE, side=_SIDES)
    def move(self, goes: bool, word: str, side: str) -> None:
        """Have it stand still, and go on here or there."""
        old = cast("Copy", self.running)
        new = self.copies[1 - self.copies.index(old)]
        batch = old.call(lambda: Batch(old.sessions))
        if self.is_broken:
            pass
        elif word == "send":
            self.send(side, 10_000, 1)
        elif word == "flood":
            self.flood(side)
        elif word == "end":
            self.end(side)
        elif word and not all(self.has_ended.values()):
            self.break_off(side)
        if goes:
            old.call(batch.let_go)
            self.running = new
            new.call(lambda: batch.revive(new.sessions))
            if batch.records:
                # They belong to the other copy now, and are closed here.
                assert old.call(lambda: [sock.fileno() for sock in self.given]) == [-1, -1]
            elif old.limit.open:
                # It is just being closed.
                self.running = old
        else:
            old.call(batch.resume)

    def teardown(self) -> None:
        super().teardown()
        assert [copy.limit.open for copy in self.copies] == [0, 0]


@pytest.fixture
def _copies() -> Iterator[None]:
    Moving.copies = [Copy(), Copy()]
    yield
    for copy in Moving.copies:
        copy.close()


@pytest.mark.usefixtures("_copies")
def test_whatever_the_peers_do_nothing_is_lost_by_moving() -> None:
    before = len(os.listdir("/proc/self/fd"))
    run_state_machine_as_test(
        Moving, settings=settings(steady, max_examples=60, stateful_step_count=30)
    )
    # All but pipes that are kept for the next who needs one, those from the other copy, too.
    kept = sum(len(copy.pipes._spare) for copy in Moving.copies)
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before + 2 * kept)
