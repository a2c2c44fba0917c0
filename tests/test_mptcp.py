"""Multipath TCP, RFC 8684: a listener of it serves those who speak it, and those who don't."""

import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import PATIENCE, Daemon
from tests.support.greeting import UNRECOGNIZED_NAME
from tests.support.sockets import Noise, receive_all, receive_exactly

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)
IPPROTO_MPTCP = 262


def has_mptcp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError as error:
        return error.errno not in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL)
    return True


pytestmark = pytest.mark.skipif(not has_mptcp(), reason="this kernel has no Multipath TCP")


@pytest.fixture
def daemon(hosts: Path) -> Iterator[Daemon]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        daemon = Daemon(listening, hosts, ("--log", "connections"))
    with daemon:
        daemon.wait_for_log("listening")
        yield daemon


@pytest.fixture(params=[IPPROTO_MPTCP, socket.IPPROTO_TCP], ids=["MPTCP", "TCP"])
def client(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, request.param) as client:
        client.settimeout(PATIENCE)
        client.connect(daemon.address)
        yield client


# With a pause between them the pieces are packets of their own, and the daemon waits for the rest.
@pytest.mark.parametrize(("piece", "pause"), [(1, 0), (10, 0.01), (100_000, 0)])
def test_a_conversation(daemon: Daemon, client: socket.socket, piece: int, pause: float) -> None:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        for start in range(0, len(HELLO), piece):
            client.sendall(HELLO[start : start + piece])
            time.sleep(pause)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            connection.sendall(b"hello")
            assert receive_exactly(client, 5) == b"hello"
            client.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b""
            connection.sendall(b"goodbye")
        assert receive_all(client) == b"goodbye"
    assert "ending=finished" in daemon.wait_for_log("connection")


def test_much_both_ways(daemon: Daemon, client: socket.socket) -> None:
    data = b"".join(Noise().blocks(16 << 20))
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        client.sendall(HELLO)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            for source, sink in (client, connection), (connection, client):
                thread = threading.Thread(target=source.sendall, args=[data])
                thread.start()
                assert receive_exactly(sink, len(data)) == data
                thread.join()


def test_a_refusal(daemon: Daemon, client: socket.socket) -> None:
    client.sendall(hellos.hello_bytes("nobody.example"))
    assert receive_all(client) == UNRECOGNIZED_NAME


def test_last_words(daemon: Daemon, client: socket.socket) -> None:
    data = b"".join(Noise().blocks(1 << 20))
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        client.sendall(HELLO + b"unread")
        with backend.accept() as connection:
            thread = threading.Thread(target=connection.sendall, args=[data])
            thread.start()
            received = receive_exactly(client, 1 << 19)
            thread.join()
        received += receive_all(client)
    assert received == data


def test_a_drain_closes_the_port(daemon: Daemon, client: socket.socket) -> None:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        client.sendall(HELLO)
        with backend.accept():
            daemon.process.terminate()
            daemon.wait_for_log("draining")
            with pytest.raises(ConnectionRefusedError):
                daemon.connect()
    client.close()
    assert daemon.wait() == 0
