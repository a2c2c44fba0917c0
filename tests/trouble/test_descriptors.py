"""More clients than there is room for."""

import os
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.greeting import Greeter, ask
from tests.support.sockets import receive_all, receive_exactly

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)
FEW = ("prlimit", "--nofile=64")

# Seconds of processor time in a second of waiting; one that spins takes all of it.
IDLE = 0.2


def capacity(daemon: Daemon) -> int:
    line = daemon.wait_for_log("listening")
    return int(line.partition("capacity=")[2].split()[0])


def clients(stack: ExitStack, daemon: Daemon, number: int, hello: bytes) -> list[socket.socket]:
    """Return clients who have sent their hello, each before the next one connects."""
    found = []
    for _ in range(number):
        client = stack.enter_context(daemon.connect())
        client.sendall(hello)
        found.append(client)
    return found


def processor_seconds(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_it_rests(daemon: Daemon) -> None:
    before = processor_seconds(daemon)
    time.sleep(1)
    assert processor_seconds(daemon) - before < IDLE


def test_descriptors_run_out_and_all_150_clients_are_served(hosts: Path) -> None:
    number = 150
    with start_daemon(hosts, under=FEW) as daemon, ExitStack() as stack:
        before = daemon.descriptors()
        assert 10 < capacity(daemon) < 32
        backend = stack.enter_context(RawBackend(host_directory(hosts, NAME) / "tls-socket"))
        waiting = clients(stack, daemon, number, HELLO)
        # As many as there is room for are connected, and nobody hears anything yet.
        eventually(lambda: daemon.descriptors() >= before + 2 * capacity(daemon))
        check_it_rests(daemon)
        for _ in range(number):
            with backend.accept() as connection:
                assert receive_exactly(connection, len(HELLO)) == HELLO
                connection.sendall(b"served")
        assert {receive_all(client) for client in waiting} == {b"served"}
        eventually(lambda: daemon.descriptors() <= before)
        assert not [line for line in daemon.log() if "refused" in line or "exhausted" in line]


def test_silent_clients_do_not_lock_out_real_ones(hosts: Path) -> None:
    with start_daemon(hosts, under=FEW) as daemon, ExitStack() as stack:
        silent = clients(stack, daemon, 150, b"")
        with Greeter(host_directory(hosts, NAME) / "tls-socket", b"a"):
            began = time.monotonic()
            for _ in range(20):
                assert ask(daemon, NAME) == b"a"
            # Long before any deadline of those who say nothing.
            assert time.monotonic() - began < PATIENCE / 2
        # Those who came first had to go, with an end and no reset.
        assert silent[0].recv(1) == b""
        assert "refused" in daemon.wait_for_log("reason=capacity")


def test_a_client_that_waits_for_room_is_served_when_one_leaves(hosts: Path) -> None:
    with (
        start_daemon(hosts, "--max-connections", "2") as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
        ExitStack() as stack,
    ):
        assert capacity(daemon) == 2
        first, *_ = clients(stack, daemon, 3, HELLO)
        connections = [stack.enter_context(backend.accept()) for _ in range(2)]
        check_it_rests(daemon)
        connections[0].close()
        first.close()
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO


def test_workers_share_the_number(hosts: Path) -> None:
    with start_daemon(hosts, "--workers", "2", "--max-connections", "5") as daemon:
        assert capacity(daemon) == 2


def test_the_machine_has_nothing_left_although_there_should_be_room(hosts: Path) -> None:
    with (
        start_daemon(hosts) as daemon,
        Greeter(host_directory(hosts, NAME) / "tls-socket", b"a"),
        ExitStack() as stack,
    ):
        assert ask(daemon, NAME) == b"a"
        _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (1, hard))
        (client,) = clients(stack, daemon, 1, HELLO)
        assert "reason=" in daemon.wait_for_log("exhausted")
        check_it_rests(daemon)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert receive_all(client) == b"a"
        # Once is enough.
        assert sum("exhausted" in line for line in daemon.log()) == 1
