"""A backend that is handed a client's connection and does with it whatever a test asks for.

    with Backend(listening, Right.NONE) as backend:
        ...  # something hands a connection over
        backend("disconnect")
        with pytest.raises(PermissionError):
            backend("bind", "127.0.0.1", 443)

It is a process of its own, shut off from the network: it is in a network namespace in which there
is nothing. What it is asked for are the functions of `_Connection`; what fails there raises here.
It takes root.
"""

import array
import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sniproxy.service import libc, sandbox
from sniproxy.service.bpf import Program
from tests.support.daemon import unmeasured

# sched.h, sys/prctl.h
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_DUMPABLE: Final = 4

NOBODY: Final = 65534

# asm-generic/socket.h, linux/in.h, linux/tcp.h: what Python has no name for.
SO_RCVBUFFORCE: Final = 33
SO_MARK: Final = 36
SO_DETACH_FILTER: Final = 27
SO_ATTACH_FILTER: Final = 26
SO_LOCK_FILTER: Final = 44
IP_FREEBIND: Final = 15
IP_TRANSPARENT: Final = 19
TCP_REPAIR: Final = 19
TCP_FASTOPEN_NO_COOKIE: Final = 34
_MSG_FASTOPEN: Final = 0x20000000

# linux/sockios.h, net/if.h, and struct ifreq: a name of 16 bytes, and what is asked or told of it.
_SIOCGIFCONF: Final = 0x8912
_SIOCSIFFLAGS: Final = 0x8914
_SIOCGSKNS: Final = 0x894C
_IFF_UP: Final = 1
_IFREQ: Final = struct.Struct("@16s4s20x")
_ADDRESS: Final = slice(20, 24)  # in a struct sockaddr_in that follows the name

# What a call that gets no answer waits for, in seconds: the machine's own network answers in
# thousandths of one.
_PATIENCE: Final = 0.3

# For what comes: it is the machine that is slow then.
_LONG: Final = 10.0

Value = None | bool | int | str | Sequence["Value"]


class Right(enum.Enum):
    """What the process may do."""

    NONE = "none"  # it is nobody's
    USER_NAMESPACE = "user namespace"  # it is root in a user namespace that nobody has made
    ROOT = "root"


class Backend:
    """The process.

    Args:
        listening: The Unix socket on which it waits for the connection.
        right: What it may do.
    """

    def __init__(self, listening: socket.socket, right: Right = Right.NONE) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-bb", "-W", "error", "-m", "tests.support.handed", right.value],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            cwd=Path(__file__).parents[2],
            env=unmeasured(),
            text=True,
        )
        self._listening = listening
        self("wait", listening.fileno())

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, what: str, *arguments: Value) -> Value:
        """Have it do something.

        Raises:
            OSError: It can't.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": -1}')
        if "error" in answer:
            # Python makes the subclass of it: PermissionError and so on.
            raise OSError(answer["error"], os.strerror(answer["error"]))
        value: Value = answer["value"]
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:
            self._process.kill()


# A command that becomes another one, of root's, that has all rights but the one for a filter.
WITHOUT_RIGHT: Final = ("setpriv", "--bounding-set=-net_admin")

_ATTACH: Final = """
import socket
from sniproxy.service.bpf import Program
program = Program.of([(0x06, 0, 0, 0xFFFFFFFF)])
try:
    socket.socket().setsockopt(socket.SOL_SOCKET, 26, bytes(program))
except PermissionError:
    print("no")
