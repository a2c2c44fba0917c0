"""Connections in every state, that stand still and go on: in another copy, or in the same."""

import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.config import Config
from sniproxy.engine import sweep, tcp
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay, _Flow
from sniproxy.hosts import HostsDirectory
from sniproxy.log import Log
from sniproxy.service.figures import Figures
from sniproxy.session import LATENCIES, Sessions
from sniproxy_hostname import directory_namer
from tests.support import hellos
from tests.support.backends import host_directory, listen_unix
from tests.support.daemon import PATIENCE
from tests.support.sockets import Noise, plain, receive_exactly, reset, say, tcp_pair
from tests.upgrade.moving import Batch

NAME = "example.com"
HELLO = hellos.hello_bytes(NAME)
NOISE = b"".join(Noise().blocks(8 << 20))

# Bytes that a socket of a client holds, or twice as much: several turns of what is much.
BUFFER = 1 << 18

# What happens while all stand still.
Meanwhile = Callable[[], object]


class Notes(Log):
    """A log that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def _write(self, priority: int, line: str) -> None:
        self.lines.append(line)


class Copy:
    """The heart of a copy of the daemon."""

    def __init__(self, config: Config) -> None:
        self.log = Notes()
        self.loop = EventLoop(self.log.bug)
        self.pipes = PipePool()
        self.limit = ConnectionLimit()
        idle = config.idle_seconds, config.half_closed_seconds
        self.relay = Relay(self.loop, self.pipes, self.log.bug, *idle)
        self.hosts = HostsDirectory(directory_namer(hashed=False))
        self.sessions = Sessions(config, self.loop, self.relay, self.hosts, self.log, self.limit)
        self.figures = Figures(LATENCIES)
        self.sessions.count_in(self.figures)

    def close(self) -> None:
        self.sessions.cut()
        self.loop.shut()
        self.pipes.close()
        self.hosts.close()
        assert not [line for line in self.log.lines if line.startswith("bug")]

    def flow(self) -> _Flow:
        """Return the direction from the client, of the only connection."""
        [flow] = self.relay.connections()
        return flow

    def endings(self) -> list[tuple[int, int, str]]:
        """Return what the log says of each connection that has ended: bytes up, down, and how."""
        found = []
        for line in self.log.lines:
            if line.startswith("connection "):
                told = dict(field.split("=") for field in line.split()[1:])
                found.append((int(told["up"]), int(told["down"]), told["ending"]))
        return found


class Both:
    """Two copies, of which the first one has all, to begin with.

    Attributes:
        now: The one that has.
    """

    def __init__(self, listening: socket.socket, old: Copy, new: Copy, *, goes: bool) -> None:
        self._listening = listening
        self.old, self.new = old, new
        self.now = old
        self._goes = goes
        self._ends: list[socket.socket] = []

    def come(self, said: bytes = HELLO) -> socket.socket:
        """Return a client who has said that."""
        client, accepted = tcp_pair()
        for each in client, accepted:
            # Or TCP would make room for more and more.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.settimeout(PATIENCE)
        self._ends.append(client)
        near = plain(accepted)
        say(client, near, said)
        self.old.sessions.begin(near, client.getsockname())
        return client

    def accept(self) -> socket.socket:
        """Return the backend that somebody has reached."""
        backend, _ = self._listening.accept()
        backend.settimeout(PATIENCE)
        self._ends.append(backend)
        return backend

    async def join(self) -> tuple[socket.socket, socket.socket]:
        """Return a client and its backend, when the hello is behind them."""
        client = self.come()
        await turns()
        backend = self.accept()
        assert receive_exactly(backend, len(HELLO)) == HELLO
        return client, backend

    def sums(self) -> dict[str, int]:
        """Return what both have counted, together."""
        sums = dict.fromkeys(("open", "served", "refused", "ended", "up", "down"), 0)
        for copy in self.old, self.new:
            for name in "open", "served", "refused":
                sums[name] += getattr(copy.sessions.counts(), name)
            for figures in copy.figures.hosts.values():
                sums["ended"] += figures.ended
                sums["up"] += figures.up
                sums["down"] += figures.down
            for _, up, down in copy.sessions.moved():
                sums["up"] += up
                sums["down"] += down
        hosts = [*self.old.figures.hosts.values(), *self.new.figures.hosts.values()]
        assert sum(each.served for each in hosts) == sums["served"]
        return sums

    def move(
        self, meanwhile: Meanwhile = lambda: None, *, joins: bool = False
    ) -> list[dict[str, Any]]:
        """Have all stand still, and go on; return what was said of each.

        Args:
            meanwhile: what happens before they go on.
            joins: whether somebody is served by that, who was not before, or refused.
        """
        before = self.sums()
        batch = Batch(self.old.sessions)
        meanwhile()
        if self._goes:
            batch.let_go()
            batch.revive(self.new.sessions)
            self.now = self.new
        else:
            batch.resume()
        assert joins or self.sums() == before
        return batch.records

    async def settled(self) -> None:
        """Wait until nobody is left, in either."""
        with trio.fail_after(PATIENCE):
            for copy in self.old, self.new:
                await copy.limit.wait_until_empty()

    def close(self) -> None:
        for end in self._ends:
            end.close()


async def turns() -> None:
    """Let the loops do what they have to do at once."""
    for _ in range(3):
        await trio.sleep(0.001)


async def eventually(is_so: Callable[[], object]) -> None:
    """Wait for what nothing announces."""
    with trio.fail_after(PATIENCE):
        while not is_so():  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.fixture
def listening(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(hosts)
    with listen_unix(host_directory(hosts, NAME) / "tls-socket") as listening:
        yield listening


@pytest.fixture(params=["goes", "thaws"])
def goes(request: pytest.FixtureRequest) -> bool:
    """Whether connections go to the other copy."""
    return bool(request.param == "goes")


@pytest.fixture
def clock() -> MockClock:
    # The threshold, in real seconds, is what sockets on this machine may need to answer.
    return MockClock(autojump_threshold=0.03)


@asynccontextmanager
async def copies(
    listening: socket.socket,
    goes: bool,
    *,
    idle_seconds: float = 0.0,
    half_closed_seconds: float = 0.0,
) -> AsyncIterator[Both]:
    config = Config(
        log_connections=True, idle_seconds=idle_seconds, half_closed_seconds=half_closed_seconds
    )
    fds = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        old, new = Copy(config), Copy(config)
        both = Both(listening, old, new, goes=goes)
        for copy in old, new:
            nursery.start_soon(copy.loop.run)
            nursery.start_soon(copy.sessions.run)
        yield both
        nursery.cancel_scope.cancel()
    both.close()
    old.close()
    new.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def fill(sock: socket.socket) -> int:
    """Send until nothing more is taken now; return how many bytes of the noise."""
    sent = 0
    sock.setblocking(False)
    try:
        while True:
            sent += sock.send(NOISE[sent : sent + (1 << 18)])
    except BlockingIOError:
        return sent
    finally:
        sock.settimeout(PATIENCE)


async def flood(sock: socket.socket) -> int:
    """Send until all on the way is full; return how many bytes of the noise."""
    sent = quiet = 0
    sock.setblocking(False)
    while quiet < 5:
        try:
            sent += sock.send(NOISE[sent : sent + (1 << 18)])
            assert sent < len(NOISE)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            await trio.sleep(0.002)
    sock.settimeout(PATIENCE)
    return sent


async def received(sock: socket.socket, size: int) -> bytes:
    """Receive so many bytes, or what there is until the end."""
    data = await trio.to_thread.run_sync(receive_exactly, sock, size)
    return bytes(data)


async def ends(sock: socket.socket, *, with_reset: bool = False) -> None:
    """Make sure that there is no more to receive."""

    def receive() -> bytes:
        return sock.recv(1)

    if with_reset:
        with pytest.raises(ConnectionResetError):
            await trio.to_thread.run_sync(receive)
    else:
        assert await trio.to_thread.run_sync(receive) == b""


# --- Relayed


@trio_test
async def test_nothing_is_under_way(listening: socket.socket, goes: bool) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        [record] = it.move()
        assert [flow["pending"] for flow in record["flows"]] == [None, None]
        for one, other in (client, backend), (backend, client):
            one.sendall(b"word")
            assert await received(other, 4) == b"word"
        client.shutdown(socket.SHUT_WR)
        await ends(backend)
        backend.sendall(b"last")
        backend.close()
        assert await received(client, 5) == b"last"
        await it.settled()
        assert it.now.endings() == [(len(HELLO) + 4, 8, "finished")]


@pytest.mark.parametrize("splices", [True, False])
@pytest.mark.parametrize("directions", ["up", "down", "both"])
@trio_test
async def test_all_is_full(
    listening: socket.socket, goes: bool, splices: bool, directions: str
) -> None:
    async with copies(listening, goes) as it:
        it.old.relay.can_splice = splices
        client, backend = await it.join()
        streams = [
            (name, one, other, await flood(one))
            for name, one, other in (("up", client, backend), ("down", backend, client))
            if directions in (name, "both")
        ]
        [record] = it.move()
        for name, _, other, size in streams:
            flow = record["flows"][name == "down"]
            assert (flow["piped"] > 0, flow["pending"] is not None) == (splices, not splices)
            assert await received(other, size) == NOISE[:size]
        for one, other in (client, backend), (backend, client):
            one.shutdown(socket.SHUT_WR)
            await ends(other)
        await it.settled()
        sizes = {name: size for name, _, _, size in streams}
        total = len(HELLO) + sizes.get("up", 0), sizes.get("down", 0)
        assert it.now.endings() == [(*total, "finished")]


@trio_test
async def test_who_could_not_splice_is_no_trap_for_who_can(listening: socket.socket) -> None:
    """The sockets of the one are blocking still, and splice(2) would wait for bytes."""
    async with copies(listening, True) as it:
        it.old.relay.can_splice = False
        client, backend = await it.join()
        size = await flood(client)
        assert await received(backend, size) == NOISE[:size]
        assert it.old.flow().credit >= 2  # it would splice now
        it.move()
        client.sendall(b"word")
        assert await received(backend, 4) == b"word"
        await turns()
        # Else the loop stands, and this one, too.
        with trio.fail_after(PATIENCE):
            backend.sendall(b"word")
            assert await received(client, 4) == b"word"


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("who", ["client", "backend"])
@trio_test
async def test_one_has_said_all(
    listening: socket.socket, goes: bool, who: str, when: str, is_full: bool
) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        one, other = (client, backend) if who == "client" else (backend, client)
        size = await flood(one) if is_full else 0

        def end() -> None:
            one.shutdown(socket.SHUT_WR)

        if when == "before":
            end()
            await turns()
            it.move()
        else:
            it.move(end)
        assert await received(other, size) == NOISE[:size]
        await ends(other)
        back = await flood(other)
        assert await received(one, back) == NOISE[:back]
        other.close()
        await ends(one)
        await it.settled()
        [(up, down, ending)] = it.now.endings()
        assert (up - len(HELLO), down) == ((size, back) if who == "client" else (back, size))
        assert ending == "finished"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@trio_test
async def test_the_backend_closes_with_bytes_unread(
    listening: socket.socket, goes: bool, when: str
) -> None:
    """Its last words arrive, whatever the client says."""
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        size = await flood(backend)
        client.sendall(b"unread")
        await turns()

        def close() -> None:
            backend.close()

        if when == "before":
            close()
            await turns()
            [record] = it.move()
            assert record["flows"][0]["over"] == "far_reset"
        else:
            it.move(close)
        await turns()
        fill(client)  # thrown away
        assert await received(client, size) == NOISE[:size]
        await ends(client)
        client.close()
        await it.settled()
        [(_, down, ending)] = it.now.endings()
        assert (down, ending) == (size, "backend_reset")


@pytest.mark.parametrize("is_full", [False, True])
@trio_test
async def test_the_client_breaks_off_meanwhile(
    listening: socket.socket, goes: bool, is_full: bool
) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        size = await flood(client) if is_full else 0
        it.move(lambda: reset(client))
        await it.settled()
        got = await received(backend, size + 1)
        assert NOISE.startswith(got)
        [(_, _, ending)] = it.now.endings()
        assert ending == "client_reset"


@trio_test
async def test_urgent_data_comes_meanwhile(listening: socket.socket, goes: bool) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        it.move(lambda: client.send(b"!", socket.MSG_OOB))
        await it.settled()
        await ends(client, with_reset=True)
        await ends(backend)


@trio_test
async def test_bytes_come_meanwhile(listening: socket.socket, goes: bool) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        sent: list[int] = []
        it.move(lambda: sent.extend([fill(client), fill(backend)]))
        up, down = sent
        assert await received(backend, up) == NOISE[:up]
        assert await received(client, down) == NOISE[:down]


# --- Time


@pytest.mark.parametrize("half", [False, True])
@trio_test
async def test_the_time_for_which_nothing_was_moved_counts_on(
    listening: socket.socket, goes: bool, half: bool, clock: MockClock
) -> None:
    limits = {"half_closed_seconds": 80.0} if half else {"idle_seconds": 80.0}
    async with copies(listening, goes, **limits) as it:
        client, backend = await it.join()
        if half:
            client.shutdown(socket.SHUT_WR)
        began = trio.current_time()
        for _ in range(2):
            await trio.sleep(30)
            it.move()
            if goes:
                it.old, it.new = it.new, it.old
        await eventually_ends(it)
        assert trio.current_time() - began == pytest.approx(90, abs=11)
        del backend


async def eventually_ends(it: Both) -> None:
    for copy in it.old, it.new:
        await copy.limit.wait_until_empty()


@trio_test
async def test_a_slow_reader_who_was_spared_is_spared(
    listening: socket.socket, goes: bool, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts from when the window was closed: it would be reset at the next probe."""
    monkeypatch.setattr(sweep, "_EVERY", 10.0)
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        size = await flood(backend)
        near = it.old.flow().source
        await trio.sleep(50)
        option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
        assert near.getsockopt(*option) == 0
        it.move()
        near = it.now.flow().source
        set_again: list[float] = []
        monkeypatch.setattr(tcp, "set_user_timeout", lambda sock: set_again.append(1))
        await trio.sleep(25)
        assert near.getsockopt(*option) == 0
        assert not set_again
        assert await received(client, size) == NOISE[:size]
        await trio.sleep(25)
        assert set_again


