"""s6-svscan with the service directory that we ship, installed as its README says, on port 443."""

import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sniproxy.config import Config
from tests.support import hellos
from tests.support.backends import RawBackend, TlsBackend, host_directory
from tests.support.bridge import (
    INGRESS,
    PEER,
    Echo,
    connect,
    read_header,
    write,
    write_identity,
)
from tests.support.bridge import SERVICE as WEB
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, eventually
from tests.support.enclosure import Enclosure, why_no_enclosure
from tests.support.greeting import UNRECOGNIZED_NAME
from tests.support.sockets import receive_all, receive_exactly
from tests.support.wrapping import CLIENT, Server, server_context, works

NAME = "one.example"
HELLO = hellos.hello_bytes(NAME)
ADDRESS = ("127.0.0.1", 443)

SHIPPED = Path(__file__).parents[2] / "s6"
SCAN = "/run/service"
SERVICE = f"{SCAN}/sniproxy"
INGRESS_NAME, PEER_NAME = "tls-bridge", "tls-bridge-peer"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
_no_enclosure = why_no_enclosure()
pytestmark = [
    pytest.mark.skipif(_no_enclosure is not None, reason=str(_no_enclosure)),
    pytest.mark.skipif(
        shutil.which("s6-svscan") is None, reason="there is no s6 (Debian package s6)"
    ),
]

# The last line of `run`.
PROGRAM = "/opt/sniproxy/bin/sniproxy --stay --upgrade-socket /run/sniproxy/upgrade"


class Service:
    """A service in its machine."""

    def __init__(self, inside: Enclosure, name: str = "sniproxy") -> None:
        self.inside = inside
        self.name = name
        self._place = f"{SCAN}/{name}"

    def svc(self, *options: str) -> None:
        self.inside.run("s6-svc", f"-T{_milliseconds(PATIENCE)}", *options, self._place)

    def wait(self, state: str) -> None:
        self.inside.run("s6-svwait", f"-t{_milliseconds(PATIENCE)}", state, self._place)

    def status(self, *options: str) -> list[str]:
        return self.inside.run("s6-svstat", *options, self._place).split()

    def pid(self) -> int:
        return int(*self.status("-p"))

    def log(self) -> list[str]:
        """Return the lines of the log, without the time."""
        text = (self.inside / f"/var/log/{self.name}/current").read_text()
        return [line.partition(" ")[2] for line in text.splitlines()]

    def wait_for_log(self, word: str) -> None:
        eventually(lambda: any(word in line for line in self.log()))

    def ask(self, flight: bytes = HELLO) -> bytes:
        """Return what a client gets for these bytes."""
        with self.inside.connect(ADDRESS) as client:
            client.sendall(flight)
            return receive_all(client)

    def is_closed(self) -> bool:
        """Tell whether the port is closed."""
        try:
            self.inside.connect(ADDRESS).close()
        except ConnectionRefusedError:
            return True
        return False


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


@pytest.fixture
def inside() -> Iterator[Enclosure]:
    """A machine with a scan directory."""
    with Enclosure() as inside:
        (inside / SCAN).mkdir()
        with inside.start("s6-svscan", SCAN):
            try:
                eventually((inside / SCAN / ".s6-svscan/control").exists)
                yield inside
            finally:
                inside.end(signal.SIGKILL)


