"""Several workers: who serves, who is replaced, who is told, and what the first process tells."""

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import trio_test

from sniproxy.service.notify import Counts, Notifier
from sniproxy.service.workers import SharedCounts, Worker, Workers
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.sockets import receive_all, receive_exactly
from tests.support.supervisor import Supervisor

NAME = "example.com"
HELLO = hellos.hello_bytes(NAME)
ORDERS = [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]

PROGRAM = [sys.executable, "-P", "-m", "sniproxy"]

Connection = tuple[socket.socket, socket.socket]


def status_of(pid: int) -> dict[str, str]:
    """Return /proc/PID/status, see proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def has_signals(pid: int, mask: str, numbers: list[signal.Signals]) -> bool:
    """Tell whether all of `numbers` are in the mask that /proc/PID/status calls `mask`."""
    bits = int(status_of(pid)[mask], 16)
    return all(bits & 1 << number - 1 for number in numbers)


def lines_with(daemon: Daemon, word: str) -> list[str]:
    return [line for line in daemon.log() if word in line.split()]


def wait_for_lines(daemon: Daemon, word: str, count: int) -> list[str]:
    eventually(lambda: len(lines_with(daemon, word)) >= count)
    lines = lines_with(daemon, word)
    assert len(lines) == count
    return lines


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        eventually(lambda pid=pid: status_of(pid)["State"].startswith("T"))  # type: ignore[misc]
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Service:
    """A daemon with workers that have all begun, a backend, and connections between them."""

    def __init__(self, daemon: Daemon, backend: RawBackend, stack: ExitStack) -> None:
        self.daemon = daemon
        self._backend = backend
        self._stack = stack

    def connect(self, pid: int | None = None) -> Connection:
        """Return a client and its backend, joined by the worker `pid` if it matters by whom."""
        others = [each for each in self.daemon.workers() if pid not in (None, each)]
        with stopped(*others):
            client = self._stack.enter_context(self.daemon.connect())
            client.sendall(HELLO)
            connection = self._stack.enter_context(self._backend.accept())
            assert receive_exactly(connection, len(HELLO)) == HELLO
        return client, connection

    def end(self, both: Connection) -> None:
        for end in both:
            end.shutdown(socket.SHUT_WR)
        for end in both:
            assert receive_all(end) == b""


@contextmanager
def service(
    hosts: Path, count: int = 2, environment: dict[str, str] | None = None
) -> Iterator[Service]:
    with (
        start_daemon(hosts, f"--workers={count}", env=environment) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
        ExitStack() as stack,
    ):
        wait_for_lines(daemon, "listening", count)
        yield Service(daemon, backend, stack)


@pytest.fixture
def two(hosts: Path) -> Iterator[Service]:
    """A service of two workers."""
    with service(hosts) as it:
        yield it


def check_alive(both: Connection) -> None:
    client, connection = both
    client.sendall(b"ping")
    assert receive_exactly(connection, 4) == b"ping"
    connection.sendall(b"pong")
    assert receive_exactly(client, 4) == b"pong"


def check_answers(daemon: Daemon) -> None:
    """Check that somebody has an alert, unexpected_message(10), for what is no hello."""
    with daemon.connect() as client:
        client.sendall(b"x")
        assert receive_all(client) == bytes([21, 3, 3, 0, 2, 2, 10])


def check_reset(both: Connection) -> None:
    client, connection = both
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert connection.recv(1) == b""


def check_refused(daemon: Daemon) -> None:
    """Check that the port is closed, or will be in a moment."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            daemon.connect().close()
        except ConnectionResetError:
            pass  # it was half open when the port closed
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline, "the port stays open"


def replace(daemon: Daemon, pid: int) -> int:
    """Kill a worker, wait until another has begun in its place, and return that one."""
    before = set(daemon.workers())
    begun = len(lines_with(daemon, "listening"))
    os.kill(pid, signal.SIGKILL)
    wait_for_lines(daemon, "listening", begun + 1)
    [new] = set(daemon.workers()) - before
    return new


# Serving


def test_many_connections_at_once_are_served(two: Service) -> None:
    connections = [two.connect() for _ in range(60)]
    assert len(two.daemon.workers()) == 2
    for both in connections:
        check_alive(both)
    for both in connections:
        two.end(both)


