"""The daemon, with somebody inside who has taken it over and tries what is forbidden.

    python -m tests.support.intruder OPTION...

is sniproxy, which moreover tries each thing once when it begins to serve, and writes what came of
it as a line of its log: `sniproxy: intruder read=EACCES list=done ...`. The environment says what
there is to be tried: INTRUDER_FILES, a directory it may write to; INTRUDER_TCP, a port of 127.0.0.1
that listens; INTRUDER_ABSTRACT, the name of an abstract Unix socket that does.
"""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import termios
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sniproxy.__main__
from sniproxy.serve import serve

_DIRECTORY = os.environ["INTRUDER_FILES"]
_FILE = f"{_DIRECTORY}/file"


def _open(flags: int, path: str = _FILE) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags, 0o600))


def _execute(path: str = "/bin/true") -> None:
    # In a child, which inherits what is forbidden: else we would be gone if it was not.
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, ["true"])  # noqa: S606 - it is to be refused
        except OSError as error:
            os._exit(error.errno or 1)
    _, status = os.waitpid(pid, 0)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(number, os.strerror(number))


def _program_in_memory() -> int:
    program = os.memfd_create("program")
    os.write(program, Path("/bin/true").read_bytes())
    return program


def _connect_abstract() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + os.environ["INTRUDER_ABSTRACT"])


# What was there before the sandbox, as the socket that listens is: by what is forbidden to make, no
# more would be seen of what is forbidden to do.
_TCP_SOCKETS = [socket.socket() for _ in range(2)]
_TERMINAL, _ = os.openpty()
_PROGRAM = _program_in_memory()


def _make_socket(kind: socket.SocketKind) -> Callable[[], None]:
    return lambda: socket.socket(socket.AF_INET, kind).close()


def _trace() -> None:
    # Forbidden to nobody: a bug must have its lines in the log. It takes source files to show code
    # in them, and sometimes modules to be imported.
    try:
        os.stat(f"{_FILE}.gone")
    except OSError as error:
        assert "FileNotFoundError" in "".join(traceback.format_exception(error))  # noqa: PT017


_TRIES: dict[str, Callable[[], object]] = {
    "read": _open(os.O_RDONLY),
    "write": _open(os.O_WRONLY),
    "create": _open(os.O_WRONLY | os.O_CREAT, f"{_DIRECTORY}/new"),
    "truncate": lambda: os.truncate(_FILE, 0),
    "list": lambda: os.listdir(_DIRECTORY),
    "rename": lambda: os.rename(_FILE, f"{_FILE}.old"),
    "remove": lambda: os.unlink(f"{_DIRECTORY}/pending"),
    "make_directory": lambda: os.mkdir(f"{_DIRECTORY}/directory"),
    "link": lambda: os.symlink("/", f"{_DIRECTORY}/link"),
    "proc": _open(os.O_RDONLY, "/proc/self/maps"),
    "execute": _execute,
    "execute_memory": lambda: _execute(f"/proc/self/fd/{_PROGRAM}"),
    "connect_tcp": lambda: _TCP_SOCKETS[0].connect(("127.0.0.1", int(os.environ["INTRUDER_TCP"]))),
    "bind_tcp": lambda: _TCP_SOCKETS[1].bind(("127.0.0.1", 0)),
    "connect_abstract": _connect_abstract,
    "tcp_socket": _make_socket(socket.SOCK_STREAM),
    "udp_socket": _make_socket(socket.SOCK_DGRAM),
    "type": lambda: fcntl.ioctl(_TERMINAL, termios.TIOCSTI, b"x"),
    "signal": lambda: os.kill(os.getppid(), signal.SIGCONT),
    "trace": _trace,
}


async def _intrude(*arguments: Any, **options: Any) -> None:
    came: dict[str, str] = {}
    for name, attempt in _TRIES.items():
        came[name] = "done"
        try:
            attempt()
        except OSError as error:
            came[name] = errno.errorcode[error.errno or 0]
    line = " ".join(f"{name}={what}" for name, what in came.items())
    with contextlib.suppress(OSError):
        os.write(2, f"sniproxy: intruder {line}\n".encode())
    await serve(*arguments, **options)


if __name__ == "__main__":
    sniproxy.__main__.serve = _intrude  # type: ignore[attr-defined]
    sys.exit(sniproxy.__main__.main())
