"""Clients who are kept while the backend of their host is away, at the running daemon."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import UnixServer, host_directory, listen_unix
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask
from tests.support.sockets import receive_all, receive_exactly, reset

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)


@pytest.fixture
def home(hosts: Path) -> Path:
    """The directory of a host that is held for longer than a test takes."""
    home = host_directory(hosts, NAME)
    (home / "hold").write_text("300\n")
    return home


@pytest.fixture(params=["1", "2"])
def any_daemon(hosts: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with start_daemon(hosts, "--workers", request.param) as daemon:
        yield daemon


def open_connections(daemon: Daemon) -> int:
    before = len(daemon.log())
    daemon.signal(signal.SIGUSR1)
    eventually(lambda: any(" status " in line for line in daemon.log()[before:]))
    [line] = [line for line in daemon.log()[before:] if " status " in line]
    return int(line.split("open=")[1].split()[0])


def held(daemon: Daemon) -> socket.socket:
    """Return a client who asks for the host, and is held."""
    before = open_connections(daemon)
    client = daemon.connect()
    client.sendall(HELLO)
    eventually(lambda: open_connections(daemon) == before + 1)
    return client


def answer(listening: socket.socket, word: bytes = b"word") -> bytes:
    """Answer one connection; return what it said before."""
    connection, _ = listening.accept()
    with connection:
        connection.settimeout(PATIENCE)
        heard = receive_exactly(connection, len(HELLO))
        connection.sendall(word)
    return heard


@pytest.mark.parametrize("is_left_over", [False, True])
def test_a_backend_that_comes_back_finds_its_clients(
    daemon: Daemon, home: Path, is_left_over: bool
) -> None:
    path = home / "tls-socket"
    if is_left_over:
        listen_unix(path).close()
    clients = [held(daemon) for _ in range(5)]
    path.unlink(missing_ok=True)
    with listen_unix(path) as listening:
        assert [answer(listening) for _ in clients] == [HELLO] * 5
        for client in clients:
            with client:
                assert receive_all(client) == b"word"
    assert not any(" refused " in line for line in daemon.log())


def test_who_has_waited_long_enough_is_refused(daemon: Daemon, home: Path) -> None:
    (home / "hold").write_text("0.2")
    began = time.monotonic()
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert time.monotonic() - began > 0.2
    assert "reason=no_socket" in daemon.log()[-1]


def test_a_link_says_it_too(daemon: Daemon, home: Path, hosts: Path, tmp_path: Path) -> None:
    """And that of a host elsewhere, where no file may be read."""
    (home / "hold").unlink()
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    (home / "hold").symlink_to("0.1")
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "reason=no_socket" in daemon.log()[-1]


def test_to_take_it_away_ends_the_wait(daemon: Daemon, home: Path) -> None:
    with held(daemon) as client:
        (home / "hold").unlink()
        assert receive_all(client) == UNRECOGNIZED_NAME


def test_a_host_without_it_is_refused_at_once(daemon: Daemon, home: Path, hosts: Path) -> None:
    with held(daemon):
        host_directory(hosts, "b.example")
        assert ask(daemon, "b.example") == UNRECOGNIZED_NAME
        # What is wrong for good is not waited for.
        (home / "tls-socket").mkdir()
        other = host_directory(hosts, "c.example")
        (other / "hold").write_text("300")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind(str(other / "tls-socket"))
            assert ask(daemon, "c.example") == UNRECOGNIZED_NAME
        assert "reason=not_a_stream_socket" in daemon.log()[-1]


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_who_leaves_is_not_waited_for(daemon: Daemon, home: Path, leave) -> None:  # type: ignore[no-untyped-def]
    clients = [held(daemon) for _ in range(3)]
    for client in clients[1:]:
        leave(client)
    eventually(lambda: open_connections(daemon) == 1)
    assert sum("reason=client_closed" in line for line in daemon.log()) == 2
    with listen_unix(home / "tls-socket") as listening, clients[0] as first:
        answer(listening)
        assert receive_all(first) == b"word"
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_urgent_data_ends_the_wait(daemon: Daemon, home: Path) -> None:
    with held(daemon) as client:
        client.send(b"!", socket.MSG_OOB)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert "reason=urgent_data" in daemon.log()[-1]


def test_who_comes_in_pieces_is_held_as_well(daemon: Daemon, home: Path) -> None:
    with daemon.connect() as client:
        client.sendall(HELLO[:20])
        eventually(lambda: open_connections(daemon) == 1)
        client.sendall(HELLO[20:] + b"early")
        with listen_unix(home / "tls-socket") as listening:
            connection, _ = listening.accept()
            with connection:
                assert receive_exactly(connection, len(HELLO) + 5) == HELLO + b"early"
                connection.sendall(b"word")
            assert receive_all(client) == b"word"


def test_the_oldest_gives_way_to_who_can_be_served(hosts: Path, home: Path) -> None:
    with (
        start_daemon(hosts, "--max-connections", "2") as daemon,
        Greeter(host_directory(hosts, "b.example") / "tls-socket", b"word"),
    ):
        clients = [held(daemon) for _ in range(2)]
        assert ask(daemon, "b.example") == b"word"
        assert receive_all(clients[0]) == b""
        assert "reason=capacity" in daemon.log()[-1]
        for client in clients:
            client.close()


def test_a_newcomer_does_not_give_way_to_those_who_were_there_before(
    hosts: Path, home: Path
) -> None:
    with start_daemon(hosts, "--max-connections", "3") as daemon, ExitStack() as stack:
        clients = [stack.enter_context(held(daemon)) for _ in range(2)]
        newcomer = stack.enter_context(daemon.connect())  # its hello is on its way
        eventually(lambda: open_connections(daemon) == 3)
        stack.enter_context(daemon.connect())
        assert receive_all(clients[0]) == b""
        with Greeter(host_directory(hosts, "b.example") / "tls-socket", b"word"):
            newcomer.sendall(hellos.hello_bytes("b.example"))
            assert receive_all(newcomer) == b"word"


def test_a_drain_ends_the_wait(hosts: Path, home: Path) -> None:
    with start_daemon(hosts, "--drain", "0.2") as daemon, held(daemon) as client:
        daemon.signal(signal.SIGHUP)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert daemon.wait() == 0
        assert "cut=1" in daemon.log()[-1]


# --- A backend that goes while clients are in its queue


class Listener(UnixServer):
    """Answers with a word, and remembers what it has heard up to the end of the hello."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.heard: list[bytes] = []

    def serve(self, connection: socket.socket) -> None:
        with connection:
            heard = b""
            while not heard.endswith(HELLO):
                heard += connection.recv(1 << 16)
            self.heard.append(heard)
            connection.sendall(b"word")


