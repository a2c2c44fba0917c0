"""The end of the daemon: signals, the drain, and what a supervisor is told."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sniproxy.service.notify import Notifier
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, joined
from tests.support.daemon import Daemon, eventually, start_daemon
from tests.support.sockets import receive_all, receive_exactly
from tests.support.supervisor import Supervisor

NAME = "example.com"
HELLO = hellos.hello_bytes(NAME)


@pytest.fixture
def connected(daemon: Daemon) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and its backend."""
    with (
        RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend,
        daemon.connect() as client,
    ):
        client.sendall(HELLO)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            yield client, connection


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_without_connections_it_ends_at_once(daemon: Daemon, number: signal.Signals) -> None:
    daemon.signal(number)
    assert daemon.wait(timeout=2) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_the_living_live_on_and_nobody_new_is_let_in(
    daemon: Daemon, connected: tuple[socket.socket, socket.socket], number: signal.Signals
) -> None:
    client, connection = connected
    daemon.signal(number)
    daemon.wait_for_log("draining")
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()
    client.sendall(b"ping")
    assert connection.recv(4) == b"ping"
    connection.sendall(b"pong")
    assert client.recv(4) == b"pong"
    client.shutdown(socket.SHUT_WR)
    assert daemon.process.poll() is None
    connection.shutdown(socket.SHUT_WR)
    assert daemon.wait(timeout=2) == 0
    assert "cut=0" in daemon.wait_for_log("drained")