# --- Last words


@trio_test
async def test_last_words_are_under_way(listening: socket.socket, goes: bool) -> None:
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        backend.sendall(NOISE[:100_000])
        client.sendall(b"unread")
        await turns()
        near = it.old.flow().source
        client.setblocking(False)
        size = 100_000 + fill(backend)
        backend.close()
        await turns()
        records = it.move()
        del near
        client.settimeout(PATIENCE)
        got = await received(client, size + 1)
        assert got[:100_000] == NOISE[:100_000]
        assert got[100_000:] == NOISE[: size - 100_000]
        client.close()
        await it.settled()
        assert records[0]["kind"] in ("relayed", "last_words")
        [(_, down, ending)] = it.now.endings()
        assert (down, ending) == (size, "backend_reset")


@trio_test
async def test_who_has_received_all_and_stays_goes_along(
    listening: socket.socket, goes: bool, clock: MockClock
) -> None:
    """Else its end would be told to nobody, and its host have one connection for ever."""
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        client.sendall(b"unread")
        await turns()
        backend.close()
        await ends(client)
        await trio.sleep(1)
        [record] = it.move()
        assert record["kind"] == "last_words"
        assert it.sums()["open"] == it.now.limit.open == 1
        await eventually_ends(it)
        assert it.now.endings() == [(len(HELLO) + 6, 0, "backend_reset")]
        assert [each.is_idle() for each in it.now.figures.hosts.values()] == [True]


