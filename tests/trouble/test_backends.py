"""Backends that are not there, not ready, or no good."""

import contextlib
import socket
import threading
from contextlib import ExitStack

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, accepted, host_directory, listen_unix
from tests.support.daemon import Daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask
from tests.support.sockets import receive_all, receive_exactly

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)

# More than all buffers on the way hold, and less than a leak of memory would let through.
MOST_ON_THE_WAY = 64 << 20


def test_a_backend_that_is_missing(daemon: Daemon) -> None:
    host_directory(daemon.hosts, NAME)
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log("reason=no_socket")


def test_a_backend_that_does_not_listen(daemon: Daemon) -> None:
    listen_unix(host_directory(daemon.hosts, NAME) / "tls-socket").close()
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log("reason=not_listening")


def test_a_backend_that_restarts(daemon: Daemon) -> None:
    path = host_directory(daemon.hosts, NAME) / "tls-socket"
    for word in b"before", b"after":
        with Greeter(path, word):
            assert ask(daemon, NAME) == word
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME


def test_a_backlog_of_0_under_40_clients_and_all_are_served(daemon: Daemon) -> None:
    number = 40
    with (
        listen_unix(host_directory(daemon.hosts, NAME) / "tls-socket", backlog=0) as listening,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(daemon.connect()) for _ in range(number)]
        for client in clients:
            client.sendall(HELLO)
        for _ in range(number):
            connection, _ = listening.accept()
            with connection:
                assert receive_exactly(connection, len(HELLO)) == HELLO
                connection.sendall(b"served")
        assert {receive_all(client) for client in clients} == {b"served"}


def test_a_backend_that_accepts_and_never_reads(daemon: Daemon) -> None:
    others = "b.example"
    with (
        RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend,
        Greeter(host_directory(daemon.hosts, others) / "tls-socket", b"b"),
        daemon.connect() as client,
    ):
        client.sendall(HELLO)
        with backend.accept() as connection:
            client.settimeout(0.5)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < MOST_ON_THE_WAY:
                    sent += client.send(bytes(1 << 16))
            assert sent < MOST_ON_THE_WAY
            # Others don't notice, and what is on the way is not lost.
            assert ask(daemon, others) == b"b"
            client.shutdown(socket.SHUT_WR)
            assert len(receive_all(connection)) == len(HELLO) + sent


@pytest.mark.parametrize("unread", [0, 1 << 20])
def test_a_backend_that_breaks_off_in_mid_stream(daemon: Daemon, unread: int) -> None:
    """The hello was not read, and yet what it said is heard, and then an end."""
    with (
        RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend,
        daemon.connect() as client,
    ):
        client.sendall(HELLO)
        connection = backend.accept()
        connection.sendall(b"half of")
        assert receive_exactly(client, 7) == b"half of"
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.send(bytes(unread))
        client.settimeout(5)
        connection.close()
        assert client.recv(1) == b""


def test_a_backend_that_takes_its_time_to_accept(daemon: Daemon) -> None:
    with listen_unix(host_directory(daemon.hosts, NAME) / "tls-socket") as listening:
        answer: list[bytes] = []
        thread = threading.Thread(target=lambda: answer.append(ask(daemon, NAME)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        connection = next(accepted(listening))
        with connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            connection.sendall(b"at last")
        thread.join()
        assert answer == [b"at last"]
