"""The daemon as a child process, the way a supervisor runs it.

    with start_daemon(hosts) as daemon, daemon.connect() as client:
        ...

It is ready when `start_daemon` returns. When the block ends it is asked to end, and everything on
its standard error that is no line of the log, or is the traceback of a bug, fails the test.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

# What depends on another process takes milliseconds; with this many seconds gone, it never comes.
PATIENCE = 10.0

# How often a state is looked at that nothing announces.
_GLANCE = 0.005

# Strict: comparing bytes with str is an error, and so is every warning. Safe path: the modules of
# the program, and not what happens to have their name in the hosts directory.
_PYTHON = (sys.executable, "-bb", "-P", "-X", "dev", "-W", "error")

# A measurement saves at the end what it has found. No process in the sandbox can open a file.
COVERAGE = "COVERAGE_PROCESS_CONFIG"


def unmeasured() -> dict[str, str]:
    """Return the environment of a program in which coverage is not measured.

    It could not save what it has found: in its sandbox, or as another user.
    """
    return {name: value for name, value in os.environ.items() if name != COVERAGE}


class Daemon:
    """A running sniproxy.

    Args:
        listening: Its standard input; None if it opens what it listens on.
        hosts: Where it runs.
        options: The command line.
        env: What to add to the environment.
        under: A command that becomes the daemon.
        stderr: A descriptor for its standard error; then there is no log to be read here.
        module: What to run.
        measured: Whether coverage is measured in it, if it is at all; then it has no sandbox.

    Attributes:
        address: Where it listens.
        process: It.
        hosts: Its hosts directory.
    """

    def __init__(
        self,
        listening: socket.socket | None,
        hosts: Path,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        *,
        under: tuple[str, ...] = (),
        stderr: int | None = None,
        module: str = "sniproxy",
        measured: bool = True,
    ) -> None:
        environment = {**os.environ, **(env or {})}
        if measured and COVERAGE in environment:
            options = (*options, "--no-sandbox")
        else:
            environment.pop(COVERAGE, None)
        self.address: tuple[str, int] = listening.getsockname()[:2] if listening else ("", 0)
        self.hosts = hosts
        # A file, for a pipe that nobody reads could fill. It is read by position, because the
        # offset is shared with the child.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [*under, *_PYTHON, "-m", module, *options],
            stdin=listening.fileno() if listening else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr if stderr is None else stderr,
            cwd=hosts,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._end()
            log = self.log()
        finally:
            self._stderr.close()
        # pytest shows it if the test fails.
        sys.stdout.write("".join(f"{line}\n" for line in log))
        if error is None:
            unexpected = [line for line in log if _is_unexpected(line)]
            assert not unexpected, "\n".join(unexpected)

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        """Return a new connection to the daemon."""
        return socket.create_connection(self.address, timeout)

    def log(self) -> list[str]:
        """Return the lines of standard error so far."""
        stderr = self._stderr.fileno()
        return os.pread(stderr, os.fstat(stderr).st_size, 0).decode().splitlines()

    def wait_for_log(self, word: str, timeout: float = PATIENCE) -> str:
        """Return the first line that has `word`, be it the event or a field: `reason=deadline`."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            log = self.log()
            for line in log:
                if word in line.split()[1:]:
                    return line
            if ended or time.monotonic() > deadline:
                raise AssertionError("\n".join([f"there is no {word!r} in the log:", *log]))
            time.sleep(_GLANCE)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end, and return the exit code."""
        return self.process.wait(timeout)

    def workers(self) -> list[int]:
        """Return the process ids of its living workers, the oldest first."""
        if self.process.poll() is not None:
            return []
        return [
            int(pid) for pid in self._proc(f"task/{self.process.pid}/children").read_text().split()
        ]

    def rss_peak(self) -> int:
        """Return the most memory, in bytes, that was ever resident."""
        for line in self._proc("status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "VmHWM":
                return int(value.removesuffix("kB")) * 1024
        raise AssertionError("proc(5) promises VmHWM")

    def descriptors(self) -> int:
        """Return how many descriptors are open."""
        return len(list(self._proc("fd").iterdir()))

    def _proc(self, entry: str) -> Path:
        return Path("/proc", str(self.process.pid), entry)

    def _end(self) -> None:
        """End it, with a chance to save what a coverage measurement has found."""
        # A stopped process would not hear the other signal.
        workers = self.workers()
        for pid in workers:
            # One that a test has killed may have been reaped meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGINT)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.wait()
            raise


def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for a state that nothing announces, `patience` seconds at the most."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never comes true"
        time.sleep(_GLANCE)


def start_daemon(
    hosts: Path,
    *options: str,
    address: tuple[str, int] = ("127.0.0.1", 0),
    env: Mapping[str, str] | None = None,
    family: socket.AddressFamily = socket.AF_INET,
    dual_stack: bool = False,
    receive_buffer: int | None = None,
    under: tuple[str, ...] = (),
    module: str = "sniproxy",
    measured: bool = True,
) -> Daemon:
    """Start the daemon in the directory `hosts` and wait until it listens.

    Args:
        hosts: The hosts directory.
        options: The command line.
        address: Where to listen, on a port of the kernel's choice by default.
        env: What to add to the environment.
        family: That of `address`.
        dual_stack: Whether an IPv6 socket takes IPv4 clients, too.
        under: A command that becomes the daemon: ("prlimit", "--nofile=64").
        receive_buffer: What connections inherit as SO_RCVBUF, in bytes.
        module: What to run.
        measured: Whether coverage is measured in it, if it is at all; then it has no sandbox.
    """
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        if receive_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        listening.bind(address)
        listening.listen(socket.SOMAXCONN)
        daemon = Daemon(
            listening, hosts, options, env, under=under, module=module, measured=measured
        )
    try:
        daemon.wait_for_log("listening")
    except BaseException as error:
        daemon.__exit__(type(error), error, error.__traceback__)
        raise
    return daemon


def _is_unexpected(line: str) -> bool:
    # What Python itself has to say, such as a ResourceWarning, does not begin like an event.
    programs = "sniproxy|tls-bridge|tls-bridge-peer|tls-tproxy|tproxy-pod"
    return re.match(rf"({programs}): (?!bug )", line) is None