@trio_test
async def test_a_turn_that_was_asked_for_is_none_while_all_stand_still(
    listening: socket.socket, goes: bool
) -> None:
    """Who talks much amid last words has turn after turn; not in both copies."""
    async with copies(listening, goes) as it:
        client, backend = await it.join()
        client.sendall(b"unread")
        await turns()
        backend.close()
        await ends(client)
        [linger] = it.old.relay.last_words.items()
        it.old.loop.call_soon(linger)
        batch = Batch(it.old.sessions)
        client.sendall(b"and more")
        client.close()
        await turns()
        assert it.old.limit.open == 1
        if goes:
            batch.let_go()
            batch.revive(it.new.sessions)
            it.now = it.new
        else:
            batch.resume()
        await it.settled()
        assert [ending for _, _, ending in it.now.endings()] == ["backend_reset"]


# --- Who waits


@pytest.mark.parametrize("size", [0, 1, 5, 8, 40, len(HELLO) - 1])
@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
@trio_test
async def test_the_hello_is_not_whole(
    listening: socket.socket, goes: bool, size: int, when: str
) -> None:
    async with copies(listening, goes) as it:
        client = it.come(HELLO[:size])

        def go_on() -> None:
            client.sendall(HELLO[size:] + b"more")

        [record] = it.move(go_on if when == "meanwhile" else lambda: None)
        assert record["kind"] == "waiting"
        if when == "afterwards":
            await turns()
            go_on()
        await eventually(lambda: it.now.sessions.served)
        backend = it.accept()
        assert await received(backend, len(HELLO) + 4) == HELLO + b"more"
        backend.sendall(b"hi")
        assert await received(client, 2) == b"hi"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda client: client.close(), "client_closed"),
        (reset, "client_closed"),
        (lambda client: client.shutdown(socket.SHUT_WR), "client_closed"),
        (lambda client: client.send(b"!", socket.MSG_OOB), "urgent_data"),
    ],
    ids=["closes", "resets", "ends", "urgent"],
)
@trio_test
async def test_who_waits_does_something_else_meanwhile(
    listening: socket.socket, goes: bool, what: Callable[[socket.socket], object], reason: str
) -> None:
    async with copies(listening, goes) as it:
        client = it.come(HELLO[:40])
        it.move(lambda: what(client), joins=what is reset)
        await it.settled()
        reasons = [
            field for line in it.now.log.lines for field in line.split() if "reason=" in field
        ]
        assert reasons in ([f"reason={reason}"], [] if what is reset else [f"reason={reason}"])


