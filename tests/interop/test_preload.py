"""The library of scripts/preload: clients handed over to servers that know nothing of it.

`tests/service/test_handing_over_preload.py` runs what the page says of it.
"""

import ctypes
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.interop.clients import NAME, Visit, curl
from tests.support.backends import host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.sockets import receive_all, reset, tcp_pair, unix_pair

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/preload"
SOURCE = ROOT / "packaging/handoff_preload.c"

# A client's address that is not the first to come to mind.
CLIENT = "127.0.0.9"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (Debian packages gcc, libc6-dev)"
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("library") / "new"
    made = run(SCRIPT, "--output", directory, CFLAGS="-Werror")
    path = directory / "sniproxy-handoff.so"
    assert (made.returncode, made.stdout, made.stderr) == (0, f"preload: made {path}\n", "")
    assert list(directory.iterdir()) == [path]
    return path


# The script.


def test_the_script_called_wrongly() -> None:
    for arguments in ("--what",), ("--output",), ("--output", "/tmp", "more"):
        ran = run(SCRIPT, *arguments)
        assert (ran.returncode, ran.stdout) == (100, "")
        assert ran.stderr.startswith("preload: fatal: unable to understand the arguments: usage: ")
    assert "dist in the checkout" in run(SCRIPT, "--help").stdout


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [
        ("no-such-cc", "unable to find the C compiler no-such-cc (Debian packages gcc, libc6-dev)"),
        ("false", "unable to compile packaging/handoff_preload.c with false (Debian packages"),
    ],
)
def test_no_compiler_that_is_any_good(tmp_path: Path, compiler: str, complaint: str) -> None:
    old = tmp_path / "sniproxy-handoff.so"
    old.write_text("old")
    ran = run(SCRIPT, "--output", tmp_path, CC=compiler)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"preload: fatal: {complaint}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_directory_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run(SCRIPT, "--output", tmp_path / "file")
    assert ran.returncode == 1
    assert ran.stderr.endswith(f"preload: fatal: unable to make {tmp_path}/file\n")


# The library alone. It is called as a server's C would call it.


class Accepting:
    """accept and accept4, as the library has them."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), use_errno=True)

    def __call__(
        self, listener: socket.socket, flags: int = socket.SOCK_CLOEXEC, room: int | None = None
    ) -> tuple[socket.socket, bytes, int]:
        """Return the socket, what is in the buffer for the address, and the size of the latter.

        Args:
            listener: Whose turn it is.
            flags: Those of accept4(2).
            room: Bytes for the address; None to ask for none.
        """
        address = ctypes.create_string_buffer(b"\xee" * 200, 200)
        size = ctypes.c_uint32(room or 0)
        where = (None, None) if room is None else (address, ctypes.byref(size))
        fd = self._library.accept4(listener.fileno(), *where, flags)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "accept4")
        return socket.socket(fileno=fd), address.raw, size.value

    def plain(self, listener: socket.socket) -> socket.socket:
        """accept(2), which knows no flags."""
        fd = self._library.accept(listener.fileno(), None, None)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "accept")
        return socket.socket(fileno=fd)


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    def descriptors() -> list[str]:
        return sorted(os.listdir("/proc/self/fd"))

    before = descriptors()
    yield
    assert descriptors() == before


@pytest.fixture
def accept(library: Path) -> Accepting:
    return Accepting(library)


def listen(name: str | Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        listener.bind(str(name))
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listen(tmp_path / "handoff-socket") as listener:
        yield listener


def connect(listener: socket.socket) -> socket.socket:
    peer = socket.socket(listener.family, listener.type)
    peer.connect(listener.getsockname())
    return peer


def hand_over(listener: socket.socket, *descriptors: int) -> None:
    """Send one message, and leave: as the daemon does."""
    with connect(listener) as peer:
        socket.send_fds(peer, [b"\0"], descriptors)


@contextmanager
def client_of(listener: socket.socket) -> Iterator[socket.socket]:
    """A client, handed over."""
    client, ours = tcp_pair()
    with client:
        with ours:
            hand_over(listener, ours.fileno())
        yield client


def is_that_of(accepted: socket.socket, client: socket.socket) -> bool:
    """Whether they are the two ends of one connection; the first is closed."""
    with accepted:
        accepted.sendall(b"!")
    return client.recv(2) == b"!"


def test_a_client(accept: Accepting, listener: socket.socket) -> None:
    with client_of(listener) as client:
        accepted, raw, size = accept(listener, room=128)
        ours = client.getsockname()
        packed = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", ours[1], b"\x7f\0\0\1")
        assert (raw[:17], size) == (packed + b"\xee", 16)
        assert accepted.family == socket.AF_INET
        assert accepted.getpeername() == ours
        assert is_that_of(accepted, client)


def test_a_client_of_ipv6(accept: Accepting, listener: socket.socket) -> None:
    try:
        door = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"::1 is no address of this machine: {error.strerror}")
    with door, socket.create_connection(door.getsockname()[:2]) as client:
        with door.accept()[0] as ours:
            hand_over(listener, ours.fileno())
        accepted, raw, size = accept(listener, room=128)
        assert (raw[8:24], size) == (socket.inet_pton(socket.AF_INET6, "::1"), 28)
        assert is_that_of(accepted, client)


@pytest.mark.parametrize("room", [0, 1, 2, 8, 15, 16, 17])
def test_an_address_for_which_there_may_be_no_room(
    accept: Accepting, listener: socket.socket, room: int
) -> None:
    """As by accept(2) of TCP, byte for byte."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        client = socket.create_connection(door.getsockname())
        direct, raw, size = accept(door, room=room)
    with client, direct:
        hand_over(listener, direct.fileno())
        accepted, *handed = accept(listener, room=room)
        assert handed == [raw, size]
        assert (size, raw[room:]) == (16, b"\xee" * (200 - room))
        accepted.close()


