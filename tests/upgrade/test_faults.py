"""An upgrade that does not come to its end: either side ends, is silent, or refuses, at each step.

One side is a real daemon, and the other one is played here, by the letters of the protocol.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sniproxy.upgrade import letters
from sniproxy.upgrade.letters import (
    BATCH,
    DONE,
    END,
    GIVEN,
    HELLO,
    LISTEN,
    MOST_DESCRIPTORS,
    NEVER_MIND,
    READY,
    START,
    TAKEN,
    VERSION,
    YES,
    Letter,
    Message,
    Way,
)
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory, joined
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.sockets import receive_exactly

NAME = "a.example"
HELLO_BYTES = hellos.hello_bytes(NAME)

# What the new copy says, and what it hears then.
STEPS = [(READY, START), (YES, BATCH), (TAKEN, GIVEN)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "upgrade"


@pytest.fixture
def backend(hosts: Path) -> Iterator[RawBackend]:
    with RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend:
        yield backend


@pytest.fixture
def old(hosts: Path, path: Path) -> Iterator[Daemon]:
    with start_daemon(hosts, "--upgrade-socket", str(path)) as daemon:
        yield daemon


def hear(way: Way) -> Message:
    """Return the next message, whenever it comes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return way.receive()
        except BlockingIOError:
            assert time.monotonic() < deadline, "there is no answer"
            time.sleep(0.002)


@contextmanager
def new_copy(path: Path) -> Iterator[Way]:
    """Be a new copy that has got the sockets."""
    met = letters.meet(str(path))
    assert met is not None
    way, message = met
    message.close()
    try:
        yield way
    finally:
        way.close()


def go_to(way: Way, last: Letter) -> Message:
    """Go through the steps until the old copy says `last`."""
    for said, heard in STEPS:
        way.send(said)
        message = hear(way)
        assert message.letter == heard
        if heard == last:
            return message
        message.close()
    raise AssertionError(last)


def works(client: socket.socket, connection: socket.socket) -> None:
    """Make sure that bytes go both ways."""
    for one, other in (client, connection), (connection, client):
        one.sendall(b"word")
        assert receive_exactly(other, 4) == b"word"


def upgrades(hosts: Path, path: Path, old: Daemon) -> None:
    """Make sure that the next copy can take over."""
    with Daemon(None, hosts, ("--upgrade-socket", str(path))) as new:
        new.wait_for_log("taken_over")
        assert old.wait() == 0
        new.address = old.address
        new.connect().close()


@pytest.mark.parametrize("last", [LISTEN, START, BATCH])
@pytest.mark.parametrize("how", ["ends", "refuses"])
def test_the_new_copy_goes(
    old: Daemon, hosts: Path, path: Path, backend: RawBackend, last: Letter, how: str
) -> None:
    client, connection = joined(old, backend, HELLO_BYTES)
    with client, connection:
        with new_copy(path) as way:
            if last != LISTEN:
                go_to(way, last).close()
            if how == "refuses":
                way.send(NEVER_MIND, why="not today")
                assert hear(way).letter == NEVER_MIND
        line = old.wait_for_log("upgrade_failed")
        assert ("not today" if how == "refuses" else "has ended") in line
        works(client, connection)
        upgrades(hosts, path, old)


def test_the_new_copy_is_silent_with_a_batch(
    old: Daemon, hosts: Path, path: Path, backend: RawBackend
) -> None:
    client, connection = joined(old, backend, HELLO_BYTES)
    with client, connection, new_copy(path) as way:
        message = go_to(way, BATCH)
        client.sendall(b"meanwhile")
        assert receive_exactly(connection, 9) == b"meanwhile"
        old.wait_for_log("upgrade_failed")
        # It wakes up. What it has is not its own.
        with contextlib.suppress(BrokenPipeError):
            way.send(TAKEN)
        assert hear(way).letter == NEVER_MIND
        message.close()
        works(client, connection)
        way.close()
        upgrades(hosts, path, old)


