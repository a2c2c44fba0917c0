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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import NAME
from tests.support.backends import host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.sockets import Noise, receive_all, reset, tcp_pair, unix_pair

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/preload"
SOURCE = ROOT / "packaging/handoff_preload.c"

PROGRAMS = "/usr/sbin:/usr/bin:/sbin:/bin"

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
    for arguments in ("--what",), ("--output",), ("--output", ".", "more"):
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


# It fills sun_path, unix(7). Slashes are as good as one.
LONGEST = f".{'/' * (108 - len('.handoff-socket'))}handoff-socket"


def listen(name: str | Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        if name == LONGEST:  # Python leaves room for a zero
            address = struct.pack("=H108s", socket.AF_UNIX, name.encode())
            assert not ctypes.CDLL(None).bind(listener.fileno(), address, len(address))
        else:
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
    name = listener.getsockname()
    peer.connect(os.path.basename(name) if os.fsdecode(name) == LONGEST else name)
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
    here = threading.get_ident()
    heard: list[int] = []

    def speak(peer: socket.socket, ours: socket.socket) -> None:
        for _ in range(5):
            time.sleep(0.001)
            signal.pthread_kill(here, signal.SIGUSR1)
        socket.send_fds(peer, [b"\0"], [ours.fileno()])

    def is_accepted() -> bool:
        client, ours = tcp_pair()
        with client, ours, connect(listener) as peer:
            speaker = threading.Thread(target=speak, args=[peer, ours])
            speaker.start()
            try:
                return is_that_of(accept(listener)[0], client)
            except ConnectionAbortedError:
                return False
            finally:
                speaker.join()

    def hear(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, hear)
    try:
        # Where much else runs, it may come too late a time or two.
        assert any(is_accepted() for _ in range(5))
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
    # The one of another family whose protocol has TCP's number: NETLINK_XFRM, in netlink.h.
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.IPPROTO_TCP)
    listening = socket.create_server(("127.0.0.1", 0))
    file = (ROOT / "LICENSE").open()
    for thing in near, far, *pair, ours, datagrams, netlink, listening, file:
        stack.enter_context(closing(thing))
    eventually(lambda: ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or is_closed(ours))
    return {
        "none": [],
        "two": [pair[0].fileno(), pair[1].fileno()],
        "four": [pair[0].fileno(), pair[1].fileno(), near.fileno(), far.fileno()],
        "a Unix socket": [near.fileno()],
        "datagrams": [datagrams.fileno()],
        "no TCP": [netlink.fileno()],
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
        *(
            "tls-socket",
            "handoff-socket2",
            "handoff-socket.sock",
            "a.handoff-socket",
            "handoff-socke",
            "handoff-socket/x",
        ),
        pytest.param(f"\0{os.getpid()}/handoff-socket", id="no path"),
    ],
)
def test_listeners_of_other_names_are_as_they_were(
    accept: Accepting, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.startswith("\0"):
        Path(name).parent.mkdir(exist_ok=True)
    with listen(name) as listener, connect(listener) as peer, accept(listener)[0] as accepted:
        assert accepted.family == socket.AF_UNIX
        peer.sendall(b"!")
        assert accepted.recv(1) == b"!"


def test_listeners_of_other_kinds_are_as_they_were(accept: Accepting, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as peer,
    ):
        accepted, raw, size = accept(listener, room=16)
        assert (int.from_bytes(raw[2:4]), size) == (peer.getsockname()[1], 16)
        assert is_that_of(accepted, peer)
    with (
        listen(tmp_path / "handoff-socket", socket.SOCK_SEQPACKET) as listener,
        connect(listener) as peer,
    ):
        assert is_that_of(accept(listener)[0], peer)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("handoff-socket", id="without a slash"),
        pytest.param(LONGEST, id="as long as there is room"),
        pytest.param("handoff-socket.123.tmp", id="HAProxy's, which it renames"),
    ],
)
def test_names_that_are_meant(
    accept: Accepting, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with listen(name) as listener, client_of(listener) as client:
        assert is_that_of(accept(listener)[0], client)


def test_memory_and_threads_that_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.chdir(tmp_path)
    for last in "client", "silent", "nobody":
        Path(LONGEST).unlink(missing_ok=True)
        with ExitStack() as stack:
            listener = stack.enter_context(listen(LONGEST))
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


# Servers, behind the daemon.


def needs(program: str, package: str) -> pytest.MarkDecorator:
    there = shutil.which(program, path=PROGRAMS)
    return pytest.mark.skipif(
        there is None, reason=f"{program} is not installed (Debian package {package})"
    )


class Site:
    """A host of the daemon's, and a server with the library.

    Attributes:
        host: The host's directory.
        place: Where files of the server's are.
        daemon: Who hands over.
        library: What the server is started with.
        authority: Whom clients trust.
        pem: The server's certificate and key.
    """

    def __init__(
        self, host: Path, place: Path, daemon: Daemon, certificates: Certificates, library: Path
    ) -> None:
        self.host = host
        self.place = place
        self.daemon = daemon
        self.library = library
        self.authority = certificates.authority
        pair = certificates.for_client(NAME)
        self.pem = place / "pem"
        self.pem.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())

    def filled_in(self, configuration: str) -> str:
        """Return a configuration with our paths in it."""
        return configuration.replace("PLACE", str(self.place)).replace("HOST", str(self.host))

    def output(self) -> str:
        """Return what the server has said."""
        return (self.place / "output").read_text()

    @contextmanager
    def served_by(
        self, *command: str, at: str = "handoff-socket"
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server, which listens at that socket."""
        with (self.place / "output").open("wb") as output:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.place,
                env={
                    "HOME": str(self.place),
                    "PATH": PROGRAMS,
                    "LD_PRELOAD": str(self.library),
                },
            )
        try:
            eventually(lambda: server.poll() is not None or self._listens_at(at))
            assert server.poll() is None, self.output()
            yield server
        finally:
            server.terminate()
            server.wait(PATIENCE)

    def _listens_at(self, name: str) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return not probe.connect_ex(str(self.host / name))

    def get(self, *options: str, paths: Sequence[str] = ("/",)) -> str:
        """Return what a client gets, whose address is CLIENT, on one connection."""
        outcome = self.try_to_get(*options, paths=paths)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        return outcome.stdout

    def try_to_get(
        self, *options: str, paths: Sequence[str] = ("/",)
    ) -> subprocess.CompletedProcess[str]:
        """Return what came of trying."""
        port = self.daemon.address[1]
        return run(
            *("curl", "--disable", "--noproxy", "*", "--silent", "--show-error"),
            *("--cacert", self.authority, "--interface", CLIENT),
            *("--connect-to", f"::127.0.0.1:{port}", *options),
            *(f"https://{NAME}:{port}{path}" for path in paths),
        )


@pytest.fixture
def site(tmp_path: Path, certificates: Certificates, library: Path) -> Iterator[Site]:
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    with start_daemon(hosts, "--handoff") as daemon:
        yield Site(host_directory(hosts, NAME), tmp_path, daemon, certificates, library)


@pytest.fixture
def site_for_both(tmp_path: Path, certificates: Certificates, library: Path) -> Iterator[Site]:
    """The same; the daemon has one socket for IPv6 and IPv4."""
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError as error:
        pytest.skip(f"there is no IPv6 here: {error.strerror}")
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    both = partial(start_daemon, address=("::", 0), family=socket.AF_INET6, dual_stack=True)
    with both(hosts, "--handoff") as daemon:
        yield Site(host_directory(hosts, NAME), tmp_path, daemon, certificates, library)


NGINX = """
    daemon off;
    user root;  # who may read here; it is not meant for others
    pid PLACE/nginx.pid;
    worker_processes 3;
    events {}
    http {
        log_format seen "saw $remote_addr $remote_port for $request_uri";
        access_log PLACE/access seen;
        error_log PLACE/error;
        client_body_temp_path PLACE/tmp;
        server {
            listen unix:HOST/handoff-socket ssl;
            ssl_certificate PLACE/pem;
            ssl_certificate_key PLACE/pem;
            root PLACE/files;
            location = / { return 200 "$remote_addr $remote_port $connection_requests\\n"; }
            location = /big { deny 127.0.0.8; }
            location = /new { return 404; }
            location = /here { return 200 "$server_addr $server_port."; }
            location = /moved { return 301 /elsewhere; }
        }
    }
"""


@needs("nginx", "nginx-light")
def test_nginx(site: Site) -> None:
    def configure(text: str) -> None:
        (site.place / "nginx.conf").write_text(site.filled_in(text))

    configure(NGINX)
    files = site.place / "files"
    files.mkdir()
    (files / "big").write_bytes(b"".join(Noise().blocks(5_000_000)))
    command = ("nginx", "-e", "stderr", "-p", str(site.place), "-c", str(site.place / "nginx.conf"))
    with site.served_by(*command) as nginx:
        # The address is the client's, on a page and in the log; and that for two requests.
        pages = site.get("--write-out", "%{local_ip} %{local_port}\n", paths=("/", "/")).split("\n")
        assert pages == [f"{pages[1]} 1", pages[1], f"{pages[1]} 2", pages[1], ""]
        assert pages[1].startswith(f"{CLIENT} ")
        access = site.place / "access"
        eventually(lambda: access.read_text().count(f"saw {pages[1]} for /\n") == 2)
        site.get("--output", str(site.place / "got"), paths=["/big"])
        assert (site.place / "got").read_bytes() == (files / "big").read_bytes()
        # What it knows of itself is where it listens. So it tells nobody of a port.
        assert site.get(paths=["/here"]) == f"unix:{site.host}/handoff-socket ."
        redirect = site.get(
            "--write-out", "%{redirect_url}", "--output", "/dev/null", paths=["/moved"]
        )
        assert redirect == f"https://{NAME}/elsewhere"
        # Whichever worker takes it.
        children = Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children")
        workers = children.read_text().split()
        assert len(workers) == 3
        for worker in workers:
            assert "sniproxy-handoff.so" in Path(f"/proc/{worker}/maps").read_text()
        for _ in range(10):
            assert site.get().startswith(f"{CLIENT} ")
        # A reload, with the same socket. No client is lost meanwhile.
        inode = (site.host / "handoff-socket").stat().st_ino
        configure(NGINX.replace("return 404", "return 200 new"))
        nginx.send_signal(signal.SIGHUP)
        eventually(lambda: site.get(paths=["/new"]) == "new")
        eventually(lambda: not set(workers) & set(children.read_text().split()))
        assert site.get().startswith(f"{CLIENT} ")
        assert (site.host / "handoff-socket").stat().st_ino == inode
        # Nobody who is silent stops it, and that is no more than a line in its log.
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(site.host / "handoff-socket"))
            assert receive_all(silent) == b""
        assert site.get().startswith(f"{CLIENT} ")
        log = (site.place / "error").read_text()
        assert re.fullmatch(r".* accept4\(\) failed \(103: .*\n", log), log
    assert not (site.host / "handoff-socket").exists()


CODE = ("--output", "/dev/null", "--write-out", "%{http_code}")


@needs("nginx", "nginx-light")
def test_addresses_and_rules_of_ipv4_where_the_daemon_listens_for_both(site_for_both: Site) -> None:
    site = site_for_both
    (site.place / "files").mkdir()
    (site.place / "files/big").touch()
    (site.place / "nginx.conf").write_text(site.filled_in(NGINX))
    command = ("nginx", "-e", "stderr", "-p", str(site.place), "-c", str(site.place / "nginx.conf"))
    with site.served_by(*command):
        assert site.get().startswith(f"::ffff:{CLIENT} ")
        assert site.get(*CODE, paths=["/big"]) == "200"
        assert site.get(*CODE, "--interface", "127.0.0.8", paths=["/big"]) == "403"


HAPROXY = """
    global
        log stdout format raw local0
    defaults
        mode http
        timeout client 10s
        log global
        log-format "saw %ci, and sent %ST"
    frontend tls
        bind unix@HOST/handoff-socket ssl crt PLACE/pem
        http-request deny if { src 127.0.0.9 } { path /private }
        http-request return status 200 content-type text/plain lf-string "%[src] to %[dst]\\n"
"""


@needs("haproxy", "haproxy")
def test_haproxy(site: Site) -> None:
    (site.place / "haproxy.cfg").write_text(site.filled_in(HAPROXY))
    with site.served_by("haproxy", "-f", str(site.place / "haproxy.cfg")):
        assert site.get() == f"{CLIENT} to 127.0.0.1\n"
        # Its rules know the address, too.
        assert site.get(*CODE, paths=["/private"]) == "403"
        assert site.get(*CODE, paths=["/public"]) == "200"
        wanted = {f"saw {CLIENT}, and sent {sent}" for sent in (200, 403)}
        eventually(lambda: wanted <= set(site.output().splitlines()))


@needs("haproxy", "haproxy")
def test_the_same_for_haproxy(site_for_both: Site) -> None:
    site = site_for_both
    (site.place / "haproxy.cfg").write_text(site.filled_in(HAPROXY))
    with site.served_by("haproxy", "-f", str(site.place / "haproxy.cfg")):
        assert site.get() == f"::ffff:{CLIENT} to ::ffff:127.0.0.1\n"
        assert site.get(*CODE, paths=["/private"]) == "403"
        assert site.get(*CODE, "--interface", "127.0.0.8", paths=["/private"]) == "200"


PYTHON = """
import asyncio, os, socket, socketserver, ssl, sys

way, host, pem = sys.argv[1:]
path = f"{host}/handoff-socket"
tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
tls.load_cert_chain(pem)


def answer(peer, connection):
    # What servers set for clients of TCP, and not for what they take for a Unix socket.
    set = [
        bool(connection.getsockopt(level, option))
        for level, option in [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        ]
    ]
    body = f"{peer[0]} {set}".encode()
    return b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def finish_request(self, connection, peer):
        with tls.wrap_socket(connection, server_side=True) as stream:
            stream.recv(10_000)
            stream.sendall(answer(peer, connection=stream))


async def serve():
    async def finish_request(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        peer, connection = map(writer.get_extra_info, ["peername", "socket"])
        writer.write(answer(peer, connection))
        writer.close()

    await (await asyncio.start_unix_server(finish_request, path, ssl=tls)).serve_forever()


if way == "asyncio":
    asyncio.run(serve())
with Server(path, None) as server:
    server.serve_forever()
"""


@pytest.mark.parametrize("way", ["socketserver", "asyncio"])
def test_python(site: Site, way: str) -> None:
    (site.place / "server.py").write_text(PYTHON)
    program = (sys.executable, site.place / "server.py")
    with site.served_by(*map(str, program), way, str(site.host), str(site.pem)):
        assert site.get() == f"{CLIENT} [True, True]"


CADDY = """
{
    admin off
    auto_https off
    storage file_system PLACE
}
https://a.example {
    bind unix/HOST/handoff-socket
    tls PLACE/pem PLACE/pem
    respond "caddy"
}
"""


@needs("caddy", "caddy")
def test_a_program_in_go_does_not_notice_it(site: Site) -> None:
    """It asks the kernel without the C library. So it gets a Unix socket: one byte, and an end."""
    (site.place / "Caddyfile").write_text(site.filled_in(CADDY))
    command = ("caddy", "run", "--config", str(site.place / "Caddyfile"))
    with site.served_by(*command) as caddy:
        # It is there, which is of no use.
        assert "sniproxy-handoff.so" in Path(f"/proc/{caddy.pid}/maps").read_text()
        outcome = site.try_to_get()
        assert outcome.returncode == 35, outcome.stderr  # in the handshake
    # What is said to do instead.
    (site.place / "Caddyfile").write_text(
        site.filled_in(CADDY).replace("handoff-socket", "tls-socket")
    )
    with site.served_by(*command, at="tls-socket"):
        assert site.get() == "caddy"


def test_where_the_library_is_missing_the_server_says_so(site: Site) -> None:
    site.library = site.place / "missing.so"
    (site.place / "server.py").write_text(PYTHON)
    program = (sys.executable, site.place / "server.py")
    with site.served_by(*map(str, program), "asyncio", str(site.host), str(site.pem)):
        assert site.try_to_get().returncode == 35
        assert "missing.so' from LD_PRELOAD cannot be preloaded" in site.output()
