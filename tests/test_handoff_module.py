"""sniproxy/handoff.py: who is handed over is accepted, and all else that comes keeps nobody up."""

import asyncio
import contextlib
import errno
import os
import select
import selectors
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sniproxy import handoff
from tests.support.backends import listen_unix
from tests.support.handing_over import connect, hand_over, places_left, send
from tests.support.sockets import receive_all, receive_exactly, reset, tcp_pair, unix_pair

# sniproxy/handoff.py's.
SILENT = 64
AT_ONCE = 64

# A message carries no more, SCM_MAX_FD in unix(7).
MOST_DESCRIPTORS = 253

Loop = type[selectors.BaseSelector]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "handoff-socket"


@pytest.fixture
def listener(path: Path) -> Iterator[handoff.Listener]:
    """One that does not wait."""
    with handoff.listen(path) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors() -> dict[str, str]:
    """Return what is open here, and what it is."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found[entry] = os.readlink(f"/proc/self/fd/{entry}")
    return found


def is_ready(listener: handoff.Listener, timeout: float = 0) -> bool:
    """Whether a loop would be told that there is something to accept."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def is_empty(listener: handoff.Listener) -> bool:
    """Whether nobody can be accepted, and a loop would not be told that somebody can."""
    with pytest.raises(BlockingIOError) as raised:
        listener.accept()
    assert raised.value.errno == errno.EAGAIN
    return not is_ready(listener)


def hand_over_a_client(path: Path) -> socket.socket:
    client, near = tcp_pair()
    hand_over(path, near)
    return client


def is_accepted(listener: handoff.Listener, client: socket.socket) -> bool:
    """Whether it is the one that comes next."""
    with client:
        accepted, address = listener.accept()
        with accepted:
            return bool(address == client.getsockname())


# Who is handed over.


@pytest.mark.parametrize("timeout", [None, 5, 0])
def test_a_client_is_accepted(path: Path, timeout: float | None) -> None:
    client, near = tcp_pair()
    client.sendall(b"hello")
    with handoff.listen(path) as listener, client:
        listener.settimeout(timeout)
        hand_over(path, near)
        accepted, address = listener.accept()
        with accepted:
            assert type(accepted) is socket.socket
            assert address == client.getsockname() == accepted.getpeername()
            assert (accepted.family, accepted.type, accepted.proto) == (
                socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
            )
            assert not accepted.get_inheritable()
            assert accepted.gettimeout() is None
            assert os.get_blocking(accepted.fileno())
            assert accepted.recv(100) == b"hello"
            accepted.sendall(b"answer")
        assert receive_all(client) == b"answer"


def test_a_client_of_ipv6(listener: handoff.Listener, path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as door:
        client = socket.create_connection(door.getsockname()[:2])
        near, address = door.accept()
    hand_over(path, near)
    with client:
        accepted, found = listener.accept()
        with accepted:
            assert accepted.family == socket.AF_INET6
            assert found == address


def test_a_client_that_has_said_all_is_still_one(listener: handoff.Listener, path: Path) -> None:
    client, near = tcp_pair()
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    hand_over(path, near)
    with client:
        accepted, _ = listener.accept()
        with accepted:
            assert receive_all(accepted) == b"hello"


@pytest.mark.parametrize("default", [None, 7.5, 0.0])
def test_the_default_timeout_is_the_clients(path: Path, default: float | None) -> None:
    """Whatever the descriptor was like before."""
    client, near = tcp_pair()
    near.setblocking(False)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    try:
        with handoff.listen(path) as listener:
            assert listener.gettimeout() == default
            listener.setblocking(True)
            hand_over(path, near)
            accepted, _ = listener.accept()
    finally:
        socket.setdefaulttimeout(before)
    with client, accepted:
        assert accepted.gettimeout() == default
        assert os.get_blocking(accepted.fileno()) is (default is None)


def test_credentials_come_in_front(listener: handoff.Listener, path: Path) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with connect(path):
        assert is_empty(listener)
        assert is_accepted(listener, hand_over_a_client(path))


# The message comes after the connection.


def test_the_message_comes_later(listener: handoff.Listener, path: Path) -> None:
    client, near = tcp_pair()
    connection = connect(path)
    assert is_ready(listener)
    assert is_empty(listener)
    send(connection, near)
    assert is_ready(listener)
    assert is_accepted(listener, client)
    assert is_empty(listener)


@pytest.mark.parametrize("timeout", [None, 10])
def test_who_waits_gets_a_message_that_comes_later(path: Path, timeout: float | None) -> None:
    client, near = tcp_pair()
    with handoff.listen(path) as listener:
        listener.settimeout(timeout)
        connection = connect(path)
        late = threading.Timer(0.05, send, (connection, near))
        late.start()
        assert is_accepted(listener, client)
        late.join()


def test_messages_come_in_any_order(listener: handoff.Listener, path: Path) -> None:
    first, second = connect(path), connect(path)
    assert is_empty(listener)
    for connection in second, first:
        client, near = tcp_pair()
        send(connection, near)
        assert is_accepted(listener, client)


def test_nobody_comes_in_time(path: Path) -> None:
    with handoff.listen(path) as listener, connect(path):
        listener.settimeout(0.01)
        with pytest.raises(TimeoutError, match="timed out"):
            listener.accept()
        assert is_accepted(listener, hand_over_a_client(path))


# What is no client.


def nothing(_: Path) -> list[socket.socket | int]:
    return []


def a_pipe(_: Path) -> list[socket.socket | int]:
    reader, writer = os.pipe()
    os.close(writer)
    return [reader]


def a_directory(path: Path) -> list[socket.socket | int]:
    return [os.open(path.parent, os.O_RDONLY)]


def a_socket_that_can_not_be_used(path: Path) -> list[socket.socket | int]:
    return [os.open(path, os.O_PATH)]


def a_unix_socket(_: Path) -> list[socket.socket | int]:
    one, other = unix_pair()
    other.close()
    return [one]


def a_udp_socket(_: Path) -> list[socket.socket | int]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", 9))
    return [sock]


def a_netlink_socket(_: Path) -> list[socket.socket | int]:
    return [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)]