def test_each_worker_serves(two: Service) -> None:
    connections = {pid: two.connect(pid) for pid in two.daemon.workers()}
    assert len(connections) == 2
    for pid, both in connections.items():
        with stopped(*(other for other in connections if other != pid)):
            check_alive(both)


def test_who_comes_while_a_worker_is_stuck_is_served_by_the_other(two: Service) -> None:
    for pid in two.daemon.workers():
        for _ in range(20):
            check_alive(two.connect(pid))


def test_every_line_of_the_log_says_of_which_worker_it_is(two: Service) -> None:
    first, second = two.daemon.workers()
    for other in first, second:
        with stopped(other):
            check_answers(two.daemon)
    for word in "listening", "refused":
        lines = wait_for_lines(two.daemon, word, 2)
        assert {line.split()[2] for line in lines} == {"worker=1", "worker=2"}
    two.daemon.signal(signal.SIGHUP)
    assert two.daemon.wait() == 0
    for word in "draining", "drained":
        lines = wait_for_lines(two.daemon, word, 2)
        assert {line.split()[2] for line in lines} == {"worker=1", "worker=2"}


def test_one_worker_is_no_worker(hosts: Path) -> None:
    with service(hosts, 1) as it:
        check_alive(it.connect())
        assert it.daemon.workers() == []
        assert "worker=" not in "".join(it.daemon.log())


# Replacing


def test_a_worker_that_is_killed_is_replaced(two: Service) -> None:
    first, second = two.daemon.workers()
    lost, kept = two.connect(first), two.connect(second)
    new = replace(two.daemon, first)
    [line] = lines_with(two.daemon, "worker_died")
    assert line == f"sniproxy: worker_died worker=1 pid={first} cause=SIGKILL"
    assert "worker=1" in lines_with(two.daemon, "listening")[-1]
    # The kernel has closed what it held.
    with contextlib.suppress(ConnectionResetError):
        assert lost[0].recv(1) == b""
    assert lost[1].recv(1) == b""
    check_alive(kept)
    assert two.daemon.workers() == [second, new]
    check_alive(two.connect(new))
    check_alive(two.connect(second))


def test_all_workers_may_die_and_are_replaced(two: Service) -> None:
    old = two.daemon.workers()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    # Meanwhile the first process keeps the port open.
    check_answers(two.daemon)
    wait_for_lines(two.daemon, "listening", 4)
    died = wait_for_lines(two.daemon, "worker_died", 2)
    assert sorted(line.split()[2] for line in died) == ["worker=1", "worker=2"]
    assert not set(two.daemon.workers()) & set(old)


def test_a_worker_that_dies_young_is_replaced_after_a_second(two: Service) -> None:
    daemon = two.daemon
    new = replace(daemon, daemon.workers()[0])
    os.kill(new, signal.SIGKILL)
    wait_for_lines(daemon, "worker_died", 2)
    died = time.monotonic()
    wait_for_lines(daemon, "listening", 4)
    # What was seen late counts against us: a glance, and whoever had the processor instead.
    assert time.monotonic() - died > 0.8


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGXCPU, "SIGXCPU"),
        (signal.SIGQUIT, "SIGQUIT"),
        # It has no name in Python: of the real-time signals only the first and the last have one.
        (signal.SIGRTMIN + 3, str(signal.SIGRTMIN + 3)),
    ],
)
def test_the_log_says_what_a_worker_died_of(two: Service, number: int, cause: str) -> None:
    first, second = two.daemon.workers()
    os.kill(second, number)
    line = two.daemon.wait_for_log("worker_died")
    head = f"sniproxy: worker_died worker=2 pid={second} cause="
    assert line.startswith(head)
    assert cause in line.removeprefix(head)
    assert two.daemon.process.poll() is None
    check_alive(two.connect(first))


