"""The relay in the running daemon: the laws of `engine/relay.py`, seen from outside."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import check_half_closeable_stream, trio_test

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, joined
from tests.support.daemon import Daemon
from tests.support.sockets import Noise, receive_all, reset

NAME = "example.com"
HELLO = hellos.hello_bytes(NAME)


@pytest.fixture
def backend(hosts: Path) -> Iterator[RawBackend]:
    with RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend:
        yield backend


def stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def test_it_is_a_half_closeable_stream(daemon: Daemon, backend: RawBackend) -> None:
    @trio_test
    async def check() -> None:
        async def make() -> tuple[trio.SocketStream, trio.SocketStream]:
            client, connection = await trio.to_thread.run_sync(joined, daemon, backend, HELLO)
            return stream(client), stream(connection)

        await check_half_closeable_stream(make, None)

    check()


@pytest.mark.parametrize("way", ["up", "down"])
def test_200_mb_to_a_slow_reader_take_no_memory(
    daemon: Daemon, backend: RawBackend, way: str
) -> None:
    size = 200 << 20
    sender, receiver = joined(daemon, backend, HELLO)
    if way == "down":
        sender, receiver = receiver, sender
    sent = hashlib.blake2b()

    def send() -> None:
        for block in Noise().blocks(size):
            sent.update(block)
            sender.sendall(block)
        sender.shutdown(socket.SHUT_WR)

    # The receiver's small buffer makes every read a small one and every write a short one.
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
    thread = threading.Thread(target=send)
    thread.start()
    received = hashlib.blake2b()
    count = 0
    with sender, receiver:
        time.sleep(0.3)  # for everything to fill up that can be filled
        while chunk := receiver.recv(1 << 16):
            received.update(chunk)
            count += len(chunk)
        thread.join()
    assert count == size
    assert received.digest() == sent.digest()
    assert daemon.rss_peak() < 80 << 20


def test_late_data_after_a_half_close(daemon: Daemon, backend: RawBackend) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with client, connection:
        client.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b""
        connection.sendall(b"late")
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"late"


def test_a_reset_by_the_client_reaches_the_backend_at_once(
    daemon: Daemon, backend: RawBackend
) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with connection:
        reset(client)
        assert receive_all(connection) == b""
        with pytest.raises(BrokenPipeError):
            connection.sendall(b"x")


def test_a_backend_that_closes_with_bytes_unread_is_an_end_for_the_client(
    daemon: Daemon, backend: RawBackend
) -> None:
    client, connection = joined(daemon, backend, HELLO)
    with client:
        client.sendall(b"unread")
        connection.recv(1, socket.MSG_PEEK)
        connection.close()
        assert client.recv(1) == b""


def test_who_waits_costs_others_nothing(daemon: Daemon, backend: RawBackend) -> None:
    stuck, stuck_connection = joined(daemon, backend, HELLO)
    stuck.setblocking(False)
    with stuck, stuck_connection:
        with pytest.raises(BlockingIOError):
            while True:
                stuck.send(bytes(1 << 20))
        client, connection = joined(daemon, backend, HELLO)
        with client, connection:
            client.sendall(b"ping")
            assert connection.recv(4) == b"ping"


def test_a_vanished_client_is_noticed(daemon: Daemon, backend: RawBackend) -> None:
    # That the kernel asks for signs of life is all that can be seen here in less than a minute.
    client, connection = joined(daemon, backend, HELLO)
    with client, connection:
        port = client.getsockname()[1]
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        # proc(5): the state, and the kind of timer that is pending. Another connection may have had
        # the same port, and be in TIME_WAIT.
        established, keep_alive = "01", "02:"
        ours = [row for row in rows if row[2].endswith(f":{port:04X}") and row[3] == established]
        [timer] = [row[5] for row in ours if row[1].endswith(f":{daemon.address[1]:04X}")]
        assert timer.startswith(keep_alive)
