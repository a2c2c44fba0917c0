"""The bytes that the backend gets are the bytes that were sent, and the other way round."""

import contextlib
import random
import signal
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import CLIENTS, NAME, Client, Visit
from tests.support import hellos
from tests.support.backends import RawBackend, Server, TlsBackend
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon


class Eavesdropper(Server):
    """Stands between a client and `target`, and writes down what passes."""

    def __init__(self, target: tuple[str, int]) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        super().__init__(listening)
        self.address: tuple[str, int] = listening.getsockname()
        self._target = target
        self.up = bytearray()
        self.down = bytearray()

    def serve(self, connection: socket.socket) -> None:
        with (
            connection,
            socket.create_connection(self._target, PATIENCE) as server,
            ThreadPoolExecutor() as threads,
        ):
            threads.submit(copy, connection, server, self.up)
            threads.submit(copy, server, connection, self.down)


def copy(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    # curl does not stay to hear the other side's goodbye. Then it is heard here alone.
    with contextlib.suppress(ConnectionError):
        while data := source.recv(1 << 16):
            record += data
            with contextlib.suppress(ConnectionError):
                sink.sendall(data)
    with contextlib.suppress(OSError):  # ENOTCONN: it has gone
        sink.shutdown(socket.SHUT_WR)


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def read_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(1 << 16):
        received += data
    return bytes(received)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_connection_of_a_real_client(
    client: Client,
    version: str,
    visit: partial[Visit],
    tls_socket: Path,
    certificates: Certificates,
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        there = visit(NAME, version)
        with Eavesdropper(there.address) as eavesdropper:
            outcome = client(replace(there, address=eavesdropper.address))
            assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert seen.error is None
    assert eavesdropper.up == seen.received
    assert eavesdropper.down == seen.sent


GENUINE = hellos.genuine_hello(NAME, protocols=["h2", "http/1.1"])


@pytest.mark.parametrize(
    "hello",
    [
        pytest.param(GENUINE, id="OpenSSL's"),
        pytest.param(hellos.chromium_hello(NAME), id="a browser's"),
        pytest.param(hellos.hello_bytes(NAME, sizes=[1]), id="in records of one byte"),
        pytest.param(hellos.records(hellos.hello_of_size(2**16, NAME)), id="the largest"),
    ],
)
def test_a_hello_and_what_comes_with_it(hello: bytes, daemon: Daemon, tls_socket: Path) -> None:
    # Early data, for one: it comes in the same packet, and is none of the daemon's business.
    more = random.Random(hello).randbytes(2000)
    with RawBackend(tls_socket) as backend, daemon.connect() as client:
        send_all(client, hello + more)
        with backend.accept() as connection:
            assert read_all(connection) == hello + more


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1], id="byte by byte"),
        pytest.param([5, 4, 100], id="header by header"),
        pytest.param([len(GENUINE) - 1, 1], id="all but the last byte"),
    ],
)
def test_a_hello_in_pieces(sizes: Sequence[int], daemon: Daemon, tls_socket: Path) -> None:
    with RawBackend(tls_socket) as backend, daemon.connect() as client:
        # Else the kernel would put them together again.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in hellos.cut(GENUINE, sizes):
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        with backend.accept() as connection:
            assert read_all(connection) == GENUINE


def test_a_hello_and_the_end_at_once(daemon: Daemon, tls_socket: Path) -> None:
    # They come in one event, to a daemon that waits for the hello: the end is not to be forgotten.
    before = daemon.descriptors()
    with RawBackend(tls_socket) as backend, daemon.connect() as client:
        deadline = time.monotonic() + PATIENCE
        while daemon.descriptors() == before:
            assert time.monotonic() < deadline, "it does not accept"
        daemon.signal(signal.SIGSTOP)
        send_all(client, GENUINE)
        daemon.signal(signal.SIGCONT)
        with backend.accept() as connection:
            assert read_all(connection) == GENUINE


def test_anything_goes_after_the_hello(daemon: Daemon, tls_socket: Path) -> None:
    # What follows the hello is not looked at: neither is this TLS, nor does it take turns.
    up, down = (random.Random(seed).randbytes(3_000_000) for seed in (1, 2))
    with RawBackend(tls_socket) as backend, daemon.connect() as client:
        client.sendall(GENUINE)
        with backend.accept() as connection, ThreadPoolExecutor() as threads:
            threads.submit(send_all, client, up)
            threads.submit(send_all, connection, down)
            arrived_up = threads.submit(read_all, connection)
            arrived_down = threads.submit(read_all, client)
    assert arrived_up.result() == GENUINE + up
    assert arrived_down.result() == down
