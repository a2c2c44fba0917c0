"""--listen: programs that open what they listen on."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.bridge import PATIENCE, Bridge, Daemon, connect, read_header, write
from tests.support.daemon import eventually
from tests.support.sockets import receive_all, receive_exactly

OK = b"HTTP/1.1 200 "
UNRECOGNIZED_NAME = 112


class Listening(Bridge):
    """Both sides, started without a socket."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        super().__init__(place, stack)
        self._daemons = stack

    def start(
        self,
        module: str,
        *options: str,
        stdin: socket.socket | None = None,
        script: str = "",
        measured: bool = True,
    ) -> tuple[Daemon, list[str]]:
        """Start a program; return it, and where it listens.

        Args:
            module: what to run.
            options: its command line.
            stdin: what it finds there.
            script: what a shell does before.
            measured: whether coverage is measured in it, if it is at all.
        """
        place = self.peer_place if module.endswith("peer") else self.ingress_place
        under = ("sh", "-c", f'{script} exec "$@"', "sh") if script else ()
        daemon = self._daemons.enter_context(
            Daemon(stdin, place, options, module=module, under=under, measured=measured)
        )
        daemon.wait_for_log("listening")
        number = sum(each.startswith("--listen") for each in options)
        eventually(lambda: len(addresses(daemon)) == number)
        return daemon, addresses(daemon)

    def start_both(self, *options: str) -> list[str]:
        """Start both; return where the ingress listens."""
        _, [address] = self.start("tls_bridge.peer", "--listen", "127.0.0.1:0")
        write(self.ingress_place / "peers/p/address", address)
        return self.start("tls_bridge", *options)[1]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Listening]:
    with ExitStack() as stack:
        yield Listening(tmp_path, stack)


def addresses(daemon: Daemon) -> list[str]:
    """Return where it says that it listens."""
    lines = [line for line in daemon.log() if " listening " in line]
    found = [each for line in lines for each in re.findall(r"address=(\S+)", line)]
    return list(dict.fromkeys(found))  # each worker says it


def reach(address: str) -> socket.socket:
    """Connect to where something listens, as the log shows it."""
    if "/" in address:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(address)
        return client
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    return socket.create_connection(("::1" if host == "::" else host, int(port)), PATIENCE)


def check_connect(address: str) -> None:
    with reach(address) as client:
        client.sendall(connect())
        assert read_header(client).startswith(OK)
        client.sendall(b"hello")
        assert receive_exactly(client, 5) == b"hello"


def check_hello(address: str) -> None:
    """A ClientHello is understood: its name is unknown."""
    with reach(address) as client:
        client.sendall(hellos.hello_bytes("unknown.example"))
        assert receive_all(client)[-1] == UNRECOGNIZED_NAME


def run(*options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run tls-bridge where it should not start; return the exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-P", "-X", "dev", "-m", "tls_bridge", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=env,
    )
    [line] = done.stderr.splitlines() or [""]
    return done.returncode, line.removeprefix("tls-bridge: fatal: unable to ")


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", ":0"])
def test_a_tcp_port(it: Listening, where: str) -> None:
    [address] = it.start_both("--listen", where)
    check_connect(address)


def test_standard_input_may_be_closed(it: Listening) -> None:
    _, [address] = it.start("tls_bridge", "--listen", "127.0.0.1:0", "--sni", script="exec <&-;")
    check_hello(address)


def test_a_socket_on_standard_input_is_let_go(it: Listening) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        name = passed.getsockname()
        _, [address] = it.start("tls_bridge", "--listen", "127.0.0.1:0", "--sni", stdin=passed)
    assert int(address.rpartition(":")[2]) != name[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(name, PATIENCE)


def test_a_unix_socket(it: Listening, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    assert it.start_both("--listen", path) == [path]
    check_connect(path)
    # It is not taken from whom it belongs to.
    assert run("--listen", path) == (111, f"listen on {path}: Address already in use")
    check_connect(path)


def test_a_unix_socket_that_was_left(it: Listening, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    it.start_both("--listen", str(path))
    check_connect(str(path))
    assert path.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("workers", ["1", "2"])
def test_both_at_once(it: Listening, tmp_path: Path, workers: str) -> None:
    path = str(tmp_path / "socket")
    options = ("--listen", path, "--listen-sni", "127.0.0.1:0", "--workers", workers)
    first, second = it.start_both(*options)
    assert first == path
    for _ in range(4):
        check_connect(first)
        check_hello(second)


def test_hellos_alone(it: Listening, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    it.start("tls_bridge", "--listen-sni", path)
    check_hello(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_listens_before_it_is_another_user(it: Listening, tmp_path: Path) -> None:
    """Where that user can't make a file."""
    path = tmp_path / "socket"
    options = ("--listen-sni", str(path), "--user", "nobody")
    daemon, _ = it.start("tls_bridge", *options, measured=False)  # nobody could not save it
    assert path.stat().st_uid == 0
    assert "Uid:\t65534\t65534" in Path(f"/proc/{daemon.process.pid}/status").read_text()
    check_hello(str(path))


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        for options in ["--listen", where], ["--listen", "127.0.0.1:0", "--listen-sni", where]:
            assert run(*options) == (111, f"listen on {where}: Address already in use")


def test_the_same_address_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    code, line = run("--listen", path, "--listen-sni", path)
    assert (code, line) == (111, f"listen on {path}: Address already in use")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("443", "not of the form ADDRESS:PORT"),
        ("localhost:443", "'localhost' is not a numeric IPv4 address"),
        ("127.0.0.1:65536", "no port is higher than 65535"),
        ("./" + 106 * "x", "107 bytes at most"),
    ],
)
def test_what_is_no_address(where: str, why: str) -> None:
    for options in ["--listen", where], ["--listen-sni", where, "--check-options"]:
        code, line = run(*options)
        assert code == 100
        assert f"argument {options[0]}: " in line
        assert why in line


def test_to_check_the_options_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert run("--listen", str(path), "--check-options") == (0, "")
    assert not path.exists()


def test_a_supervisor_passes_a_socket_as_well(tmp_path: Path) -> None:
    """It would not be served."""
    script = 'exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    command = [sys.executable, "-P", "-m", "tls_bridge", "--listen", str(tmp_path / "socket")]
    with socket.create_server(("127.0.0.1", 0)) as passed:
        done = subprocess.run(
            ["sh", "-c", script, "sh", *command],
            stdin=passed.fileno(),
            capture_output=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 100
    assert b"LISTEN_FDS passes sockets, and options say where to listen" in done.stderr
