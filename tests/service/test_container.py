"""The container image: built with buildah, and its programs run in containers.

Its base is a Debian that debootstrap has made, for the tests ask no registry. All that buildah
keeps is in a directory of the test's.
"""

import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from sniproxy import __version__
from tests.support import machine
from tests.support.backends import host_directory
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.greeting import Greeter
from tests.support.greeting import ask as ask_backend
from tests.support.hellos import hello_bytes
from tests.support.machine import why_no_machine
from tests.support.pods import Pod, Pods, ask, running
from tests.support.sockets import receive_all
from tests.support.tenants import Page

ROOT: Final = Path(__file__).parents[2]
IMAGE: Final = "tproxy-pod:1"

PAGE: Final = Page(ROOT / "docs/coming-from.md")
PAGES: Final = (ROOT / "docs/running.md", ROOT / "kubernetes/README.md")

# Seconds to build it. It takes 25, most of them for copying: vfs keeps each layer whole.
_BUILD: Final = 300

# Whom this machine trusts, so that pip gets out where that is not whom Debian trusts.
_TRUSTED: Final = Path("/etc/ssl/certs/ca-certificates.crt")


def why_not() -> str | None:
    """Return what is missing here, in words for people; None if nothing is."""
    if shutil.which("buildah") is None:
        return "buildah is not installed (Debian package buildah)"
    return why_no_machine()


_why_not = why_not()
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


class Buildah:
    """Buildah, with a storage of its own."""

    def __init__(self, place: Path) -> None:
        storage = ("--root", str(place / "root"), "--runroot", str(place / "run"))
        self._command = ("buildah", *storage, "--storage-driver", "vfs")

    def __call__(self, *arguments: str) -> str:
        """Run it; return what it prints."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=_BUILD,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def command(self, *arguments: str) -> tuple[str, ...]:
        """Return what runs it."""
        return ("env", "BUILDAH_ISOLATION=chroot", *self._command, *arguments)

    def run(self, container: str, *command: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return the command that runs another one in a container."""
        return self.command("run", *options, container, *command)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """Buildah, which has built the image."""
    machine._take_time()
    place = tmp_path_factory.mktemp("buildah")
    buildah = Buildah(place)
    base = buildah("from", "scratch")
    buildah("copy", "--quiet", base, str(machine.plain_tree()), "/")
    if _TRUSTED.exists():
        buildah("copy", "--quiet", base, str(_TRUSTED), str(_TRUSTED))
        buildah("config", "--env", f"PIP_CERT={_TRUSTED}", base)
    # In the place of the one that a registry has.
    buildah("commit", "--quiet", "--rm", base, "localhost/debian:12-slim")
    # As both pages say; the second time everything is there already.
    for page in PAGES:
        [command] = re.findall(r"^buildah (build .+)$", page.read_text(), re.MULTILINE)
        buildah(*shlex.split(command))
    yield buildah
    # Hundreds of megabytes, which pytest would keep.
    shutil.rmtree(place)


@pytest.fixture
def container(buildah: Buildah) -> Iterator[str]:
    container = buildah("from", "--pull-never", IMAGE)
    yield container
    buildah("rm", container)


def test_all_programs_are_there(buildah: Buildah, container: str) -> None:
    for program in (
        *("sniproxy", "sniproxy-hostname", "tls-bridge", "tls-bridge-peer", "tls-tproxy"),
        *("tproxy-pod", "tproxy-pod-inject"),
    ):
        command = buildah.run(container, program, "--version")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        build = " (pure Python)" if program == "sniproxy" else ""
        assert done.stdout == f"{program} {__version__}{build}\n"
    # Nothing of what it was built from is left, and nothing is configured: least of all an empty
    # pod/egress, which would let everything leave in plaintext.
    command = buildah.run(container, "sh", "-c", "ls / | grep source; ls -A /srv/tproxy-pod")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


