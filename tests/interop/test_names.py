"""From the name in the hello to the directory, whatever it looks like and wherever it is."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import CLIENTS, Client, Visit, curl, openssl
from tests.support.backends import TlsBackend, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import start_daemon

# The longest there is: 63 + 1 + 63 + 1 + 63 + 1 + 61.
LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def directory_name(*arguments: str) -> str:
    """Return what `sniproxy-hostname` tells the administrator."""
    command = [sys.executable, "-m", "sniproxy_hostname", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode().strip()


@pytest.mark.parametrize("client", CLIENTS)
def test_the_longest_name(
    client: Client, visit: partial[Visit], hosts: Path, certificates: Certificates
) -> None:
    tls_socket = host_directory(hosts, LONGEST) / "tls-socket"
    with TlsBackend(tls_socket, certificates.server_context(LONGEST)) as backend:
        outcome = client(visit(LONGEST))
        assert outcome.code == 0, outcome.output
        assert backend.connection().server_name == LONGEST


@pytest.mark.parametrize("name", ["CASE.example", "case.example.", "Case.Example."])
def test_case_and_trailing_dot_do_not_matter(
    name: str, visit: partial[Visit], hosts: Path, certificates: Certificates
) -> None:
    tls_socket = host_directory(hosts, "case.example") / "tls-socket"
    with TlsBackend(tls_socket, certificates.server_context("case.example")) as backend:
        outcome = openssl(visit(name), "-verify_hostname", "case.example")
        assert outcome.code == 0, outcome.output
        # For the backend the name is what the client made of it.
        assert backend.connection().server_name == name


def test_client_and_administrator_type_the_same_name(
    visit: partial[Visit], hosts: Path, certificates: Certificates
) -> None:
    typed = "Bücher.example"
    name = directory_name(typed)
    tls_socket = host_directory(hosts, name) / "tls-socket"
    with TlsBackend(tls_socket, certificates.server_context(name)) as backend:
        outcome = curl(visit(typed))
        assert outcome.code == 0, outcome.output
        assert backend.connection().server_name == name == "xn--bcher-kva.example"


def test_a_hashed_directory(tmp_path: Path, certificates: Certificates) -> None:
    name = "a.example"
    tls_socket = host_directory(tmp_path, directory_name("--hashed", name)) / "tls-socket"
    with (
        start_daemon(tmp_path, "--hashed") as daemon,
        TlsBackend(tls_socket, certificates.server_context(name)) as backend,
    ):
        outcome = curl(Visit(daemon.address, certificates.authority, name))
        assert outcome.code == 0, outcome.output
        assert backend.connection().server_name == name


def test_links_are_followed_anew_for_every_connection(
    visit: partial[Visit], hosts: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """Both kinds: the host's directory, and the socket in it."""
    (hosts / "linked.example").symlink_to(host_directory(tmp_path, "real"))
    link = tmp_path / "real" / "tls-socket"
    for generation in ("blue", "green"):
        tls_socket = host_directory(tmp_path, generation) / "backend.sock"
        link.unlink(missing_ok=True)
        link.symlink_to(tls_socket)
        with TlsBackend(tls_socket, certificates.server_context("linked.example")) as backend:
            outcome = curl(visit("linked.example"))
            assert outcome.code == 0, outcome.output
            assert backend.connection().error is None