@pytest.mark.parametrize("option", ["", "send-proxy-v1", "send-proxy-v2"])
def test_whom_a_backend_has_never_accepted_the_next_one_gets(
    any_daemon: Daemon, home: Path, option: str
) -> None:
    if option:
        (home / option).touch()
    path = home / "tls-socket"
    clients = []
    with listen_unix(path) as listening:
        for _ in range(20):
            client = any_daemon.connect()
            client.sendall(HELLO)
            clients.append(client)
        # They are in its queue, and their hellos with them.
        eventually(lambda: open_connections(any_daemon) == 20)
        waiting = listening.accept()[0]
    path.unlink()
    with Listener(path) as backend:
        waiting.close()
        for client in clients:
            with client:
                assert receive_all(client) == b"word"
    assert len(backend.heard) == 20
    assert all(heard.endswith(HELLO) for heard in backend.heard)
    begins = {"": HELLO[:3], "send-proxy-v1": b"PROXY ", "send-proxy-v2": b"\r\n\r\n"}[option]
    assert all(heard.startswith(begins) for heard in backend.heard)
    assert not any(" refused " in line for line in any_daemon.log())


def test_whoever_never_answers_is_not_asked_for_ever(daemon: Daemon, home: Path) -> None:
    """Three ends without a word are no accident; the client gets the third."""
    with listen_unix(home / "tls-socket") as listening, daemon.connect() as client:
        client.sendall(HELLO)
        for _ in range(3):
            connection, _ = listening.accept()
            assert receive_exactly(connection, len(HELLO)) == HELLO
            connection.close()
        assert receive_all(client) == b""
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_early_data_that_was_read_is_not_sent_twice(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "tls-socket") as listening, daemon.connect() as client:
        client.sendall(HELLO + b"early")
        connection, _ = listening.accept()
        assert receive_exactly(connection, len(HELLO) + 5) == HELLO + b"early"
        connection.close()
        assert receive_all(client) == b""
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_who_leaves_while_another_one_waits_is_let_go(daemon: Daemon, home: Path) -> None:
    """Only the first of them is looked for; the others hear of it."""
    path = home / "tls-socket"
    with ExitStack() as stack:
        listening = listen_unix(path)
        clients = [stack.enter_context(daemon.connect()) for _ in range(3)]
        for client in clients:
            client.sendall(HELLO)
        eventually(lambda: open_connections(daemon) == 3)
        path.unlink()
        listening.close()
        for client in clients[1:]:
            client.close()
        eventually(lambda: open_connections(daemon) == 1)