def test_a_child_that_is_no_worker_is_none(hosts: Path, tmp_path: Path) -> None:
    # Whose parent has become the daemon by exec.
    fifo, log = tmp_path / "fifo", tmp_path / "log"
    os.mkfifo(fifo)
    with log.open("w") as stderr, socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            ["sh", "-c", 'cat "$0" & exec "$@" --workers=2', str(fifo), *PROGRAM],
            stdin=listening.fileno(),
            stderr=stderr,
            cwd=hosts,
        )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        with fifo.open("w"):
            eventually(lambda: log.read_text().count("listening") == 2)
            assert len(children.read_text().split()) == 3
        eventually(lambda: len(children.read_text().split()) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert "worker_died" not in log.read_text()


def test_the_first_process_keeps_no_descriptor_of_the_dead(two: Service) -> None:
    daemon = two.daemon
    before = daemon.descriptors()
    for times in 1, 2:
        for pid in daemon.workers():
            os.kill(pid, signal.SIGKILL)
        wait_for_lines(daemon, "listening", 2 + 2 * times)
        assert daemon.descriptors() == before


# Orders


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_without_connections_all_end_at_once(two: Service, number: signal.Signals) -> None:
    two.daemon.signal(number)
    assert two.daemon.wait(timeout=2) == 0
    wait_for_lines(two.daemon, "cut=0", 2)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_drain_lasts_until_the_last_connection_of_any_worker(
    two: Service, number: signal.Signals
) -> None:
    daemon = two.daemon
    first, second = daemon.workers()
    ends_first, ends_last = two.connect(first), two.connect(second)
    daemon.signal(number)
    wait_for_lines(daemon, "draining", 2)
    check_refused(daemon)
    check_alive(ends_first)
    check_alive(ends_last)
    two.end(ends_first)
    # It ends, and nobody takes its place.
    eventually(lambda: daemon.workers() == [second])
    check_alive(ends_last)
    check_refused(daemon)
    assert daemon.process.poll() is None
    two.end(ends_last)
    assert daemon.wait(timeout=2) == 0
    wait_for_lines(daemon, "cut=0", 2)
    assert not lines_with(daemon, "worker_died")
    assert len(lines_with(daemon, "listening")) == 2


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT],
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGTERM, signal.SIGHUP],
        [signal.SIGTERM, signal.SIGINT],
    ],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_sigint_and_a_second_signal_cut(two: Service, numbers: list[signal.Signals]) -> None:
    daemon = two.daemon
    connections = [two.connect(pid) for pid in daemon.workers()]
    *drains, last = numbers
    for number in drains:
        daemon.signal(number)
        wait_for_lines(daemon, "draining", 2)
        for both in connections:
            check_alive(both)
    daemon.signal(last)
    assert daemon.wait(timeout=2) == 0
    wait_for_lines(daemon, "cut=1", 2)
    for both in connections:
        check_reset(both)


@pytest.mark.parametrize("number", ORDERS)
def test_a_signal_that_comes_before_the_workers_have_begun_is_not_lost(
    hosts: Path, number: signal.Signals
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Daemon(listening, hosts, ("--workers=8",)) as daemon,
    ):
        # Not "SigBlk": who starts a program, as imports may, blocks all signals for a moment.
        eventually(lambda: has_signals(daemon.process.pid, "SigCgt", ORDERS))
        daemon.signal(number)
        assert daemon.wait() == 0
        # Nobody is left to hold it.
        listening.close()
        check_refused(daemon)


@pytest.mark.parametrize("number", ORDERS)
def test_a_signal_that_comes_when_one_worker_has_begun_is_not_lost(
    hosts: Path, number: signal.Signals
) -> None:
    with start_daemon(hosts, "--workers=8") as daemon:
        daemon.signal(number)
        assert daemon.wait() == 0
        check_refused(daemon)


def test_a_drain_that_is_ordered_while_all_workers_are_dead_is_the_end(two: Service) -> None:
    for pid in two.daemon.workers():
        os.kill(pid, signal.SIGKILL)
    wait_for_lines(two.daemon, "worker_died", 2)
    # They were young, so that the next ones are still to come.
    two.daemon.signal(signal.SIGTERM)
    assert two.daemon.wait() == 0
    check_refused(two.daemon)


def test_who_dies_during_a_drain_is_not_replaced(two: Service) -> None:
    daemon = two.daemon
    first, second = daemon.workers()
    two.connect(first)
    both = two.connect(second)
    daemon.signal(signal.SIGTERM)
    wait_for_lines(daemon, "draining", 2)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: daemon.workers() == [second])
    check_alive(both)
    two.end(both)
    assert daemon.wait(timeout=2) == 0
    assert len(lines_with(daemon, "listening")) == 2