def a_socket_of_the_kernels_ciphers(_: Path) -> list[socket.socket | int]:
    """It has no name that could be asked for."""
    return [socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)]


def a_listening_socket(_: Path) -> list[socket.socket | int]:
    return [socket.create_server(("127.0.0.1", 0))]


def a_socket_without_a_connection(_: Path) -> list[socket.socket | int]:
    return [socket.socket(socket.AF_INET, socket.SOCK_STREAM)]


def a_client_that_is_gone(_: Path) -> list[socket.socket | int]:
    client, near = tcp_pair()
    reset(client)
    with contextlib.suppress(ConnectionResetError):
        near.recv(1)
    return [near]


def two_clients(_: Path) -> list[socket.socket | int]:
    (one, near), (other, far) = tcp_pair(), tcp_pair()
    one.close()
    other.close()
    return [near, far]


def a_client_and_a_pipe(path: Path) -> list[socket.socket | int]:
    client, near = tcp_pair()
    client.close()
    return [near, *a_pipe(path)]


def as_many_as_there_can_be(_: Path) -> list[socket.socket | int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(MOST_DESCRIPTORS)]


NO_CLIENTS = [
    nothing,
    a_pipe,
    a_directory,
    a_socket_that_can_not_be_used,
    a_unix_socket,
    a_udp_socket,
    a_netlink_socket,
    a_listening_socket,
    a_socket_without_a_connection,
    a_client_that_is_gone,
    two_clients,
    a_client_and_a_pipe,
    as_many_as_there_can_be,
]
with contextlib.suppress(OSError):  # not every kernel has it
    a_socket_of_the_kernels_ciphers(Path())[0].close()  # type: ignore[union-attr]
    NO_CLIENTS.append(a_socket_of_the_kernels_ciphers)


def send_no_client(path: Path, make: Callable[[Path], list[socket.socket | int]]) -> None:
    sent = make(path)
    hand_over(path, *sent)
    for descriptor in sent:
        if isinstance(descriptor, int):
            os.close(descriptor)


@pytest.mark.parametrize("timeout", [None, 0])
@pytest.mark.parametrize("make", NO_CLIENTS)
def test_what_is_no_client_is_dropped(
    path: Path, make: Callable[[Path], list[socket.socket | int]], timeout: float | None
) -> None:
    with handoff.listen(path) as listener:
        listener.settimeout(timeout)
        before = descriptors()
        send_no_client(path, make)
        client = hand_over_a_client(path)
        assert is_accepted(listener, client)
        assert descriptors() == before


