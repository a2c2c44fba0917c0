"""What real clients send first, all of `tests/flights/`: however it is cut, it reaches its host.

And second opinions on the corpus itself: that OpenSSL, GnuTLS and Wireshark see the same name in
each flight, in whatever records it comes.
"""

import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import trustme

from sniproxy.wire import MAX_WIRE, Alert, ClientHello, HelloReader
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, start_daemon
from tests.support.recorder import NAME, record_flight
from tests.support.recordings import FOLDER, Recording, load
from tests.support.sockets import receive_all, receive_exactly

CORPUS = load()
RECORD_SIZES = (1, 2, 3, 5, 16, 100, 1000)

each = pytest.mark.parametrize("recording", CORPUS, ids=lambda recording: recording.label)


def test_the_index_lists_every_file() -> None:
    assert [recording.label for recording in CORPUS] == sorted(
        path.stem for path in FOLDER.glob("*.bin")
    )


PYTHON = """
import socket, ssl
tcp = socket.create_connection(("127.0.0.1", {port}))
ssl.create_default_context().wrap_socket(tcp, server_hostname="{name}")
"""
PYTHON_BY_PROXY = """
import os, urllib.request
os.environ["https_proxy"] = "http://127.0.0.1:{port}"
urllib.request.urlopen("https://{name}/")
"""


@pytest.mark.parametrize("program", [PYTHON, PYTHON_BY_PROXY], ids=["directly", "by proxy"])
def test_anyone_can_record_more(program: str) -> None:
    flight = record_flight([sys.executable, "-c", program])
    assert read([flight]).server_name == NAME.encode()


# The parser alone.


def read(pieces: Iterable[bytes]) -> ClientHello:
    """Read a hello the way the daemon does; it never asks for a byte beyond the hello's last."""
    reader = HelloReader()
    for piece in pieces:
        if (hello := reader.feed(piece)) is not None:
            return hello
    raise AssertionError(f"{reader.missing} bytes are missing")


def record_sizes(recording: Recording) -> list[int]:
    """The sizes of records that keep the flight within what is read at all."""
    return [size for size in RECORD_SIZES if len(recording.in_records_of(size)) <= MAX_WIRE]


def cuts(flight: bytes) -> Iterable[int]:
    """Every place to cut a flight in two; of the few very long ones, those near the ends."""
    if len(flight) <= 3000:
        return range(1, len(flight))
    ends = 150
    middle = range(ends, len(flight) - ends, 499)  # a prime number: no two of one alignment
    return [*range(1, ends), *middle, *range(len(flight) - ends, len(flight))]


@each
def test_the_name_is_found(recording: Recording) -> None:
    assert read([recording.flight]).server_name == recording.server_name.encode()


@each
def test_split_anywhere(recording: Recording) -> None:
    flight = recording.flight
    whole = read([flight])
    for cut in cuts(flight):
        assert read([flight[:cut], flight[cut:]]) == whole, cut


@each
def test_byte_by_byte(recording: Recording) -> None:
    assert read(hellos.cut(recording.flight, [1])) == read([recording.flight])


