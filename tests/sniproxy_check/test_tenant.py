"""A tenant, without root and without the log, finds out what is wrong with their own host.

There is a machine with a daemon that runs as a user of its own, and two tenants. One of them makes
one mistake after the other, and has the two tools.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.support.backends import TlsBackend, accepted, host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, start_daemon, unmeasured
from tests.support.hellos import handshake, hello_body, record
from tests.support.others import TENANT, needs_python_for_all

pytestmark = needs_python_for_all

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "two.example"
OTHER: Final = 4002


class Machine(NamedTuple):
    """What there is.

    Attributes:
        hosts: The hosts directory, which the tenants may not list.
        home: The tenant's, where the directory of the host is.
        status: The status socket.
    """

    daemon: Daemon
    hosts: Path
    home: Path
    status: Path
    certificates: Certificates
    stack: ExitStack

    @property
    def path(self) -> Path:
        return self.home / "site" / "tls-socket"

    def serve(self, name: str = NAME, *, proxy: bool = False) -> None:
        """Have the tenant's backend listen where it should."""
        context = self.certificates.server_context(name)
        before = os.geteuid()
        os.seteuid(TENANT)
        try:
            self.stack.enter_context(TlsBackend(self.path, context, proxy=proxy))
        finally:
            os.seteuid(before)
        self.path.chmod(0o666)

    def ask(self) -> None:
        """Have a visitor come, whatever becomes of that."""
        with self.daemon.connect() as client, suppress(OSError):
            client.sendall(record(handshake(hello_body(NAME))))
            client.settimeout(PATIENCE)
            client.recv(1)


@pytest.fixture
def machine(hosts: Path, tmp_path: Path, certificates: Certificates) -> Iterator[Machine]:
    for parent in hosts.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    home = tmp_path / "home"
    (home / "site").mkdir(parents=True)
    for path in home, home / "site":
        path.chmod(0o755)
        os.chown(path, TENANT, TENANT)
    (hosts / NAME).symlink_to(home / "site")
    os.chown(host_directory(hosts, "other.example"), OTHER, OTHER)
    hosts.chmod(0o711)
    options = "--user", "nobody:nogroup", "--status-socket", str(tmp_path / "status")
    with (
        ExitStack() as stack,
        start_daemon(hosts, *options, measured=False) as daemon,
    ):
        yield Machine(daemon, hosts, home, tmp_path / "status", certificates, stack)


def run(machine: Machine, module: str, *arguments: str) -> str:
    """Run a tool as the tenant, in the hosts directory; return what it says."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        cwd=machine.hosts,
        env=unmeasured() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        user=TENANT,
        group=TENANT,
        extra_groups=[],
    )
    assert done.stderr == ""
    return done.stdout


def check(machine: Machine) -> str:
    return run(machine, "sniproxy_check", "--pid", str(machine.daemon.process.pid), NAME)


def misspell(machine: Machine) -> None:
    machine.serve()
    machine.path.rename(machine.path.with_name("tls_socket"))
    machine.stack.callback(machine.path.touch)  # the backend is going to remove it


def lead_to_nothing(machine: Machine) -> None:
    machine.path.symlink_to("../run/backend.sock")


def put_a_file(machine: Machine) -> None:
    machine.path.touch()
    os.chown(machine.path, TENANT, TENANT)
    machine.path.chmod(0o666)


def leave_a_stale_socket(machine: Machine) -> None:
    listen_unix(machine.path, uid=TENANT).close()
    machine.path.chmod(0o666)


def close_the_home(machine: Machine) -> None:
    machine.serve()
    machine.home.chmod(0o700)
    machine.stack.callback(machine.home.chmod, 0o755)


def close_the_socket(machine: Machine) -> None:
    machine.serve()
    machine.path.chmod(0o600)


def lead_to_somebody_else(machine: Machine) -> None:
    other = machine.hosts / "other.example" / "tls-socket"
    machine.stack.enter_context(listen_unix(other, uid=OTHER))
    other.chmod(0o666)
    machine.path.symlink_to(other)


def speak_plain_http(machine: Machine) -> None:
    listening = machine.stack.enter_context(listen_unix(machine.path, uid=TENANT))
    machine.path.chmod(0o666)

    def answer() -> None:
        for connection in accepted(listening):
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    machine.stack.callback(thread.join)
    machine.stack.callback(listening.shutdown, socket.SHUT_RDWR)


def send_a_header_that_nobody_wants(machine: Machine) -> None:
    machine.serve()
    (machine.home / "site" / "send-proxy-v1").touch()


def send_no_header(machine: Machine) -> None:
    machine.serve(proxy=True)


def take_the_wrong_certificate(machine: Machine) -> None:
    machine.serve("three.example")


def wish_for_what_there_is_not(machine: Machine) -> None:
    machine.serve()
    (machine.home / "site" / "send-proxy").touch()


MISTAKES: Final[dict[Callable[[Machine], None], tuple[str, str]]] = {
    misspell: ("misspelt", "it has to be called tls-socket"),
    lead_to_nothing: ("no_socket", "-> ../run/backend.sock: there is no "),
    put_a_file: ("not_listening", "is no socket"),
    leave_a_stale_socket: ("not_listening", "nobody listens"),
    close_the_home: ("permission_denied", "may not be searched"),
    close_the_socket: ("permission_denied", "may not be written"),
    lead_to_somebody_else: ("wrong_owner", f"the listener to uid {OTHER}"),
    speak_plain_http: ("speaks_plain_http", "HTTP/1.1 400"),
    send_a_header_that_nobody_wants: ("refuses_proxy_header", "rm -r two.example/send-proxy-v1"),
    send_no_header: ("wants_proxy_header", "mkdir two.example/send-proxy-v1"),
    take_the_wrong_certificate: ("certificate_for_others", "three.example"),
    wish_for_what_there_is_not: ("unknown_file", "send-proxy"),
}

# Of these the daemon knows, too, and tells the tenant at the status socket.
REFUSED: Final = {
    *("no_socket", "not_listening", "permission_denied", "wrong_owner", "proxy_header_unanswered")
}


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__)
def test_a_tenant_finds_their_mistake(machine: Machine, make: Callable[[Machine], None]) -> None:
    word, says = MISTAKES[make]
    make(machine)
    found = check(machine)
    assert word in found.split(), found
    assert says in found
    machine.ask()
    told = run(machine, "sniproxy_status", str(machine.status))
    assert "other.example" not in told
    if word in REFUSED:
        assert word in told
        assert says in told


def test_without_a_mistake_nothing_is_found(machine: Machine) -> None:
    machine.serve()
    found = check(machine)
    assert f"{NAME}  served" in found
    assert "1 hosts: 1 served, 0 with something to mend" in found
    machine.ask()
    told = run(machine, "sniproxy_status", str(machine.status), NAME)
    assert NAME in told