def test_who_says_nothing_and_goes(listener: handoff.Listener, path: Path) -> None:
    connect(path).close()
    waits = connect(path)
    assert is_empty(listener)
    waits.close()
    assert is_ready(listener)
    assert is_empty(listener)


def test_bytes_are_no_client(listener: handoff.Listener, path: Path) -> None:
    with connect(path) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert is_empty(listener)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_connection_that_breaks(listener: handoff.Listener, path: Path) -> None:
    """One that was never accepted by its peer, of whom the kernel says so: unix(7), ECONNRESET."""
    waits = connect(path)
    assert is_empty(listener)
    [(_, peer)] = listener._silent.items()
    peer.sendall(b"x")
    waits.close()
    assert is_empty(listener)


def test_the_silent_keep_nobody_waiting(listener: handoff.Listener, path: Path) -> None:
    """And of more than some the oldest ones go."""
    silent = []
    for _ in range(SILENT + 3):
        silent.append(connect(path))
        assert is_empty(listener)
    assert is_accepted(listener, hand_over_a_client(path))
    for gone in silent[:3]:
        assert gone.recv(1) == b""
        gone.close()
    for late in silent[3:]:
        client, near = tcp_pair()
        send(late, near)
        assert is_accepted(listener, client)


def test_a_crowd_does_not_keep_a_loop_from_its_work(listener: handoff.Listener, path: Path) -> None:
    for _ in range(AT_ONCE):
        hand_over(path)
    client = hand_over_a_client(path)
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert is_ready(listener)
    assert is_accepted(listener, client)


def test_a_crowd_is_nobody_to_wait_for(path: Path) -> None:
    with handoff.listen(path) as listener:
        for _ in range(AT_ONCE + 1):
            hand_over(path)
        assert is_accepted(listener, hand_over_a_client(path))


@pytest.mark.parametrize("number", [1, 2])
def test_nobody_can_make_it_wait_until_all_is_sent(
    listener: handoff.Listener, path: Path, number: int
) -> None:
    """SO_LINGER, socket(7), has close(2) wait; here, for an hour, and this test with it."""
    pairs = [tcp_pair() for _ in range(number)]
    for _, near in pairs:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 3600))
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 16))
    hand_over(path, *[near for _, near in pairs])
    if number == 1:
        listener.accept()[0].close()
    assert is_empty(listener)
    for client, _ in pairs:
        client.close()


# No descriptors left.


def test_no_place_for_the_connection(listener: handoff.Listener, path: Path) -> None:
    client = hand_over_a_client(path)
    with places_left(0):
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files") as raised:
                listener.accept()
            assert raised.value.errno == errno.EMFILE
    assert is_accepted(listener, client)


def test_no_place_for_the_client(listener: handoff.Listener, path: Path) -> None:
    """It is not lost: nobody would tell the daemon."""
    client = hand_over_a_client(path)
    with places_left(1):
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files") as raised:
                listener.accept()
            assert raised.value.errno == errno.EMFILE
    assert is_ready(listener)
    assert is_accepted(listener, client)