def test_after_ten_seconds_the_rest_is_cut(
    daemon: Daemon, connected: tuple[socket.socket, socket.socket]
) -> None:
    client, connection = connected
    began = time.monotonic()
    daemon.signal(signal.SIGHUP)
    assert daemon.wait(timeout=15) == 0
    assert 9 < time.monotonic() - began < 12
    assert "cut=1" in daemon.wait_for_log("drained")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert receive_all(connection) == b""


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("seconds", "most"), [("0", 1.0), ("1.5", 4.0)])
def test_how_long_a_drain_waits_can_be_set(
    hosts: Path, seconds: str, most: float, workers: str
) -> None:
    with (
        start_daemon(hosts, "--drain", seconds, "--workers", workers) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        client, connection = joined(daemon, backend, HELLO)
        with client, connection:
            began = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert float(seconds) <= time.monotonic() - began < most
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert any("cut=1" in line for line in daemon.log())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain(
    daemon: Daemon, connected: tuple[socket.socket, socket.socket], number: signal.Signals
) -> None:
    client, _ = connected
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("draining")
    daemon.signal(number)
    assert daemon.wait(timeout=2) == 0
    assert "cut=1" in daemon.wait_for_log("drained")
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_signal_at_the_very_end_changes_nothing(hosts: Path) -> None:
    for pause in (0.0, 0.001, 0.003, 0.01, 0.03):
        with start_daemon(hosts) as daemon:
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_log("draining")
            time.sleep(pause)
            daemon.signal(signal.SIGHUP)
            assert daemon.wait(timeout=2) == 0


def test_a_client_in_mid_hello_may_finish_it(hosts: Path) -> None:
    with (
        start_daemon(hosts) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
        daemon.connect() as client,
    ):
        client.sendall(HELLO[:20])
        # Somebody who came later and was served: so the first one was accepted.
        with daemon.connect() as other:
            other.sendall(b"x")
            receive_all(other)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("draining")
        client.sendall(HELLO[20:])
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            client.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b""
        assert daemon.wait(timeout=2) == 0
        assert "cut=0" in daemon.wait_for_log("drained")


def test_who_was_in_the_queue_is_served(hosts: Path) -> None:
    with (
        start_daemon(hosts) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        # While it is stopped connections are made by the kernel, and a signal waits.
        daemon.signal(signal.SIGSTOP)
        clients = [daemon.connect() for _ in range(50)]
        for client in clients:
            client.sendall(HELLO)
        daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGCONT)
        for _ in clients:
            with backend.accept() as connection:
                assert receive_exactly(connection, len(HELLO)) == HELLO
                connection.sendall(b"served")
        for client in clients:
            assert receive_all(client) == b"served"
            client.close()
        assert daemon.wait(timeout=2) == 0


def test_a_second_copy_takes_over_on_the_same_socket(hosts: Path) -> None:
    with (
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
        socket.create_server(("127.0.0.1", 0)) as listening,
        Daemon(listening, hosts) as old,
        Daemon(listening, hosts) as new,
    ):
        for daemon in old, new:
            daemon.wait_for_log("listening")
        old.signal(signal.SIGHUP)
        assert old.wait(timeout=2) == 0
        with new.connect() as client:
            client.sendall(HELLO)
            with backend.accept() as connection:
                assert receive_exactly(connection, len(HELLO)) == HELLO


def test_another_holder_may_make_the_socket_a_blocking_one(hosts: Path) -> None:
    """systemd does, when it starts the next copy. To wait in accept would hold up everybody."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Daemon(listening, hosts) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        daemon.wait_for_log("listening")
        client, connection = joined(daemon, backend, HELLO)
        with client, connection:
            listening.setblocking(True)
            other, far = joined(daemon, backend, HELLO)
            with other, far:
                client.sendall(b"ping")
                assert receive_exactly(connection, 4) == b"ping"
            # And soon it is as it was.
            eventually(lambda: ask_and_look(daemon, listening))


def ask_and_look(daemon: Daemon, listening: socket.socket) -> bool:
    """Have the daemon accept; return whether the socket is a non-blocking one then."""
    with daemon.connect() as client:
        client.sendall(b"no hello")
        receive_all(client)
    return not os.get_blocking(listening.fileno())


def test_the_supervisor_is_told(hosts: Path, supervisor: Supervisor) -> None:
    with start_daemon(hosts, env=supervisor.environment) as daemon:
        assert supervisor.hear("READY") == "READY=1"
        assert supervisor.hear("STATUS") == "STATUS=0 open, 0 served, 0 refused"
        with daemon.connect() as client:
            client.sendall(b"x")
            receive_all(client)
        assert supervisor.hear("STATUS=0 open, 0 served, 1") == "STATUS=0 open, 0 served, 1 refused"
        daemon.signal(signal.SIGHUP)
        assert supervisor.hear("STOPPING") == "STOPPING=1"


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "/nonexistent/notify"},
        {"NOTIFY_SOCKET": "nonsense"},
        {"NOTIFY_SOCKET": "@nobody.listens", "WATCHDOG_USEC": "100"},
    ],
)
def test_a_supervisor_that_is_not_there_is_no_harm(
    hosts: Path, environment: dict[str, str]
) -> None:
    with start_daemon(hosts, env=environment) as daemon:
        daemon.signal(signal.SIGHUP)
        assert daemon.wait(timeout=2) == 0


@pytest.mark.parametrize("time", ["-1", "0", "", "soon"])
def test_a_watchdog_time_that_is_none(hosts: Path, supervisor: Supervisor, time: str) -> None:
    with start_daemon(hosts, env=supervisor.environment | {"WATCHDOG_USEC": time}):
        supervisor.hear("READY")


def test_the_watchdog_is_kept_quiet_at_half_its_time(hosts: Path, supervisor: Supervisor) -> None:
    watchdog = {"WATCHDOG_USEC": "100000"}
    with start_daemon(hosts, env=supervisor.environment | watchdog) as daemon:
        supervisor.hear("WATCHDOG")
        began = time.monotonic()
        for _ in range(4):
            assert supervisor.hear("WATCHDOG") == "WATCHDOG=1"
        assert time.monotonic() - began > 0.15
        # A stuck process says nothing.
        daemon.signal(signal.SIGSTOP)
        supervisor.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while True:
                supervisor.hear("WATCHDOG")
        daemon.signal(signal.SIGCONT)


def test_the_time_of_the_watchdog_is_in_microseconds(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (supervisor.environment | {"WATCHDOG_USEC": "1500000"}).items():
        monkeypatch.setenv(name, value)
    notifier = Notifier()
    assert notifier.watchdog == 1.5
    notifier.close()


def test_a_watchdog_for_another_process_is_not_ours(hosts: Path, supervisor: Supervisor) -> None:
    other = {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}
    with start_daemon(hosts, env=supervisor.environment | other):
        supervisor.hear("READY")
        supervisor.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            supervisor.hear("WATCHDOG")