def test_the_seconds_begin_when_the_backend_goes(daemon: Daemon, home: Path) -> None:
    (home / "hold").write_text("1")
    path = home / "tls-socket"
    listening = listen_unix(path)
    with daemon.connect() as client:
        client.sendall(HELLO)
        time.sleep(1.2)  # in the queue of a server that is about to end
        path.unlink()
        listening.close()
        with Greeter(path, b"word"):
            assert receive_all(client) == b"word"


def test_after_an_answer_the_end_is_the_clients(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "tls-socket") as listening, daemon.connect() as client:
        client.sendall(HELLO)
        answer(listening, b"!")
        assert receive_all(client) == b"!"
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_all_that_comes_with_the_hello_arrives_once_and_in_order(
    daemon: Daemon, home: Path
) -> None:
    """Early data may be far more than is lent."""
    rest = bytes(range(256)) * 4000
    with listen_unix(home / "tls-socket") as listening, daemon.connect() as client:
        sender = threading.Thread(target=client.sendall, args=[HELLO + rest])
        sender.start()
        refused, _ = listening.accept()
        refused.recv(10)
        refused.close()  # with bytes unread: a reset
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(PATIENCE)
            assert receive_exactly(connection, len(HELLO)) == HELLO
            connection.sendall(b"!")
            assert client.recv(1) == b"!"
            assert receive_exactly(connection, len(rest)) == rest
        sender.join()


def test_a_client_who_ends_before_the_answer_still_gets_it(daemon: Daemon, home: Path) -> None:
    with listen_unix(home / "tls-socket") as listening, daemon.connect() as client:
        client.sendall(HELLO)
        client.shutdown(socket.SHUT_WR)
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(PATIENCE)
            assert receive_all(connection) == HELLO
            connection.sendall(b"word")
        assert receive_all(client) == b"word"


class Server:
    """A backend that answers as fast as it can, and leaves whoever is in its queue when it ends."""

    def __init__(self, path: Path) -> None:
        self.served = 0
        self._listening = listen_unix(path)
        self._listening.settimeout(0.01)
        self._is_over = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._is_over:
            try:
                connection, _ = self._listening.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(PATIENCE)
                receive_exactly(connection, len(HELLO))
                connection.sendall(b"word")
                self.served += 1

    def end(self) -> None:
        self._is_over = True
        self._thread.join()
        # Nobody accepts any more, and clients go on coming, as with a server that ends in order.
        time.sleep(0.05)
        self._listening.close()


def test_a_restart_under_load_loses_nobody(any_daemon: Daemon, home: Path) -> None:
    path = home / "tls-socket"
    answers: list[bytes] = []
    is_over = threading.Event()

    def visit() -> None:
        while not is_over.is_set():
            answers.append(ask(any_daemon, NAME))

    visitors = [threading.Thread(target=visit) for _ in range(8)]
    server = Server(path)
    served = 0
    for visitor in visitors:
        visitor.start()
    try:
        for _ in range(5):
            time.sleep(0.1)
            server.end()
            time.sleep(0.1)  # the old socket is there, and nobody listens
            path.unlink()
            time.sleep(0.1)  # nothing is there
            served += server.served
            server = Server(path)
    finally:
        is_over.set()
        for visitor in visitors:
            visitor.join()
        server.end()
    assert set(answers) == {b"word"}
    assert len(answers) == served + server.served


def test_a_hundred_held_hosts_are_in_nobodys_way(daemon: Daemon, hosts: Path) -> None:
    with ExitStack() as stack:
        clients = {}
        for number in range(100):
            name = f"host{number}.example"
            (host_directory(hosts, name) / "hold").write_text("300")
            clients[name] = stack.enter_context(daemon.connect())
            clients[name].sendall(hellos.hello_bytes(name))
        eventually(lambda: open_connections(daemon) == 100)
        with Greeter(host_directory(hosts, "b.example") / "tls-socket", b"word"):
            for _ in range(100):
                assert ask(daemon, "b.example") == b"word"
        # And each of them is still looked for.
        name = "host57.example"
        with Greeter(hosts / name / "tls-socket", b"there"):
            assert receive_all(clients[name]) == b"there"
