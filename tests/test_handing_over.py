"""docs/handing-over.md and -python.md, done as they say: programs are run, behind the daemon."""

import configparser
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sniproxy import handoff
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon, unmeasured
from tests.support.handing_over import connect, hand_over
from tests.support.sockets import receive_all, receive_exactly, tcp_pair
from tests.support.tenants import Page

ROOT = Path(__file__).parents[1]
PAGE = Page(ROOT / "docs/handing-over.md")
PYTHON_PAGE = Page(ROOT / "docs/handing-over-python.md")

NAME = "two.example"
HELLO = hellos.hello_bytes(NAME)

# A client's address that is not the first to come to mind.
CLIENT = "127.0.0.7"

SERVERS = {"asyncio": PAGE} | dict.fromkeys(PYTHON_PAGE, PYTHON_PAGE)


@pytest.fixture
def daemon(hosts: Path) -> Iterator[Daemon]:
    with start_daemon(hosts, "--handoff", "--log", "connections") as daemon:
        yield daemon


@pytest.fixture
def path(hosts: Path) -> Path:
    return host_directory(hosts, NAME) / "handoff-socket"


def test_every_block_is_run_here() -> None:
    """But for those of the library, which are in service/test_handing_over_preload.py."""
    here = Path(__file__).read_text()
    blocks = {name for name in PAGE if not name.startswith("preload")}
    assert {*re.findall(r'PAGE\["(.+?)"\]', here), "asyncio"} == blocks
    assert len(PYTHON_PAGE) == 4


# Servers in Python.


def get(daemon: Daemon, authority: Path) -> str:
    """Return the page of the site, or what curl has to say in its place."""
    port = daemon.address[1]
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--max-time", str(PATIENCE)),
            *("--interface", CLIENT, "--cacert", authority),
            *("--resolve", f"{NAME}:{port}:127.0.0.1", f"https://{NAME}:{port}/"),
        ],
        capture_output=True,
        text=True,
    )
    return done.stdout or done.stderr


@contextlib.contextmanager
def running(server: str, path: Path, pem: Path) -> Iterator[None]:
    """Run it, where this test is the tenant."""
    program = path.with_name("server.py")
    text = SERVERS[server][server].text
    for here, there in (f"/srv/hosts/{NAME}/", f"{path.parent}/"), ("/home/two/two.pem", f"{pem}"):
        assert here in text
        text = text.replace(here, there)
    program.write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-bb", "-X", "dev", program],
        env=unmeasured() | {"PYTHONPATH": os.fspath(ROOT)},
    )
    try:
        eventually(lambda: process.poll() is not None or is_there(path))
        assert process.poll() is None
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def hello_of_a_client() -> bytes:
    """Return one that a server answers; HELLO has no more than the name."""
    said = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname=NAME)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


def is_there(path: Path) -> bool:
    """Whether somebody listens, who sees one come who says nothing, and goes."""
    with contextlib.suppress(OSError):
        connect(path).close()
        return True
    return False


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("server", SERVERS)
def test_servers(
    daemon: Daemon, path: Path, certificates: Certificates, tmp_path: Path, server: str
) -> None:
    """They see the client's address, and nobody keeps them from the next client."""
    pair = certificates.for_client(NAME)
    pem = tmp_path / "two.pem"
    pem.write_text(pair.certificate.read_text() + pair.key.read_text())
    hello = hello_of_a_client()
    with running(server, path, pem), connect(path), daemon.connect() as slow:
        slow.sendall(hello)
        assert get(daemon, certificates.authority) == f"{CLIENT}\n"
        with daemon.connect() as rude:
            rude.sendall(hello)
            assert rude.recv(1)
            rude.sendall(b"no TLS any more")
            with contextlib.suppress(ConnectionResetError):
                receive_all(rude)
        assert get(daemon, certificates.authority) == f"{CLIENT}\n"
    lines = [line for line in daemon.log() if f"client={CLIENT}:" in line]
    assert len(lines) == 2
    assert all("up=0 down=0" in line and "ending=handed_over" in line for line in lines)


def test_the_socket_of_a_unit(path: Path) -> None:
    """It is descriptor 3, and not close-on-exec."""
    assert "`handoff.Listener(3)`" in PYTHON_PAGE.text
    script = (
        "from sniproxy import handoff; client, _ = handoff.Listener(3).accept();"
        "client.sendall(client.recv(5))"
    )
    with listen_unix(path) as listening:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            preexec_fn=lambda: os.dup2(listening.fileno(), 3),
            close_fds=False,
            env=unmeasured() | {"PYTHONPATH": os.fspath(ROOT)},
        )
    client, near = tcp_pair()
    hand_over(path, near)
    with client, process:
        client.sendall(b"hello")
        assert receive_exactly(client, 5) == b"hello"


# What it says of the daemon; tests/test_handoff.py has more.


