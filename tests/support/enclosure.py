"""Mounts and a network apart, in which this machine looks like one of an administrator's.

    with Enclosure() as inside:
        inside.run("useradd", "--system", "sniproxy")
        (inside / "/srv/hosts").mkdir()
        ...

It has its own network, a loopback interface and nothing else, and its own /etc, /opt, /srv, /run,
/var/log and /dev/log. So what an administrator copies to a machine is run here as it is: on port
443, with its users and its paths. /opt/sniproxy is the environment of the tests; of /etc there is a
copy. All of it is in memory, and gone at the end, with every process that is left.

It takes root.
"""

import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, ParamSpec, Self, TypeVar

from sniproxy.service import libc
from tests.support.daemon import PATIENCE, eventually

P = ParamSpec("P")
T = TypeVar("T")

_CHECKOUT: Final = Path(__file__).parents[2]

# sched.h, sys/mount.h, linux/sockios.h, net/if.h
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1

_EMPTY: Final = ("/opt", "/run", "/srv", "/var/log")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")

# All that a program in there knows of ours. Coverage is not measured: another user could not save
# what was found.
_ENVIRONMENT: Final = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


def why_no_enclosure() -> str | None:
    """Return what is missing here for one, in words for people; None if nothing is."""
    if os.geteuid() != 0:
        return "only root can make mounts and users"
    if not Path(sys.prefix, "bin/sniproxy").exists():
        return f"sniproxy is not installed in {sys.prefix}"
    attempt = ["unshare", "--mount", "--net", "true"]
    if shutil.which(attempt[0]) is None or subprocess.run(attempt, capture_output=True).returncode:
        return "no namespaces are to be had here"
    return None


class Enclosure:
    """Namespaces that one thread of ours is in, and whatever is started there."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        try:
            self._root, self._mounts = self.do(_enter)
        except BaseException:
            self._thread.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(signal.SIGKILL)
        self._thread.shutdown()

    def __truediv__(self, path: str) -> Path:
        """Return what is `path` in there as a path out here.

        An absolute link on the way would lead to our own files.
        """
        return self._root / path.removeprefix("/")

    def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in there. One call at a time."""
        return self._thread.submit(function, *args, **kwargs).result()

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        """Start a program in there."""

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, cwd=_CHECKOUT, env=_ENVIRONMENT
            )

        return self.do(start)

    def run(self, *command: str, code: int = 0) -> str:
        """Run a program in there to its end, with the exit code `code`; return what it says."""

        def run() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=_CHECKOUT,
                env=_ENVIRONMENT,
                # What is run waits for a drain of ten seconds at the most.
                timeout=3 * PATIENCE,
            )

        result = self.do(run)
        assert result.returncode == code, f"{command}: {result.returncode}\n{result.stdout}"
        return result.stdout

    def connect(self, address: tuple[str, int]) -> socket.socket:
        """Return a connection to a server in there."""
        return self.do(socket.create_connection, address, PATIENCE)

    def processes(self, name: str | None = None) -> list[int]:
        """Return the ids of the processes in there, or of those that have the name `name`."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and process.name != str(os.getpid()):
                # They come and go. One that has ended, and was not waited for, has no namespace;
                # and that of some may not be seen, not even by root in a container.
                with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                    is_there = os.readlink(process / "ns/mnt") == self._mounts
                    if is_there and name in (None, (process / "comm").read_text().strip()):
                        found.append(int(process.name))
        return found

    def end(self, number: signal.Signals) -> None:
        """Send a signal to all processes in there until none is left."""

        def none_is_left() -> bool:
            pids = self.processes()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            return not pids

        eventually(none_is_left)

    def listeners(self, port: int) -> set[str]:
        """Return the sockets that listen on a TCP port in there, named as in /proc/PID/fd."""
        found = set()
        for table in "tcp", "tcp6":
            for line in (self._root.parent / "net" / table).read_text().splitlines()[1:]:
                # proc_pid_net(5): number, local address, remote address, state; six more; inode.
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
        return found


def _enter() -> tuple[Path, str]:
    """Make it, with the calling thread inside; return its root and its mount namespace."""
    libc.call("unshare", _CLONE_NEWNS | _CLONE_NEWNET)
    _mount(None, "/", flags=_MS_REC | _MS_PRIVATE)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    parts = [path for path in _CHECKOUT.iterdir() if path.is_dir()]
    _open_the_way([Path(sys.prefix), Path(sys.base_prefix), *parts])
    with _held(sys.prefix) as prefix:
        for path in _EMPTY:
            _mount(None, path, "tmpfs")
        _bind(prefix, "/opt/sniproxy")
    with _held("/etc") as etc:
        _mount(None, "/etc", "tmpfs")
        shutil.copytree(etc, "/etc", symlinks=True, dirs_exist_ok=True)
    with _held("/dev") as dev:
        _mount(None, "/dev", "tmpfs")
        for device in _DEVICES:
            _bind(dev / device, f"/dev/{device}")
    # The thread has a root directory of its own now, and others can look into it.
    us = Path("/proc/thread-self").resolve()
    return us / "root", os.readlink(us / "ns/mnt")


def _open_the_way(paths: Iterable[Path]) -> None:
    """Let everybody in there reach `paths`, through directories that are closed out here.

    The Python of the tests may be in the home of root. Whoever closed that meant it, so it is not
    touched: in there, a directory is put over it that has nothing in it but the way.
    """
    behind: dict[Path, list[Path]] = {}
    for path in paths:
        for ancestor in reversed(path.parents):
            if not ancestor.stat().st_mode & stat.S_IXOTH:
                behind.setdefault(ancestor, []).append(path)
                break
    for closed, hidden in behind.items():
        with ExitStack() as stack:
            sources = {path: stack.enter_context(_held(path)) for path in hidden}
            _mount(None, closed, "tmpfs")
            for path, source in sources.items():
                _bind(source, path)


@contextmanager
def _held(path: str | Path) -> Iterator[Path]:
    """Keep a name for what is at `path`, whatever is mounted over it meanwhile."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _bind(source: Path, target: str | Path) -> None:
    """Make `target`, and have there what is at `source`, a directory or something else."""
    target = Path(target)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.touch()
    _mount(source, target, flags=_MS_BIND | _MS_REC)


def _mount(
    source: Path | None, target: str | Path, kind: str | None = None, flags: int = 0
) -> None:
    """mount(2). A file system that is new belongs to root, and everybody can look into it."""
    options = b"mode=755" if kind == "tmpfs" else None
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    libc.call("mount", *words, flags, options)
