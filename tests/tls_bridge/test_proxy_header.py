"""The PROXY header that a service asks the peer for, as the programs that read it understand it."""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from fuzz.invariants import ProxyV2, read_proxy_v2, read_tlvs
from tests.support.bridge import (
    INGRESS,
    PEER,
    SERVICE,
    Bridge,
    authority,
    bridge,
    client_context,
    connect,
    read_header,
    start,
    write,
)
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.foreign import free_port
from tests.support.sockets import receive_all, receive_exactly

# A client's address that is not the first to come to mind.
CLIENT = "127.0.0.7"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    with bridge(tmp_path) as made:
        yield made


def ask_from(ingress: Daemon) -> tuple[socket.socket, int]:
    """Ask for the service from the client's address; return the tunnel, and the client's port."""
    client = socket.create_connection(ingress.address, PATIENCE, (CLIENT, 0))
    client.sendall(connect())
    assert read_header(client).startswith(b"HTTP/1.1 200 ")
    return client, client.getsockname()[1]


def first_said(it: Bridge, *files: str) -> tuple[bytes, int]:
    """Return what a service hears that has these files, and the client's port."""
    for file in files:
        write(it.peer_place / "allow" / SERVICE / file)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(it.peer_place / f"allow/{SERVICE}/80", f"127.0.0.1:{listening.getsockname()[1]}")
        it.start_peer()
        client, port = ask_from(it.start_ingress())
        with client:
            client.shutdown(socket.SHUT_WR)
            service, _ = listening.accept()
            with service:
                service.settimeout(PATIENCE)
                return receive_all(service), port


def receive_header(service: socket.socket) -> bytes:
    start = receive_exactly(service, 16)
    return start + receive_exactly(service, int.from_bytes(start[14:]))


def check(header: ProxyV2, it: Bridge, port: int) -> None:
    here = socket.inet_aton("127.0.0.1")
    peer_port = it.peer_socket.getsockname()[1]
    assert header.ends == [(socket.inet_aton(CLIENT), port), (here, peer_port)]
    (kind, tls), names = header.tlvs
    assert kind == 0x20
    assert names == (0xE5, b"DNS:" + INGRESS.encode())
    # TLS, with a certificate in this connection and this session; verified.
    assert tls[:5] == b"\7" + bytes(4)
    inside = dict(read_tlvs(tls[5:]))
    assert inside.pop(0x23).startswith(b"TLS_")
    assert inside == {0x21: b"TLSv1.3", 0x22: INGRESS.encode()}