@pytest.mark.parametrize("was", [False, True])
@pytest.mark.parametrize("nonblocking", [0, socket.SOCK_NONBLOCK])
@pytest.mark.parametrize("cloexec", [0, socket.SOCK_CLOEXEC])
def test_flags(
    accept: Accepting, listener: socket.socket, was: bool, nonblocking: int, cloexec: int
) -> None:
    client, ours = tcp_pair()
    with client, ours:
        ours.setblocking(was)
        hand_over(listener, ours.fileno())
        accepted = accept(listener, nonblocking | cloexec)[0]
        with accepted:
            assert bool(fcntl.fcntl(accepted, fcntl.F_GETFD)) == bool(cloexec)
            assert bool(fcntl.fcntl(accepted, fcntl.F_GETFL) & os.O_NONBLOCK) == bool(nonblocking)


def test_accept_without_flags(accept: Accepting, listener: socket.socket) -> None:
    with client_of(listener) as client:
        accepted = accept.plain(listener)
        assert not fcntl.fcntl(accepted, fcntl.F_GETFD)
        assert is_that_of(accepted, client)


def errno_of(accept: Accepting, listener: socket.socket, flags: int = 0) -> int:
    with pytest.raises(OSError, match="accept4") as caught:
        accept(listener, flags)
    assert caught.value.errno is not None
    return caught.value.errno


def test_errors_are_those_of_accept(accept: Accepting, listener: socket.socket) -> None:
    listener.setblocking(False)
    assert errno_of(accept, listener) == errno.EAGAIN
    assert errno_of(accept, listener, 1) == errno.EINVAL
    near, far = unix_pair()
    with near, far:
        assert errno_of(accept, near) == errno.EINVAL
    assert errno_of(accept, near) == errno.EBADF
    listener.setblocking(True)
    listener.shutdown(socket.SHUT_RD)
    assert errno_of(accept, listener) == errno.EINVAL


def test_nobody_speaks(accept: Accepting, listener: socket.socket) -> None:
    with connect(listener) as silent, client_of(listener) as client:
        assert errno_of(accept, listener) == errno.ECONNABORTED
        assert receive_all(silent) == b""
        assert is_that_of(accept(listener)[0], client)


def test_the_message_comes_later(accept: Accepting, listener: socket.socket) -> None:
    """And signals come meanwhile, as they may at any time."""
    client, ours = tcp_pair()
    here = threading.get_ident()
    heard: list[int] = []

    def speak(peer: socket.socket) -> None:
        for _ in range(5):
            time.sleep(0.002)
            signal.pthread_kill(here, signal.SIGUSR1)
        socket.send_fds(peer, [b"\0"], [ours.fileno()])

    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with client, ours, connect(listener) as peer:
            speaker = threading.Thread(target=speak, args=[peer])
            speaker.start()
            accepted = accept(listener)[0]
            speaker.join()
            assert is_that_of(accepted, client)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard


def bad_messages(stack: ExitStack) -> dict[str, list[int]]:
    """Return what is no client, or not one alone: the descriptors of messages."""
    near, far = unix_pair()
    pair = tcp_pair()
    gone, ours = tcp_pair()
    reset(gone)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.connect(("127.0.0.1", 9))
    listening = socket.create_server(("127.0.0.1", 0))
    file = (ROOT / "LICENSE").open()
    for thing in near, far, *pair, ours, datagrams, listening, file:
        stack.enter_context(closing(thing))
    eventually(lambda: ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or is_closed(ours))
    return {
        "none": [],
        "two": [pair[0].fileno(), pair[1].fileno()],
        "four": [pair[0].fileno(), pair[1].fileno(), near.fileno(), far.fileno()],
        "a Unix socket": [near.fileno()],
        "datagrams": [datagrams.fileno()],
        "a listening socket": [listening.fileno()],
        "a file": [file.fileno()],
        "gone": [ours.fileno()],
    }


