"""The contract's table of answers, each row through the parser alone and through the daemon."""

import time
from collections.abc import Iterator

import pytest

from sniproxy.wire import ClientHello, HelloError, HelloReader
from sniproxy_hostname import Hostname, InvalidHostname
from tests.support import hellos
from tests.support.answers import NAME, ROWS, Row
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.sockets import receive_all, receive_exactly

every_row = pytest.mark.parametrize("row", ROWS, ids=[row.case for row in ROWS])
every_message = pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.in_message],
    ids=[row.case for row in ROWS if row.in_message],
)


def answer(pieces: list[bytes]) -> int | None:
    """Return the alert that a flight gets, or None if it is routed; as the daemon decides."""
    reader = HelloReader()
    try:
        for piece in pieces:
            if (hello := reader.feed(piece)) is not None:
                return judge(hello)
    except HelloError as error:
        return error.alert
    raise AssertionError(f"no verdict, {reader.missing} bytes missing")


def judge(hello: ClientHello) -> int | None:
    try:
        name = Hostname(hello.required_server_name())
    except InvalidHostname:
        return 112
    return None if name == NAME else 112


def fragment(flight: bytes, size: int) -> bytes | None:
    """Return the flight in records of another size; None if it would be too long for the wire."""
    message = bytearray()
    while flight:
        length = int.from_bytes(flight[3:5], "big")
        message += flight[5 : 5 + length]
        flight = flight[5 + length :]
    flight = hellos.records(bytes(message), [size])
    return flight if len(flight) <= 96 * 1024 else None


@every_row
def test_whole(row: Row) -> None:
    assert answer([row.flight]) == row.alert


@every_row
def test_byte_by_byte(row: Row) -> None:
    assert answer([bytes([byte]) for byte in row.flight]) == row.alert


@every_row
def test_split_at_every_position_of_its_beginning_and_end(row: Row) -> None:
    # Of a long one, few positions: what comes between its beginning and its end is all alike.
    size = len(row.flight)
    dense = 200 if size < 2000 else 20
    for at in {*range(min(dense, size)), *range(max(0, size - dense), size)}:
        assert answer([row.flight[:at], row.flight[at:]]) == row.alert


@every_message
def test_with_bytes_behind_it(row: Row) -> None:
    for behind in (b"\0", b"\x15\3\3\0\2\1\0", bytes(100), row.flight):
        assert answer([row.flight + behind]) == row.alert


@every_message
def test_in_records_of_every_size(row: Row) -> None:
    # A long one in some sizes, from one byte to all or what a record may hold.
    size = min(len(row.flight), 2**14)
    for length in range(1, size, 1 + size // 300):
        if (flight := fragment(row.flight, length)) is not None:
            assert answer([flight]) == row.alert


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_daemon(tmp_path_factory.mktemp("hosts")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def backend(daemon: Daemon) -> Iterator[RawBackend]:
    with RawBackend(host_directory(daemon.hosts, NAME) / "tls-socket") as backend:
        yield backend


@every_row
def test_the_daemon(row: Row, daemon: Daemon, backend: RawBackend) -> None:
    ask(row, row.flight, daemon, backend)


@every_message
def test_the_daemon_in_small_records(row: Row, daemon: Daemon, backend: RawBackend) -> None:
    for size in (1, 7):
        if (flight := fragment(row.flight, size)) is not None:
            ask(row, flight, daemon, backend)


def ask(row: Row, flight: bytes, daemon: Daemon, backend: RawBackend) -> None:
    began = time.monotonic()
    with daemon.connect() as client:
        client.sendall(flight)
        if row.alert is None:
            with backend.accept() as connection:
                assert receive_exactly(connection, len(flight)) == flight
                connection.sendall(b"routed")
            assert receive_all(client) == b"routed"
        else:
            # The alert, and behind it an end and not a reset.
            assert receive_all(client) == bytes([21, 3, 3, 0, 2, 2, row.alert])
    # At once: nothing is waited for, neither the deadline nor the end of an alert's second.
    assert time.monotonic() - began < 5
