"""openbsd-inetd with the line that we ship, on port 443."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from syslog import LOG_DAEMON, LOG_ERR, LOG_INFO, LOG_WARNING

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, TlsBackend, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, eventually
from tests.support.enclosure import Enclosure, why_no_enclosure
from tests.support.greeting import UNRECOGNIZED_NAME
from tests.support.sockets import receive_all, receive_exactly
from tests.support.syslogd import Syslog

NAME = "one.example"
HELLO = hellos.hello_bytes(NAME)
IPV4, IPV6 = ("127.0.0.1", 443), ("::1", 443)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
_no_enclosure = why_no_enclosure()
pytestmark = [
    pytest.mark.skipif(_no_enclosure is not None, reason=str(_no_enclosure)),
    pytest.mark.skipif(
        shutil.which("inetd", path="/usr/sbin") is None,
        reason="there is no inetd (Debian package openbsd-inetd)",
    ),
]


@pytest.fixture
def inside() -> Iterator[Enclosure]:
    """A machine to which the administrator has added our line, and the hosts directory."""
    with Enclosure() as inside:
        inside.run("useradd", "--system", "--shell", "/usr/sbin/nologin", "sniproxy")
        (inside / "/srv/hosts").mkdir()
        inside.run("sh", "-c", "cat inetd/inetd.conf >>/etc/inetd.conf")
        yield inside


@pytest.fixture
def syslog(inside: Enclosure) -> Iterator[Syslog]:
    with Syslog(inside / "/dev/log") as syslog:
        yield syslog


@pytest.fixture
def inetd(inside: Enclosure, syslog: Syslog) -> Iterator["subprocess.Popen[bytes]"]:
    """inetd, when it listens."""
    with running_inetd(inside) as inetd:
        yield inetd


@contextmanager
def running_inetd(inside: Enclosure, sockets: int = 2) -> Iterator["subprocess.Popen[bytes]"]:
    with inside.start("inetd", "-i") as inetd:
        try:
            eventually(lambda: len(inside.listeners(443)) == sockets)
            yield inetd
        finally:
            inetd.terminate()


def backend_path(inside: Enclosure) -> Path:
    return host_directory(inside / "/srv/hosts", NAME) / "tls-socket"


@contextmanager
def raw_backend(inside: Enclosure) -> Iterator[RawBackend]:
    path = backend_path(inside)
    with RawBackend(path) as backend:
        path.chmod(0o666)
        yield backend


def ask(inside: Enclosure, flight: bytes, address: tuple[str, int] = IPV4) -> bytes:
    """Return all that a client gets for these bytes."""
    with inside.connect(address) as client:
        client.sendall(flight)
        return receive_all(client)


def descriptors(pid: int) -> dict[int, str]:
    folder = Path("/proc", str(pid), "fd")
    return {int(fd.name): os.readlink(fd) for fd in folder.iterdir()}


@pytest.mark.usefixtures("inetd")
def test_the_first_connection_starts_one_daemon_for_all(inside: Enclosure, syslog: Syslog) -> None:
    assert inside.processes("sniproxy") == []
    for _ in range(3):
        assert ask(inside, HELLO) == UNRECOGNIZED_NAME
    [pid] = inside.processes("sniproxy")
    listening = syslog.wait_for("sniproxy", "listening address=0.0.0.0:443")
    assert (listening.pid, listening.facility, listening.severity) == (pid, LOG_DAEMON, LOG_INFO)
    assert ask(inside, HELLO, IPV6) == UNRECOGNIZED_NAME
    assert syslog.wait_for("sniproxy", "listening address=[::]:443").pid != pid


@pytest.mark.usefixtures("inetd")
def test_what_the_daemon_is_then(inside: Enclosure, syslog: Syslog) -> None:
    ask(inside, HELLO)
    pid = syslog.wait_for("sniproxy", "listening").pid
    user = inside.run("id", "--user", "sniproxy").strip()
    status = Path("/proc", str(pid), "status").read_text()
    assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
    assert os.readlink(f"/proc/{pid}/cwd") == "/srv/hosts"
    # Of the three that inetd has made the socket, none is left; its own one is what it listens on.
    links = descriptors(pid)
    assert [links[fd] for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert len(inside.listeners(443).intersection(links.values())) == 1


@needs_curl
@pytest.mark.usefixtures("inetd", "syslog")
@pytest.mark.parametrize("address", [IPV4, IPV6], ids=["IPv4", "IPv6"])
def test_real_tls(inside: Enclosure, certificates: Certificates, address: tuple[str, int]) -> None:
    path = backend_path(inside)
    host, port = address
    with TlsBackend(path, certificates.server_context(NAME)):
        path.chmod(0o666)
        code = inside.run(
            *("curl", "--silent", "--show-error", "--output", "/dev/null"),
            *("--write-out", "%{http_code}", "--cacert", str(certificates.authority)),
            *("--connect-to", f"{NAME}:443:[{host}]:{port}", f"https://{NAME}/"),
        )
    assert code == "200"


@pytest.mark.usefixtures("inetd")
def test_refusals_are_told_to_syslog(inside: Enclosure, syslog: Syslog) -> None:
    assert ask(inside, HELLO) == UNRECOGNIZED_NAME
    refused = syslog.wait_for("sniproxy", "refused")
    assert f"name={NAME} reason=no_such_host alert=112" in refused.text
    assert (refused.facility, refused.severity) == (LOG_DAEMON, LOG_INFO)
    ask(inside, hellos.record(hellos.handshake(b"", length=70_000)))
    too_large = syslog.wait_for("sniproxy", "reason=hello_too_large")
    assert (too_large.facility, too_large.severity) == (LOG_DAEMON, LOG_WARNING)


def test_a_drain(inside: Enclosure, syslog: Syslog, inetd: "subprocess.Popen[bytes]") -> None:
    with raw_backend(inside) as backend, inside.connect(IPV4) as client:
        client.sendall(HELLO)
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            old = syslog.wait_for("sniproxy", "listening").pid
            os.kill(old, signal.SIGHUP)
            syslog.wait_for("sniproxy", "draining open=1")
            # It has no copy left. inetd has its own, so the port is open.
            eventually(lambda: inside.listeners(443).isdisjoint(descriptors(old).values()))
            assert inside.listeners(443) <= set(descriptors(inetd.pid).values())
            with inside.connect(IPV4) as late:
                late.sendall(HELLO)
                # Who is in lives on; who has come since waits until the old one is gone.
                connection.sendall(b"pong")
                assert receive_exactly(client, 4) == b"pong"
                client.shutdown(socket.SHUT_WR)
                assert receive_all(connection) == b""
                connection.close()
                drained = syslog.wait_for("sniproxy", "drained served=1 refused=0 cut=0")
                assert (drained.facility, drained.severity) == (LOG_DAEMON, LOG_INFO)
                with backend.accept() as connection:
                    assert receive_exactly(connection, len(HELLO)) == HELLO
                assert syslog.wait_for("sniproxy", "listening", count=2).pid != old


def test_without_inetd_the_drain_closes_the_port(inside: Enclosure, syslog: Syslog) -> None:
    with raw_backend(inside) as backend, running_inetd(inside) as inetd:
        with inside.connect(IPV4) as client:
            client.sendall(HELLO)
            with backend.accept() as connection:
                inetd.terminate()
                assert inetd.wait(PATIENCE) == 0
                # The daemon goes on alone.
                assert ask(inside, b"no hello")
                os.kill(syslog.wait_for("sniproxy", "listening").pid, signal.SIGHUP)
                syslog.wait_for("sniproxy", "draining")
                eventually(lambda: inside.listeners(443) == set())
                with pytest.raises(ConnectionRefusedError):
                    inside.connect(IPV4)
                connection.sendall(b"pong")
                receive_exactly(client, 4)
        syslog.wait_for("sniproxy", "drained")


def test_called_wrongly(inside: Enclosure, syslog: Syslog) -> None:
    """Syslog is told, and not the client."""
    configuration = inside / "/etc/inetd.conf"
    line = configuration.read_text()
    # Twice is enough.
    line = line.replace("wait.20 ", "wait.3 ").replace("bin/sniproxy\n", "bin/sniproxy --wrong\n")
    configuration.write_text(line)
    with running_inetd(inside):
        with inside.connect(IPV4) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        fatal = syslog.wait_for(
            "sniproxy", "fatal: unable to understand the options: unknown option '--wrong'"
        )
        assert (fatal.facility, fatal.severity) == (LOG_DAEMON, LOG_ERR)
        syslog.wait_for("inetd", "/usr/bin/env: exit status 100")


@pytest.mark.parametrize("what", ["missing", "closed"])
def test_no_hosts_directory(inside: Enclosure, syslog: Syslog, what: str) -> None:
    """What the comments in our file say of it, and of what ends without having served."""
    hosts = inside / "/srv/hosts"
    if what == "missing":
        hosts.rmdir()
    else:
        hosts.chmod(0o700)
    with running_inetd(inside) as inetd:
        with inside.connect(IPV4) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        told = syslog.wait_for("inetd", "/usr/bin/env: exit signal 13")
        assert (told.facility, told.severity) == (LOG_DAEMON, LOG_WARNING)
        syslog.wait_for("inetd", "443/tcp server failing (looping), service terminated")
        assert len([each for each in syslog.messages if "exit signal" in each.text]) < 20
        assert len(inside.listeners(443)) == 1  # that of IPv6, which nobody has tried
        hosts.mkdir(exist_ok=True)
        hosts.chmod(0o755)
        # As `systemctl reload inetd` does.
        inetd.send_signal(signal.SIGHUP)
        eventually(lambda: len(inside.listeners(443)) == 2)
        assert ask(inside, HELLO) == UNRECOGNIZED_NAME


def test_the_log_outlives_syslogd(inside: Enclosure) -> None:
    """It finds the new one, from within its sandbox."""
    with running_inetd(inside):
        with Syslog(inside / "/dev/log") as syslog:
            ask(inside, HELLO)
            syslog.wait_for("sniproxy", "refused")
        assert ask(inside, HELLO) == UNRECOGNIZED_NAME
        with Syslog(inside / "/dev/log") as syslog:
            ask(inside, HELLO)
            syslog.wait_for("sniproxy", "refused")


def test_a_syslogd_that_hangs_stops_nothing(inside: Enclosure) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(str(inside / "/dev/log"))
        (inside / "/dev/log").chmod(0o666)
        with running_inetd(inside):
            # net.unix.max_dgram_qlen, 10 in a new network, is how many messages wait there.
            for flight in [HELLO, b"no hello", hellos.genuine_hello(None)] * 10:
                assert ask(inside, flight)


@pytest.fixture
def confined(inside: Enclosure) -> None:
    """The same with the hosts directory as the root directory."""
    inside.run(
        *("sed", "--in-place", "-e", "/^443 /s/sniproxy/root/"),
        *("-e", "/^443 /s/$/ --chroot --user sniproxy/", "/etc/inetd.conf"),
    )


@pytest.mark.usefixtures("confined", "inetd")
def test_in_a_chroot(inside: Enclosure, syslog: Syslog) -> None:
    assert ask(inside, HELLO) == UNRECOGNIZED_NAME
    syslog.wait_for("sniproxy", "refused")


@pytest.mark.usefixtures("confined")
def test_what_is_fatal_in_a_chroot_is_told_all_the_same(inside: Enclosure, syslog: Syslog) -> None:
    (inside / "/srv/hosts").chmod(0o700)
    inside.run("sed", "--in-place", "/^443 /s/wait.20/wait.3/", "/etc/inetd.conf")
    with running_inetd(inside):
        with inside.connect(IPV4) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        told = syslog.wait_for("sniproxy", "fatal: unable to search the hosts directory")
        assert (told.facility, told.severity) == (LOG_DAEMON, LOG_ERR)


@pytest.mark.usefixtures("confined")
def test_in_a_chroot_no_other_syslogd_is_looked_for(inside: Enclosure) -> None:
    """It might be a tenant's: `dev` is a hostname as well."""
    with running_inetd(inside):
        with Syslog(inside / "/dev/log") as syslog:
            ask(inside, HELLO)
            syslog.wait_for("sniproxy", "refused")
        place = host_directory(inside / "/srv/hosts", "dev")
        with Syslog(place / "log") as tenant:
            for _ in range(3):
                assert ask(inside, HELLO) == UNRECOGNIZED_NAME
            assert tenant.messages == []


@pytest.mark.usefixtures("syslog")
def test_one_socket_for_both_families(inside: Enclosure) -> None:
    """tcp46, as the comment in our file says."""
    inside.run("sed", "--in-place", "/^443 /s/tcp/tcp46/", "/etc/inetd.conf")
    with running_inetd(inside, sockets=1):
        for address in IPV4, IPV6:
            assert ask(inside, HELLO, address) == UNRECOGNIZED_NAME
        assert len(inside.processes("sniproxy")) == 1