@each
def test_in_records_of_any_size(recording: Recording) -> None:
    whole = read([recording.flight])
    for size in record_sizes(recording):
        fragmented = recording.in_records_of(size)
        assert read([fragmented]) == whole
        # Pieces that fit no record; for a long flight, some hundreds will do.
        assert read(hellos.cut(fragmented, [7 + len(fragmented) // 500])) == whole


# Through the daemon.


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_daemon(tmp_path_factory.mktemp("hosts")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def backends(daemon: Daemon) -> Iterator[dict[str, RawBackend]]:
    """A backend for each host that is asked for, by its name in lower case without a last dot."""
    with contextlib.ExitStack() as stack:
        yield {
            host: stack.enter_context(RawBackend(host_directory(daemon.hosts, host) / "tls-socket"))
            for host in {host_of(recording) for recording in CORPUS}
        }


def host_of(recording: Recording) -> str:
    return recording.server_name.lower().rstrip(".")


def check_it_arrives(daemon: Daemon, backend: RawBackend, pieces: list[bytes]) -> None:
    """The host's backend gets the very bytes, and no more."""
    with daemon.connect() as client:
        # Else the kernel would put the pieces together again.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(pieces[0])
        for piece in pieces[1:]:
            time.sleep(0.004)  # let the daemon look at what there is
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        with backend.accept() as connection:
            assert receive_all(connection) == b"".join(pieces)


@each
def test_it_reaches_its_host(
    recording: Recording, daemon: Daemon, backends: dict[str, RawBackend]
) -> None:
    check_it_arrives(daemon, backends[host_of(recording)], [recording.flight])


@each
def test_it_reaches_its_host_in_two_pieces(
    recording: Recording, daemon: Daemon, backends: dict[str, RawBackend]
) -> None:
    flight = recording.flight
    hello = len(flight) - len(recording.rest)
    # In the record's header, after it, in the message's header, in the middle, before the end.
    for cut in (3, 5, 7, hello // 2, hello - 1):
        check_it_arrives(daemon, backends[host_of(recording)], [flight[:cut], flight[cut:]])


@each
def test_it_reaches_its_host_in_records_of_any_size(
    recording: Recording, daemon: Daemon, backends: dict[str, RawBackend]
) -> None:
    for size in record_sizes(recording):
        fragmented = recording.in_records_of(size)
        check_it_arrives(daemon, backends[host_of(recording)], [fragmented])


# Second opinions.


@pytest.fixture(scope="module")
def openssl(certificates: Certificates) -> ssl.SSLContext:
    context = certificates.server_context(NAME)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@each
def test_openssl_sees_the_same_name(recording: Recording, openssl: ssl.SSLContext) -> None:
    for flight in (recording.flight, recording.in_records_of(100)):
        seen: list[str | None] = []

        def note(
            _tls: object, name: str | None, _context: object, seen: list[str | None] = seen
        ) -> None:
            seen.append(name)

        openssl.sni_callback = note
        incoming = ssl.MemoryBIO()
        incoming.write(flight)
        server = openssl.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
        with contextlib.suppress(ssl.SSLError):  # what comes after the name is not our business
            server.do_handshake()
        assert seen == [recording.server_name]


def test_wireshark_sees_the_same_names(tmp_path: Path) -> None:
    tshark = shutil.which("tshark")
    if tshark is None:
        pytest.skip("tshark is not installed (Debian: apt install tshark)")
    flights = [recording.flight for recording in CORPUS]
    # Once as recorded, once in small records, for it can put these together, too.
    flights += [recording.in_records_of(100) for recording in CORPUS]
    capture = tmp_path / "flights.pcap"
    capture.write_bytes(pcap(flights))
    fields = ["-e", "tcp.srcport", "-e", "tls.handshake.extensions_server_name"]
    done = subprocess.run(
        # -n: it must not ask a name server who 192.0.2.1 is.
        [tshark, "-n", "-r", capture, "-Y", "tls.handshake.type == 1", "-T", "fields", *fields],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
    )
    seen = [line.split("\t") for line in done.stdout.splitlines()]
    names = [recording.server_name for recording in CORPUS]
    assert seen == [[str(port), name] for port, name in enumerate(names * 2, FIRST_PORT)]


FIRST_PORT = 20_000


def pcap(flights: Iterable[bytes]) -> bytes:
    """A capture in which each flight is a TCP connection, from a port of its own to port 443.

    The file is draft-ietf-opsawg-pcap, of packets that begin with an IPv4 header (LINKTYPE_IPV4).
    """
    capture = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 16, 228)
    syn, ack, push = 0x02, 0x10, 0x08
    for port, flight in enumerate(flights, FIRST_PORT):
        packets = [ipv4(port, 0, syn, b"")]
        packets += [
            ipv4(port, 1 + at, ack | push, flight[at : at + 1400])
            for at in range(0, len(flight), 1400)
        ]
        for packet in packets:
            capture += struct.pack("<IIII", 0, 0, len(packet), len(packet)) + packet
    return capture


def ipv4(port: int, sequence: int, flags: int, payload: bytes) -> bytes:
    """A packet from 192.0.2.1 to 192.0.2.2, its checksums left out."""
    tcp = struct.pack("!HHIIBBHHH", port, 443, sequence, 0, 5 << 4, flags, 0xFFFF, 0, 0) + payload
    addresses = bytes([192, 0, 2, 1, 192, 0, 2, 2])
    return struct.pack("!BBHHHBBH", 0x45, 0, 40 + len(payload), 0, 0, 64, 6, 0) + addresses + tcp


@pytest.fixture(scope="module")
def gnutls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A server of GnuTLS that is `flight.example` and nobody else; its address."""
    program = shutil.which("gnutls-serv")
    if program is None:
        pytest.skip("gnutls-serv is not installed (Debian: apt install gnutls-bin)")
    pem = tmp_path_factory.mktemp("gnutls") / "key-and-certificate.pem"
    trustme.CA().issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(str(pem))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address: tuple[str, int] = free.getsockname()
    command = [program, "--quiet", "--port", str(address[1]), "--priority", "LEGACY"]
    command += ["--x509certfile", str(pem), "--x509keyfile", str(pem)]
    command += ["--sni-hostname", NAME, "--sni-hostname-fatal"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    socket.create_connection(address).close()
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None, "gnutls-serv has ended"
                    assert time.monotonic() < deadline, "gnutls-serv does not listen"
                    time.sleep(0.01)
            yield address
        finally:
            process.kill()


# handshake_failure(40): the client wants more of a certificate than a P-256 key.
DEMANDING = {"gnutls-secure256"}


@each
def test_gnutls_sees_the_same_name(recording: Recording, gnutls_server: tuple[str, int]) -> None:
    with socket.create_connection(gnutls_server, PATIENCE) as client:
        client.sendall(recording.flight)
        answer = receive_exactly(client, 7)
    if recording.server_name != NAME:
        # It compares names letter by letter.
        assert fatal_alert(answer) == Alert.UNRECOGNIZED_NAME
    elif recording.label in DEMANDING:
        assert fatal_alert(answer) == 40
    else:
        # A record's header, its version left out, and the beginning of a ServerHello.
        assert (answer[0], answer[5]) == (hellos.HANDSHAKE, 2)


def fatal_alert(record: bytes) -> int:
    assert (record[0], record[5]) == (hellos.ALERT, 2)
    return record[6]