def test_what_it_has_taken_goes_with_it(
    old: Daemon, hosts: Path, path: Path, backend: RawBackend
) -> None:
    with ExitStack() as stack:
        pairs = [joined(old, backend, HELLO_BYTES) for _ in range(2 * MOST_DESCRIPTORS // 3)]
        for pair in pairs:
            for each in pair:
                stack.enter_context(each)
        with new_copy(path) as way:
            first = go_to(way, BATCH)
            way.send(TAKEN)
            assert hear(way).letter == GIVEN
            second = hear(way)
            assert second.letter == BATCH
            taken = {socket.socket(fileno=os.dup(fd)) for fd in first.fds[1::2]}
            gone = set()
            for each in taken:
                with each:
                    gone.add(each.getpeername())
            first.close()
            second.close()
        old.wait_for_log("upgrade_failed")
        left = [pair for pair in pairs if pair[0].getsockname() not in gone]
        assert 0 < len(left) < len(pairs)
        for pair in left:
            works(*pair)
        for client, _ in pairs:
            if client.getsockname() in gone:
                assert client.recv(1) == b""
        upgrades(hosts, path, old)


@pytest.mark.parametrize("wrong", [READY, BATCH, GIVEN, Letter("?")])
def test_the_new_copy_says_what_it_should_not(
    old: Daemon, hosts: Path, path: Path, wrong: Letter
) -> None:
    with new_copy(path) as way:
        way.send(READY)
        assert hear(way).letter == START
        way.send(wrong)
        assert hear(way).letter == NEVER_MIND
    old.wait_for_log("upgrade_failed")
    upgrades(hosts, path, old)


@pytest.mark.parametrize(
    "data", [b"H", b"Hgarbage", b"H{}", b"H[]", b'H{"version": 99}', b"\xff\xff"]
)
def test_the_first_word_is_not_understood(
    old: Daemon, hosts: Path, path: Path, data: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect(str(path))
        stranger.send(data)
        assert stranger.recv(1000).startswith(b"X")
    old.wait_for_log("upgrade_failed")
    upgrades(hosts, path, old)


def test_another_version_is_told(hosts: Path, path: Path, old: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(str(path))
        other.send(b'H{"version": 99}')
        other.settimeout(PATIENCE)
        assert b"version 99 of the protocol is not %d" % VERSION in other.recv(1000)
    assert "version 99" in old.wait_for_log("upgrade_failed")


@pytest.mark.parametrize(
    ("options", "under"),
    [
        (("--unknown",), ()),
        (("--user", "nobody-of-that-name"), ()),
        (("--status-socket", "/nowhere/at/all"), ()),
        ((), ("prlimit", "--nofile=40")),
    ],
    ids=["option", "user", "directory", "descriptors"],
)
def test_a_copy_that_does_not_start(
    old: Daemon,
    hosts: Path,
    path: Path,
    backend: RawBackend,
    options: tuple[str, ...],
    under: tuple[str, ...],
) -> None:
    with ExitStack() as stack:
        pairs = [joined(old, backend, HELLO_BYTES) for _ in range(10)]
        for pair in pairs:
            for each in pair:
                stack.enter_context(each)
        with Daemon(None, hosts, ("--upgrade-socket", str(path), *options), under=under) as new:
            assert new.wait() in (100, 111)
            assert "fatal: " in new.log()[-1]
        for pair in pairs:
            works(*pair)
        if options != ("--unknown",):  # it has not asked
            old.wait_for_log("upgrade_failed")
        stack.close()
        upgrades(hosts, path, old)


def test_nobody_is_there_to_be_upgraded(hosts: Path, path: Path) -> None:
    with Daemon(None, hosts, ("--upgrade", str(path)), measured=False) as new:
        assert new.wait() == 111
        assert "nobody listens" in "".join(new.log())


def test_an_order_to_end_comes_amid_an_upgrade(
    old: Daemon, path: Path, backend: RawBackend
) -> None:
    client, connection = joined(old, backend, HELLO_BYTES)
    with client, connection, new_copy(path) as way:
        message = go_to(way, BATCH)
        old.signal(signal.SIGHUP)
        assert hear(way).letter == NEVER_MIND
        message.close()
        works(client, connection)
        client.close()
        connection.close()
        assert old.wait() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_stranger_gets_nothing(old: Daemon, path: Path, hosts: Path) -> None:
    path.chmod(0o666)  # or it could not even ask
    for directory in path.parents:
        if directory.stat().st_uid == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o711)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setresuid(61002, 61002, 61002)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.settimeout(PATIENCE)
                stranger.connect(str(path))
                stranger.send(b'H{"version": 1}')
                code = 0 if stranger.recv(1000) == b"" else 2
        except ConnectionError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    upgrades(hosts, path, old)


# --- The old copy is played


class Old:
    """An old copy with one connection."""

    def __init__(self, path: Path, hosts: Path) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.door = letters.listen(str(path))
        self.hosts = os.open(hosts, os.O_PATH)
        self.client, self.near = self._tcp_pair()
        self.far, self.backend = socket.socketpair()

    def _tcp_pair(self) -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection(self.listening.getsockname(), PATIENCE)
        return client, self.listening.accept()[0]

    def close(self) -> None:
        for each in self.listening, self.door, self.client, self.near, self.far, self.backend:
            each.close()
        os.close(self.hosts)

    def meet(self) -> Way:
        """Let the new copy in, and hear that it is ready."""
        self.door.settimeout(PATIENCE)
        way = None
        deadline = time.monotonic() + PATIENCE
        while way is None and time.monotonic() < deadline:
            way = letters.accept(self.door)
        assert way is not None
        assert hear(way).letter == HELLO
        facts = {"pid": os.getpid(), "arguments": [], "environment": {}, "status": None}
        facts["guardian"] = False
        fds = [self.listening.fileno(), self.door.fileno(), self.hosts, 2]
        way.send(LISTEN, fds, version=VERSION, facts=facts, workers=0)
        assert hear(way).letter == READY
        return way

    def give(self, way: Way) -> None:
        """Give the connection, of which nothing is under way."""
        way.send(START, open=1)
        assert hear(way).letter == YES
        flow = {"moved": 0, "swept": -1, "quiet": 0, "credit": 0, "ended": False, "over": None}
        flow |= {"pending": None, "piped": 0, "pipe": None}
        record = {"kind": "relayed", "fd": 0, "family": int(socket.AF_INET), "story": {}}
        memory = letters.write_memory([record | {"flows": [flow, flow]}])
        way.send(BATCH, [memory, self.near.fileno(), self.far.fileno()])
        os.close(memory)


@pytest.fixture
def played(path: Path, hosts: Path) -> Iterator[Old]:
    old = Old(path, hosts)
    yield old
    old.close()


@contextmanager
def real_new(hosts: Path, path: Path) -> Iterator[Daemon]:
    with Daemon(None, hosts, ("--upgrade-socket", str(path))) as new:
        yield new


@pytest.mark.parametrize("is_heard", [True, False])
def test_the_old_copy_dies_behind_a_batch(
    played: Old, hosts: Path, path: Path, is_heard: bool
) -> None:
    """What it has sent survives it, whether it has heard that that was taken or not."""
    with real_new(hosts, path) as new:
        way = played.meet()
        played.give(way)
        if is_heard:
            assert hear(way).letter == TAKEN
        played.near.close()
        played.far.close()
        way.close()
        assert "taken=1" in new.wait_for_log("taken_over")
        played.backend.settimeout(PATIENCE)
        works(played.client, played.backend)
        with socket.create_connection(played.listening.getsockname()):
            pass
        with new_copy(path) as another:
            another.send(READY)
            assert hear(another).letter == START


def test_the_old_copy_takes_a_batch_back(played: Old, hosts: Path, path: Path) -> None:
    with real_new(hosts, path) as new:
        way = played.meet()
        played.give(way)
        assert hear(way).letter == TAKEN
        way.send(NEVER_MIND, why="too late")
        assert "taken=0" in new.wait_for_log("taken_over")
        works(played.client, played.near)
        way.close()
        # It was given nothing, so there is nothing to stay for.
        assert new.wait() == 0


def test_the_old_copy_refuses_before_it_begins(played: Old, hosts: Path, path: Path) -> None:
    with real_new(hosts, path) as new:
        way = played.meet()
        way.send(NEVER_MIND, why="I was told to end")
        assert new.wait() == 111
        assert "I was told to end" in new.log()[-1]
        way.close()


def test_the_old_copy_dies_before_it_begins(played: Old, hosts: Path, path: Path) -> None:
    with real_new(hosts, path) as new:
        played.meet().close()
        assert "taken=0" in new.wait_for_log("taken_over")
        new.wait_for_log("listening")


def test_all_is_told_at_the_end(played: Old, hosts: Path, path: Path) -> None:
    with real_new(hosts, path) as new:
        way = played.meet()
        played.give(way)
        assert hear(way).letter == TAKEN
        played.near.close()
        played.far.close()
        way.send(GIVEN)
        counts = {"open": 0, "served": 40, "refused": 2}
        memory = letters.write_memory({"counts": counts, "figures": None})
        way.send(DONE, [memory], stays=False)
        os.close(memory)
        new.wait_for_log("taken_over")
        played.backend.settimeout(PATIENCE)
        works(played.client, played.backend)
        assert hear(way).letter == END
        way.close()
        new.wait_for_log("listening")
        new.signal(signal.SIGUSR1)
        assert "open=1 served=41 refused=2" in new.wait_for_log("status")
        played.client.close()
        played.backend.close()


def test_the_new_copy_is_asked_to_end_meanwhile(played: Old, hosts: Path, path: Path) -> None:
    with real_new(hosts, path) as new:
        way = played.meet()
        way.send(START, open=1)
        assert hear(way).letter == YES
        new.signal(signal.SIGTERM)
        message = hear(way)
        assert message.letter == NEVER_MIND
        assert "asked to end" in message.content["why"]
        way.close()
        assert new.wait() == 0
        works(played.client, played.near)


def is_stopped(daemon: Daemon) -> bool:
    """Tell whether SIGSTOP has reached it."""
    return " T " in Path(f"/proc/{daemon.process.pid}/stat").read_text()


def test_the_old_copy_dies_before_it_hears_yes(played: Old, hosts: Path, path: Path) -> None:
    """The new one can't say it any more, and is the only one there is."""
    with real_new(hosts, path) as new:
        way = played.meet()
        new.signal(signal.SIGSTOP)
        eventually(lambda: is_stopped(new))
        way.send(START, open=3)
        way.close()
        new.signal(signal.SIGCONT)
        assert "has died" in new.wait_for_log("taken_over")
        with new_copy(path) as another:
            another.send(READY)
            message = hear(another)
            assert message.letter == START
            assert message.content["open"] == 0
        new.wait_for_log("upgrade_failed")


@pytest.mark.parametrize("has_heard", [True, False])
def test_it_is_asked_to_end_while_it_waits_for_a_batch(
    played: Old, hosts: Path, path: Path, has_heard: bool
) -> None:
    """If the old one has heard that it was taken, nobody else has that connection."""
    with real_new(hosts, path) as new:
        way = played.meet()
        played.give(way)
        assert hear(way).letter == TAKEN
        new.signal(signal.SIGTERM)
        message = hear(way)
        assert message.letter == NEVER_MIND
        assert "asked to end" in message.content["why"]
        if has_heard:
            played.near.close()
            played.far.close()
            way.send(GIVEN)
        with contextlib.suppress(BrokenPipeError):
            way.send(NEVER_MIND, why="so be it")
        assert f"taken={int(has_heard)}" in new.wait_for_log("taken_over")
        played.backend.settimeout(PATIENCE)
        works(played.client, played.backend if has_heard else played.near)
        way.close()
        played.client.close()
        played.backend.close()
        assert new.wait() == 0


# --- Workers


def test_a_worker_dies_meanwhile(hosts: Path, path: Path) -> None:
    """Nobody takes its place before it is known whether the new copy goes on."""
    with start_daemon(hosts, "--upgrade-socket", str(path), "--workers", "2") as old:
        met = letters.meet(str(path))
        assert met is not None
        way, message = met
        assert message.content["workers"] == len(old.workers()) == 2
        os.kill(old.workers()[0], signal.SIGKILL)
        old.wait_for_log("worker_died")
        time.sleep(0.1)
        assert len(old.workers()) == 1
        message.close()
        way.close()
        old.wait_for_log("upgrade_failed")
        eventually(lambda: len(old.workers()) == 2)
        upgrades(hosts, path, old)


# --- One that stays


@pytest.mark.parametrize("workers", ["1", "2"])
def test_who_stays_passes_signals_on(hosts: Path, path: Path, workers: str) -> None:
    options = ("--stay", "--upgrade-socket", str(path), "--workers", workers)
    with start_daemon(hosts, *options) as first:
        copies = []
        for _ in range(2):
            new = Daemon(None, hosts, options)
            copies.append(new)
            new.wait_for_log("taken_over")
            new.wait_for_log("listening")
        with copies[1], copies[0]:
            # The one between has nobody who would miss it.
            assert copies[0].wait() == 0
            assert first.process.poll() is None
            first.signal(signal.SIGUSR1)
            copies[1].wait_for_log("status")
            first.signal(signal.SIGHUP)
            assert copies[1].wait() == 0
            assert first.wait() == 0


def test_without_who_stays_the_copy_drains(hosts: Path, path: Path) -> None:
    options = ("--stay", "--upgrade-socket", str(path))
    with start_daemon(hosts, *options) as first, Daemon(None, hosts, options) as new:
        new.wait_for_log("taken_over")
        first.signal(signal.SIGKILL)
        assert new.wait() == 0


def is_alive(pid: int) -> bool:
    """Tell whether a process is there that has not ended."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start it as somebody else")
def test_root_has_a_copy_take_over_that_is_no_more_than_the_old_one(
    hosts: Path, path: Path
) -> None:
    for directory in path.parents[:-1]:
        if directory.stat().st_uid == 0:
            directory.chmod(directory.stat().st_mode | 0o711)
    path.parent.chmod(0o777)
    user = ("setpriv", "--reuid=61003", "--regid=61003", "--clear-groups")
    if subprocess.run([*user, sys.executable, "-c", ""], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("others may not run this Python, which is in root's home")
    with start_daemon(hosts, "--upgrade-socket", str(path), under=user, measured=False) as old:
        with Daemon(None, hosts, ("--upgrade", str(path)), measured=False) as caller:
            assert caller.wait() == 0
        assert old.wait() == 0
        met = letters.meet(str(path), of_anybody=True)
        assert met is not None
        way, message = met
        pid = message.content["facts"]["pid"]
        message.close()
        way.close()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Uid:\t61003\t61003\t61003\t61003" in status
        assert "Gid:\t61003\t61003\t61003\t61003" in status
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_alive(pid))


def test_in_the_background(hosts: Path, path: Path) -> None:
    """It ends when the copy has all, which has the options and the hosts of the old one."""
    with (
        start_daemon(
            hosts, "--upgrade-socket", str(path), "--log", "connections", measured=False
        ) as old,
        Daemon(None, Path("/"), ("--upgrade", str(path)), measured=False) as caller,
    ):
        assert caller.wait() == 0
        # Nothing holds the terminal, or the pipe, of whoever has called.
        assert caller.log() == []
        assert old.wait() == 0
        with old.connect():
            pass
        eventually(lambda: "".join(old.log()).count(f"hosts={hosts}") == len((old, caller)))
        met = letters.meet(str(path))
        assert met is not None
        way, message = met
        assert message.content["facts"]["arguments"][-1] == "connections"
        message.close()
        way.close()
        pid = message.content["facts"]["pid"]
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: old.log()[-1].startswith("sniproxy: drained ") and not is_alive(pid))


def test_in_the_background_it_says_why_not(
    hosts: Path, path: Path, old: Daemon, backend: RawBackend
) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            for each in joined(old, backend, HELLO_BYTES):
                stack.enter_context(each)
        few = ("prlimit", "--nofile=40")
        with Daemon(None, hosts, ("--upgrade", str(path)), under=few, measured=False) as caller:
            assert caller.wait() == 111
            [line] = caller.log()
        assert line.startswith("sniproxy: fatal: unable to upgrade: unable to take over from")
        assert "10 connections are more than" in line
        assert old.process.poll() is None