def test_what_a_security_module_keeps_back_is_dropped(
    listener: handoff.Listener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the message comes truncated, as it does if there is no room for what it carries."""
    refused = hand_over_a_client(path)
    with monkeypatch.context() as patch:
        patch.setattr(handoff, "_ROOM", 0)
        assert is_empty(listener)
    with refused:
        assert refused.recv(1) == b""
    assert is_accepted(listener, hand_over_a_client(path))


# Several who accept.


def test_threads_share_a_listener(path: Path) -> None:
    taken = []

    def accept(listener: handoff.Listener) -> None:
        with contextlib.suppress(OSError):  # the end, as of any socket
            while True:
                client, address = listener.accept()
                taken.append(address)
                client.close()

    with handoff.listen(path) as listener:
        threads = [threading.Thread(target=accept, args=(listener,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        clients = []
        for _ in range(100):
            client, near = tcp_pair()
            clients.append(client)
            connection = connect(path)
            os.sched_yield()
            send(connection, near)
        for client in clients:
            assert client.recv(1) == b""
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    assert sorted(taken) == sorted(client.getsockname() for client in clients)
    for client in clients:
        client.close()


def test_another_one_was_quicker(listener: handoff.Listener) -> None:
    """Another process that took the connection, or another thread that hears the message."""
    door = socket.socket.fileno(listener)
    assert listener._hear(door, select.EPOLLIN, door) is None
    assert listener._hear(listener.fileno(), select.EPOLLIN, door) is None


def test_a_duplicate_knows_nothing_of_the_silent(listener: handoff.Listener, path: Path) -> None:
    waits = connect(path)
    assert is_empty(listener)
    with listener.dup() as other:
        other.setblocking(False)
        client, near = tcp_pair()
        send(waits, near)
        assert is_empty(other)
        assert is_accepted(listener, client)
        client = hand_over_a_client(path)
        assert is_ready(listener)
        assert is_accepted(other, client)
        assert is_empty(listener)


def test_after_fork(path: Path) -> None:
    """In a program of its own: a process of tests has threads."""
    script = f"""
import os, sys
from sniproxy import handoff
listener = handoff.listen({os.fspath(path)!r})
children = []
for _ in range(2):
    if not (pid := os.fork()):
        with listener.dup() as mine:
            client, _ = mine.accept()
            client.sendall(str(os.getpid()).encode())
        os._exit(0)
    children.append(pid)
print(*children, flush=True)
for pid in children:
    os.waitpid(pid, 0)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        children = program.stdout.readline().split()
        served = set()
        for _ in children:
            with hand_over_a_client(path) as client:
                served.add(receive_all(client))
    assert served == set(children)


# It is a socket.


def test_its_timeout(listener: handoff.Listener) -> None:
    for timeout, waits in (None, True), (2, True), (0, False):
        listener.settimeout(timeout)
        assert (listener.gettimeout(), listener.timeout, listener.getblocking()) == (
            timeout,
            timeout,
            waits,
        )
        assert not os.get_blocking(socket.socket.fileno(listener))
    with pytest.raises(ValueError, match="out of range"):
        listener.settimeout(-1)
    for waits in True, False:
        listener.setblocking(waits)
        assert listener.getblocking() is waits
        assert listener.gettimeout() == (None if waits else 0)


def test_it_ends(path: Path) -> None:
    with handoff.listen(path) as listener:
        listener.setblocking(False)
        waits = connect(path)
        assert is_empty(listener)
        assert listener.getsockname() == os.fspath(path)
    with waits:
        assert waits.recv(1) == b""
    assert listener.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        listener.accept()
    with pytest.raises(OSError, match="Bad file descriptor"):
        listener.dup()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        connect(path)


def test_the_socket_can_be_taken_out(path: Path) -> None:
    listener = handoff.listen(path)
    descriptor = listener.detach()
    assert listener.fileno() == -1
    with handoff.Listener(descriptor) as again:
        assert is_accepted(again, hand_over_a_client(path))


def test_one_that_was_passed(path: Path) -> None:
    with listen_unix(path) as passed:
        descriptor = os.dup(passed.fileno())
    os.set_inheritable(descriptor, True)
    with handoff.Listener(descriptor) as listener:
        assert not os.get_inheritable(descriptor)
        assert is_accepted(listener, hand_over_a_client(path))


@pytest.mark.parametrize("kind", ["TCP", "datagrams", "connected"])
def test_another_kind_of_socket_was_passed(path: Path, kind: str) -> None:
    if kind == "TCP":
        passed = socket.create_server(("127.0.0.1", 0))
    elif kind == "datagrams":
        passed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    else:
        passed, other = unix_pair()
        other.close()
    with passed:
        message = f"descriptor {passed.fileno()} is no listening Unix stream socket"
        with pytest.raises(ValueError, match=message):
            handoff.Listener(passed.fileno())
        assert passed.getblocking()
        os.fstat(passed.fileno())


def test_no_socket_was_passed() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="non-socket"):
        handoff.Listener(reader)
    os.close(reader)
    os.close(writer)


def test_no_place_for_a_duplicate(listener: handoff.Listener) -> None:
    """There is none for the epoll instance, when the socket has taken the last."""
    with places_left(1), pytest.raises(OSError, match="Too many open files"):
        listener.dup()


# The path.


def test_the_daemon_may_write_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        handoff.listen(path).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert os.umask(0o077) == 0o077
        handoff.listen(path, mode=0o660).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        os.umask(before)


def test_one_that_was_left_over_is_replaced(path: Path) -> None:
    handoff.listen(path).close()
    inode = path.stat().st_ino
    blocker = path.with_name("blocker")
    os.link(path, blocker)  # so that the number is not used again
    with handoff.listen(path) as listener:
        assert path.stat().st_ino != inode
        assert is_accepted(listener, hand_over_a_client(path))


