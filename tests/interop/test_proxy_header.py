"""The PROXY protocol: who the client is, as the client itself knows, and as servers log it."""

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.interop.clients import NAME, Visit, curl
from tests.support.backends import TlsBackend, UnixServer, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, eventually, start_daemon
from tests.support.sockets import receive_exactly


def skip_if_missing(address: str) -> None:
    try:
        socket.create_server((address, 0), family=family_of(address)).close()
    except OSError as error:
        pytest.skip(f"{address} is no address of this machine: {error.strerror}")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.mark.parametrize(
    ("listening", "reached", "protocol"),
    [
        pytest.param("127.0.0.1", "127.0.0.1", "TCP4", id="IPv4"),
        pytest.param("::1", "::1", "TCP6", id="IPv6"),
        pytest.param("::", "127.0.0.1", "TCP4", id="dual-stack by IPv4"),
        pytest.param("::", "::1", "TCP6", id="dual-stack by IPv6"),
    ],
)
def test_the_header_comes_before_the_hello(
    listening: str, reached: str, protocol: str, tmp_path: Path, certificates: Certificates
) -> None:
    skip_if_missing(reached)
    host = host_directory(tmp_path, NAME)
    (host / "send-proxy-v1").touch()
    with (
        start_daemon(
            tmp_path,
            address=(listening, 0),
            family=family_of(listening),
            dual_stack=listening == "::",
        ) as daemon,
        TlsBackend(host / "tls-socket", certificates.server_context(NAME), proxy=True) as backend,
    ):
        port = daemon.address[1]
        outcome = curl(
            Visit((reached, port), certificates.authority, NAME),
            *("--write-out", "I was %{local_ip} %{local_port}\n"),
        )
        assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert seen.proxy_line is not None
    header = seen.proxy_line.decode()
    client_port = header.split()[4]
    assert header == f"PROXY {protocol} {reached} {reached} {client_port} {port}\r\n"
    assert f"I was {reached} {client_port}\n" in outcome.output
    # Nothing of it was taken for TLS, and the other way round.
    assert (seen.error, seen.requests) == (None, ["GET / HTTP/1.1"])


@contextmanager
def running(log: Path, listens_at: Path, *command: str) -> Iterator[None]:
    """Run a server, which listens at a path."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: server.poll() is not None or _accepts(listens_at))
        assert server.poll() is None, log.read_text()
        yield
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return not probe.connect_ex(str(path))


def haproxy(path: Path, place: Path, pem: Path) -> AbstractContextManager[None]:
    configuration = place / "haproxy.cfg"
    configuration.write_text(f"""
        global
            log {place}/log len 1024 format raw local0
        defaults
            mode http
            timeout client 10s
            log global
            log-format "HAProxy saw %ci %cp, and %[fc_pp_authority]"
        frontend tls
            bind unix@{path} accept-proxy ssl crt {pem}
            http-request return status 200
        \n""")
    return running(place / "haproxy.out", path, "haproxy", "-f", str(configuration))


def nginx(path: Path, place: Path, pem: Path) -> AbstractContextManager[None]:
    configuration = place / "nginx.conf"
    configuration.write_text(f"""
        daemon off;
        pid {place}/nginx.pid;
        events {{ }}
        http {{
            log_format seen "nginx saw $proxy_protocol_addr $proxy_protocol_port";
            access_log {place}/access seen;
            server {{
                listen unix:{path} ssl proxy_protocol;
                ssl_certificate {pem};
                ssl_certificate_key {pem};
                location / {{ return 200; }}
            }}
        }}
    """)
    command = ("nginx", "-e", str(place / "nginx.log"), "-p", str(place), "-c", str(configuration))
    return running(place / "nginx.out", path, *command)


def needs(program: str, package: str) -> pytest.MarkDecorator:
    there = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(
        there is None, reason=f"{program} is not installed (Debian package {package})"
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(haproxy, marks=needs("haproxy", "haproxy")),
        pytest.param(nginx, marks=needs("nginx", "nginx-light")),
    ],
)
def test_servers_log_the_client(
    program: Callable[[Path, Path, Path], AbstractContextManager[None]],
    version: int,
    tmp_path: Path,
    certificates: Certificates,
) -> None:
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    host = host_directory(hosts, NAME)
    (host / f"send-proxy-v{version}").touch()
    pair = certificates.for_client(NAME)
    pem = tmp_path / "pem"
    pem.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    # HAProxy writes datagrams.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.settimeout(PATIENCE)
        log.bind(str(tmp_path / "log"))
        with (
            program(host / "tls-socket", tmp_path, pem),
            start_daemon(hosts) as daemon,
        ):
            (host / "tls-socket").chmod(0o666)
            outcome = curl(
                Visit(daemon.address, certificates.authority, NAME),
                *("--write-out", "I was %{local_ip} %{local_port}\n"),
            )
            assert outcome.code == 0, outcome.output
            [client] = re.findall("I was (.+)", outcome.output)
            if program is nginx:
                access = tmp_path / "access"
                eventually(lambda: f"nginx saw {client}\n" in access.read_text())
                return
            authority = NAME if version == 2 else "-"
            # The connection that asked whether it listens is in the log, too.
            wanted = f"HAProxy saw {client}, and {authority}".encode()
            while wanted not in log.recv(1 << 16):
                pass


def test_a_receiver_of_version_2_alone(tmp_path: Path, certificates: Certificates) -> None:
    """It refuses version 1, as Jetty and others can be told to."""
    host = host_directory(tmp_path, NAME)
    context = certificates.server_context(NAME)

    class StrictBackend(UnixServer):
        def serve(self, connection: socket.socket) -> None:
            with connection, suppress(OSError):
                start = receive_exactly(connection, 16)
                if start[:13] != b"\r\n\r\n\0\r\nQUIT\n\x21":
                    return
                receive_exactly(connection, int.from_bytes(start[14:16]))
                with context.wrap_socket(connection, server_side=True) as stream:
                    stream.recv(1 << 14)
                    stream.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

    with StrictBackend(host / "tls-socket"), start_daemon(tmp_path) as daemon:
        visit = Visit(daemon.address, certificates.authority, NAME)
        assert curl(visit).code != 0
        (host / "send-proxy-v1").touch()
        assert curl(visit).code != 0
        (host / "send-proxy-v2").touch()
        assert curl(visit).code == 0