@pytest.mark.parametrize("files", [["send-proxy-v2"], ["send-proxy-v1", "send-proxy-v2"]])
def test_version_2_says_who_is_in_the_certificate_that_was_verified(
    it: Bridge, files: list[str]
) -> None:
    heard, port = first_said(it, *files)
    check(read_proxy_v2(heard), it, port)


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ([], None),
        (["Forwarded: for=192.0.2.7:50000"], [(b"\xc0\0\2\7", 50000), (bytes(4), 80)]),
        (
            ['Forwarded: for="[2001:db8::7]:50000"'],
            [(b"\x20\1\r\xb8" + bytes(11) + b"\7", 50000), (bytes(16), 80)],
        ),
    ],
)
def test_where_the_peer_has_no_address_the_client_may_have_one(
    it: Bridge, tmp_path: Path, fields: list[str], ends: list[tuple[bytes, int]] | None
) -> None:
    """It listens on a Unix socket, and only Forwarded says where a client comes from."""
    write(it.peer_place / "allow" / SERVICE / "send-proxy-v2")
    path = str(tmp_path / "peer-socket")
    context = client_context()
    authority().issue_cert(INGRESS, common_name=INGRESS).configure_cert(context)
    with (
        socket.socket(socket.AF_UNIX) as at_peer,
        socket.socket(socket.AF_UNIX) as near,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        at_peer.bind(path)
        at_peer.listen()
        write(it.peer_place / f"allow/{SERVICE}/80", f"127.0.0.1:{listening.getsockname()[1]}")
        with start(at_peer, it.peer_place, "tls_bridge.peer"):
            near.settimeout(PATIENCE)
            near.connect(path)
            with context.wrap_socket(near, server_hostname=PEER) as client:
                client.sendall(connect(f"{SERVICE}:80", *fields))
                assert read_header(client).startswith(b"HTTP/1.1 200 ")
                service, _ = listening.accept()
                with service:
                    service.settimeout(PATIENCE)
                    header = read_proxy_v2(receive_header(service))
    assert header.ends == ends
    assert [kind for kind, _ in header.tlvs] == [0x20, 0xE5]


def test_version_1_is_for_who_asks_for_that_only(it: Bridge) -> None:
    heard, port = first_said(it, "send-proxy-v1")
    peer_port = it.peer_socket.getsockname()[1]
    assert heard == f"PROXY TCP4 {CLIENT} 127.0.0.1 {port} {peer_port}\r\n".encode()


# --- Programs that read it -----------------------------------------------------------------------


def free_socket(place: Path, kind: str) -> str:
    """Return an address for a service, as allow/HOST/PORT has it."""
    return str(place / "service-socket") if kind == "unix" else f"127.0.0.1:{free_port()}"


@contextmanager
def running(where: str, log: Path, *command: str) -> Iterator[None]:
    """Run a program, which listens at `where`."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: process.poll() is not None or listens(where))
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def listens(where: str) -> bool:
    unix = "/" in where
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
        host, _, port = where.partition(":")
        return not probe.connect_ex(where if unix else (host, int(port)))


def haproxy(where: str, place: Path) -> AbstractContextManager[None]:
    listening = f"unix@{where}" if "/" in where else where
    path = write(
        place / "haproxy.cfg",
        f"""
        defaults
            mode http
            timeout client 10s
        frontend service
            bind {listening} accept-proxy
            http-request return status 200 content-type text/plain lf-string "%[src] %[src_port]"
        \n""",
    )
    return running(where, place / "haproxy.log", "haproxy", "-f", str(path))


def nginx(where: str, place: Path) -> AbstractContextManager[None]:
    listening = f"unix:{where}" if "/" in where else where
    path = write(
        place / "nginx.conf",
        f"""
        daemon off;
        pid {place}/nginx.pid;
        events {{ }}
        http {{
            access_log off;
            server {{
                listen {listening} proxy_protocol;
                location / {{ return 200 "$proxy_protocol_addr $proxy_protocol_port"; }}
            }}
        }}
        """,
    )
    command = ("nginx", "-e", str(place / "nginx.log"), "-p", str(place), "-c", str(path))
    return running(where, place / "nginx.out", *command)


def needs(program: str, package: str) -> pytest.MarkDecorator:
    there = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(
        there is None, reason=f"{program} is not installed (Debian package {package})"
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(haproxy, marks=needs("haproxy", "haproxy")),
        pytest.param(nginx, marks=needs("nginx", "nginx-light")),
    ],
)
def test_a_web_server_knows_its_client(
    it: Bridge,
    program: Callable[[str, Path], AbstractContextManager[None]],
    kind: str,
    version: int,
    tmp_path: Path,
) -> None:
    where = free_socket(tmp_path, kind)
    write(it.peer_place / f"allow/{SERVICE}/80", where)
    write(it.peer_place / f"allow/{SERVICE}/send-proxy-v{version}")
    it.start_peer()
    with program(where, tmp_path):
        client, port = ask_from(it.start_ingress())
        with client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = receive_all(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(f"\r\n\r\n{CLIENT} {port}".encode())


@needs("tshark", "tshark")
@needs("text2pcap", "wireshark-common")
def test_wireshark_reads_what_we_meant(it: Bridge, tmp_path: Path) -> None:
    heard, port = first_said(it, "send-proxy-v2")
    dump = write(tmp_path / "dump", f"000000 {heard.hex(' ')}\n")
    capture = tmp_path / "capture"
    command = ("text2pcap", "-q", "-T", "50000,80", str(dump), str(capture))
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    done = subprocess.run(
        ["tshark", "-r", str(capture), "-o", "tcp.try_heuristic_first:true", "-V", "-O", "proxy"],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    for expected in (
        "Address Family Protocol: TCP over IPv4 (0x11)",
        f"Source Address: {CLIENT}",
        f"Source Port: {port}",
        "Client: 0x07",
        "Verify: 0x00000000",
        "Version: TLSv1.3",
        f"CN: {INGRESS}",
        f"Value: {(b'DNS:' + INGRESS.encode()).hex()}",
    ):
        assert expected in lines, done.stdout
