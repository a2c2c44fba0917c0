"""What takes time: deadlines, alerts on their way, full backlogs. On a clock that does not wait."""

import _socket
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy import waiting_room
from sniproxy.config import Config
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address, Listener, take_listening_socket
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay
from sniproxy.hosts import HostError, HostReason, HostsDirectory, Step
from sniproxy.log import Log
from sniproxy.serve import serve
from sniproxy.service.descriptors import Share
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.session import ALERTS, Session, Sessions
from sniproxy_hostname import Hostname, directory_namer
from tests.support import hellos
from tests.support.backends import host_directory, listen_unix
from tests.support.daemon import PATIENCE
from tests.support.sockets import plain, receive_all, receive_exactly, reset, tcp_pair

NAME = "example.com"
HELLO = hellos.hello_bytes(NAME)
CONFIG = Config()


@pytest.fixture
def clock() -> MockClock:
    # The threshold, in real seconds, is what sockets on this machine may need to answer.
    return MockClock(autojump_threshold=0.03)


class Notes(Log):
    """A log that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def _write(self, priority: int, line: str) -> None:
        self.lines.append(line)


class Door:
    """Sessions in a running loop, in this very process."""

    def __init__(self, service: trio.Nursery, log: Notes) -> None:
        self.service = service
        self.log = log
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.loop = EventLoop(log.bug)
        self.pipes = PipePool()
        self.limit = ConnectionLimit()
        self.hosts = HostsDirectory(directory_namer(hashed=False))
        self.relay = Relay(self.loop, self.pipes, log.bug)
        self.sessions = Sessions(
            CONFIG,
            self.loop,
            self.relay,
            self.hosts,
            log,
            self.limit,
        )
        self.listener = Listener(
            self.loop,
            take_listening_socket(self.listening.fileno()),
            self.limit,
            self.sessions.begin,
            self.sessions.make_room,
            log.exhausted,
        )
        for task in self.loop.run, self.listener.run, self.sessions.run:
            service.start_soon(task)

    def take_in(self) -> socket.socket:
        """Return a client whose hello has been read, and who is to be connected in a turn."""
        client, accepted = tcp_pair()
        client.settimeout(PATIENCE)
        client.sendall(HELLO)
        assert accepted.recv(1, socket.MSG_PEEK)
        self.sessions.begin(plain(accepted), client.getsockname())
        assert not self.sessions.waiting
        return client

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.listening.getsockname())

    def close(self) -> None:
        self.listener.close()
        self.loop.shut()
        self.pipes.close()
        self.hosts.close()
        self.listening.close()


@asynccontextmanager
async def door() -> AsyncIterator[Door]:
    log = Notes()
    async with trio.open_nursery() as service:
        it = Door(service, log)
        try:
            yield it
        finally:
            it.sessions.cut()
        service.cancel_scope.cancel()
    it.close()
    assert not [line for line in log.lines if line.startswith("bug")]


@pytest.fixture(autouse=True)
def _in_hosts_directory(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hosts)


@pytest.fixture
def backend(hosts: Path) -> Iterator[socket.socket]:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket") as listening:
        yield listening


async def receive_to_end(client: trio.SocketStream) -> bytes:
    return b"".join([chunk async for chunk in client])


@trio_test
async def test_who_says_nothing_is_let_go_after_ten_seconds(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        began = trio.current_time()
        assert await receive_to_end(client) == b""
        assert trio.current_time() - began == pytest.approx(CONFIG.hello_seconds, abs=0.1)
        assert "reason=deadline" in it.log.lines[-1]


@trio_test
async def test_who_drips_gains_nothing(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            for byte in HELLO:
                await client.send_all(bytes([byte]))
                await trio.sleep(1)
        assert trio.current_time() - began < CONFIG.hello_seconds + 3
        assert "reason=deadline" in it.log.lines[-1]


@trio_test
async def test_each_has_a_deadline_of_its_own(clock: MockClock) -> None:
    async with door() as it:
        ends = []

        async def wait() -> None:
            async with await it.connect() as client:
                await receive_to_end(client)
                ends.append(trio.current_time())

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
                await trio.sleep(4)
        expected = [began + CONFIG.hello_seconds + after for after in (0, 4, 8)]
        assert ends == pytest.approx(expected, abs=0.2)


@trio_test
async def test_a_joined_connection_has_no_deadline(
    clock: MockClock, backend: socket.socket
) -> None:
    async with door() as it, await it.connect() as client:
        await client.send_all(HELLO[:10])
        await trio.sleep(9)
        await client.send_all(HELLO[10:])
        await trio.sleep(100)
        connection, _ = backend.accept()
        with connection:
            connection.sendall(b"late")
            assert await client.receive_some() == b"late"


@trio_test
async def test_a_refused_client_that_stays_is_let_go_after_a_second(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        await client.send_all(b"x")
        began = trio.current_time()
        assert await receive_to_end(client) == bytes([21, 3, 3, 0, 2, 2, 10])
        assert it.limit.open == 1
        await it.limit.wait_until_empty()
        assert trio.current_time() - began == pytest.approx(CONFIG.alert_seconds, abs=0.1)


@trio_test
async def test_a_refused_client_that_floods_is_let_go_at_once(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await client.send_all(bytes(1 << 16))
        await it.limit.wait_until_empty()
        assert trio.current_time() - began < CONFIG.alert_seconds


@trio_test
async def test_a_refused_client_is_listened_to_for_64_kib(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        await client.send_all(b"x")
        await receive_to_end(client)
        began = trio.current_time()
        await client.send_all(bytes(65_535))
        await trio.sleep(0.1)
        assert it.limit.open == 1
        await client.send_all(b"x")
        await it.limit.wait_until_empty()
        assert trio.current_time() - began < CONFIG.alert_seconds / 2


@pytest.mark.parametrize(
    "said", [b"x", hellos.hello_bytes("nobody.example"), hellos.hello_bytes("-.example")]
)
@trio_test
async def test_an_alert_leaves_in_the_step_that_decides(said: bytes) -> None:
    """Before any other task has a turn; and then the end."""
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        client, accepted = tcp_pair()
        client.settimeout(PATIENCE)
        with client:
            client.sendall(said)
            assert accepted.recv(1, socket.MSG_PEEK)
            it.sessions.begin(plain(accepted), client.getsockname())
            for session in list(it.loop._runnable):
                session.on_event(0)
            it.loop._runnable.clear()
            assert client.recv(100, socket.MSG_DONTWAIT)[:5] == bytes([21, 3, 3, 0, 2])
            assert client.recv(100, socket.MSG_DONTWAIT) == b""
            assert len(it.sessions.alerted) == 1


@trio_test
async def test_who_only_has_to_hear_an_alert_gives_way_first(backend: socket.socket) -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        silent, accepted = tcp_pair()
        it.sessions.begin(plain(accepted), silent.getsockname())
        refused = []
        for _ in range(3):
            client, accepted = tcp_pair()
            client.sendall(b"x")
            assert accepted.recv(1, socket.MSG_PEEK)
            it.sessions.begin(plain(accepted), client.getsockname())
            refused.append(client)
        assert it.limit.open == 4
        it.limit.capacity = 4
        for left in 3, 2, 1:
            assert it.sessions.make_room()
            assert it.limit.open == left
            it.limit.capacity = left
            assert len(it.sessions.waiting) == 1
        for client in refused:  # each has heard its alert and then the end, not a reset
            client.settimeout(PATIENCE)
            assert await trio.to_thread.run_sync(receive_all, client) == b"\x15\3\3\0\2\2\n"
        # Only then those who say nothing.
        assert it.sessions.make_room()
        assert it.limit.open == 0
        for client in (silent, *refused):
            client.close()


@pytest.mark.parametrize("pieces", [[], [HELLO[:10]], [HELLO[:5], HELLO[5:40]]])
@trio_test
async def test_urgent_data_amid_a_hello_is_a_reset_at_once(
    clock: MockClock, pieces: list[bytes]
) -> None:
    async with door() as it, await it.connect() as client:
        began = trio.current_time()
        for piece in pieces:
            await client.send_all(piece)
            await trio.sleep(0.1)
        await client.socket.send(b"!", socket.MSG_OOB)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        assert trio.current_time() - began < 1
        await it.limit.wait_until_empty()
        assert "reason=urgent_data" in it.log.lines[-1]
        assert it.sessions.refused == 1


@trio_test
async def test_a_full_backlog_is_waited_for(clock: MockClock, hosts: Path) -> None:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket", backlog=0) as backend:
        async with door() as it:
            clients = [await it.connect() for _ in range(10)]
            for client in clients:
                await client.send_all(HELLO)
            for _ in clients:
                # Each has all the time until the deadline.
                connection, _ = await trio.to_thread.run_sync(backend.accept)
                with connection:
                    assert connection.recv(1 << 16) == HELLO
                    connection.sendall(b"served")
            for client in clients:
                assert await receive_to_end(client) == b"served"
                await client.aclose()


@trio_test
async def test_a_backlog_that_stays_full_is_given_up_at_the_deadline(
    clock: MockClock, hosts: Path
) -> None:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket", backlog=0):
        async with door() as it, await it.connect() as first, await it.connect() as second:
            began = trio.current_time()
            await first.send_all(HELLO)  # is all that fits
            await trio.sleep(1)
            await second.send_all(HELLO)
            assert await receive_to_end(second) == bytes([21, 3, 3, 0, 2, 2, 80])
            assert trio.current_time() - began == pytest.approx(CONFIG.hello_seconds, abs=0.2)
            assert "name=example.com reason=backend_busy alert=80" in it.log.lines[-1]


@trio_test
async def test_a_full_backlog_is_tried_soon_and_then_less_and_less_often(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with door() as it, await it.connect() as client:
        times: list[float] = []
        # These looks take no time, so that there is no rest for its sake.
        monkeypatch.setattr(waiting_room, "perf_counter", lambda: 0.0)

        def fail(host: Hostname) -> str:
            times.append(trio.current_time())
            if len(times) == 11:
                raise HostError(HostReason.NOT_LISTENING, "enough", Step.SOCKET)
            raise HostError(HostReason.BACKEND_BUSY, "full", Step.SOCKET)

        it.hosts.directory_name = fail
        await client.send_all(HELLO)
        await receive_to_end(client)
        pauses = [after - before for before, after in pairwise(times)]
        milliseconds = [1, 2, 4, 8, 16, 32, 64, 100, 100, 100]
        assert pauses == pytest.approx([each / 1000 for each in milliseconds])


@trio_test
async def test_a_client_that_leaves_a_full_backlog_is_forgotten(
    clock: MockClock, hosts: Path
) -> None:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket", backlog=0) as backend:
        async with door() as it:
            async with await it.connect() as first, await it.connect() as second:
                await first.send_all(HELLO)
                await trio.sleep(0.1)
                await second.send_all(HELLO)
                await trio.sleep(0.1)
            with backend.accept()[0] as connection:
                assert connection.recv(1 << 16) == HELLO
            with trio.fail_after(CONFIG.hello_seconds):
                with (await trio.to_thread.run_sync(backend.accept))[0] as connection:
                    assert connection.recv(1 << 16) == HELLO
                await it.limit.wait_until_empty()


@trio_test
async def test_cut_ends_every_kind_of_session(
    clock: MockClock, hosts: Path, backend: socket.socket
) -> None:
    async with door() as it:
        waiting, refused, joined = [await it.connect() for _ in range(3)]
        await waiting.send_all(HELLO[:10])
        await refused.send_all(b"x")
        await joined.send_all(HELLO)
        await trio.sleep(0.1)
        assert it.limit.open == 3
        assert it.sessions.cut() == 2  # the refused one has been told all there is to say
    assert not it.limit.open
    for client in waiting, joined:
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
    for client in waiting, refused, joined:
        await client.aclose()


@trio_test
async def test_a_client_who_breaks_off_before_its_hello_is_lent_is_forgotten(
    clock: MockClock, hosts: Path, backend: socket.socket
) -> None:
    (hosts / NAME / "hold").write_text("30")
    async with door() as it:
        client = it.take_in()
        reset(client)
        await it.limit.wait_until_empty()
        backend.accept()[0].close()


def check_was_cut(it: Door, clients: list[socket.socket]) -> None:
    """Check that all were reset; some may have been connected in the very last turn."""
    assert it.limit.open == 0
    for client in clients:
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)


@trio_test
async def test_only_who_is_silent_makes_room(clock: MockClock, backend: socket.socket) -> None:
    async with door() as it:
        clients = []
        for _ in range(2):
            client, accepted = tcp_pair()
            it.sessions.begin(plain(accepted), client.getsockname())
            clients.append(client)
        it.limit.capacity = 2
        # The hello of the first is there by now, and nobody has looked at it yet.
        clients[0].sendall(HELLO)
        assert it.sessions.make_room()
        assert not it.sessions.waiting
        await trio.sleep(1)
        assert clients[1].recv(1) == b""
        connection, _ = backend.accept()
        assert receive_exactly(connection, len(HELLO)) == HELLO
        assert "reason=capacity" in it.log.lines[-1]
        for sock in (*clients, connection):
            sock.close()


@trio_test
async def test_who_has_left_without_a_word_makes_room_without_a_line() -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        client, accepted = tcp_pair()
        it.sessions.begin(plain(accepted), client.getsockname())
        [silent] = it.sessions.waiting.items()
        client.close()
        # It has ended by now, and the loop has not told of it yet.
        poll = select.poll()
        poll.register(silent._client, select.POLLRDHUP)
        assert poll.poll(PATIENCE * 1000)
        it.limit.capacity = 1
        assert it.sessions.make_room()
        assert it.limit.open == 0
        assert it.sessions.refused == 0
        assert it.log.lines == []


@trio_test
async def test_cut_resets_and_counts_who_is_to_be_connected(backend: socket.socket) -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        clients = [it.take_in() for _ in range(5)]
        assert it.limit.open == 5
        assert it.sessions.cut() == 5
    check_was_cut(it, clients)
    assert it.sessions.refused == 0


@trio_test
async def test_who_would_be_refused_when_all_are_cut_is_no_bug() -> None:
    # The order in which tasks are woken is trio's secret.
    for _ in range(10):
        async with door() as it:
            await trio.testing.wait_all_tasks_blocked()
            clients = [it.take_in() for _ in range(5)]
            assert it.sessions.cut() == 5
        assert it.limit.open == 0
        for client in clients:
            client.close()


@trio_test
async def test_who_is_to_be_connected_is_reset_when_the_loop_is_cancelled(
    backend: socket.socket,
) -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        clients = [it.take_in() for _ in range(5)]
        it.service.cancel_scope.cancel()
    check_was_cut(it, clients)


@trio_test
async def test_who_has_said_all_at_last_and_awaits_a_turn_is_counted_out_once(
    backend: socket.socket,
) -> None:
    # The loop then knows it twice: as one who has asked for a turn, and as one who is watched.
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        client, accepted = tcp_pair()
        client.settimeout(PATIENCE)
        client.sendall(HELLO[:10])
        assert accepted.recv(1, socket.MSG_PEEK)
        it.sessions.begin(plain(accepted), client.getsockname())
        silent = it.sessions.waiting.oldest()
        assert silent is not None
        client.sendall(HELLO[10:])
        silent.look()
        assert not it.sessions.waiting
        assert it.limit.open == 1
        it.service.cancel_scope.cancel()
    check_was_cut(it, [client])
    assert it.sessions.refused == 0


@trio_test
async def test_all_of_a_batch_are_served_and_each_has_its_own_story(
    backend: socket.socket,
) -> None:
    async with door() as it:
        # Without a pause for anybody: the kernel makes these connections.
        clients, others = [], []
        for _ in range(50):
            client = socket.create_connection(it.listening.getsockname(), PATIENCE)
            client.sendall(HELLO)
            clients.append(client)
            other = socket.create_connection(it.listening.getsockname(), PATIENCE)
            other.sendall(b"x")
            others.append(other)
        for _ in clients:
            with (await trio.to_thread.run_sync(backend.accept))[0] as connection:
                assert await trio.to_thread.run_sync(connection.recv, 1 << 16) == HELLO
                connection.sendall(b"served")
        for expected, group in (b"served", clients), (bytes([21, 3, 3, 0, 2, 2, 10]), others):
            for client in group:
                with client:
                    assert await trio.to_thread.run_sync(receive_all, client) == expected
        with trio.fail_after(PATIENCE):
            await it.limit.wait_until_empty()
        assert (it.sessions.served, it.sessions.refused) == (len(clients), len(others))


async def has_served(it: Door, number: int) -> None:
    with trio.fail_after(PATIENCE):
        while it.sessions.served < number:  # noqa: ASYNC110 - it has no event of its own
            await trio.sleep(0.001)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("ends_first", [False, True])
@trio_test
async def test_no_more_descriptors_are_open_than_there_are_places(
    backend: socket.socket, monkeypatch: pytest.MonkeyPatch, ends_first: bool
) -> None:
    """The worst that one batch of events can be: all end, and as many come, with their hello."""
    places = 10
    async with door() as it:
        it.limit.capacity = places
        peaks: list[int] = []
        directory_name, begin = it.hosts.directory_name, it.sessions.begin

        def counting_name(host: Hostname) -> str:
            peaks.append(descriptors() + 1)  # its backend's, which comes next
            return directory_name(host)

        def counting_begin(client: _socket.socket, address: Address) -> None:
            peaks.append(descriptors())
            begin(client, address)

        it.hosts.directory_name = counting_name
        monkeypatch.setattr(it.listener, "_on_accept", counting_begin)

        def come() -> list[socket.socket]:
            clients = []
            for _ in range(places):
                client = socket.create_connection(it.listening.getsockname(), PATIENCE)
                client.sendall(HELLO)
                clients.append(client)
            return clients

        clients, served = come(), places
        for _ in range(5):
            await has_served(it, served)
            connections = [backend.accept()[0] for _ in range(places)]
            # From here to the next await, nothing is noticed.
            leaving = [*clients, *connections]
            if ends_first:
                for sock in leaving:
                    sock.close()
                clients = come()
            else:
                clients = come()
                for sock in leaving:
                    sock.close()
            peaks.clear()
            most = descriptors()
            served += places
            await has_served(it, served)
            assert len(peaks) == 2 * places
            assert max(peaks) <= most
        for _ in range(places):
            backend.accept()[0].close()
        for client in clients:
            client.close()


@trio_test
async def test_a_bug_in_one_session_ends_that_one_alone(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch, backend: socket.socket
) -> None:
    async with door() as it, await it.connect() as first, await it.connect() as second:
        with monkeypatch.context() as patch:

            def fail(host: Hostname) -> str:
                raise ZeroDivisionError(host)

            patch.setattr(it.hosts, "directory_name", fail)
            for client, pieces in (first, [HELLO]), (second, [HELLO[:10], HELLO[10:]]):
                for piece in pieces:
                    await client.send_all(piece)
                    await trio.sleep(0.1)
                with pytest.raises(trio.BrokenResourceError):
                    await client.receive_some()
        assert "bug ZeroDivisionError: example.com" in it.log.lines
        it.log.lines.clear()
        async with await it.connect() as third:
            await third.send_all(HELLO)
            with (await trio.to_thread.run_sync(backend.accept))[0] as connection:
                assert connection.recv(1 << 16) == HELLO


class Orders(Signals):
    """What is asked for, but not by signals."""

    async def receive(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()


@trio_test
async def test_a_bug_in_a_turn_is_told_and_the_service_goes_on() -> None:
    def fail(host: Hostname) -> str:
        raise ZeroDivisionError(host)

    log, orders = Notes(), Orders()
    hosts = HostsDirectory(fail)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        listening = take_listening_socket(bound.fileno())
        async with trio.open_nursery() as nursery:
            share, notifier = Share(connections=10, pipes=1), Notifier({})
            nursery.start_soon(
                partial(serve, listening, hosts, CONFIG, share, log, orders, notifier)
            )
            with trio.fail_after(PATIENCE):
                for _ in range(2):
                    async with await trio.open_tcp_stream(*bound.getsockname()) as client:
                        await client.send_all(HELLO)
                        with pytest.raises(trio.BrokenResourceError):
                            await client.receive_some()
            orders.drain.set()
    hosts.close()
    assert log.lines.count("bug ZeroDivisionError: example.com") == 2
    assert log.lines[-1] == "drained served=0 refused=0 cut=0"


@trio_test
async def test_a_bug_in_the_task_of_a_session_ends_that_one_and_frees_its_place(
    clock: MockClock,
) -> None:
    async with door() as it, await it.connect() as client:
        tries = 0

        def fail(host: Hostname) -> str:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise HostError(HostReason.BACKEND_BUSY, "full", Step.SOCKET)
            raise ZeroDivisionError(host)

        it.hosts.directory_name = fail
        await client.send_all(HELLO)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        assert it.limit.open == 0
        assert "bug ZeroDivisionError: example.com" in it.log.lines
        it.log.lines.clear()


@trio_test
async def test_a_bug_at_the_first_look_is_told_and_ends_that_one() -> None:
    class Failing(_socket.socket):
        def recv(self, *args: int) -> bytes:
            raise ZeroDivisionError("why")

    async with door() as it:
        client, accepted = tcp_pair()
        it.sessions.begin(Failing(fileno=accepted.detach()), client.getsockname())
        assert it.log.lines[-1] == "bug ZeroDivisionError: why"
        it.log.lines.clear()
        await trio.testing.wait_all_tasks_blocked()
        check_was_cut(it, [client])


@trio_test
async def test_who_leaves_amid_a_hello_that_began_late_is_refused(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        await trio.sleep(0.1)
        await client.send_all(HELLO[:10])
        await trio.sleep(0.1)
        await client.aclose()
        with trio.fail_after(1):
            await it.limit.wait_until_empty()
        assert "reason=client_closed" in it.log.lines[-1]
        assert it.sessions.refused == 1


@trio_test
async def test_who_leaves_without_a_word_leaves_no_line(clock: MockClock) -> None:
    async with door() as it, await it.connect() as client:
        await trio.sleep(0.1)
        assert len(it.sessions.waiting) == 1
        await client.aclose()
        with trio.fail_after(1):
            await it.limit.wait_until_empty()
        assert not it.sessions.waiting
        assert it.sessions.refused == 0
        assert it.log.lines == []


@trio_test
async def test_a_line_says_in_more_words_why() -> None:
    async with door() as it, await it.connect() as client:
        await client.send_all(hellos.hello_bytes("-.example"))
        await receive_to_end(client)
        assert "reason=invalid_name" in it.log.lines[-1]
        assert ' detail="' in it.log.lines[-1]


@pytest.mark.parametrize("how", ["joined", "refused", "closed"])
@trio_test
async def test_what_is_over_is_not_ended_again(backend: socket.socket, how: str) -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        client, accepted = tcp_pair()
        client.settimeout(PATIENCE)
        if how == "closed":
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(1, socket.MSG_PEEK) == b""
        else:
            client.sendall(HELLO if how == "joined" else b"x")
            assert accepted.recv(1, socket.MSG_PEEK)
        it.limit.add()
        session = Session(it.sessions, plain(accepted), client.getsockname())
        session.begin()
        if how == "joined":
            session.on_event(0)
        left = it.limit.open
        assert left == (0 if how == "closed" else 1)
        assert session.is_over
        session.close()
        session.abort()
        if how == "joined":
            session.on_event(0)
        assert it.limit.open == left
        assert it.sessions.served == (how == "joined")
        it.loop._runnable.clear()
        if how == "joined":
            with backend.accept()[0] as connection:
                assert await trio.to_thread.run_sync(connection.recv, 1 << 16) == HELLO
                client.sendall(b"more")
                assert await trio.to_thread.run_sync(connection.recv, 4) == b"more"
        elif how == "refused":
            assert await trio.to_thread.run_sync(receive_all, client) == b"\x15\3\3\0\2\2\n"
        client.close()


@trio_test
async def test_who_has_a_turn_after_the_cut_is_not_connected(backend: socket.socket) -> None:
    async with door() as it:
        await trio.testing.wait_all_tasks_blocked()
        client = it.take_in()
        [session] = it.loop._runnable
        it.loop._runnable.clear()
        it.sessions.cut()
        session.on_event(0)
        assert it.sessions.served == 0
        backend.setblocking(False)
        with pytest.raises(BlockingIOError):
            backend.accept()
        it.loop._close_pending()
        check_was_cut(it, [client])


def test_every_reason_has_an_answer() -> None:
    assert set(ALERTS) == set(HostReason)


@trio_test
async def test_the_hello_is_forgotten_when_it_has_been_sent(
    hosts: Path, backend: socket.socket
) -> None:
    (hosts / NAME / "send-proxy-v1").touch()
    async with door() as it, await it.connect() as client:
        await client.send_all(HELLO)
        with (await trio.to_thread.run_sync(backend.accept))[0] as connection:
            header = receive_exactly(connection, len(b"PROXY TCP4 "))
            assert header == b"PROXY TCP4 "
            [(on_end, up, down)] = it.relay.moved()
            session = getattr(on_end, "__self__", None)
            assert isinstance(session, Session)
            # What is told at the end keeps the session; the bytes of the client have been counted.
            assert (session.head, up, down) == (b"", len(HELLO), 0)
