"""The status socket of the running daemon: whom it tells what."""

import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from sniproxy.service.figures import HostFigures
from sniproxy.service.notify import Counts
from sniproxy.service.status import StatusSocket
from tests.support.backends import host_directory, listen_unix
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.hellos import handshake, hello_body, record
from tests.support.status import connect_as, hosts_in, processes, read_status, total

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")

ONE, OTHER = 4001, 4002


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "status"


@pytest.fixture
def counting(hosts: Path, path: Path) -> Iterator[Daemon]:
    with start_daemon(hosts, "--status-socket", str(path)) as daemon:
        yield daemon


def hello(name: str) -> bytes:
    return record(handshake(hello_body(name)))


def ask(daemon: Daemon, name: str) -> socket.socket:
    client = daemon.connect()
    client.sendall(hello(name))
    return client


def refuse(daemon: Daemon, name: str) -> None:
    with ask(daemon, name) as client:
        assert client.recv(7)[:1] == b"\x15"


def take(listening: socket.socket) -> socket.socket:
    """Return the client's connection that a backend is given."""
    with listening.accept()[0] as given:
        _, [descriptor], _, _ = socket.recv_fds(given, 1, 1)
    return socket.socket(fileno=descriptor)


def serve(daemon: Daemon, listening: socket.socket, name: str, answer: bytes) -> None:
    """Have a client served, to the end."""
    with ask(daemon, name) as client:
        with listening.accept()[0] as backend:
            assert backend.recv(1 << 16) == hello(name)
            backend.sendall(answer)
        assert b"".join(iter(lambda: client.recv(1 << 16), b"")) == answer


def test_what_was_counted_is_told(counting: Daemon, hosts: Path, path: Path) -> None:
    with listen_unix(host_directory(hosts, "a.example") / "tls-socket") as listening:
        for size in 10, 1000:
            serve(counting, listening, "a.example", bytes(size))
        refuse(counting, "nobody.example")
        host_directory(hosts, "b.example")
        refuse(counting, "B.Example.")
        eventually(lambda: processes(read_status(path))[0]["open"] == 0)
        lines = read_status(path)
        [process] = processes(lines)
        assert process["program"] == "sniproxy"
        assert process["pid"] == counting.process.pid
        assert (process["served"], process["refused"]) == (2, 2)
        assert process["reasons"] == {"no_such_host": 1, "no_socket": 1}
        assert (process["up"], process["down"]) == (2 * len(hello("a.example")), 1010)
        # The first one, and then one of sixteen.
        assert process["seconds"]["lookup"]["count"] == process["seconds"]["connect"]["count"] == 1
        found = hosts_in(lines)
        assert set(found) == {"a.example", "b.example"}
        assert found["a.example"]["down"] == 1010
        assert found["a.example"]["owner"] == hosts.stat().st_uid
        [last] = found["b.example"]["last"]
        assert last["reason"] == "no_socket"
        assert last["detail"] == "socket: there is no b.example/tls-socket"


def test_bytes_of_open_connections_are_told(counting: Daemon, hosts: Path, path: Path) -> None:
    with (
        listen_unix(host_directory(hosts, "a.example") / "tls-socket") as listening,
        ask(counting, "a.example") as client,
        listening.accept()[0] as backend,
    ):
        backend.sendall(b"four")
        assert client.recv(4) == b"four"
        host = hosts_in(read_status(path))["a.example"]
        assert (host["open"], host["up"], host["down"]) == (1, len(hello("a.example")), 4)
        assert total(read_status(path), "down") == 4


def test_with_a_proxy_header_and_lines_for_connections_the_same_is_counted(
    hosts: Path, path: Path
) -> None:
    options = "--status-socket", str(path), "--log", "connections"
    with start_daemon(hosts, *options) as daemon:
        for name in "plain.example", "proxy.example":
            directory = host_directory(hosts, name)
            if name == "proxy.example":
                (directory / "send-proxy-v1").touch()
            with (
                listen_unix(directory / "tls-socket") as listening,
                ask(daemon, name) as client,
                listening.accept()[0] as backend,
            ):
                backend.sendall(b"four")
                assert client.recv(4) == b"four"
                assert hosts_in(read_status(path))[name]["down"] == 4
        eventually(lambda: total(read_status(path), "open") == 0)
        for host in hosts_in(read_status(path)).values():
            assert (host["open"], host["served"], host["down"]) == (0, 1, 4)