def test_sniproxy_in_a_container(buildah: Buildah, hosts: Path) -> None:
    """As the pages have it, with another port, and the hosts directory of a test."""
    [command] = re.findall(r"```sh\n(buildah run .+?)\n```", PAGES[0].read_text(), re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    container = buildah("from", "sniproxy:1")
    command = command.replace("\\\n", "").replace('"$(buildah from sniproxy:1)"', container)
    command = command.replace("/srv/hosts:", f"{hosts}:").replace(":443", f"127.0.0.1:{port}")
    path = host_directory(hosts, "a.example") / "tls-socket"
    with Greeter(path, b"word"):
        path.chmod(0o666)  # for a user who is not root
        for options, end, said in (
            ("", "", []),
            # As docs/handing-over.md has it.
            ("--cap-add=CAP_NET_ADMIN", " --handoff", ["handoff guarded=yes"]),
        ):
            words = shlex.split(command.replace("buildah run", f"buildah run {options}") + end)
            with subprocess.Popen(
                buildah.command(*words[1:]), stderr=subprocess.PIPE, text=True
            ) as process:
                try:
                    assert process.stderr is not None
                    for line in "forbids=new_privileges,", *said, "listening":
                        assert line in process.stderr.readline()
                    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                        client.sendall(hello_bytes("a.example"))
                        assert receive_all(client) == b"word"
                finally:
                    process.terminate()
    buildah("rm", container)


# Answers a hello with a word, on the socket that is shared.
SERVER = """
import os, socket
os.umask(0)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind("/run/tls/tls-socket")
    listening.listen()
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"word")
"""


def test_a_backend_in_a_container(buildah: Buildah, daemon: Daemon, hosts: Path) -> None:
    """As docs/coming-from.md has it."""
    install, run = PAGE["container"].text.replace("/srv/hosts", str(hosts)).splitlines()
    subprocess.run(shlex.split(install), check=True)
    container = buildah("from", "sniproxy:1")
    words = shlex.split(run.replace('"$(buildah from IMAGE)"', container))
    assert (words[0], words[-1]) == ("buildah", "SERVER")
    with subprocess.Popen(buildah.command(*words[1:-1], "python3", "-c", SERVER)) as process:
        try:
            eventually((hosts / "one.example/tls-socket").is_socket, 3 * PATIENCE)
            eventually(lambda: ask_backend(daemon, "one.example") == b"word")
        finally:
            process.terminate()
    buildah("rm", container)


@contextmanager
def in_a_container(buildah: Buildah, container: str, pod: Pod, place: Path) -> Iterator[None]:
    """Run tproxy-pod in a container that has the network of a pod."""
    pod.issue(place / "identity")
    mount = ("--volume", f"{place}/identity:/srv/tproxy-pod/pod/identity:ro")
    rights = ("--cap-add=CAP_NET_ADMIN", "--cap-add=CAP_NET_RAW")
    # buildah takes --cap-drop=all for the last word.
    drop = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--no-new-privs")
    program = ("tproxy-pod", "--tcp-port=15001", "--tls-port=15006")
    command = buildah.run(container, *drop, *program, options=(*mount, *rights))
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(
            [*pod.machine.under, *command], stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            said = place / "log"
            eventually(
                lambda: "listening" in said.read_text() or process.poll() is not None,
                3 * PATIENCE,
            )
            assert process.poll() is None, said.read_text()
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


def test_it_wraps_the_connections_of_a_pod(
    buildah: Buildah, container: str, tmp_path: Path
) -> None:
    """With the rights that the manifests give it, and no others."""
    with Pods() as pods:
        one, other = pods.pod(), pods.pod()
        with (
            running(other, tmp_path / "other") as there,
            in_a_container(buildah, container, one, tmp_path),
        ):
            with other.listen(8080) as listening:
                assert ask(one.connect(other, 8080), listening)[0] == one.address
            there.line("connection", "direction=in", "tls=yes")
            with one.listen(8080) as listening:
                assert ask(other.connect(one, 8080), listening)[0] == other.address
        eventually(lambda: one.rules() == {"tables": [], "rules": [], "routes": []})
