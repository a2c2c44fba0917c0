"""Names that no host has, and clients without a name, at the running daemon."""

import socket
from pathlib import Path

import pytest

from fuzz.invariants import read_proxy_v2
from sniproxy.wire.crc32c import crc32c
from tests.support.backends import RawBackend, UnixServer, host_directory, listen_unix
from tests.support.daemon import Daemon, start_daemon
from tests.support.hellos import client_hello, handshake, hello_body, record, server_name
from tests.support.sockets import receive_all, receive_exactly
from tests.support.status import hosts_in, read_status


def hello(name: str | None) -> bytes:
    body = client_hello([]) if name is None else hello_body(name)
    return record(handshake(body))


def is_served(daemon: Daemon, listening: socket.socket, data: bytes) -> bool:
    """Tell whether a client is joined to this backend, and not refused."""
    with daemon.connect() as client:
        client.sendall(data)
        with listening.accept()[0] as backend:
            assert receive_exactly(backend, len(data)) == data
            backend.sendall(b"!")
            return client.recv(1) == b"!"


def alert(daemon: Daemon, data: bytes) -> int:
    """Return the alert that a client gets."""
    with daemon.connect() as client:
        client.sendall(data)
        answer = receive_exactly(client, 7)
    assert answer[:6] == bytes([21, 3, 3, 0, 2, 2])
    return answer[6]


def test_any_name_and_no_name(hosts: Path, tmp_path: Path) -> None:
    status = tmp_path / "status"
    with (
        start_daemon(hosts, "--status-socket", str(status)) as daemon,
        listen_unix(host_directory(hosts, "_unknown") / "tls-socket") as unknown,
        listen_unix(host_directory(hosts, "_no-name") / "tls-socket") as nameless,
    ):
        assert is_served(daemon, unknown, hello("any.example"))
        assert is_served(daemon, nameless, hello(None))
        found = hosts_in(read_status(status))
        # Not under the names that clients make up.
        assert {name: host["served"] for name, host in found.items()} == {
            "_unknown": 1,
            "_no-name": 1,
        }
        (hosts / "_no-name" / "tls-socket").unlink()
        assert alert(daemon, hello(None)) == 112
        assert "no_socket" in hosts_in(read_status(status))["_no-name"]["reasons"]


def test_without_them_clients_are_refused_as_ever(daemon: Daemon, hosts: Path) -> None:
    assert alert(daemon, hello(None)) == 112
    assert alert(daemon, hello("any.example")) == 112
    assert "reason=no_server_name" in daemon.log()[-2]
    assert "reason=no_such_host" in daemon.log()[-1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 10),
        (record(handshake(client_hello(extensions_length=1))), 50),
        (record(handshake(client_hello([server_name("a"), server_name("b")]))), 47),
        (record(handshake(client_hello([server_name("")]))), 50),
        (hello("192.0.2.1"), 112),
        (hello("_unknown"), 112),
        (hello("_no-name"), 112),
        (hello("_.example.com"), 112),
        (hello("a..example"), 112),
        (hello("../_unknown"), 112),
    ],
)
def test_what_can_t_be_read_or_is_no_name_they_never_serve(
    daemon: Daemon, hosts: Path, data: bytes, expected: int
) -> None:
    listening = [
        listen_unix(host_directory(hosts, entry) / "tls-socket")
        for entry in ("_unknown", "_no-name", "_.example.com", "_.1")
    ]
    assert alert(daemon, data) == expected
    for each in listening:
        each.setblocking(False)
        with pytest.raises(BlockingIOError):
            each.accept()
        each.close()


def header_of(daemon: Daemon, path: Path, data: bytes) -> tuple[bytes, socket.socket]:
    """Return the header that comes before a hello, and the client, who is connected."""
    with RawBackend(path) as backend:
        client = daemon.connect()
        client.sendall(data)
        with backend.accept() as accepted:
            start = receive_exactly(accepted, 16)
            header = start + receive_exactly(accepted, int.from_bytes(start[14:16]))
            assert receive_exactly(accepted, len(data)) == data
    return header, client


def test_version_2_says_what_the_client_wants(daemon: Daemon, hosts: Path) -> None:
    home = host_directory(hosts, "a.example")
    (home / "send-proxy-v2").touch()
    data = record(handshake(hello_body("A.Example", protocols=["h2", "http/1.1"])))
    header, client = header_of(daemon, home / "tls-socket", data)
    read = read_proxy_v2(header)
    with client:
        ends = client.getsockname(), client.getpeername()
    assert read.ends == [(socket.inet_aton(host), port) for host, port in ends]
    (kind, checksum), *others = read.tlvs
    assert kind == 0x03
    at = header.index(b"\x03\x00\x04") + 3
    assert int.from_bytes(checksum) == crc32c(header[:at] + bytes(4) + header[at + 4 :])
    assert others == [(0x02, b"A.Example"), (0x01, b"\x02h2\x08http/1.1")]


def test_version_2_of_who_says_nothing_more(daemon: Daemon, hosts: Path) -> None:
    home = host_directory(hosts, "_no-name")
    (home / "send-proxy-v2").touch()
    header, client = header_of(daemon, home / "tls-socket", hello(None))
    client.close()
    assert [kind for kind, _ in read_proxy_v2(header).tlvs] == [0x03]


def test_names_that_clients_make_up_are_one_host_in_the_log(daemon: Daemon, hosts: Path) -> None:
    """So they can neither fill it, nor hide a host that is out of order."""
    host_directory(hosts, "_unknown")
    host_directory(hosts, "b.example")
    for number in range(1100):
        assert alert(daemon, hello(f"n{number}.example")) == 112
    assert alert(daemon, hello("b.example")) == 112
    lines = [line for line in daemon.log() if " refused " in line]
    assert len(lines) < 100
    assert any("name=b.example" in line for line in lines)


class Closer(UnixServer):
    """A backend that does not like what it hears."""

    def serve(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(1 << 16)


def test_headers_that_are_not_answered_are_those_of_one_host(daemon: Daemon, hosts: Path) -> None:
    home = host_directory(hosts, "_unknown")
    (home / "send-proxy-v2").touch()
    with Closer(home / "tls-socket"):
        for number in range(150):
            with daemon.connect() as client:
                client.sendall(hello(f"n{number}.example"))
                assert receive_all(client) == b""
    assert 0 < sum(" proxy_header_unanswered " in line for line in daemon.log()) < 100