def test_workers_ignore_signals(two: Service) -> None:
    workers = two.daemon.workers()
    connections = [two.connect(pid) for pid in workers]
    for pid in workers:
        assert has_signals(pid, "SigIgn", ORDERS)
        assert int(status_of(pid)["SigBlk"], 16) == 0
        for number in ORDERS:
            os.kill(pid, number)
    for both in connections:
        check_alive(both)
    for pid in workers:
        check_alive(two.connect(pid))
    assert not lines_with(two.daemon, "draining")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_one_order(two: Service, number: signal.Signals) -> None:
    daemon = two.daemon
    workers = daemon.workers()
    connections = [two.connect(pid) for pid in workers]
    # As the kernel does, which knows no order among the members of a group.
    for pid in workers[0], daemon.process.pid, workers[1]:
        os.kill(pid, number)
    wait_for_lines(daemon, "draining", 2)
    for both in connections:
        check_alive(both)
    check_refused(daemon)
    for both in connections:
        two.end(both)
    assert daemon.wait(timeout=2) == 0
    wait_for_lines(daemon, "cut=0", 2)


def test_without_the_first_process_workers_drain_and_end(two: Service) -> None:
    daemon = two.daemon
    # One that was made later has seen more descriptors than the others.
    replace(daemon, daemon.workers()[0])
    workers = daemon.workers()
    with ExitStack() as stack:
        ended = {pid: os.pidfd_open(pid) for pid in workers}
        for pidfd in ended.values():
            stack.callback(os.close, pidfd)
            # Should they live for ever.
            stack.callback(signal_if_alive, pidfd, signal.SIGKILL)
        connections = {pid: two.connect(pid) for pid in workers}
        daemon.process.kill()
        assert daemon.wait() == -signal.SIGKILL
        wait_for_lines(daemon, "draining", 2)
        check_refused(daemon)
        for pid, both in connections.items():
            check_alive(both)
            two.end(both)
            assert select.select([ended[pid]], [], [], PATIENCE)[0]
    wait_for_lines(daemon, "cut=0", 2)


