"""docs/coming-from.md under systemd: its units carry a host to a TCP port. And socat does."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import eventually
from tests.support.enclosure import why_no_enclosure
from tests.support.machine import Machine
from tests.support.tenants import Page, SharedMachine
from tests.support.units import SYSTEM, UNITS, commands, heard, show, started, state

ROOT = Path(__file__).parents[2]
PAGE = Page(ROOT / "docs/coming-from.md")
NAME = "one.example"
SOCKET, SERVICE = f"tcp-backend@{NAME}.socket", f"tcp-backend@{NAME}.service"
SHELL = ("sh", "-euc")

# A site that listens on 127.0.0.1:8443, and says who is at the other end.
SITE = """
[Service]
WorkingDirectory=/root
ExecStart=openssl s_server -accept 127.0.0.1:8443 -www -cert site.crt -key site.key
"""

# A TCP port, or a Unix socket, that answers each connection with what it has read up to a line's
# end, and a word.
ECHO = """
import os, socket, sys
where, word = sys.argv[1:]
if where.startswith("/"):
    os.makedirs(os.path.dirname(where), exist_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(where)
    os.chmod(where, 0o666)
else:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", int(where)))
listening.listen()
print("listening", flush=True)
while True:
    connection, _ = listening.accept()
    with connection:
        read = connection.recv(65536)
        line = read.partition(b"\\r\\n")[0] if read.startswith(b"PROXY") else b"hello"
        connection.sendall(line + b" " + word.encode())
"""

# Answers when the other side has ended.
LATE = """
import socket
with socket.create_server(("127.0.0.1", 8443)) as listening:
    print("listening", flush=True)
    connection, _ = listening.accept()
    while connection.recv(65536):
        pass
    connection.sendall(b"late")
"""

# A client of the name, which is at 127.0.0.7, and prints what comes back. With a second argument it
# ends its own direction first.
CLIENT = """
import socket, ssl, sys
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
context = ssl.create_default_context()
try:
    context.wrap_bio(incoming, outgoing, server_hostname=sys.argv[1]).do_handshake()
except ssl.SSLWantReadError:
    pass
client = socket.create_connection(("127.0.0.1", 443), 30, ("127.0.0.7", 0))
client.sendall(outgoing.read())
if sys.argv[2:]:
    client.shutdown(socket.SHUT_WR)
answer = b""
while more := client.recv(1000):
    answer += more
print(answer)
"""


@pytest.fixture(scope="module")
def machine(machine: Machine) -> Machine:
    """The machine with the daemon, and with the units of the page."""
    machine.install_wheel()
    for unit in "sniproxy.socket", "sniproxy.service":
        machine.write(f"{SYSTEM}/{unit}", (UNITS / unit).read_text())
    machine.run(*SHELL, "\n".join(commands("sniproxy.service")))
    for block in PAGE["tcp socket"], PAGE["tcp service"]:
        machine.write(block.path, block.text)
    machine.run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-noenc", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
        *("-keyout", "/root/site.key", "-out", "/root/site.crt"),
    )
    machine.write(f"{SYSTEM}/site.service", SITE)
    machine.write("/root/echo.py", ECHO)
    machine.write("/root/client.py", CLIENT)
    machine.run("systemctl", "daemon-reload")
    return machine


@pytest.fixture
def tcp_host(machine: Machine) -> Iterator[None]:
    """The host of the page, made and removed as it says."""
    machine.run(*SHELL, PAGE["tcp host"].text)
    yield
    machine.run(*SHELL, PAGE["tcp leave"].text)
    assert machine.run("ls", "/srv/hosts").stdout == ""
    assert state(machine, SOCKET) == state(machine, SERVICE) == "inactive"
    machine.run("systemctl", "reset-failed")


@contextmanager
def echo(machine: Machine, where: str, word: str) -> Iterator[None]:
    """Something that listens there, and answers with the word."""
    with started(machine, "python3", "/root/echo.py", where, word) as program:
        assert heard(program.stdout) == ["listening"]
        yield


def ask(machine: Machine, name: str = NAME) -> str:
    """Return what a client of the name gets."""
    return machine.run("python3", "/root/client.py", name).stdout.strip()


# unrecognized_name, and then an end.
REFUSED = r"b'\x15\x03\x03\x00\x02\x02p'"


def test_systemd_understands_the_units(machine: Machine) -> None:
    done = machine.run("systemd-analyze", "verify", "--man=no", SOCKET, SERVICE)
    assert done.stdout + done.stderr == ""


@pytest.mark.usefixtures("tcp_host")
def test_a_site_on_a_tcp_port(machine: Machine) -> None:
    machine.run("systemctl", "start", "site.service")
    fetch = (
        "curl",
        "--silent",
        "--show-error",
        "--cacert",
        "/root/site.crt",
        "--retry-connrefused",
    )
    where = ("--resolve", f"{NAME}:443:127.0.0.1", f"https://{NAME}/")
    assert "Ciphers supported in s_server binary" in machine.run(*fetch, *where).stdout
    # The directory and the listener are root's; nobody but the daemon may connect.
    place = f"/srv/hosts/{NAME}"
    modes = machine.run("stat", "--format=%U %G %a", place, f"{place}/tls-socket").stdout
    assert modes.splitlines() == ["root root 755", "root sniproxy 660"]
    check = ("/opt/sniproxy/bin/sniproxy-check", "--as", "sniproxy", NAME)
    checked = machine.run("sh", "-c", 'cd /srv/hosts && exec "$@"', "sh", *check, check=False)
    assert f"{NAME}  served" in checked.stdout
    # "systemd finds out by itself on which file system the socket is"
    mounts = show(machine, "RequiresMountsFor", SOCKET).split()
    assert f"{place}/tls-socket" in mounts
    # It is there after the machine is started anew.
    assert machine.run("systemctl", "is-enabled", SOCKET).stdout == "enabled\n"
    machine.run("systemctl", "stop", "site.service")


@pytest.mark.usefixtures("tcp_host")
def test_a_header_goes_to_the_tcp_port_as_it_is(machine: Machine) -> None:
    with echo(machine, "8443", "one"):
        assert ask(machine) == "b'hello one'"
        machine.run("touch", f"/srv/hosts/{NAME}/send-proxy-v1")
        answer = ask(machine)
    assert answer.startswith("b'PROXY TCP4 127.0.0.7 127.0.0.1 ")
    assert answer.endswith(" 443 one'")


@pytest.mark.usefixtures("tcp_host")
def test_another_address(machine: Machine) -> None:
    with echo(machine, "8443", "one"), echo(machine, "8444", "two"):
        assert ask(machine) == "b'hello one'"
        setting = f"echo ADDRESS=127.0.0.1:8444 >/srv/hosts/{NAME}/tcp-backend"
        machine.run(*SHELL, f"{setting}; systemctl restart {SERVICE}")
        assert ask(machine) == "b'hello two'"


@pytest.mark.usefixtures("tcp_host")
def test_of_a_name_only_the_first_address_is_tried(machine: Machine) -> None:
    """Why `localhost` becomes 127.0.0.1. If this fails, systemd has learnt more."""
    hosts = machine.run("cat", "/etc/hosts", check=False).stdout
    machine.write("/etc/hosts", "::1 both.example\n127.0.0.1 both.example\n")
    with echo(machine, "8443", "one"):
        setting = f"echo ADDRESS=both.example:8443 >/srv/hosts/{NAME}/tcp-backend"
        machine.run(*SHELL, f"{setting}; systemctl restart {SERVICE}")
        assert ask(machine) == "b''"
        machine.write("/etc/hosts", "127.0.0.1 both.example\n")
        assert ask(machine) == "b'hello one'"
    machine.write("/etc/hosts", hosts)


@pytest.mark.usefixtures("tcp_host")
def test_who_ends_one_direction_ends_both(machine: Machine) -> None:
    with started(machine, "python3", "-c", LATE) as program:
        assert heard(program.stdout) == ["listening"]
        assert machine.run("python3", "/root/client.py", NAME, "end").stdout == "b''\n"


@pytest.mark.usefixtures("tcp_host")
def test_a_tcp_backend_that_is_down(machine: Machine) -> None:
    """ "the client's connection is accepted, and then closed without an alert" """
    assert ask(machine) == "b''"


def test_the_longest_name(machine: Machine) -> None:
    """ "A name may have 85 bytes at most here" """
    for length, works in (85, True), (86, False):
        name = f"{'a' * 40}.{'b' * (length - 41)}"
        unit = f"tcp-backend@{name}.socket"
        machine.run("install", "-d", f"/srv/hosts/{name}")
        machine.write(f"/srv/hosts/{name}/tcp-backend", "ADDRESS=127.0.0.1:8443\n")
        done = machine.run("systemctl", "start", unit, check=False)
        assert (done.returncode == 0) == works
        if works:
            with echo(machine, "8443", "long"):
                assert ask(machine, name) == "b'hello long'"
        machine.run("systemctl", "stop", unit, f"tcp-backend@{name}.service", check=False)
        machine.run("rm", "-r", f"/srv/hosts/{name}")


def test_what_is_printed_makes_these_hosts(machine: Machine, tmp_path: Path) -> None:
    """The example for nginx, run in the hosts directory; and links that lead out of it."""
    config, command = PAGE["nginx"], PAGE["nginx command"]
    (tmp_path / config.path).write_text(config.text)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    printed = subprocess.run(
        [*SHELL[:1], "-c", f"PATH={Path(sys.executable).parent}:$PATH; {command.text}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    machine.run("sh", "-euc", f"cd /srv/hosts\n{printed}")
    with (
        echo(machine, "8443", "rest"),
        echo(machine, "/run/one/tls.sock", "one"),
        echo(machine, "/run/two/tls.sock", "two"),
    ):
        assert ask(machine) == REFUSED
        block = PAGE["outside"]
        machine.write(block.path, block.text)
        machine.run(*SHELL, "systemctl daemon-reload; systemctl restart sniproxy.service")
        for name, word in (
            ("one.example", "one"),
            ("two.example", "two"),
            ("a.b.two.example", "two"),
            ("www.example", "rest"),
        ):
            answer = ask(machine, name)
            assert answer.startswith("b'PROXY TCP4 127.0.0.7 127.0.0.1 ")
            assert answer.endswith(f" {word}'")
    unknown = "tcp-backend@_unknown"
    machine.run("systemctl", "disable", "--now", f"{unknown}.socket")
    machine.run(*SHELL, f"systemctl stop {unknown}.service; rm -r /srv/hosts/*")


# --- Without systemd -----------------------------------------------------------------------------


def test_socat(needs_socat: None) -> None:
    if missing := why_no_enclosure():
        pytest.skip(missing)
    with SharedMachine() as machine:
        machine.root("useradd --system --user-group --shell /usr/sbin/nologin sniproxy")
        machine.root(f"install -d -m 0755 /srv/hosts/{NAME}")
        machine.write("/run/echo.py", ECHO, "root")
        machine.start("root", "exec python3 /run/echo.py 8443 one")
        machine.start("root", PAGE["socat"].text)
        eventually((machine.inside / f"/srv/hosts/{NAME}/tls-socket").exists)
        with machine.daemon() as daemon:
            eventually(lambda: machine.ask(daemon, NAME) == b"hello one")


@pytest.fixture
def needs_socat() -> None:
    there = subprocess.run(["sh", "-c", "command -v socat"], capture_output=True).returncode == 0
    if not there:
        pytest.skip("socat is not installed (Debian package socat)")
