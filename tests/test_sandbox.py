"""What whoever takes over the daemon can't do, while it serves."""

import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sniproxy.engine import sandbox
from tests.support.backends import host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask

NAME = "a.example"

# By what the kernel has to offer for it, in the words of the log: what is tried, and the error.
STOPPED = {
    "files": {
        **dict.fromkeys(["read", "write", "create", "truncate", "list", "rename"], "EACCES"),
        **dict.fromkeys(["remove", "make_directory", "link", "proc", "execute"], "EACCES"),
    },
    "tcp": dict.fromkeys(["connect_tcp", "bind_tcp"], "EACCES"),
    "abstract_sockets": {"connect_abstract": "EPERM"},
    "signals": {"signal": "EPERM"},
}
# And all that is tried, if nothing is forbidden; a traceback never is.
DONE = dict.fromkeys([name for tries in STOPPED.values() for name in tries] + ["trace"], "done")


@dataclass
class Surroundings:
    """What an intruder finds around him."""

    files: Path
    environment: dict[str, str]


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[Surroundings]:
    files = tmp_path / "files"
    files.mkdir()
    (files / "file").write_text("secret")
    (files / "doomed").touch()
    abstract = f"sniproxy-test-{secrets.token_hex(8)}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(f"\0{abstract}")
        unix.listen()
        yield Surroundings(
            files,
            {
                "INTRUDER_FILES": str(files),
                "INTRUDER_TCP": str(tcp.getsockname()[1]),
                "INTRUDER_ABSTRACT": abstract,
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
        )


def taken_over(hosts: Path, surroundings: Surroundings, *options: str) -> Daemon:
    return start_daemon(
        hosts,
        *options,
        env=surroundings.environment,
        module="tests.support.intruder",
        measured=False,
    )


def fields(line: str) -> dict[str, str]:
    """Return what a line of the log says."""
    return dict(pair.split("=", 1) for pair in line.split()[2:])


def forbidden(daemon: Daemon) -> list[str]:
    return fields(daemon.wait_for_log("sandbox"))["forbids"].split(",")


def serves(daemon: Daemon) -> bool:
    """Tell whether all that a lookup takes is still allowed."""
    (host_directory(daemon.hosts, NAME) / "send-proxy-v1").touch()
    (daemon.hosts / "alias.example").symlink_to(NAME)
    with Greeter(daemon.hosts / NAME / "tls-socket", b"word") as backend:
        return (
            ask(daemon, NAME) == b"word"
            and ask(daemon, "alias.example") == b"word"
            and all(heard.startswith(b"PROXY TCP4 ") for heard in backend.heard)
            and ask(daemon, "b.example") == UNRECOGNIZED_NAME
        )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_whoever_takes_it_over_is_locked_in(
    hosts: Path, surroundings: Surroundings, workers: str
) -> None:
    with taken_over(hosts, surroundings, "--workers", workers) as daemon:
        came = fields(daemon.wait_for_log("intruder"))
        in_force = forbidden(daemon)
        assert serves(daemon)
    if "files" not in in_force:
        pytest.skip("the kernel has no Landlock: see landlock(7)")
    expected = dict(DONE)
    for what in in_force:
        expected |= STOPPED.get(what, {})
    if workers != "1":
        # The first process is in the same sandbox: they may signal each other.
        expected["signal"] = "done"
    assert came == expected
    assert {path.name for path in surroundings.files.iterdir()} == {"doomed", "file"}
    assert (surroundings.files / "file").read_text() == "secret"


def test_this_kernel_offers_all_of_it(daemon: Daemon, hosts: Path) -> None:
    """Else the test above would say little."""
    with start_daemon(hosts, measured=False) as sandboxed:
        in_force = forbidden(sandboxed)
    missing = {"new_privileges", *STOPPED} - set(in_force)
    if missing:
        pytest.skip(f"Linux {os.uname().release} has no means against {', '.join(missing)}")
    assert in_force == ["new_privileges", *STOPPED]


def test_without_a_sandbox_all_of_it_succeeds(hosts: Path, surroundings: Surroundings) -> None:
    """So what stops the intruder is the sandbox, and nothing else."""
    with taken_over(hosts, surroundings, "--no-sandbox") as daemon:
        assert forbidden(daemon) == ["nothing"]
        assert fields(daemon.wait_for_log("intruder")) == DONE
        assert serves(daemon)


def no_new_privileges(daemon: Daemon) -> bool:
    status = Path("/proc", str(daemon.process.pid), "status").read_text()
    return "NoNewPrivs:\t1\n" in status


def test_no_program_it_runs_gains_privileges(hosts: Path) -> None:
    with start_daemon(hosts, measured=False) as daemon:
        assert no_new_privileges(daemon)
    with start_daemon(hosts, "--no-sandbox") as daemon:
        assert not no_new_privileges(daemon)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (0, ["new_privileges"]),
        (1, ["new_privileges", "files"]),
        (3, ["new_privileges", "files"]),
        (4, ["new_privileges", "files", "tcp"]),
        (5, ["new_privileges", "files", "tcp"]),
        (6, ["new_privileges", "files", "tcp", "abstract_sockets", "signals"]),
        (99, ["new_privileges", "files", "tcp", "abstract_sockets", "signals"]),
    ],
)
def test_an_older_kernel_gives_what_it_has(version: int, expected: list[str]) -> None:
    """In a child, since there is no way out."""
    if version and not sandbox._landlock_version():
        pytest.skip("the kernel has no Landlock: see landlock(7)")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sandbox._landlock_version = lambda: version
        os.write(writing, ",".join(sandbox.enter()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == ",".join(expected)
