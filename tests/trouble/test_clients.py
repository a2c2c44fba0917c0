"""Clients that are slow, rude or gone."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, joined
from tests.support.daemon import Daemon
from tests.support.sockets import receive_all, receive_exactly, reset

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)


@pytest.fixture
def backend(daemon: Daemon) -> Iterator[RawBackend]:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        yield backend


def test_a_hello_that_drips_gains_no_time(daemon: Daemon, backend: RawBackend) -> None:
    with daemon.connect() as client:
        began = time.monotonic()
        client.settimeout(0.25)
        for byte in HELLO:
            client.sendall(bytes([byte]))
            try:
                assert client.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionResetError:
                pass  # this byte came at the very moment
            break
        assert 9 < time.monotonic() - began < 12
    assert "refused" in daemon.wait_for_log("reason=deadline")


def test_a_client_that_resets(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with connection:
        client.sendall(b"last words")
        assert receive_exactly(connection, 10) == b"last words"
        reset(client)
        # There is no reset for a Unix socket: the end is all that it can be told.
        assert receive_all(connection) == b""


def test_a_client_that_resets_what_it_was_being_sent(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with connection:
        reset(client)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                connection.send(bytes(1 << 16))


@pytest.mark.parametrize("first", ["client", "backend"])
def test_a_half_close_with_late_data_from_the_other_side(
    daemon: Daemon, backend: RawBackend, first: str
) -> None:
    client, connection = joined(daemon, backend, HELLO)
    early, late = (client, connection) if first == "client" else (connection, client)
    with client, connection:
        early.sendall(b"all I have to say")
        early.shutdown(socket.SHUT_WR)
        assert receive_all(late) == b"all I have to say"
        time.sleep(0.2)
        late.sendall(b"and now I")
        assert receive_exactly(early, 9) == b"and now I"
        time.sleep(0.2)
        late.sendall(b" have done")
        late.shutdown(socket.SHUT_WR)
        assert receive_all(early) == b" have done"