def is_closed(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("room", [None, 128])
def test_what_is_no_client_is_closed_and_the_next_is_taken(
    accept: Accepting, listener: socket.socket, room: int | None
) -> None:
    with ExitStack() as stack:
        messages = bad_messages(stack)
        before = len(os.listdir("/proc/self/fd"))
        for descriptors in messages.values():
            hand_over(listener, *descriptors)
        # And those who say nothing and leave.
        connect(listener).close()
        with client_of(listener) as client:
            assert is_that_of(accept(listener, room=room)[0], client)
        assert len(os.listdir("/proc/self/fd")) == before
        # They were closed: nobody holds them but who sent them.
        for name, descriptors in messages.items():
            hand_over(listener, *descriptors)
            listener.setblocking(False)
            assert errno_of(accept, listener) == errno.EAGAIN, name
            assert len(os.listdir("/proc/self/fd")) == before, name


@pytest.mark.parametrize("free", [0, 1])
def test_at_the_limit_of_descriptors_clients_stay_in_the_queue(
    accept: Accepting, listener: socket.socket, free: int
) -> None:
    listener.setblocking(False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with client_of(listener) as client:
        # No gaps, and so many more than the last of them.
        with ExitStack() as stack:
            highest = max(map(int, os.listdir("/proc/self/fd")))
            while (filler := os.dup(0)) < highest:
                stack.callback(os.close, filler)
            os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (filler + free, limits[1]))
            try:
                assert errno_of(accept, listener) == errno.EMFILE
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert is_that_of(accept(listener)[0], client)


@pytest.mark.parametrize(
    "name",
    [
        *("tls-socket", "handoff-socket2", "a.handoff-socket", "handoff-socke", "handoff-socket/x"),
        *("\0handoff-socket", "\0/handoff-socket"),
    ],
)
def test_listeners_of_other_names_are_as_they_were(
    accept: Accepting, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.startswith("\0"):
        Path(name).parent.mkdir(exist_ok=True)
    with listen(name) as listener, connect(listener) as peer:
        with accept(listener)[0] as accepted:
            assert accepted.family == socket.AF_UNIX
            peer.sendall(b"!")
            assert accepted.recv(1) == b"!"


def test_listeners_of_other_kinds_are_as_they_were(accept: Accepting, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as peer:
            accepted, raw, size = accept(listener, room=16)
            assert (int.from_bytes(raw[2:4]), size) == (peer.getsockname()[1], 16)
            assert is_that_of(accepted, peer)
    with listen(tmp_path / "handoff-socket", socket.SOCK_SEQPACKET) as listener:
        with connect(listener) as peer:
            assert is_that_of(accept(listener)[0], peer)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("handoff-socket", id="without a slash"),
        # Slashes are as good as one.
        pytest.param("./handoff-socket".replace("/", "/" * 92), id="as long as there is room"),
        pytest.param("handoff-socket.123.tmp", id="HAProxy's, which it renames"),
    ],
)
def test_names_that_are_meant(
    accept: Accepting, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with listen(name) as listener, client_of(listener) as client:
        assert is_that_of(accept(listener)[0], client)


def test_memory_and_threads_that_are_cancelled(tmp_path: Path, listener: socket.socket) -> None:
    """With the sanitizers of the compiler, which say what is not right, and end the program."""
    program = tmp_path / "check"
    check = Path(__file__).with_name("preload_check.c")
    made = run(
        *("cc", "-std=c11", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", program),
        *(check, SOURCE, "-ldl"),
    )
    if "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers (Debian package libgcc-12-dev)")
    assert (made.returncode, made.stderr) == (0, "")
    for last in "client", "silent", "nobody":
        with ExitStack() as stack:
            for _ in range(9):
                stack.enter_context(client_of(listener))
            if last == "client":
                stack.enter_context(client_of(listener))
            if last == "silent":
                stack.enter_context(connect(listener))
            ran = subprocess.run(
                [program, str(listener.fileno())],
                # A thread that is cancelled leaves its stack marked. What the sanitizer does there
                # at the thread's end, it takes for a mistake.
                env=os.environ | {"ASAN_OPTIONS": "use_sigaltstack=0"},
                pass_fds=[listener.fileno()],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout == "16\n" * 9 + "cancelled\n0 lost\n"
