"""The hello as the daemon meets it: in any pieces, of any size, and answered if it is no good.

What is right and wrong in a hello is tested in `wire/`; here it is whether that reaches a socket.
"""

import socket
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.answers import ROWS
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.sockets import receive_all, receive_exactly, reset

NAME = "example.com"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_daemon(tmp_path_factory.mktemp("hosts")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def backend(daemon: Daemon) -> Iterator[RawBackend]:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        yield backend


def send_in_pieces(client: socket.socket, pieces: list[bytes], pause: float = 0.0) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        client.sendall(piece)
        time.sleep(pause)


def check_it_arrives(backend: RawBackend, client: socket.socket, flight: bytes) -> None:
    """The backend gets the very bytes, and both can talk."""
    with backend.accept() as connection:
        assert receive_exactly(connection, len(flight)) == flight
        connection.sendall(b"answer")
        assert receive_exactly(client, 6) == b"answer"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b""


def test_byte_by_byte(daemon: Daemon, backend: RawBackend) -> None:
    flight = hellos.hello_bytes(NAME)
    with daemon.connect() as client:
        # The pauses let every byte be a segment of its own, and be looked at alone.
        send_in_pieces(client, [bytes([byte]) for byte in flight], pause=0.001)
        check_it_arrives(backend, client, flight)


@pytest.mark.parametrize("first", [1, 4, 5, 6, 8, 9, 10, 43, 100])
def test_in_two_pieces(daemon: Daemon, backend: RawBackend, first: int) -> None:
    flight = hellos.hello_bytes(NAME)
    with daemon.connect() as client:
        send_in_pieces(client, [flight[:first], flight[first:]], pause=0.02)
        check_it_arrives(backend, client, flight)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 100])
@pytest.mark.parametrize("pause", [0.0, 0.0005])
def test_in_small_records(daemon: Daemon, backend: RawBackend, size: int, pause: float) -> None:
    flight = hellos.hello_bytes(NAME, sizes=[size])
    pieces = hellos.cut(flight, repeat(7, len(flight) // 7)) if pause else [flight]
    with daemon.connect() as client:
        send_in_pieces(client, pieces, pause)
        check_it_arrives(backend, client, flight)


# 4,087 bytes and two headers are what the first look at a hello has room for.
@pytest.mark.parametrize("size", [1800, 4086, 4087, 4088, 16_380, 16_385, 30_000, 65_536])
@pytest.mark.parametrize("segment", [700, 40_000, 1 << 20])
def test_up_to_64_kib(daemon: Daemon, backend: RawBackend, size: int, segment: int) -> None:
    flight = hellos.records(hellos.hello_of_size(size, NAME))
    with daemon.connect() as client:
        send_in_pieces(client, list(hellos.cut(flight, repeat(segment, 1 + size // segment))))
        check_it_arrives(backend, client, flight)


def test_up_to_96_kib_on_the_wire(daemon: Daemon, backend: RawBackend) -> None:
    # 16,383 bytes, each in a record of its own, are 6 bytes short of the limit.
    flight = hellos.records(hellos.hello_of_size(16_383 - 4, NAME), [1])
    assert len(flight) == 96 * 1024 - 6
    with daemon.connect() as client:
        send_in_pieces(client, [flight[:50_000], flight[50_000:]], pause=0.02)
        check_it_arrives(backend, client, flight)


def test_with_more_behind_it(daemon: Daemon, backend: RawBackend) -> None:
    flight = hellos.hello_bytes(NAME) + bytes(200_000)
    with daemon.connect() as client:
        client.sendall(flight)
        check_it_arrives(backend, client, flight)


def test_a_client_that_ends_its_side_after_the_hello(daemon: Daemon, backend: RawBackend) -> None:
    flight = hellos.hello_bytes(NAME)
    with daemon.connect() as client:
        send_in_pieces(client, [flight[:40], flight[40:]], pause=0.02)
        client.shutdown(socket.SHUT_WR)
        with backend.accept() as connection:
            assert receive_all(connection) == flight
            connection.sendall(b"answer")
        assert receive_all(client) == b"answer"


def fatal(alert: int) -> bytes:
    return bytes([21, 3, 3, 0, 2, 2, alert])


# The shortest flight for each alert. (The table itself is in test_answers.py.)
REFUSED = {
    row.alert: row.flight
    for row in sorted(ROWS, key=lambda row: len(row.flight), reverse=True)
    if row.alert is not None
}


@pytest.mark.parametrize(("alert", "flight"), REFUSED.items())
def test_refused_byte_by_byte(daemon: Daemon, flight: bytes, alert: int) -> None:
    with daemon.connect() as client:
        send_in_pieces(client, [bytes([byte]) for byte in flight], pause=0.0005)
        assert receive_all(client) == fatal(alert)


def test_a_client_that_goes_on_sending_gets_the_alert(daemon: Daemon) -> None:
    with daemon.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(7) == fatal(10)
        client.sendall(bytes(30_000))
        client.sendall(bytes(30_000))
        assert receive_all(client) == b""


def test_a_hello_that_fills_the_receive_buffer_is_too_large(hosts: Path) -> None:
    # A buffer that is set on a listener is inherited, and no mark can make it grow.
    flight = hellos.records(hellos.hello_of_size(65_000, NAME))
    with start_daemon(hosts, receive_buffer=4096) as daemon, daemon.connect() as client:
        client.sendall(flight)  # into our own send buffer, most of it
        assert receive_all(client) == fatal(80)


def test_many_small_segments_are_not_too_large(daemon: Daemon, backend: RawBackend) -> None:
    # Each takes a multiple of its size in the kernel's memory, which is not how a hello is judged.
    flight = hellos.records(hellos.hello_of_size(2000, NAME), [1])
    with daemon.connect() as client:
        send_in_pieces(client, list(hellos.cut(flight, [6])), pause=0.0001)
        check_it_arrives(backend, client, flight)


def test_a_client_that_says_nothing_and_goes_is_no_event(daemon: Daemon) -> None:
    before = len(daemon.log())
    for _ in range(3):
        daemon.connect().close()
        reset(daemon.connect())
    with daemon.connect() as client:
        client.sendall(b"x")
        receive_all(client)
    assert len(daemon.log()) == before + 1


def test_a_client_that_goes_in_mid_hello_gets_no_alert(daemon: Daemon) -> None:
    with daemon.connect() as client:
        client.sendall(hellos.hello_bytes(NAME)[:50])
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
    daemon.wait_for_log("reason=client_closed")


def test_names_are_the_same_in_every_spelling(daemon: Daemon, backend: RawBackend) -> None:
    for name in ("EXAMPLE.com", "example.com.", "eXaMpLe.CoM."):
        flight = hellos.hello_bytes(name)
        with daemon.connect() as client:
            client.sendall(flight)
            check_it_arrives(backend, client, flight)


def test_nothing_is_left_behind(hosts: Path) -> None:
    # A daemon of its own: the other one may be busy still with the last client of another test.
    with (
        start_daemon(hosts) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
    ):
        before = daemon.descriptors()
        for flight in chain(repeat(hellos.hello_bytes(NAME), 5), repeat(b"x", 5)):
            with daemon.connect() as client:
                client.sendall(flight)
                client.shutdown(socket.SHUT_WR)
                if flight != b"x":
                    with backend.accept() as connection:
                        assert receive_all(connection) == flight
                receive_all(client)
        deadline = time.monotonic() + 5
        while daemon.descriptors() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert daemon.descriptors() == before
