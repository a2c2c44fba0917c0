"""Signals that ask for something else than the end, and being process 1."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.backends import host_directory
from tests.support.daemon import Daemon, eventually, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask

NAME = "a.example"


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_usr1_asks_how_it_goes(hosts: Path, options: list[str]) -> None:
    with (
        Greeter(host_directory(hosts, NAME) / "tls-socket", b"word"),
        start_daemon(hosts, *options) as daemon,
    ):
        for _ in range(3):
            assert ask(daemon, NAME) == b"word"
        for _ in range(2):
            assert ask(daemon, "nobody.example") == UNRECOGNIZED_NAME

        def told() -> bool:
            # Workers make their entries twice a second.
            daemon.signal(signal.SIGUSR1)
            time.sleep(0.05)
            return any(
                line == "sniproxy: status open=0 served=3 refused=2" for line in daemon.log()
            )

        eventually(told)


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["alone", "workers"])
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGALRM, signal.SIGUSR1])
def test_habits_from_other_servers_do_not_end_it(
    hosts: Path, number: signal.Signals, options: list[str]
) -> None:
    with start_daemon(hosts, *options) as daemon:
        for pid in (daemon.process.pid, *daemon.workers()):
            os.kill(pid, number)
        for _ in range(4):
            assert ask(daemon, NAME) == UNRECOGNIZED_NAME
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


# --- process 1

# Blocked only where all signals are, for a moment, while a program or a thread is started.
NEVER_BLOCKED_ALONE = 1 << signal.SIGSEGV - 1

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc")


def may_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


as_process_1 = pytest.mark.skipif(
    not may_unshare(), reason="needs unshare(1) and the right to make a PID namespace"
)


@contextmanager
def first(daemon: Daemon) -> Iterator[int]:
    """Give the number, seen from here, of the daemon that is process 1 in a namespace."""
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    eventually(children.read_text)
    pid = int(children.read_text())
    try:
        yield pid
    finally:
        if daemon.process.poll() is None:
            os.kill(pid, signal.SIGINT)
            daemon.wait()


@as_process_1
@pytest.mark.parametrize("delay", [0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3])
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_process_1_hears_a_signal_that_comes_early(
    hosts: Path, delay: float, options: list[str]
) -> None:
    """Not while Python itself starts; from then on."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Daemon(listening, hosts, tuple(options), under=UNSHARE) as daemon,
        first(daemon) as pid,
    ):
        status = Path(f"/proc/{pid}/status")
        children = Path(f"/proc/{pid}/task/{pid}/children")

        def has_begun() -> bool:
            # It blocks the signal, or by now catches it, or has workers and waits for it. Before it
            # becomes Python, unshare(1) blocks it for a moment, too.
            fields = dict(line.split(":\t") for line in status.read_text().splitlines())
            blocked, caught = (int(fields[name], 16) for name in ("SigBlk", "SigCgt"))
            if fields["Name"] == "unshare" or blocked & NEVER_BLOCKED_ALONE:
                return False
            return bool((blocked | caught) & 1 << signal.SIGTERM - 1 or children.read_text())

        eventually(has_begun)
        time.sleep(delay - 0.05)
        os.kill(pid, signal.SIGTERM)
        assert daemon.wait() == 0


@as_process_1
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["alone", "workers"])
def test_process_1_leaves_no_zombies(hosts: Path, options: tuple[str, ...]) -> None:
    # A child of the shell that becomes the daemon has a child of its own, and leaves it behind.
    script = 'sh -c "sleep 0.6 & exec sleep 0.3" & exec "$@"'
    under = (*UNSHARE, "sh", "-c", script, "sh")
    with start_daemon(hosts, *options, under=under) as daemon, first(daemon) as pid:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        expected = 2 if options else 0
        time.sleep(0.7)
        eventually(lambda: len(children.read_text().split()) == expected)
        daemon.wait_for_log("listening")
