"""More clients than there are descriptors for."""

import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.bridge import PATIENCE, Bridge, Daemon, ask, bridge, connect, read_header
from tests.support.daemon import eventually
from tests.support.sockets import receive_exactly

OK = b"HTTP/1.1 200 "
FEW = ("prlimit", "--nofile=64")

# No more than wait in the queue of a socket as Python opens it, 128.
NUMBER = 120


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    with bridge(tmp_path) as made:
        yield made


def allow_descriptors(daemon: Daemon, number: int | None) -> None:
    """Limit the descriptors of a running program; None is as many as it had."""
    _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    soft = hard if number is None else number
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


def lowest_free(daemon: Daemon) -> int:
    """Return the number that the next descriptor will have."""
    taken = {int(each.name) for each in Path(f"/proc/{daemon.process.pid}/fd").iterdir()}
    return min(set(range(len(taken) + 1)) - taken)


def ask_at_once(
    ingress: Daemon, stopped: Daemon, stack: ExitStack, number: int = NUMBER
) -> list[socket.socket]:
    """Return clients who have all said CONNECT while a program did not run."""
    stopped.signal(signal.SIGSTOP)
    clients = []
    for _ in range(number):
        client = stack.enter_context(ingress.connect())
        client.sendall(connect())
        clients.append(client)
    stopped.signal(signal.SIGCONT)
    return clients


def check_served(client: socket.socket) -> None:
    assert read_header(client).startswith(OK)
    client.sendall(b"hello")
    assert receive_exactly(client, 5) == b"hello"


@pytest.mark.parametrize("who", ["ingress", "peer"])
def test_with_few_descriptors_all_are_served_one_after_the_other(it: Bridge, who: str) -> None:
    """At the peer, too, where a client that comes says what it wants after a handshake only."""
    peer = it.start_peer(under=FEW if who == "peer" else ())
    ingress = it.start_ingress(under=FEW if who == "ingress" else ())
    with ExitStack() as stack:
        waiting = set(ask_at_once(ingress, peer if who == "peer" else ingress, stack))
        while waiting:
            # In the order in which they are answered: who is served keeps others waiting.
            answered, _, _ = select.select(waiting, [], [], PATIENCE)
            assert answered
            for client in answered:
                check_served(client)
                client.close()
            waiting.difference_update(answered)
    for daemon in peer, ingress:
        assert not [line for line in daemon.log() if "refused" in line or "exhausted" in line]


@pytest.mark.parametrize("who", ["ingress", "peer"])
def test_who_dawdles_gives_way_after_a_second(it: Bridge, who: str) -> None:
    """They have all begun to say what they want, and nobody else can come in meanwhile."""
    limit = ("--max-connections", "5")
    peer = it.start_peer(*(limit if who == "peer" else ()))
    ingress = it.start_ingress(*(limit if who == "ingress" else ()))
    short, begin = (peer, b"\x16\x03\x01") if who == "peer" else (ingress, b"CONNECT ")
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(short.connect()).sendall(begin)
        began = time.monotonic()
        client, header = ask(ingress, connect())
        stack.enter_context(client)
        assert header.startswith(OK)
        # Five have had a second, and then five others.
        assert time.monotonic() - began > 1
    assert "refused" in short.wait_for_log("reason=capacity")


@pytest.mark.parametrize("who", ["ingress", "peer"])
def test_the_machine_has_no_descriptor_left(it: Bridge, who: str) -> None:
    daemons = {"peer": it.start_peer(), "ingress": it.start_ingress()}
    ingress, short = daemons["ingress"], daemons[who]
    client, header = ask(ingress, connect())
    with client:
        assert header.startswith(OK)
        # An open tunnel goes on, and a new client waits at the door.
        allow_descriptors(short, 1)
        with ingress.connect() as waiting:
            waiting.sendall(connect())
            assert "Too many open files" in short.wait_for_log("exhausted")
            client.sendall(b"hello")
            assert receive_exactly(client, 5) == b"hello"
            allow_descriptors(short, None)
            check_served(waiting)
    assert not [line for each in daemons.values() for line in each.log() if "refused" in line]


def test_the_last_descriptor_is_the_clients_own(it: Bridge) -> None:
    """None is left to look up the host with. That is no fault of what is written there."""
    it.start_peer()
    ingress = it.start_ingress()
    before = ingress.descriptors()
    client, header = ask(ingress, connect())
    client.close()
    eventually(lambda: ingress.descriptors() == before)
    allow_descriptors(ingress, lowest_free(ingress) + 1)
    with ExitStack() as stack:
        # Who had not said anything would have to go: to ask for one more takes a descriptor.
        [client] = ask_at_once(ingress, ingress, stack, number=1)
        with pytest.raises(ConnectionResetError):
            read_header(client)
    assert "Too many open files" in ingress.wait_for_log("exhausted")
    assert not [line for line in ingress.log() if "refused" in line]
    allow_descriptors(ingress, None)
    client, header = ask(ingress, connect())
    with client:
        assert header.startswith(OK)