@trio_test
async def test_deadlines_are_kept(listening: socket.socket, goes: bool, clock: MockClock) -> None:
    """In their order, too: who comes later does not hide who came before."""
    async with copies(listening, goes) as it:
        began = trio.current_time()
        ended: list[float] = []

        async def wait(client: socket.socket) -> None:
            end = trio.socket.from_stdlib_socket(client.dup())
            with end:
                assert await end.recv(1) == b""
            ended.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, it.come(HELLO[:1]))
            await trio.sleep(4)
            nursery.start_soon(wait, it.come(HELLO[:1]))
            await trio.sleep(4)
            if goes:
                # Somebody has come to the new copy already.
                client, accepted = tcp_pair()
                it.new.sessions.begin(plain(accepted), client.getsockname())
                nursery.start_soon(wait, client)
            it.move()
        assert ended[:2] == pytest.approx([10, 14], abs=0.3)
        if goes:
            assert ended[2:] == pytest.approx([18], abs=0.3)
            client.close()


@trio_test
async def test_many_who_wait_are_put_in_order_once(
    listening: socket.socket, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with copies(listening, goes) as it:
        for _ in range(100):
            it.come(b"")
        times = 0
        waiting = it.new.sessions.waiting if goes else it.old.sessions.waiting
        in_order = waiting._sorted

        def count() -> object:
            nonlocal times
            times += 1
            return in_order()

        monkeypatch.setattr(waiting, "_sorted", count)
        it.move()
        await turns()
        assert len(waiting) == 100
        assert 0 < times < 10


@trio_test
async def test_who_is_held_is_held_since_then(
    hosts: Path, listening: socket.socket, goes: bool, clock: MockClock
) -> None:
    """And no longer than that; but who ends meanwhile is let go."""
    place = hosts / NAME / "tls-socket"
    (hosts / NAME / "hold").write_text("2")
    place.rename(place.with_name("away"))
    async with copies(listening, goes) as it:
        client = it.come()
        began = trio.current_time()
        await turns()
        other = it.come()
        await trio.sleep(1.2)
        records = it.move(other.close)
        assert [record["held"] for record in records] == pytest.approx([1.2, 1.2], abs=0.2)
        end = trio.socket.from_stdlib_socket(client.dup())
        with end:
            assert (await end.recv(100))[:1] == b"\x15"
        assert trio.current_time() - began == pytest.approx(2, abs=0.3)
        assert it.now.sessions.refused == len((client, other))


@trio_test
async def test_who_is_held_is_served_when_there_is_a_backend(
    hosts: Path, listening: socket.socket, goes: bool
) -> None:
    place = hosts / NAME / "tls-socket"
    (hosts / NAME / "hold").write_text("30")
    away = place.rename(place.with_name("away"))
    async with copies(listening, goes) as it:
        client = it.come()
        await turns()
        it.move(lambda: away.rename(place))
        await eventually(lambda: it.now.sessions.lent)
        backend = it.accept()
        assert await received(backend, len(HELLO)) == HELLO
        # Who has been lent a hello, and not answered yet, is joined by another move.
        if goes:
            it.old, it.new = it.new, it.old
        it.move(joins=True)
        backend.sendall(b"hi")
        assert await received(client, 2) == b"hi"


# --- What is counted


@trio_test
async def test_what_is_counted_goes_along(listening: socket.socket) -> None:
    async with copies(listening, True) as it:
        for size in 10, 20:
            client, backend = await it.join()
            client.sendall(bytes(size))
            assert len(await received(backend, size)) == size
            client.close()
            await ends(backend)
            backend.close()
        await it.settled()
        nobody = it.come(hellos.hello_bytes("nobody.example"))
        await eventually(lambda: it.old.sessions.refused)
        nobody.close()
        client, backend = await it.join()
        backend.sendall(b"word")
        assert await received(client, 4) == b"word"
        before = it.sums()
        it.move()
        old = it.old.sessions.counts()
        it.new.figures.add(json.loads(json.dumps(it.old.figures.tell())))
        it.new.sessions.served += old.served
        it.new.sessions.refused += old.refused
        counts = it.new.sessions.counts()
        assert (counts.open, counts.served, counts.refused) == (1, 3, 1)
        [host] = it.new.figures.hosts.values()
        assert (host.served, host.ended, host.up) == (3, 2, 2 * len(HELLO) + 30)
        assert it.new.figures.reasons == it.old.figures.reasons
        client.close()
        await ends(backend)
        backend.close()
        await it.settled()
        assert (host.served, host.ended) == (3, 3)
        assert (host.up, host.down) == (before["up"], before["down"])
