"""docs/many-machines.md, on machines that are network namespaces: what fails when what dies."""

import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.support import hellos
from tests.support.bridge import INGRESS, PEER, Echo, write, write_identity
from tests.support.daemon import PATIENCE, Daemon
from tests.support.network import Machine, Network, why_no_network
from tests.support.sockets import receive_exactly
from tests.support.tenants import Page

PAGE: Final = Page(Path(__file__).parents[2] / "docs/many-machines.md")
SITE: Final = "site.example"
ENTRANCE: Final = ("192.0.2.1", 443)
FRONTS: Final = ("10.2.1.2", "10.2.2.2")
PEERS: Final = ("10.3.1.2", "10.3.2.2")
MANY: Final = 20

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


class Tunnel:
    """A connection that is in use all the time: each answer is followed by the next question."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._wanted = threading.Event()
        self.is_broken = False
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        question = bytes(1000)
        while not self._wanted.wait(0.01):
            try:
                self._connection.sendall(question)
                answer = receive_exactly(self._connection, len(question))
            except OSError:
                answer = b""
            if answer != question:
                self.is_broken = True
                return
            self.rounds += 1

    def ends(self) -> bool:
        """Wait until it breaks; return whether it does."""
        self._thread.join(PATIENCE)
        return self.is_broken

    def goes_on(self) -> bool:
        """Wait for some rounds more; return whether they come."""
        before = self.rounds
        while self._thread.is_alive() and self.rounds < before + 3:
            self._thread.join(0.005)
        return not self.is_broken

    def close(self) -> None:
        self._wanted.set()
        self._thread.join()
        self._connection.close()


class Site:
    """Two fronts and two peers, a router, and a client."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self._stack = stack
        network = stack.enter_context(Network())
        self.router = network.router
        self.client = network.machine("10.1.0.2")
        self.router.run("nft", "-f", "-", stdin=PAGE["both"].text)
        self.peers = [self._peer(network.machine(at), at, place) for at in PEERS]
        tree = place / "tree"
        write(tree / "hosts" / SITE / "peer", "rack\n")
        (tree / "hosts" / SITE / "tls-socket").symlink_to("../../run/bridge")
        write(tree / "peers/rack/address", "".join(f"{at}:8443\n" for at in PEERS))
        write(tree / "peers/rack/server-name", f"{PEER}\n")
        write_identity(tree / "peers/rack/identity", INGRESS)
        self.fronts = [self._front(network.machine(at), at, place) for at in FRONTS]

    def _peer(self, machine: Machine, address: str, place: Path) -> Daemon:
        directory = place / address
        echo = machine.do(Echo)
        self._stack.callback(echo.close)
        write_identity(directory / "identity", PEER)
        write(directory / "clients" / INGRESS)
        write(directory / "allow" / SITE / "443", f"127.0.0.1:{echo.port}\n")
        # Closed here, or it would go on listening when the program is dead.
        with machine.do(socket.create_server, (address, 8443)) as listening:
            return self._start(machine, listening, directory, "tls_bridge.peer")

    def _front(self, machine: Machine, address: str, place: Path) -> tuple[Daemon, Daemon]:
        directory = place / address
        shutil.copytree(place / "tree", directory, symlinks=True)
        (directory / "run").mkdir()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(directory / "run/bridge"))
            listening.listen()
            bridge = self._start(machine, listening, directory, "tls_bridge", "--sni")
        with machine.do(socket.create_server, (address, 443)) as listening:
            router = self._start(machine, listening, directory / "hosts", "sniproxy")
        return router, bridge

    def _start(
        self, machine: Machine, listening: socket.socket, place: Path, module: str, *options: str
    ) -> Daemon:
        daemon = Daemon(listening, place, options, under=machine.under, module=module)
        self._stack.enter_context(daemon)
        daemon.wait_for_log("listening")
        return daemon

    def visit(self) -> socket.socket | None:
        """Return a connection through all of it to the service; None if there is none."""
        hello = hellos.hello_bytes(SITE)
        try:
            connection = self.client.do(socket.create_connection, ENTRANCE, PATIENCE)
        except ConnectionRefusedError:
            return None
        self._stack.callback(connection.close)
        try:
            connection.sendall(hello)
            # The service says back what it hears. An alert is shorter.
            return connection if receive_exactly(connection, len(hello)) == hello else None
        except OSError:
            return None

    def use(self) -> list[Tunnel]:
        """Return connections that are in use."""
        tunnels = []
        for _ in range(MANY):
            connection = self.visit()
            assert connection is not None
            tunnels.append(Tunnel(connection))
            self._stack.callback(tunnels[-1].close)
        return tunnels

    def failures(self) -> int:
        """Return how many of new connections fail."""
        return sum(self.visit() is None for _ in range(MANY))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def kill(*daemons: Daemon) -> None:
    for daemon in daemons:
        daemon.signal(signal.SIGKILL)
        daemon.wait()


def opened(daemon: Daemon) -> str:
    daemon.signal(signal.SIGUSR1)
    return next(word for word in daemon.wait_for_log("status").split() if word.startswith("open="))


def test_a_front_dies(site: Site) -> None:
    tunnels = site.use()
    # Both fronts have their part, and the first peer has all.
    assert [opened(router) for router, _ in site.fronts] == [f"open={MANY // 2}"] * 2
    assert [opened(peer) for peer in site.peers] == [f"open={MANY}", "open=0"]
    said(f"nothing | 0 of {MANY} | {site.failures()} of {MANY}")

    kill(*site.fronts[0])
    # The kernel takes the fronts in turn.
    through, others = tunnels[::2], tunnels[1::2]
    assert all(tunnel.ends() for tunnel in through)
    assert all(tunnel.goes_on() for tunnel in others)
    failures = site.failures()
    said(
        f"the programs of one front | {len(through)} of {MANY}: those through it "
        f"| {failures} of {MANY}, until the rules change"
    )

    site.router.run("nft", "-f", "-", stdin=PAGE["one"].text)
    failures = site.failures()
    assert all(tunnel.goes_on() for tunnel in others)
    said(f"... when the rules have changed | 0 of {len(others)} | {failures} of {MANY}")


def test_a_peer_dies(site: Site) -> None:
    tunnels = site.use()
    kill(site.peers[0])
    failures = site.failures()
    assert all(tunnel.ends() for tunnel in tunnels)
    said(f"one peer, the first | {MANY} of {MANY}: all were on it | {failures} of {MANY}")
    assert opened(site.peers[1]) == f"open={MANY}"


def test_a_client_gets_the_same_front_by_its_address(site: Site) -> None:
    rules = PAGE["both"].text
    assert "`jhash ip saddr mod 2` in the place of `numgen inc mod 2`" in PAGE.text
    site.router.run("nft", "-f", "-", stdin=rules.replace("numgen inc", "jhash ip saddr"))
    site.use()
    counts = sorted(opened(router) for router, _ in site.fronts)
    assert counts == ["open=0", f"open={MANY}"]


def said(row: str) -> None:
    """Check that the page says it."""
    assert f"| {row} |\n" in PAGE.text, row