def signal_if_alive(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


# What the supervisor hears


def everything_said(supervisor: Supervisor) -> list[str]:
    supervisor.socket.setblocking(False)
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(supervisor.socket.recv(4096).decode())
    return said


def test_it_is_ready_when_all_workers_have_begun(hosts: Path, supervisor: Supervisor) -> None:
    with start_daemon(hosts, "--workers=8", env=supervisor.environment) as daemon:
        supervisor.hear("READY")
        assert len(lines_with(daemon, "listening")) == 8
        # Nothing that comes later makes it ready once more.
        replace(daemon, daemon.workers()[0])
        daemon.signal(signal.SIGTERM)
        supervisor.hear("STOPPING")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        said = everything_said(supervisor)
    assert "READY=1" not in said
    assert "STOPPING=1" not in said


def test_the_status_is_the_sum_and_forgets_nothing(hosts: Path, supervisor: Supervisor) -> None:
    with service(hosts, 2, supervisor.environment) as it:
        first, second = it.daemon.workers()
        connections = [it.connect(pid) for pid in (first, first, second)]
        check_answers(it.daemon)
        supervisor.hear("STATUS=3 open, 3 served, 1 refused")
        replace(it.daemon, first)
        supervisor.hear("STATUS=1 open, 3 served, 1 refused")
        it.end(connections.pop())
        supervisor.hear("STATUS=0 open, 3 served, 1 refused")


def test_a_drain_is_told(hosts: Path, supervisor: Supervisor) -> None:
    environment = supervisor.environment | {"WATCHDOG_USEC": "400000"}
    with service(hosts, 2, environment) as it:
        first, second = it.daemon.workers()
        ends_first, ends_last = it.connect(first), it.connect(second)
        supervisor.hear("READY")
        it.daemon.signal(signal.SIGHUP)
        assert supervisor.hear("STOPPING") == "STOPPING=1"
        it.end(ends_first)
        eventually(lambda: it.daemon.workers() == [second])
        everything_said(supervisor)
        supervisor.socket.settimeout(PATIENCE)
        # Who drains is alive, and who has ended is not missed.
        for _ in range(3):
            supervisor.hear("WATCHDOG")
        it.end(ends_last)
        assert it.daemon.wait() == 0


def test_the_watchdog_is_kept_quiet_in_time(hosts: Path, supervisor: Supervisor) -> None:
    environment = supervisor.environment | {"WATCHDOG_USEC": "400000"}
    with service(hosts, 2, environment):
        supervisor.hear("WATCHDOG")
        times = [time.monotonic()]
        for _ in range(9):
            assert supervisor.hear("WATCHDOG") == "WATCHDOG=1"
            times.append(time.monotonic())
    gaps = sorted(after - before for before, after in pairwise(times))
    # Most of them: a machine that is busy may be late now and then.
    assert gaps[len(gaps) // 2] < 0.4


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_is_stuck_is_noticed(hosts: Path, supervisor: Supervisor, which: int) -> None:
    environment = supervisor.environment | {"WATCHDOG_USEC": "400000"}
    with service(hosts, 2, environment) as it:
        supervisor.hear("WATCHDOG")
        with stopped(it.daemon.workers()[which]):
            supervisor.socket.settimeout(0.8)
            deadline = time.monotonic() + PATIENCE
            with pytest.raises(TimeoutError):
                while time.monotonic() < deadline:
                    supervisor.hear("WATCHDOG")
        supervisor.socket.settimeout(PATIENCE)
        supervisor.hear("WATCHDOG")


def test_workers_do_not_hold_the_supervisors_socket(hosts: Path, supervisor: Supervisor) -> None:
    with service(hosts, 2, supervisor.environment) as it:
        # One that was made first, and one that was made last.
        replace(it.daemon, it.daemon.workers()[0])
        of_all = [sockets_of(pid) for pid in (it.daemon.process.pid, *it.daemon.workers())]
        assert len(of_all) == 3
        assert len(of_all[0]) == 4  # the supervisor's, and for each worker one for its orders
        # What they share is where all of them listen.
        assert len(set.intersection(*of_all)) == 1
        for sockets in of_all[1:]:
            assert len(of_all[0] & sockets) == 1


def sockets_of(pid: int) -> set[str]:
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return {link for link in links if link.startswith("socket:")}


# --- Orders, seen from a worker


@trio_test
async def test_two_orders_at_once_are_both_heard() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = Worker(SharedCounts(1), 0, theirs, 1.0)
    for order in b"d", b"e":  # drain, and end
        ours.send(order)
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.receive)
        with trio.fail_after(PATIENCE):
            await worker.drain.wait()
            await worker.end.wait()
        nursery.cancel_scope.cancel()
    ours.close()


@trio_test
async def test_an_orphan_drains_and_reads_its_orders_no_more() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = Worker(SharedCounts(1), 0, theirs, 1.0)
    ours.close()
    with trio.fail_after(PATIENCE):
        await worker.receive()  # it returns: an end of file is readable for ever
    assert worker.drain.is_set()
    assert not worker.end.is_set()


NO_ORDERS = cast(socket.socket, None)


@trio_test
async def test_a_worker_writes_its_own_entry_at_once_and_at_its_end() -> None:
    shared = SharedCounts(3)
    counts = Counts(1, 2, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Worker(shared, 1, NO_ORDERS, 60.0).run, lambda: counts)
        await trio.testing.wait_all_tasks_blocked()
        assert [shared.has_entry(index) for index in range(3)] == [False, True, False]
        assert shared.read(1)[0] == counts
        counts = Counts(0, 4, 5)
        nursery.cancel_scope.cancel()
    assert [shared.has_entry(index) for index in range(3)] == [False, True, False]
    assert shared.read(1)[0] == counts


# --- Workers, seen from the first process


def workers_of_one() -> Workers:
    return Workers(1, Notifier({}), lambda *death: None, lambda counts: None)


def test_who_has_ended_is_counted_once_while_the_next_has_no_entry_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No process is made: the test is the worker."""
    workers = workers_of_one()
    pids = iter([1, 2])
    monkeypatch.setattr(os, "fork", lambda: next(pids))
    monkeypatch.setattr(os, "waitpid", lambda pid, options: (next(iter(workers._alive)), 0))
    workers._start(0)
    workers._shared.write(0, Counts(1, 3, 2))
    assert workers._counts() == Counts(1, 3, 2)
    workers._reap()
    assert workers._counts() == Counts(0, 3, 2)
    workers._start(0)
    assert workers._counts() == Counts(0, 3, 2)
    workers._reap()  # which closes the pipe


def test_a_fork_that_fails_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = workers_of_one()

    def fail() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        workers._start(0)
    assert os.listdir("/proc/self/fd") == before


def test_the_tests_do_without_signals_that_a_script_took_away() -> None:
    """As of a script that starts them with &, or of nohup(1)."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    command = (*pytest, __file__, "-k", "died_of and SIGQUIT")
    done = subprocess.run(
        ["sh", "-c", 'trap "" HUP INT QUIT; exec "$@"', "sh", *command],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert "1 passed" in done.stdout, done.stdout
