"""Clients who are handed over, at the running daemon: the backend gets the connection itself."""

import _socket
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sniproxy.hand_over import HandOver
from tests.support import hellos
from tests.support.backends import RawBackend, Server, host_directory, listen_unix
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask, hear
from tests.support.sockets import Noise, plain, receive_all, receive_exactly, tcp_pair, unix_pair

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)
IPPROTO_MPTCP = 262


@pytest.fixture(params=["1", "2"])
def daemon(hosts: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with handing_over(hosts, "--workers", request.param) as daemon:
        yield daemon


@pytest.fixture
def home(hosts: Path) -> Path:
    return host_directory(hosts, NAME)


def handing_over(hosts: Path, *options: str, under: tuple[str, ...] = ()) -> Daemon:
    # As another user it could not save what was measured.
    fixed = "--handoff", "--log", "connections"
    return start_daemon(hosts, *fixed, *options, under=under, measured="--user" not in options)


def take(listening: socket.socket) -> socket.socket:
    """Return the client that comes next."""
    while True:
        connection, _ = listening.accept()
        with connection:
            message, fds, _, _ = socket.recv_fds(connection, 2, 2)
            if message:
                break
            # One that could not be handed over, and was relayed or refused.
    assert message == b"\0"
    [fd] = fds
    assert os.get_blocking(fd)
    client = socket.socket(fileno=fd)
    client.settimeout(PATIENCE)
    return client


class Taker(Server):
    """Answers the hello of each client that is handed over with a word."""

    def __init__(self, path: Path, word: bytes = b"taken") -> None:
        super().__init__(listen_unix(path))
        self._word = word

    def serve(self, connection: socket.socket) -> None:
        with connection:
            _, [fd], _, _ = socket.recv_fds(connection, 1, 1)
        with socket.socket(fileno=fd) as client:
            client.settimeout(PATIENCE)
            hear(client)
            client.sendall(self._word)


def handed(daemon: Daemon, listening: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Return a client, and what the backend has got of it, when the hello has been read."""
    client = daemon.connect()
    client.sendall(HELLO)
    taken = take(listening)
    assert receive_exactly(taken, len(HELLO)) == HELLO
    return client, taken


def test_the_backend_speaks_to_the_client(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "handoff-socket") as listening:
        client = daemon.connect()
        client.sendall(HELLO + b"early")
        taken = take(listening)
    with client, taken:
        assert taken.getpeername() == client.getsockname()
        assert taken.getsockname() == client.getpeername() == daemon.address
        assert receive_exactly(taken, len(HELLO) + 5) == HELLO + b"early"
        taken.sendall(b"word")
        taken.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"word"
        client.sendall(b"more")
        client.close()
        assert receive_all(taken) == b"more"
    line = daemon.wait_for_log("ending=handed_over")
    assert "name=a.example up=0 down=0" in line


@pytest.mark.parametrize("sizes", [[1, 4, 100], [len(HELLO) - 1]])
def test_a_hello_in_pieces(daemon: Daemon, home: Path, sizes: list[int]) -> None:
    with listen_unix(home / "handoff-socket") as listening, daemon.connect() as client:
        for before, size in zip([0, *sizes], [*sizes, len(HELLO)], strict=True):
            client.sendall(HELLO[before:size])
            time.sleep(0.02)
        with take(listening) as taken:
            assert receive_exactly(taken, len(HELLO)) == HELLO
            is_as_accepted(taken)


def test_a_hello_in_pieces_leaves_the_socket_as_it_was(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "handoff-socket") as listening:
        client, taken = handed(daemon, listening)
    with client, taken:
        is_as_accepted(taken)


def is_as_accepted(taken: socket.socket) -> None:
    assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    for option in socket.SO_RCVTIMEO, socket.SO_SNDTIMEO:
        assert taken.getsockopt(socket.SOL_SOCKET, option, 16) == bytes(16)
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
    assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)


def test_what_follows_is_told_to_nobody_else(hosts: Path, home: Path) -> None:
    """A descriptor that somebody else has, too, stays in an epoll set when it is closed."""
    with (
        handing_over(hosts) as daemon,
        listen_unix(home / "handoff-socket") as listening,
        RawBackend(host_directory(hosts, "b.example") / "tls-socket") as backend,
        ExitStack() as stack,
    ):
        given = []
        for _ in range(20):
            client = stack.enter_context(daemon.connect())
            client.sendall(HELLO[:9])  # so the daemon has to wait for the rest
            given.append(client)
        time.sleep(0.1)
        taken = []
        for client in given:
            client.sendall(HELLO[9:])
            taken.append(stack.enter_context(take(listening)))
        eventually(lambda: sum("handed_over" in line for line in daemon.log()) == len(given))
        # These get the same numbers in the daemon.
        other = hellos.hello_bytes("b.example")
        pairs = []
        for _ in given:
            visitor = stack.enter_context(daemon.connect())
            visitor.sendall(other)
            connection = stack.enter_context(backend.accept())
            assert receive_exactly(connection, len(other)) == other
            pairs.append((visitor, connection))
        for client in given:
            client.send(b"!", socket.MSG_OOB)  # what ends a connection that is relayed
            client.close()
        for visitor, connection in pairs:
            connection.sendall(b"word")
            assert receive_exactly(visitor, 4) == b"word"


def test_nothing_of_it_is_left(hosts: Path, home: Path) -> None:
    with handing_over(hosts) as daemon, listen_unix(home / "handoff-socket") as listening:
        for pair in handed(daemon, listening):
            pair.close()
        daemon.wait_for_log("ending=handed_over")
        before = daemon.descriptors()
        with ExitStack() as stack:
            for _ in range(10):
                for each in handed(daemon, listening):
                    stack.enter_context(each)
            eventually(lambda: daemon.descriptors() == before)


def open_counts(daemon: Daemon) -> str:
    before = len(daemon.log())
    daemon.signal(signal.SIGUSR1)
    eventually(lambda: any(" status " in line for line in daemon.log()[before:]))
    return next(line for line in daemon.log()[before:] if " status " in line)


def test_it_is_counted_as_served(hosts: Path, home: Path) -> None:
    with handing_over(hosts) as daemon, listen_unix(home / "handoff-socket") as listening:
        client, taken = handed(daemon, listening)
        with client, taken:
            assert open_counts(daemon).endswith("open=0 served=1 refused=0")


@pytest.mark.parametrize("order", [signal.SIGHUP, signal.SIGKILL])
def test_a_download_goes_on_without_the_daemon(
    hosts: Path, home: Path, order: signal.Signals
) -> None:
    noise = b"".join(Noise(b"film").blocks(1 << 20))
    with listen_unix(home / "handoff-socket") as listening:
        with handing_over(hosts) as daemon:
            client, taken = handed(daemon, listening)
            taken.sendall(noise[:1000])
            assert receive_exactly(client, 1000) == noise[:1000]
            began = time.monotonic()
            daemon.signal(order)
            daemon.wait()
            assert time.monotonic() - began < 5  # a drain waits for ten seconds
        with client, taken, handing_over(hosts):
            client.sendall(b"go on")
            assert receive_exactly(taken, 5) == b"go on"
            taken.settimeout(None)
            pid = os.fork()
            if not pid:
                taken.sendall(noise[1000:])
                os._exit(0)
            assert receive_exactly(client, len(noise) - 1000) == noise[1000:]
            os.waitpid(pid, 0)


# --- Which of the two sockets it is


def test_without_the_option_there_is_no_such_socket(hosts: Path, home: Path) -> None:
    with (
        start_daemon(hosts) as daemon,
        Greeter(home / "tls-socket", b"word"),
        Taker(home / "handoff-socket"),
    ):
        assert ask(daemon, NAME) == b"word"
        (home / "tls-socket").rename(home / "other")
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
        assert "a.example/tls-socket" in daemon.log()[-1]
        (home / "other").rename(home / "tls-socket")


def test_who_has_both_is_handed_over(daemon: Daemon, home: Path) -> None:
    with Greeter(home / "tls-socket", b"relayed"):
        assert ask(daemon, NAME) == b"relayed"
        with Taker(home / "handoff-socket"):
            assert ask(daemon, NAME) == b"taken"
        (home / "handoff-socket").unlink()
        assert ask(daemon, NAME) == b"relayed"


def left_over(path: Path) -> None:
    listen_unix(path).close()


def a_file(path: Path) -> None:
    path.touch()


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def looping(path: Path) -> None:
    path.symlink_to(path.name)


BROKEN = {
    left_over: "not_listening",
    a_file: "not_listening",
    looping: "link_loop",
}


@pytest.mark.parametrize("spoil", [*BROKEN, dangling])
def test_what_is_wrong_with_it_is_not_in_the_way(daemon: Daemon, home: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    spoil(home / "handoff-socket")
    (home / "send-proxy-v1").touch()
    with Greeter(home / "tls-socket", b"word") as greeter:
        assert ask(daemon, NAME) == b"word"
    assert greeter.heard[0].startswith(b"PROXY TCP4 127.0.0.1 ")


@pytest.mark.parametrize("spoil", BROKEN)
def test_what_is_wrong_is_told_if_there_is_no_other(daemon: Daemon, home: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    spoil(home / "handoff-socket")
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    line = daemon.wait_for_log(f"reason={BROKEN[spoil]}")
    assert "a.example/handoff-socket" in line


def test_a_dangling_link_is_none(daemon: Daemon, home: Path) -> None:
    dangling(home / "handoff-socket")
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "a.example/tls-socket" in daemon.wait_for_log("reason=no_socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as two users")
def test_it_has_to_belong_to_the_owner_of_the_directory(daemon: Daemon, home: Path) -> None:
    os.chown(home, 1000, 1000)
    with listen_unix(home / "handoff-socket", uid=1001) as listening:
        (home / "handoff-socket").chmod(0o666)
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
        assert "uid 1000, the listener to uid 1001" in daemon.wait_for_log("reason=wrong_owner")
        with Greeter(home / "tls-socket", b"word", uid=1000):
            assert ask(daemon, NAME) == b"word"
        # It was connected to, to see whose it is, and got nothing.
        connection, _ = listening.accept()
        assert socket.recv_fds(connection, 2, 2)[:2] == (b"", [])
        connection.close()
    (home / "handoff-socket").unlink()
    with listen_unix(home / "handoff-socket", uid=1000) as listening:
        for pair in handed(daemon, listening):
            pair.close()


def test_a_full_backlog_is_not_in_the_way(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "handoff-socket", backlog=0), ExitStack() as stack:
        first = stack.enter_context(daemon.connect())
        first.sendall(HELLO)
        daemon.wait_for_log("ending=handed_over")
        with Greeter(home / "tls-socket", b"word"):
            assert ask(daemon, NAME) == b"word"


def test_a_full_backlog_is_waited_for_if_there_is_no_other(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "handoff-socket", backlog=0) as listening, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(daemon.connect()).sendall(HELLO)
        for _ in range(3):
            take(listening).close()


def test_a_backend_that_is_away_is_waited_for(daemon: Daemon, home: Path) -> None:
    (home / "hold").write_text("300")
    left_over(home / "handoff-socket")
    with ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(4)]
        for client in clients:
            client.sendall(HELLO)
        (home / "handoff-socket").unlink()
        with listen_unix(home / "handoff-socket") as listening:
            for _ in clients:
                with take(listening) as taken:
                    assert receive_exactly(taken, len(HELLO)) == HELLO
                    is_as_accepted(taken)
                    taken.sendall(b"word")
            for client in clients:
                assert receive_all(client) == b"word"


def test_default_hosts_are_handed_over_too(daemon: Daemon, hosts: Path) -> None:
    with Taker(host_directory(hosts, "_unknown") / "handoff-socket"):
        assert ask(daemon, "nobody.example") == b"taken"


# --- What can't be delivered


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_too_many_are_on_their_way(hosts: Path, home: Path) -> None:
    """As many descriptors may be in queues as a process may have: ETOOMANYREFS in sendmsg(2)."""
    hosts.parent.chmod(0o755)
    with (
        listen_unix(home / "handoff-socket") as listening,
        handing_over(hosts, "--user", "61000:61000", under=("prlimit", "--nofile=64")) as daemon,
        ExitStack() as stack,
    ):
        (home / "handoff-socket").chmod(0o666)
        while "reason=backend_failed" not in "".join(daemon.log()):
            before = len(daemon.log())
            stack.enter_context(daemon.connect()).sendall(HELLO)
            eventually(lambda before=before: len(daemon.log()) > before)  # type: ignore[misc]
        assert "handoff-socket" in daemon.log()[-1]
        assert "Too many references" in daemon.log()[-1]
        with Greeter(home / "tls-socket", b"word"):
            (home / "tls-socket").chmod(0o666)
            assert ask(daemon, NAME) == b"word"
        for line in daemon.log():
            if "ending=handed_over" in line:
                take(listening).close()
        client, taken = handed(daemon, listening)
        client.close()
        taken.close()


# --- A backend that would hold us up


def test_nobody_makes_our_close_wait() -> None:
    """SO_LINGER is of the socket, which the backend has, too; and the client may be its friend."""
    with ExitStack() as stack:

        def plain_tcp() -> tuple[socket.socket, _socket.socket]:
            client, accepted = tcp_pair()
            ours = plain(accepted)
            stack.callback(ours.close)
            return stack.enter_context(client), ours

        near, far = unix_pair()
        backend = plain(near)
        stack.callback(backend.close)
        stack.enter_context(far)
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        duplicate = plain(listening.dup())
        stack.callback(duplicate.close)
        hand_over = HandOver(duplicate)
        is_noticed = False
        while not is_noticed:  # the first time it might have been by chance
            _client, ours = plain_tcp()
            assert hand_over.give(ours, backend, owner=1000) is None
            with socket.socket(fileno=socket.recv_fds(far, 1, 1)[1][0]) as taken:
                taken.setblocking(False)
                with pytest.raises(BlockingIOError):
                    while True:
                        taken.send(bytes(1 << 16))  # the client does not read
                linger = struct.pack("ii", 1, 2 * int(PATIENCE))
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            began = time.monotonic()
            hand_over.close_each([hand_over.kept(ours, owner=1000)])
            assert time.monotonic() - began < PATIENCE
            _, ours = plain_tcp()
            is_noticed = hand_over.give(ours, backend, owner=1000) is not None
            if not is_noticed:
                os.close(socket.recv_fds(far, 1, 1)[1][0])
        # Hosts of that owner get nothing more for a while; those of others do.
        _, ours = plain_tcp()
        error = hand_over.give(ours, backend, owner=1000)
        assert error is not None
        assert error.errno == errno.EPERM
        assert hand_over.give(ours, backend, owner=1001) is None


# --- What does not go together


def start_with(listening: socket.socket, hosts: Path) -> tuple[int, list[str]]:
    with Daemon(listening, hosts, ("--handoff",)) as daemon:
        eventually(
            lambda: daemon.process.poll() is not None or " listening " in "".join(daemon.log()[1:])
        )
        code = daemon.process.poll()
        return -1 if code is None else code, daemon.log()


def test_nobody_else_is_to_listen_there(hosts: Path) -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        code, log = start_with(listening, hosts)
    assert code == 100
    assert "SO_REUSEPORT" in log[0]


def test_a_filter_that_somebody_has_locked(hosts: Path) -> None:
    so_lock_filter = 44
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, so_lock_filter, 1)
        code, log = start_with(listening, hosts)
    assert code == -1
    assert any(line.endswith(" handoff guarded=no") for line in log)


def test_multipath_tcp_is_not_handed_over(hosts: Path) -> None:
    try:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"this kernel has no Multipath TCP: {error.strerror}")
    with listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        code, log = start_with(listening, hosts)
    assert code == 100
    assert "Multipath TCP" in log[0]