def test_one_on_which_somebody_listens_is_not(path: Path) -> None:
    with handoff.listen(path, backlog=0) as listener:
        for _ in range(2):  # the second time its queue is full
            with pytest.raises(OSError, match="Address already in use"):
                handoff.listen(path)
        assert is_accepted_after_others(listener, path)


def is_accepted_after_others(listener: handoff.Listener, path: Path) -> bool:
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        listener.accept()
    return is_accepted(listener, hand_over_a_client(path))


def test_what_is_no_socket_stays(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(OSError, match="Address already in use"):
        handoff.listen(path)
    assert path.read_text() == "mine"


def test_a_link_stays(path: Path) -> None:
    path.symlink_to("elsewhere")
    handoff_elsewhere = path.with_name("elsewhere")
    handoff.listen(handoff_elsewhere).close()
    with pytest.raises(OSError, match="Address already in use"):
        handoff.listen(path)
    assert path.is_symlink()


def test_there_is_no_such_directory(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        handoff.listen(path / "x")


def test_it_vanishes_while_it_is_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handoff.listen(path).close()
    is_abandoned = handoff._is_abandoned

    def look(where: str) -> bool:
        found = is_abandoned(where)
        path.unlink()
        return found

    monkeypatch.setattr(handoff, "_is_abandoned", look)
    with handoff.listen(path) as listener:
        assert is_accepted(listener, hand_over_a_client(path))


# Servers of the standard library.


@pytest.mark.parametrize(
    "kind", [selectors.EpollSelector, selectors.PollSelector, selectors.SelectSelector]
)
def test_asyncio(path: Path, kind: Loop) -> None:
    """With somebody silent before, garbage between, and messages that come late."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port, *_ = writer.get_extra_info("peername")
        writer.write(f"{host} {port} ".encode() + await reader.readexactly(5))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def main() -> list[bytes]:
        with connect(path), handoff_clients(path, 20) as clients:
            server = await asyncio.start_server(serve, sock=listener)
            answers = await asyncio.gather(
                *(asyncio.to_thread(receive_all, client) for client in clients)
            )
            server.close()
            await server.wait_closed()
            return answers

    with handoff.listen(path) as listener:
        loop = asyncio.SelectorEventLoop(kind())
        with asyncio.Runner(loop_factory=lambda: loop, debug=True) as runner:
            for answer in runner.run(main()):
                assert answer.endswith(b" hello"), answer


@contextlib.contextmanager
def handoff_clients(path: Path, number: int) -> Iterator[list[socket.socket]]:
    """Have clients handed over, some of them late, and garbage between them."""
    clients, late = [], []
    for turn in range(number):
        client, near = tcp_pair()
        client.sendall(b"hello")
        clients.append(client)
        connection = connect(path)
        if turn % 3 == 0:
            late.append((connection, near))
        else:
            send(connection, near)
        send_no_client(path, NO_CLIENTS[turn % len(NO_CLIENTS)])

    def send_late() -> None:
        for connection, near in late:
            send(connection, near)

    later = threading.Timer(0.05, send_late)
    later.start()
    try:
        yield clients
    finally:
        later.join()
        for client in clients:
            client.close()


def test_asyncio_accepts_one(listener: handoff.Listener, path: Path) -> None:
    async def main() -> Any:
        accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
        await asyncio.sleep(0)
        client, near = tcp_pair()
        with connect(path) as connection:
            await asyncio.sleep(0.01)
            send(connection, near)
            accepted, address = await accepting
        with accepted, client:
            assert accepted.gettimeout() == 0
            return address == client.getsockname()

    assert asyncio.run(main(), debug=True)


def test_socketserver(path: Path) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(
                f"{self.client_address}".encode() + receive_exactly(self.request, 5)
            )

    with socketserver.ThreadingTCPServer(("", 0), Handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = handoff.listen(path)
        server.socket.setblocking(False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with connect(path), handoff_clients(path, 20) as clients:
            for client in clients:
                assert receive_all(client) == f"{client.getsockname()}".encode() + b"hello"
        server.shutdown()
        thread.join()


# What it brings with it.


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    """It may be copied, and takes no time to import: nothing but the standard library is there."""
    copy = tmp_path / "handed_over.py"
    copy.write_bytes(Path(handoff.__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", copy], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    script = "import sys, sniproxy.handoff; print(*sorted(m for m in sys.modules if 'sni' in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["sniproxy", "sniproxy.handoff"]
