"""tproxy-pod beside programs that wrap connections in TLS; and plaintext between pods beside it.

usage: scripts/bench pod [--rounds N] [--quick] [--only WORD] [--save]

As tls.py. Each tproxy-pod is in a network namespace of its own, for there is one in each, with a
cable to the one where all others are. So its connections pass a cable, routing and connection
tracking in place of the loopback device.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import tls
from load import Load, Place
from peers import Peer, Running, package
from report import POD as REPORT
from tls import Program, Proxy, Stage, TLSBench
from tls_peers import POD, SERVER_NAME, TPROXY_PEERS, TLSSetup

from tests.support.network import Machine

PLAINTEXT: Final = "plaintext"

# What both measure from pod to pod, in the titles of the metrics.
BOTH: Final = "pod to pod"

_IP: Final = shutil.which("ip") or "/usr/sbin/ip"

_numbers = count(1)


class Pod:
    """A namespace with a cable to this one.

    Attributes:
        address: Its own.
        outside: That of the other end of the cable.
    """

    def __init__(self) -> None:
        self._machine = Machine()
        self.under = self._machine.under
        number = next(_numbers)
        self.address, self.outside = f"10.9.{number}.2", f"10.9.{number}.1"
        leader = self._machine.place.parts[4]
        cable = f"pod{number}"
        for command in (
            f"link add {cable} type veth peer name eth0 netns {leader}",
            f"address add {self.outside}/24 dev {cable}",
            f"link set {cable} up",
        ):
            subprocess.run([_IP, *command.split()], check=True)
        self._machine.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._machine.run("ip", "link", "set", "eth0", "up")
        self._machine.run("ip", "route", "add", "default", "via", self.outside)
        # As scripts/bench has it here.
        reno = "echo reno >/proc/sys/net/ipv4/tcp_congestion_control"
        self._machine.run("sh", "-c", reno)

    def end(self) -> None:
        """Let it go."""
        self._machine.end()


@contextmanager
def a_pod() -> Iterator[Pod]:
    """Make one, for as long as the block lasts."""
    pod = Pod()
    try:
        yield pod
    finally:
        pod.end()


@contextmanager
def wrapping(pod: Pod, directory: Path, identity: Path) -> Iterator[Running]:
    """Run tproxy-pod in a pod, with that identity."""
    (directory / "pod/egress").mkdir(parents=True)
    (directory / "pod/identity").symlink_to(identity)
    # The certificates are for names.
    (directory / "pod/egress/10.0.0.0_8").write_text(f"mtls\n{SERVER_NAME}\n")
    log = directory / "log"
    command = [*pod.under, sys.executable, "-m", "tproxy_pod"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, cwd=directory)
    try:
        for _ in range(500):
            if b"listening" in log.read_bytes() or process.poll() is not None:
                break
            time.sleep(0.02)
        if process.poll() is not None:
            raise RuntimeError(f"tproxy-pod does not start:\n{log.read_text('utf-8', 'replace')}")
        yield Running(process.pid)
    finally:
        process.terminate()
        process.wait()


class Together(Running):
    """Several programs, whose processor time is one figure."""

    def __init__(self, programs: Sequence[Running]) -> None:
        self._programs = programs

    def processor_seconds(self) -> float:
        """Return the sum."""
        return sum(each.processor_seconds() for each in self._programs)


class PodStage(Stage):
    """Where programs run, and pods."""

    def __init__(self, directory: Path, load: Load) -> None:
        super().__init__(directory, directory)
        self._place = directory
        self._load = load

    @contextmanager
    def proxy(self, peer: Peer, side: str, behind: int) -> Iterator[Proxy]:
        """Run a program in front of a service; tproxy-pod in a pod of its own."""
        if peer.name != POD:
            with super().proxy(peer, side, behind) as proxy:
                yield proxy
            return
        number = self.port()
        setup = TLSSetup(
            self._place / str(number), number, behind, self._place, is_ingress=side == "ingress"
        )
        with ExitStack() as stack:
            pod = stack.enter_context(a_pod())
            running = stack.enter_context(wrapping(pod, setup.directory, setup.identity))
            if setup.is_ingress:
                clients = Place(pod.outside, pod.under)
                yield Proxy(POD, side, behind, running, clients)
            else:
                inside = Place("0.0.0.0", pod.under)
                service = self._load.serving("serve", "plain", number, self._place, place=inside)
                stack.enter_context(service)
                yield Proxy(POD, side, number, running, Place(pod.address), speaks="tls")

    @contextmanager
    def pods(self, name: str, *, are_wrapped: bool) -> Iterator[Proxy]:
        """Run clients in one pod, and a service in another one."""
        port = self.port()
        with ExitStack() as stack:
            one, other = (stack.enter_context(a_pod()) for _ in range(2))
            programs = []
            if are_wrapped:
                for pod, identity in (one, "client"), (other, "server"):
                    program = wrapping(
                        pod, self._place / f"{port}-{identity}", self._place / identity
                    )
                    programs.append(stack.enter_context(program))
            inside = Place("0.0.0.0", other.under)
            stack.enter_context(
                self._load.serving("serve", "plain", port, self._place, place=inside)
            )
            running = Together(programs) if programs else None
            yield Proxy(name, BOTH, port, running, Place(other.address, one.under))


def measure(
    program: Program,
    bench: TLSBench,
    load: Load,
    directory: Path,
    peers: list[Peer],
    rounds: int,
) -> None:
    """Measure tproxy-pod beside the others, and then connections that pass two of them."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    stage = PodStage(directory, load)
    everywhere = Place("0.0.0.0")
    tls.run(bench, load, stage, directory, peers, program.sides, rounds, everywhere)
    works: list[tuple[str, Callable[[Proxy], None]]] = [
        ("connect", partial(bench.connect, "connect")),
        ("bulk down", partial(bench.bulk, "down")),
        ("bulk up", partial(bench.bulk, "up")),
        ("ping", bench.ping),
    ]
    shuffle = random.Random(rounds)  # noqa: S311 - the order need not be a secret
    with (
        stage.pods(PLAINTEXT, are_wrapped=False) as plain,
        stage.pods(POD, are_wrapped=True) as wrapped,
    ):
        assert wrapped.running is not None
        before = wrapped.running.processor_seconds()
        for proxy in plain, wrapped:
            bench.warm_up(proxy)
        if wrapped.running.processor_seconds() == before:
            raise RuntimeError("no connection has come by tproxy-pod")
        for title, work in works:
            for _ in range(rounds * bench.size.slices if bench.wanted(f"{title}, {BOTH}") else 0):
                for proxy in shuffle.sample([plain, wrapped], 2):
                    work(proxy)


OURS = Peer(
    POD,
    lambda setup: NotImplemented,  # it is not started as the others are
    [sys.executable, "-m", "tproxy_pod", "--version"],
    package("nft", "nftables") or ("" if os.geteuid() == 0 else "root is needed"),
)

PODS = Program("pod", REPORT, [OURS, *TPROXY_PEERS[1:]], tls.SIDES, (PLAINTEXT,), measure)

if __name__ == "__main__":
    sys.exit(tls.main(PODS))