"""


@functools.cache
def filter_takes_a_right() -> bool:
    """Whether this kernel lets only those with CAP_NET_ADMIN have a filter on a TCP socket."""
    done = subprocess.run(
        [*WITHOUT_RIGHT, sys.executable, "-c", _ATTACH],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=unmeasured(),
    )
    return done.stdout != b""


class _Connection:
    """What can be asked for. The first two come first."""

    def __init__(self) -> None:
        self._listening: socket.socket
        self._sock: socket.socket

    def wait(self, fd: int) -> None:
        self._listening = socket.socket(fileno=fd)
        self._listening.settimeout(_LONG)

    def take(self) -> Value:
        """Take the connection; return how many bytes and descriptors came, and how it is."""
        descriptors: list[int] = []
        while not descriptors:  # whose handing over has failed is in the queue, too
            connection, _ = self._listening.accept()
            with connection:
                data, descriptors, _, _ = socket.recv_fds(connection, 16, 16)
        self._sock = socket.socket(fileno=descriptors[0])
        listens = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return [len(data), len(descriptors), bool(listens), self._sock.getpeername()[1]]

    # --- What sockets are for

    def reach(self, host: str, port: int) -> None:
        """Connect somewhere with a new socket."""
        socket.create_connection((host, port), _PATIENCE).close()

    def reach_itself(self) -> None:
        """Connect to a listening socket of its own, in its own network."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            up = _IFREQ.pack(b"lo", struct.pack("@HH", _IFF_UP, 0))
            fcntl.ioctl(listening, _SIOCSIFFLAGS, up)
            self.reach(*listening.getsockname())

    def receive(self, size: int) -> str:
        return self._sock.recv(size).hex()

    def send(self, data: str) -> None:
        self._sock.sendall(data.encode())

    def disconnect(self) -> None:
        """Free the socket of its peer, connect(2)."""
        unspecified = ctypes.create_string_buffer(struct.pack("@H14x", socket.AF_UNSPEC))
        libc.call("connect", self._sock.fileno(), ctypes.byref(unspecified), 16)
        self._sock.settimeout(_PATIENCE)

    def connect(self, host: str, port: int) -> None:
        try:
            self._sock.connect((host, port))
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "") from None

    def begin_to_connect(self, host: str, port: int) -> None:
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self._sock.connect((host, port))

    def error(self) -> int:
        """Return what has become of it."""
        self._sock.settimeout(_PATIENCE)
        select.select([], [self._sock], [], _PATIENCE)
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def connect_with_data(self, host: str, port: int, data: str) -> None:
        """Send bytes with the first packet of a connection, RFC 7413."""
        self._sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        self._sock.sendto(data.encode(), _MSG_FASTOPEN, (host, port))

    def bind(self, host: str, port: int) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._sock.bind((host, port))

    def listen(self) -> Value:
        """Return where it listens then."""
        self._sock.listen()
        return list(self._sock.getsockname())

    def take_fill_and_close(self) -> None:
        """Leave bytes behind that the client does not read, and that closing has to wait for."""
        self.take()
        self._sock.recv(1 << 16)
        hours = struct.pack("@ii", 1, 3600)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hours)
        self._sock.send(bytes(1 << 20), socket.MSG_DONTWAIT)
        self._sock.close()

    # --- What else they are for

    def set(self, level: int, option: int, value: int) -> None:
        self._sock.setsockopt(level, option, value)

    def bind_to_device(self, name: str) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())

    def attach_filter(self) -> None:
        """Let everything in."""
        program = Program.of([(0x06, 0, 0, 0xFFFFFFFF)])
        self._sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))

    def interfaces(self) -> Value:
        """Return the IPv4 addresses where the socket is, netdevice(7)."""
        room = array.array("B", bytes(4096))
        where, size = room.buffer_info()
        answer = fcntl.ioctl(self._sock, _SIOCGIFCONF, struct.pack("@iP", size, where))
        filled = room.tobytes()[: struct.unpack("@iP", answer)[0]]
        # Each is a struct ifreq.
        return [
            socket.inet_ntoa(filled[at:][_ADDRESS]) for at in range(0, len(filled), _IFREQ.size)
        ]

    def shut_interface(self, name: str) -> None:
        fcntl.ioctl(self._sock, _SIOCSIFFLAGS, _IFREQ.pack(name.encode(), bytes(4)))

    def namespace(self) -> int:
        """Return the inode of the network namespace that the socket is in, ioctl(2) permitting."""
        fd = fcntl.ioctl(self._sock, _SIOCGSKNS)
        try:
            return os.stat(fd).st_ino
        finally:
            os.close(fd)

    # --- Sandboxes

    def enter_sandbox(self) -> Value:
        """Enter the daemon's own: no TCP by Landlock, and by seccomp no socket but Unix ones."""
        return sandbox.enter()

    def enter_landlock(self) -> Value:
        libc.call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        return sandbox._enter_landlock([], sandbox._BIND_TCP | sandbox._CONNECT_TCP)


def _become(right: Right) -> None:
    libc.call("unshare", _CLONE_NEWNET)
    if right is Right.ROOT:
        return
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if right is Right.USER_NAMESPACE:
        # Files of a process in /proc are root's, once it has changed its user, prctl(2).
        libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
        libc.call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
        Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")


def _serve() -> None:
    connection = _Connection()
    # What would be loaded later, when there may be no way to it.
    "a".encode("idna")
    _become(Right(sys.argv[1]))
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer: dict[str, Value]
        try:
            answer = {"value": functools.partial(getattr(connection, what), *arguments)()}
        except OSError as error:
            answer = {"error": errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno}
        print(json.dumps(answer), flush=True)  # noqa: T201 - it is what is read at the other end


if __name__ == "__main__":
    _serve()