def test_whom_backends_have_got_themselves_is_told(hosts: Path, path: Path) -> None:
    with (
        start_daemon(hosts, "--handoff", "--status-socket", str(path)) as daemon,
        listen_unix(host_directory(hosts, "a.example") / "handoff-socket") as listening,
    ):
        assert total(read_status(path), "handed_over") == 0
        with ask(daemon, "a.example") as client, take(listening) as backend:
            backend.sendall(b"four")
            assert client.recv(4) == b"four"
            eventually(lambda: total(read_status(path), "open") == 0)
        with listen_unix(hosts / "a.example" / "relayed") as relaying:
            (hosts / "a.example" / "relayed").rename(hosts / "a.example" / "tls-socket")
            (hosts / "a.example" / "handoff-socket").unlink()
            serve(daemon, relaying, "a.example", b"four")
        eventually(lambda: total(read_status(path), "open") == 0)
        lines = read_status(path)
        assert (total(lines, "served"), total(lines, "handed_over")) == (2, 1)
        host = hosts_in(lines)["a.example"]
        assert (host["open"], host["served"], host["handed_over"]) == (0, 2, 1)
        # What is moved without us is not known.
        assert (host["up"], host["down"]) == (len(hello("a.example")), 4)


def test_a_backend_that_dislikes_the_header_is_told_of(
    counting: Daemon, hosts: Path, path: Path
) -> None:
    directory = host_directory(hosts, "a.example")
    (directory / "send-proxy-v1").touch()
    with listen_unix(directory / "tls-socket") as listening:
        with ask(counting, "a.example") as client:
            listening.accept()[0].close()
            assert client.recv(1) == b""
        line = counting.wait_for_log("proxy_header_unanswered")
        assert "name=a.example" in line
        [last] = hosts_in(read_status(path))["a.example"]["last"]
        assert last["reason"] == "proxy_header_unanswered"
        # One that answers is none.
        with ask(counting, "a.example") as client:
            with listening.accept()[0] as backend:
                backend.recv(1 << 16)
                backend.sendall(b"?")
            assert client.recv(1) == b"?"
        eventually(lambda: total(read_status(path), "open") == 0)
        assert len(hosts_in(read_status(path))["a.example"]["last"]) == 1


def test_workers_together_have_counted_all(hosts: Path, path: Path) -> None:
    with (
        listen_unix(host_directory(hosts, "a.example") / "tls-socket") as listening,
        start_daemon(hosts, "--workers", "3", "--status-socket", str(path)) as daemon,
    ):
        for number in range(30):
            serve(daemon, listening, "a.example", bytes(number))
            refuse(daemon, "nobody.example")
        eventually(lambda: total(read_status(path), "open") == 0)
        lines = read_status(path)
        assert sorted(line["worker"] for line in processes(lines)) == [1, 2, 3]
        assert {line["pid"] for line in processes(lines)} == set(daemon.workers())
        assert (total(lines, "served"), total(lines, "refused")) == (30, 30)
        assert hosts_in(lines)["a.example"]["down"] == total(lines, "down") == sum(range(30))


def test_after_a_worker_was_replaced_all_speak(hosts: Path, path: Path) -> None:
    with start_daemon(hosts, "--workers", "2", "--status-socket", str(path)) as daemon:
        first = daemon.workers()
        os.kill(first[0], signal.SIGKILL)
        lines = read_status(path)  # the new one takes what the old one did not
        assert sorted(line["worker"] for line in processes(lines)) == [1, 2]


@needs_root
def test_a_user_hears_of_their_own_hosts_alone(counting: Daemon, hosts: Path, path: Path) -> None:
    for name, uid in [("one.example", ONE), ("other.example", OTHER), ("root.example", 0)]:
        os.chown(host_directory(hosts, name), uid, uid)
        refuse(counting, name)
    refuse(counting, "nobody.example")
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    told = read_status(path, ONE)
    assert set(hosts_in(told)) == {"one.example"}
    [process] = processes(told)
    assert process["sees"] == "own"
    assert not {"open", "served", "refused", "up", "down", "reasons", "seconds"} & set(process)
    assert "other" not in repr(told)
    assert hosts_in(read_status(path, 4003)) == {}
    assert set(hosts_in(read_status(path))) == {"one.example", "other.example", "root.example"}


@needs_root
def test_who_may_be_many_hears_nothing(counting: Daemon, hosts: Path, path: Path) -> None:
    overflow = 65534
    os.chown(host_directory(hosts, "a.example"), overflow, overflow)
    refuse(counting, "a.example")
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    assert hosts_in(read_status(path, overflow)) == {}