def test_the_unit(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(PAGE["unit"].text)
    original = (ROOT / "systemd/sniproxy.service").read_text()
    line = unit["Service"]["ExecStart"]
    _, options = line.replace("%N", "sniproxy").split(" ", 1)
    # What it has besides that of the unit as it is.
    assert f"ExecStart={line.replace(' --handoff', '')}\n" in original
    done = subprocess.run(
        [sys.executable, "-m", "sniproxy", "--check-options", *options.split()],
        cwd=tmp_path,
        env=unmeasured() | {"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_proxy_headers_are_for_the_other_socket(daemon: Daemon, path: Path) -> None:
    path.with_name("send-proxy-v1").touch()
    with RawBackend(path.with_name("tls-socket")) as relayed:
        with handoff.listen(path) as listener, daemon.connect() as client:
            client.sendall(HELLO)
            with listener.accept()[0] as near:
                assert receive_exactly(near, len(HELLO)) == HELLO
        with daemon.connect() as client:
            client.sendall(HELLO)
            with relayed.accept() as connection:
                assert connection.recv(6) == b"PROXY "


def test_who_was_not_accepted_is_reset(daemon: Daemon, path: Path) -> None:
    with daemon.connect() as client:
        with handoff.listen(path):
            client.sendall(HELLO)
            daemon.wait_for_log("ending=handed_over")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_client_of_ipv4_at_a_socket_for_both(hosts: Path, path: Path) -> None:
    with (
        start_daemon(
            hosts, "--handoff", address=("::", 0), family=socket.AF_INET6, dual_stack=True
        ) as daemon,
        handoff.listen(path) as listener,
        socket.create_connection(("127.0.0.1", daemon.address[1])) as client,
    ):
        client.sendall(HELLO)
        near, address = listener.accept()
        near.close()
        assert address[:2] == ("::ffff:127.0.0.1", client.getsockname()[1])


def test_who_can_connect_can_claim_any_address(path: Path) -> None:
    """So the directory is to let nobody in but the daemon."""
    script = """
import socket, sys
door = socket.create_server(("192.0.2.7", 0))
client = socket.create_connection(door.getsockname())
near, _ = door.accept()
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
socket.send_fds(connection, [b"x"], [near.fileno()])
"""
    alone = ["unshare", "--user", "--map-root-user", "--net", "sh", "-euc"]
    if subprocess.run([*alone, "ip link set lo up"], capture_output=True).returncode:
        pytest.skip("no right to make namespaces, or no ip (Debian package iproute2)")
    network = 'ip link set lo up; ip address add 192.0.2.7/32 dev lo; exec "$@"'
    with handoff.listen(path) as listener:
        command = [*alone, network, "-", sys.executable, "-I", "-c", script, os.fspath(path)]
        subprocess.run(command, check=True, env=unmeasured())
        client, address = listener.accept()
        client.close()
    assert address[0] == "192.0.2.7"


# The protocol.


def test_the_options_of_a_client(daemon: Daemon, path: Path) -> None:
    with (
        handoff.listen(path) as listener,
        daemon.connect() as client,
        socket.create_server(("127.0.0.1", 0)) as door,
    ):
        client.sendall(HELLO)
        near, _ = listener.accept()
        with near, socket.create_connection(door.getsockname()):
            plain, _ = door.accept()
            with plain:
                for level, name in (
                    (socket.SOL_SOCKET, "SO_RCVTIMEO"),
                    (socket.SOL_SOCKET, "SO_SNDTIMEO"),
                    (socket.SOL_SOCKET, "SO_RCVLOWAT"),
                    (socket.SOL_SOCKET, "SO_LINGER"),
                    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
                ):
                    option = getattr(socket, name)
                    expected = plain.getsockopt(level, option, 16)
                    assert near.getsockopt(level, option, 16) == expected, name
            assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


_C_MAIN = r"""
#include <arpa/inet.h>
#include <dirent.h>
#include <stdio.h>

static int open_descriptors(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

int main(void)
{
    int before = open_descriptors();
    for (;;) {
        struct sockaddr_storage address;
        char said[100], name[100];
        int client = accept_handed_over(0, &address);
        if (client < 0) {
            printf("none %d\n", open_descriptors() - before);
        } else {
            struct sockaddr_in *found = (struct sockaddr_in *)&address;
            inet_ntop(AF_INET, &found->sin_addr, name, sizeof name);
            printf("%s:%d\n", name, ntohs(found->sin_port));
            fflush(stdout);
            write(client, said, read(client, said, sizeof said));
            close(client);
        }
        fflush(stdout);
    }
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian package gcc)")
def test_c(daemon: Daemon, path: Path, tmp_path: Path) -> None:
    source, program = tmp_path / "server.c", tmp_path / "server"
    source.write_text(PAGE["c"].text + _C_MAIN)
    subprocess.run(
        ["cc", "-Wall", "-Wextra", "-Werror", "-Wno-unused-result", "-o", program, source],
        check=True,
    )
    with listen_unix(path) as listening:
        os.set_blocking(listening.fileno(), True)
        process = subprocess.Popen(
            [program], stdin=listening.fileno(), stdout=subprocess.PIPE, text=True
        )
    with process:
        assert process.stdout is not None
        for number in 0, 1, 2, 3, 253:
            null = [os.open("/dev/null", os.O_RDONLY) for _ in range(number)]
            hand_over(path, *null)
            for descriptor in null:
                os.close(descriptor)
            assert process.stdout.readline() == "none 0\n", number
        connect(path).close()
        assert process.stdout.readline() == "none 0\n"
        with daemon.connect() as client:
            client.sendall(HELLO)
            assert process.stdout.readline() == "{}:{}\n".format(*client.getsockname())
            assert client.recv(5) == HELLO[:5]
        process.kill()
