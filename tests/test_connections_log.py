"""`--log connections`: a line for each connection, at its end."""

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, joined
from tests.support.daemon import Daemon, start_daemon
from tests.support.sockets import receive_all, receive_exactly, reset

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)

LINE = re.compile(
    r"sniproxy: connection client=127\.0\.0\.1:(?P<port>\d+) name=a\.example up=(?P<up>\d+) "
    r"down=(?P<down>\d+) seconds=(?P<seconds>\d+\.\d{3}) ending=(?P<ending>\w+)"
)


@pytest.fixture
def daemon(hosts: Path) -> Iterator[Daemon]:
    with start_daemon(hosts, "--log", "connections") as daemon:
        yield daemon


@pytest.fixture
def backend(daemon: Daemon) -> Iterator[RawBackend]:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        yield backend


def line(daemon: Daemon) -> re.Match[str]:
    found = LINE.fullmatch(daemon.wait_for_log("connection"))
    assert found, daemon.log()
    return found


@pytest.mark.parametrize("size", [1, 8 << 20], ids=["copied", "spliced"])
def test_what_went_there_and_back(daemon: Daemon, backend: RawBackend, size: int) -> None:
    client, connection = joined(daemon, backend, HELLO)
    port = client.getsockname()[1]
    with client, connection:
        for sender, receiver in (client, connection), (connection, client):
            sent = 0
            while sent < size:
                piece = min(size - sent, 1 << 16)
                sender.sendall(bytes(piece))
                assert len(receive_exactly(receiver, piece)) == piece
                sent += piece
            sender.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == receive_all(client) == b""
    found = line(daemon)
    assert found["ending"] == "finished"
    assert (int(found["port"]), int(found["up"])) == (port, len(HELLO) + size)
    assert int(found["down"]) == size
    assert 0 <= float(found["seconds"]) < 60


def test_a_client_that_resets(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with connection:
        reset(client)
        assert line(daemon)["ending"] == "client_reset"


def test_a_backend_that_goes_without_reading(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with client:
        client.sendall(b"unread")
        connection.recv(1, socket.MSG_PEEK)
        connection.close()
        assert client.recv(1) == b""
    assert line(daemon)["ending"] == "backend_reset"


def test_one_that_is_cut(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with client, connection:
        daemon.signal(signal.SIGINT)
        daemon.wait()
        assert line(daemon)["ending"] == "cut"


@pytest.mark.parametrize(
    ("option", "half_closes", "ending"),
    [("--idle-timeout", False, "idle"), ("--half-closed-timeout", True, "half_closed")],
)
def test_one_that_has_a_time_limit(
    hosts: Path, option: str, half_closes: bool, ending: str
) -> None:
    with (
        start_daemon(hosts, "--log", "connections", option, "0.4") as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        client, connection = joined(daemon, backend, HELLO)
        with client, connection:
            if half_closes:
                client.shutdown(socket.SHUT_WR)
                assert receive_all(connection) == b""
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            found = line(daemon)
            assert found["ending"] == ending
            assert float(found["seconds"]) >= 0.4


def test_without_the_option_there_is_no_line(hosts: Path) -> None:
    with (
        start_daemon(hosts) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        client, connection = joined(daemon, backend, HELLO)
        client.close()
        connection.close()
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        assert not [line for line in daemon.log() if "connection" in line.split()]