def installations() -> list[str]:
    """Return the commands of the README: for sniproxy, for tls-bridge and for tls-tproxy."""
    return re.findall(r"```sh\n(.*?)```", (SHIPPED / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def service(inside: Enclosure) -> Iterator[Service]:
    """The service, installed and ready."""
    inside.run("sh", "-e", "-c", installations()[0])
    service = Service(inside)
    service.wait("-U")
    yield service
    # pytest shows it if the test fails.
    sys.stdout.write("".join(f"{line}\n" for line in service.log()))


@contextmanager
def raw_backend(inside: Enclosure) -> Iterator[RawBackend]:
    path = host_directory(inside / "/srv/hosts", NAME) / "tls-socket"
    with RawBackend(path) as backend:
        path.chmod(0o666)
        yield backend


def descriptors(pid: int) -> list[str]:
    return [os.readlink(fd) for fd in Path("/proc", str(pid), "fd").iterdir()]


def test_it_is_ready(service: Service) -> None:
    inside = service.inside
    [pid] = inside.processes("sniproxy")
    assert service.pid() == pid
    assert service.ask() == UNRECOGNIZED_NAME
    # The client that asked whether it is ready has left no trace, and nobody else has the socket.
    service.wait_for_log("refused")
    assert [line.split()[1] for line in service.log()] == ["sandbox", "listening", "refused"]
    [listener] = inside.listeners(443)
    assert [each for each in inside.processes() if listener in descriptors(each)] == [pid]
    user = inside.run("id", "--user", "sniproxy").strip()
    status = Path("/proc", str(pid), "status").read_text()
    assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
    # It has not been left with children of others.
    assert Path("/proc", str(pid), "task", str(pid), "children").read_text() == ""


def test_who_does_not_answer_is_not_ready(service: Service) -> None:
    """To listen is not enough."""
    service.svc("-wD", "-d")
    change(service.inside, f"{PROGRAM}\n", "sleep 1000\n")
    service.svc("-u")
    # Asked it is, and so it would be ready within milliseconds.
    eventually(lambda: service.inside.processes("check"))
    service.inside.run("s6-svwait", "-U", "-t500", SERVICE, code=99)
    assert service.status("-o", "up,ready") == ["true", "false"]


def change(inside: Enclosure, end: str, instead: str) -> None:
    """Let `run` end in another way."""
    run = inside / "/etc/s6/sniproxy/run"
    text = run.read_text()
    assert text.endswith(end)
    run.write_text(text.removesuffix(end) + instead)


@needs_curl
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_real_tls(service: Service, certificates: Certificates, host: str) -> None:
    path = host_directory(service.inside / "/srv/hosts", NAME) / "tls-socket"
    with TlsBackend(path, certificates.server_context(NAME)):
        path.chmod(0o666)
        code = service.inside.run(
            *("curl", "--silent", "--show-error", "--output", "/dev/null"),
            *("--write-out", "%{http_code}", "--cacert", str(certificates.authority)),
            *("--connect-to", f"{NAME}:443:{host}:443", f"https://{NAME}/"),
        )
    assert code == "200"


@pytest.mark.parametrize("option", ["-h", "-r"])
def test_a_drain_and_a_new_copy(service: Service, option: str) -> None:
    old = service.pid()
    with raw_backend(service.inside) as backend, service.inside.connect(ADDRESS) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            service.svc(option)
            service.wait_for_log("draining open=1")
            eventually(service.is_closed)
            # Who is in lives on.
            connection.sendall(b"pong")
            assert receive_exactly(client, 4) == b"pong"
            client.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b""
        service.wait_for_log("drained served=1 refused=0 cut=0")
        eventually(lambda: service.pid() not in (old, -1))
        service.wait("-U")
        with service.inside.connect(ADDRESS) as client:
            client.sendall(HELLO)
            with backend.accept() as connection:
                assert receive_exactly(connection, len(HELLO)) == HELLO


def test_down_and_up(service: Service) -> None:
    with raw_backend(service.inside) as backend, service.inside.connect(ADDRESS) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            service.svc("-d")
            service.wait_for_log("draining open=1")
            eventually(service.is_closed)
            connection.sendall(b"pong")
            assert receive_exactly(client, 4) == b"pong"
    service.wait("-D")
    service.wait_for_log("drained")
    assert service.status("-o", "up,wantedup,exitcode") == ["false", "false", "0"]
    assert service.inside.listeners(443) == set()
    service.svc("-wU", "-u")
    assert service.ask() == UNRECOGNIZED_NAME


def test_killed_it_comes_back(service: Service) -> None:
    old = service.pid()
    service.svc("-wR", "-k")
    assert service.pid() != old
    assert service.ask() == UNRECOGNIZED_NAME


def test_called_wrongly_it_stays_down(service: Service) -> None:
    service.svc("-wD", "-d")
    hosts = service.inside / "/srv/hosts"
    hosts.chmod(0o700)
    service.svc("-u")
    service.wait_for_log("fatal: unable to search the hosts directory")
    # s6-supervise does not want it up any more, so it does not try.
    eventually(lambda: service.status("-o", "wantedup,exitcode") == ["false", "100"])
    assert service.status("-o", "up") == ["false"]
    hosts.chmod(0o755)
    service.svc("-wU", "-u")
    assert service.ask() == UNRECOGNIZED_NAME


def test_what_may_pass_is_tried_again(service: Service) -> None:
    service.svc("-wD", "-d")
    hosts = service.inside / "/srv/hosts"
    hosts.rmdir()
    service.svc("-u")
    service.wait_for_log("unable to chdir to /srv/hosts")
    eventually(lambda: service.status("-o", "wantedup,exitcode") == ["true", "111"])
    hosts.mkdir()
    service.wait("-U")
    assert service.ask() == UNRECOGNIZED_NAME


def test_the_log(service: Service) -> None:
    inside = service.inside
    service.ask()
    service.wait_for_log("refused client=127.0.0.1:")
    folder = inside / "/var/log/sniproxy"
    for line in (folder / "current").read_text().splitlines():
        assert re.match(r"@4[0-9a-f]{23} sniproxy: ", line)
    # Neither the daemon nor others may read or change it.
    for user in "sniproxy", "nobody":
        there = ("s6-setuidgid", user, "test", "-x", "/var/log/sniproxy")
        inside.run(*there, code=1)
    # A new logger takes over the pipe.
    [old] = inside.processes("s6-log")
    inside.run("s6-svc", "-wR", "-r", f"{SERVICE}/log")
    assert inside.processes("s6-log") != [old]
    service.ask()
    service.wait_for_log("refused client=127.0.0.1:")


def test_the_root_directory_may_be_that_of_the_hosts(service: Service) -> None:
    """As the comment in `run` says."""
    inside = service.inside
    service.svc("-wD", "-d")
    change(
        inside,
        f"s6-setuidgid sniproxy\n{PROGRAM}\n",
        "/opt/sniproxy/bin/sniproxy --chroot --user sniproxy\n",
    )
    service.svc("-wU", "-u")
    assert service.ask() == UNRECOGNIZED_NAME
    pid = service.pid()
    assert os.path.samestat(os.stat(f"/proc/{pid}/root"), (inside / "/srv/hosts").stat())
    service.wait_for_log("refused")


def test_a_new_copy_without_a_gap(service: Service) -> None:
    """With keep-port, of docs/running.md, in the place of the daemon."""
    inside = service.inside
    service.svc("-wD", "-d")
    page = (SHIPPED.parent / "docs/running.md").read_text()
    [script] = re.findall(r"```sh\n(#!/bin/sh\n# keep-port.*?)```", page, re.DOTALL)
    keep_port = inside / "/srv/keep-port"
    keep_port.write_text(script.replace("sniproxy <", "/opt/sniproxy/bin/sniproxy <"))
    keep_port.chmod(0o755)
    change(inside, f"{PROGRAM}\n", "/srv/keep-port\n")
    service.svc("-wU", "-u")
    [old] = inside.processes("sniproxy")
    with raw_backend(inside) as backend, inside.connect(ADDRESS) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            service.svc("-h")

            def the_old_one_drains() -> bool:
                assert service.ask(b"no hello")
                return sum("draining" in line for line in service.log()) == 2

            eventually(the_old_one_drains)
            # Both are there, and the old one has only those who are in.
            connection.sendall(b"pong")
            assert receive_exactly(client, 4) == b"pong"
    eventually(lambda: old not in inside.processes("sniproxy"))
    service.svc("-wD", "-d")
    assert inside.processes("sniproxy") == []


def test_an_upgrade_without_a_cut(service: Service) -> None:
    """s6 goes on with the process that it knows, and what it is asked for reaches the other one."""
    pid = service.pid()
    command = "/opt/sniproxy/bin/sniproxy", "--upgrade", "/run/sniproxy/upgrade"
    with raw_backend(service.inside) as backend, service.inside.connect(ADDRESS) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            for _ in range(2):
                service.inside.run(*command)
                connection.sendall(b"pong")
                assert receive_exactly(client, 4) == b"pong"
                assert service.pid() == pid
                assert len(service.inside.processes("sniproxy")) == 2
            assert service.ask(b"no hello")
            assert sum("taken_over" in line for line in service.log()) == 2
            service.svc("-h")
            service.wait_for_log("draining open=1")
        assert receive_all(client) == b""
    # When that has ended, it has ended, too, and s6 starts it anew.
    eventually(lambda: service.pid() not in (pid, -1))
    service.wait("-U")
    assert service.ask(b"no hello")


def test_the_end_of_s6(service: Service) -> None:
    with raw_backend(service.inside) as backend, service.inside.connect(ADDRESS) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            service.inside.run("s6-svscanctl", "-t", SCAN)
            service.wait_for_log("draining open=1")
            connection.sendall(b"pong")
            assert receive_exactly(client, 4) == b"pong"
    eventually(lambda: service.inside.processes() == [])
    assert "drained served=1 refused=0 cut=0" in service.log()[-1]


@pytest.mark.parametrize("name", ["sniproxy", INGRESS_NAME, PEER_NAME])
def test_no_drain_is_killed(name: str) -> None:
    milliseconds = int((SHIPPED / name / "timeout-kill").read_text())
    assert milliseconds > _milliseconds(Config().drain_seconds)


# --- tls-bridge ----------------------------------------------------------------------------------


@pytest.fixture
def bridge(inside: Enclosure) -> Iterator[dict[str, Service]]:
    """Both sides, installed and ready, with a service behind them."""
    inside.run("sh", "-e", "-c", installations()[1])
    ingress, peer = inside / "/srv/tls-bridge/main", inside / "/srv/tls-bridge-peer/main"
    write(ingress / "hosts" / WEB / "peer", "rack\n")
    write(ingress / "peers/rack/address", "127.0.0.1:8443\n")
    write(ingress / "peers/rack/server-name", PEER)
    write_identity(ingress / "peers/rack/identity", INGRESS)
    echo = inside.do(Echo)
    write(peer / "clients" / INGRESS)
    write(peer / "allow" / WEB / "80", f"127.0.0.1:{echo.port}")
    write_identity(peer / "identity", PEER)
    for place in "tls-bridge/main/peers/rack", "tls-bridge-peer/main":
        key = f"/srv/{place}/identity/key.pem"
        inside.run("sh", "-ec", f"chgrp tls-bridge {key} && chmod 640 {key}")
    services = {name: Service(inside, name) for name in (INGRESS_NAME, PEER_NAME)}
    for service in services.values():
        service.wait("-U")
    yield services
    echo.close()
    for service in services.values():
        sys.stdout.write("".join(f"{line}\n" for line in service.log()))


def tunnel(inside: Enclosure) -> socket.socket:
    """Return a client that has got to the service."""
    client = inside.connect(("127.0.0.1", 8080))
    client.sendall(connect(f"{WEB}:80"))
    assert read_header(client).startswith(b"HTTP/1.1 200 ")
    return client


def says_it_back(client: socket.socket) -> bool:
    client.sendall(b"ping")
    return receive_exactly(client, 4) == b"ping"


def test_both_sides_are_ready(bridge: dict[str, Service]) -> None:
    for name, service in bridge.items():
        inside = service.inside
        # The kernel keeps 15 bytes of a name.
        [pid] = inside.processes(name[:15])
        assert service.pid() == pid
        user = inside.run("id", "--user", "tls-bridge").strip()
        status = Path("/proc", str(pid), "status").read_text()
        assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
        service.wait_for_log("listening")
    # The client that has asked whether it is ready is worth no line.
    for service in bridge.values():
        assert [line.split()[1] for line in service.log()] == ["sandbox", "listening"]
    with tunnel(bridge[INGRESS_NAME].inside) as client:
        assert says_it_back(client)


@pytest.mark.parametrize("name", [INGRESS_NAME, PEER_NAME])
def test_a_side_drains_and_starts_anew(bridge: dict[str, Service], name: str) -> None:
    service = bridge[name]
    old = service.pid()
    with tunnel(service.inside) as client:
        service.svc("-h")
        service.wait_for_log("draining open=1")
        # Who is in lives on.
        assert says_it_back(client)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
    service.wait_for_log("drained served=1")
    eventually(lambda: service.pid() not in (old, -1))
    service.wait("-U")
    with tunnel(service.inside) as client:
        assert says_it_back(client)


@pytest.mark.parametrize("name", [INGRESS_NAME, PEER_NAME])
def test_a_side_that_is_called_wrongly_stays_down(bridge: dict[str, Service], name: str) -> None:
    service = bridge[name]
    service.svc("-wD", "-d")
    run = service.inside / f"/etc/s6/{name}/run"
    run.write_text(f"{run.read_text().rstrip()} --verbose\n")
    service.svc("-u")
    service.wait_for_log("fatal: unable to understand the options: unknown option '--verbose'")
    eventually(lambda: service.status("-o", "wantedup,exitcode") == ["false", "100"])


def test_both_sides_have_the_same_files() -> None:
    for path in "finish", "notification-fd", "timeout-kill", "data/check", "log/notification-fd":
        ingress, peer = (SHIPPED / name / path for name in (INGRESS_NAME, PEER_NAME))
        assert ingress.read_text() == peer.read_text()
        assert ingress.stat().st_mode == peer.stat().st_mode


# --- tls-tproxy ----------------------------------------------------------------------------------

TPROXY_NAME = "tls-tproxy"
WRAPPED = ("127.0.0.2", 8443)

needs_nft = pytest.mark.skipif(
    shutil.which("nft") is None, reason="nft is not installed (Debian package nftables)"
)


@pytest.fixture
def tproxy(inside: Enclosure) -> Iterator[Service]:
    """It, installed and ready, with a server that has a name by a fixed address."""
    place = inside / "/srv/tls-tproxy/main"
    write(place / f"wrap/ports/{WRAPPED[1]}", "443\n")
    write(place / f"wrap/names/{NAME}/addresses", f"{WRAPPED[0]}\n")
    write_identity(place / "identity", CLIENT)
    inside.run("sh", "-e", "-c", installations()[2])
    key = "/srv/tls-tproxy/main/identity/key.pem"
    inside.run("sh", "-ec", f"chgrp tls-tproxy {key} && chmod 640 {key}")
    listening = inside.do(lambda: socket.create_server((WRAPPED[0], 443)))
    server = Server(listening, server_context(NAME))
    service = Service(inside, TPROXY_NAME)
    service.wait("-U")
    yield service
    server.close()
    sys.stdout.write("".join(f"{line}\n" for line in service.log()))


@needs_nft
def test_programs_are_wrapped(tproxy: Service) -> None:
    inside = tproxy.inside
    assert works(inside.connect(WRAPPED))
    user = inside.run("id", "--user", TPROXY_NAME).strip()
    status = Path("/proc", str(tproxy.pid()), "status").read_text()
    assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
    # The client that asked whether it is ready.
    tproxy.wait_for_log("reason=not_redirected")


@needs_nft
def test_restarted_it_wraps_and_stopped_it_refuses(tproxy: Service) -> None:
    inside = tproxy.inside
    old = tproxy.pid()
    tproxy.svc("-h")
    eventually(lambda: tproxy.pid() not in (old, -1))
    tproxy.wait("-U")
    assert works(inside.connect(WRAPPED))
    tproxy.svc("-wD", "-d")
    with pytest.raises(ConnectionRefusedError):
        inside.connect(WRAPPED)


def test_tls_tproxy_has_the_same_files_as_the_others() -> None:
    for path in "finish", "notification-fd", "timeout-kill", "log/notification-fd", "log/run":
        ours, others = (SHIPPED / name / path for name in (TPROXY_NAME, INGRESS_NAME))
        assert ours.read_text() == others.read_text().replace(INGRESS_NAME, TPROXY_NAME)
        assert ours.stat().st_mode == others.stat().st_mode