@needs_root
def test_the_words_end_at_a_door_that_is_closed_to_the_owner(
    counting: Daemon, hosts: Path, path: Path, tmp_path: Path
) -> None:
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    closed = tmp_path / "closed"
    (closed / "inside").mkdir(parents=True)
    os.chown(closed, OTHER, OTHER)
    closed.chmod(0o750)
    directory = host_directory(hosts, "a.example")
    os.chown(directory, ONE, ONE)
    for target in "there", "inside":
        (directory / "tls-socket").unlink(missing_ok=True)
        (directory / "tls-socket").symlink_to(closed / target)
        refuse(counting, "a.example")
    host = hosts_in(read_status(path, ONE))["a.example"]
    # Whether there is something behind it, or not, they can't tell from anything.
    assert host["reasons"] == {"permission_denied": 2}
    assert {last["reason"] for last in host["last"]} == {"permission_denied"}
    detail = f"socket: a.example/tls-socket leads through {closed}, which is closed to you"
    assert {last["detail"] for last in host["last"]} == {detail}
    # The administrator is told all.
    assert any("reason=no_socket" in line for line in counting.log())
    assert any("reason=not_listening" in line for line in counting.log())


def test_everybody_may_connect(counting: Daemon, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_socket_that_was_left_behind_is_replaced(hosts: Path, path: Path) -> None:
    listen_unix(path).close()
    with start_daemon(hosts, "--status-socket", str(path)):
        assert processes(read_status(path))


def test_a_drain_leaves_the_place_to_another_copy(
    counting: Daemon, hosts: Path, path: Path
) -> None:
    with (
        listen_unix(host_directory(hosts, "a.example") / "tls-socket") as listening,
        ask(counting, "a.example"),
        listening.accept()[0],
    ):
        counting.signal(signal.SIGHUP)
        counting.wait_for_log("draining")
        with start_daemon(hosts, "--status-socket", str(path)) as second:
            assert processes(read_status(path))[0]["pid"] == second.process.pid


def test_who_does_not_listen_is_not_waited_for(counting: Daemon, hosts: Path, path: Path) -> None:
    silent = [connect_as(path) for _ in range(8)]
    try:
        refuse(counting, "nobody.example")
    finally:
        for each in silent:
            each.close()
    assert total(read_status(path), "refused") == 1


def test_too_many_at_a_time_hear_nothing(counting: Daemon, hosts: Path, path: Path) -> None:
    """Of one user; what is told to others does not suffer."""
    directory = host_directory(hosts, "a.example")
    for _ in range(20):
        refuse(counting, "a.example")
    assert directory.exists()
    # A receive buffer of the smallest size keeps the daemon from having said all.
    clients = [connect_as(path) for _ in range(30)]
    for client in clients:
        client.settimeout(PATIENCE)
    told = [b"".join(iter(lambda client=client: client.recv(1 << 16), b"")) for client in clients]  # type: ignore[misc]
    for client in clients:
        client.close()
    assert any(each.endswith(b'{"kind":"end"}\n') for each in told)
    assert all(each == b"" or each.endswith(b'{"kind":"end"}\n') for each in told)


def test_without_the_option_nothing_is_there(daemon: Daemon, hosts: Path) -> None:
    assert list(hosts.iterdir()) == []


class Nothing:
    """Connections of a service that has none."""

    def counts(self) -> Counts:
        return Counts()

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        return iter(())


@needs_root
@trio_test
async def test_many_who_do_not_listen_keep_nobody_out_but_each_other(path: Path) -> None:
    users = range(4001, 4005)
    status = StatusSocket(str(path), "sniproxy", ("lookup",), 1)
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    for number in range(1500):
        for uid in users:
            # More than the buffers of a socket hold.
            status.figures.served(f"{number}.{uid}.example" + "x" * 200, uid)
    faults: list[Exception] = []
    silent: list[socket.socket] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(status.run, Nothing(), faults.append, None)
        for uid in users:
            # The last one is one too many of this user.
            silent += [connect_as(path, uid) for _ in range(5)]
            assert await trio.to_thread.run_sync(silent[-1].recv, 1) == b""
        with connect_as(path, 4005) as another:
            assert await trio.to_thread.run_sync(another.recv, 1) == b""
        lines = await trio.to_thread.run_sync(read_status, path)
        assert len(hosts_in(lines)) == 6000
        nursery.cancel_scope.cancel()
    for each in silent:
        each.close()
    status.end()
    assert not faults


@trio_test
async def test_a_fault_is_told_and_ends_one_answer(path: Path) -> None:
    class Faulty(Nothing):
        def counts(self) -> Counts:
            raise ZeroDivisionError

    status = StatusSocket(str(path), "sniproxy", (), 1)
    faults: list[Exception] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(status.run, Faulty(), faults.append, None)
        for _ in range(6):
            with connect_as(path) as client:
                assert await trio.to_thread.run_sync(client.recv, 1) == b""
        nursery.cancel_scope.cancel()
    status.end()
    assert [type(each) for each in faults] == [ZeroDivisionError] * 6
