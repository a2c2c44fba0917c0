"""tls-bridge, or one of the others, beside programs that wrap connections in TLS: the same clients.

usage: scripts/bench tls|tproxy|pod [--rounds N] [--quick] [--only WORD] [--save]

Measured as in run.py: short slices with all programs in each, processor time of theirs alone, and
ratios within a slice. Each side has its own: "ingress" puts mutual TLS on, "peer" takes it off.
tls-tproxy has the first one only, and clients that speak TLS themselves are beside it.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from load import HERE, Load, Place
from peers import Peer, Running
from report import ROOT, TLS, TPROXY, Report, Results
from run import FIRST_PORT, GIGABYTE, installed, raise_limits, read_options
from tls_peers import SERVER_NAME, TLS_PEERS, TPROXY_PEERS, TLSSetup

SIDES = ("ingress", "peer")

# Clients that speak TLS themselves, with nothing between them and the service.
DIRECT = "direct TLS"

AT_A_TIME = 8
# Of the connections: some programs use each ticket once, and may have none where eight begin. nginx
# resumes four fifths, and two thirds in a bad slice; with less something is wrong.
RESUMED_AT_LEAST = 0.5
# Works that a program is left out of, where it would not do the same. Of the connections that it
# should resume, ATS resumed half in one slice and four fifths in the next.
LEFT_OUT = {("ATS", "resumed handshake", "ingress")}


class Size(NamedTuple):
    """How much of everything; a slice takes a tenth of a second or so from each program."""

    slices: int = 15
    connections: int = 120
    bulk: int = 200_000_000  # bytes
    pings: int = 3_000
    idle: int = 1_000
    idle_bulk: int = 2_000_000  # bytes that a connection moves before it rests


QUICK = Size(1, 40, 5_000_000, 100, 30, 300_000)


class Proxy(NamedTuple):
    """One that is running."""

    name: str
    side: str
    port: int
    running: Running | None  # None if its processor time is not asked for
    clients: Place = HERE
    speaks: str = "plain"  # what its clients do, or "tls"


class TLSBench:
    """What is measured, and the results: for each metric, for each program, a value a slice."""

    def __init__(self, load: Load, identities: Path, size: Size, only: str) -> None:
        self._load = load
        self._identities = identities
        self.size = size
        self._only = only
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def wanted(self, title: str) -> bool:
        """Tell whether `title` is to be measured."""
        return self._only in title

    def warm_up(self, proxy: Proxy) -> None:
        """Connect, before anything is measured."""
        self._run(proxy, "resume", AT_A_TIME, 2 * self.size.connections)

    def connect(self, kind: str, proxy: Proxy) -> None:
        """Connect, do a handshake, a byte back, close."""
        count = self.size.connections
        what = "resume" if kind == "resumed handshake" else "connect"
        cpu, printed = self._measure(proxy, what, AT_A_TIME, count)
        resumed = printed["resumed"] / count
        is_right = resumed >= RESUMED_AT_LEAST if what == "resume" else not resumed
        if not is_right:
            raise RuntimeError(f"{proxy.name}, {kind}: {resumed:.0%} were resumed")
        self._note(f"{kind}, {proxy.side}: time, µs", proxy, printed["seconds"] / count * 1e6)
        self._note_cpu(f"{kind}, {proxy.side}: CPU, µs", proxy, cpu / count * 1e6)

    def bulk(self, direction: str, proxy: Proxy) -> None:
        """Move bytes: down is towards the client."""
        cpu, printed = self._measure(proxy, direction, self.size.bulk)
        scale = GIGABYTE / self.size.bulk
        title = f"bulk {direction}, {proxy.side}"
        self._note(f"{title}: time, s/GB", proxy, printed["seconds"] * scale)
        self._note_cpu(f"{title}: CPU, s/GB", proxy, cpu * scale)

    def ping(self, proxy: Proxy) -> None:
        """Send one byte there and back, again and again."""
        cpu, printed = self._measure(proxy, "ping", self.size.pings)
        title = f"ping, {proxy.side}"
        self._note(f"{title}: round trip, µs", proxy, printed["median"] * 1e6)
        self._note_cpu(f"{title}: CPU, µs", proxy, cpu / self.size.pings * 1e6)

    def idle(self, title: str, bytes_moved: int, proxy: Proxy) -> None:
        """Hold connections that do nothing, or nothing any more."""
        assert proxy.running is not None
        count = self.size.idle // 10 if bytes_moved else self.size.idle
        self.warm_up(proxy)
        time.sleep(0.5)  # for the last to be closed
        before = proxy.running.private_bytes()
        arguments = self._arguments(proxy, "idle", count, bytes_moved)
        with self._load.ready(*arguments, place=proxy.clients) as clients:
            assert clients.stdout is not None
            clients.stdout.readline()
            memory = proxy.running.private_bytes() - before
            self._note(
                f"{title}, {proxy.side}: private memory each, KB", proxy, memory / count / 1024
            )
            clients.communicate()

    def _arguments(self, proxy: Proxy, kind: str, *arguments: object) -> tuple[object, ...]:
        return kind, proxy.speaks, proxy.port, self._identities, *arguments

    def _run(self, proxy: Proxy, kind: str, *arguments: object) -> dict[str, float]:
        return self._load.run(*self._arguments(proxy, kind, *arguments), place=proxy.clients)

    def _measure(
        self, proxy: Proxy, kind: str, *arguments: object
    ) -> tuple[float, dict[str, float]]:
        """Run clients; return the program's processor seconds, and what they print."""
        running = proxy.running
        before = running.processor_seconds() if running is not None else 0.0
        printed = self._run(proxy, kind, *arguments)
        if running is None:
            return 0.0, printed
        time.sleep(0.05)  # what follows the last byte, closing, is part of the work
        return running.processor_seconds() - before, printed

    def _note_cpu(self, metric: str, proxy: Proxy, value: float) -> None:
        if proxy.running is not None:
            self._note(metric, proxy, value)

    def _note(self, metric: str, proxy: Proxy, value: float) -> None:
        self.values[metric][proxy.name].append(value)


class Stage:
    """Where programs run: a directory, ports, the services behind them."""

    def __init__(self, directory: Path, identities: Path) -> None:
        self._directory = directory
        self._identities = identities
        self._ports = iter(range(FIRST_PORT, FIRST_PORT + 10_000))

    def port(self) -> int:
        """Return a port that nobody has."""
        return next(self._ports)

    @contextmanager
    def proxy(self, peer: Peer, side: str, behind: int) -> Iterator[Proxy]:
        """Run a program in front of a service."""
        port = self.port()
        directory = self._directory / str(port)
        setup = TLSSetup(directory, port, behind, self._identities, is_ingress=side == "ingress")
        with peer.running(setup) as running:
            speaks = "plain" if side == "ingress" else "tls"
            yield Proxy(peer.name, side, port, running, speaks=speaks)


def run(
    bench: TLSBench,
    load: Load,
    stage: Stage,
    identities: Path,
    peers: list[Peer],
    sides: Sequence[str],
    rounds: int,
    place: Place = HERE,
) -> None:
    """Measure everything, round after round. With one side, also what has no program at all.

    The services are at `place`.
    """
    size = bench.size
    works: list[tuple[str, Callable[[Proxy], None]]] = [
        *((kind, partial(bench.connect, kind)) for kind in ("full handshake", "resumed handshake")),
        *((f"bulk {way}", partial(bench.bulk, way)) for way in ("down", "up")),
        ("ping", bench.ping),
    ]
    rests = [("idle", 0), ("idle after bulk", size.idle_bulk)]
    shuffle = random.Random(rounds)  # noqa: S311 - the order need not be a secret
    with ExitStack() as stack:
        # The service behind an ingress speaks TLS, and there it decides whether sessions are
        # resumed; in front of a peer the clients do.
        services = {}
        for kind in "tls", "resumable", "plain":
            services[kind] = stage.port()
            stack.enter_context(
                load.serving("serve", kind, services[kind], identities, place=place)
            )
        proxies: dict[tuple[str, bool], list[Proxy]] = {}
        for side in sides:
            for resumable in False, True:
                behind = services[
                    "plain" if side == "peer" else "resumable" if resumable else "tls"
                ]
                proxies[side, resumable] = [
                    stack.enter_context(stage.proxy(peer, side, behind)) for peer in peers
                ]
                if len(sides) == 1:
                    direct = Proxy(DIRECT, side, behind, None, speaks="tls")
                    proxies[side, resumable].append(direct)
                for proxy in proxies[side, resumable]:
                    bench.warm_up(proxy)
        for number in range(rounds):
            print(f"bench: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for title, work in works:
                for side in sides:
                    measured = [
                        proxy
                        for proxy in proxies[side, title.startswith("resumed")]
                        if (proxy.name, title, side) not in LEFT_OUT
                    ]
                    for _ in range(size.slices if bench.wanted(f"{title}, {side}") else 0):
                        # In another order each time, as in run.py.
                        for proxy in shuffle.sample(measured, len(measured)):
                            work(proxy)
            for title, bytes_moved in rests:
                for side in sides:
                    for peer in peers if bench.wanted(f"{title}, {side}") else []:
                        # Each time a new process: memory once used is not given back.
                        behind = services["plain" if side == "peer" else "tls"]
                        with stage.proxy(peer, side, behind) as proxy:
                            bench.idle(title, bytes_moved, proxy)


def make_identities(directory: Path) -> None:
    """Make an authority, and a client and a server by it, with keys on P-256."""
    openssl_path = shutil.which("openssl") or "openssl"

    def openssl(*arguments: object) -> None:
        done = subprocess.run(
            (openssl_path, *map(str, arguments)), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    authority = directory / "ca.pem", directory / "ca-key.pem"
    openssl(
        "req", "-x509", *key, "-keyout", authority[1], "-out", authority[0],
        "-subj", "/CN=bench", "-days", 2,
    )  # fmt: skip
    for who, name in ("client", "client.example"), ("server", SERVER_NAME):
        place = directory / who
        place.mkdir()
        (place / "extensions").write_text(f"subjectAltName=DNS:{name}\n")
        openssl(
            "req", *key, "-keyout", place / "key.pem", "-out", place / "request",
            "-subj", f"/CN={name}",
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", place / "request", "-CA", authority[0], "-CAkey", authority[1],
            "-CAcreateserial", "-out", place / "leaf.pem", "-days", 2,
            "-extfile", place / "extensions",
        )  # fmt: skip
        # The chain up to the authority: who has less builds and verifies it in each handshake.
        chain = (place / "leaf.pem").read_text() + authority[0].read_text()
        (place / "cert.pem").write_text(chain)
        (place / "ca.pem").write_text(authority[0].read_text())


@dataclass(frozen=True)
class Program:
    """A program that is measured.

    Attributes:
        word: What scripts/bench calls it.
        report: What is made of the results.
        peers: It, and those beside it.
        sides: Which it has.
        others: What else has a column, without a version.
        measure: Measures everything.
    """

    word: str
    report: Report
    peers: Sequence[Peer]
    sides: Sequence[str]
    others: Sequence[str]
    measure: "Callable[[Program, TLSBench, Load, Path, list[Peer], int], None]"


def _measure_here(
    program: Program, bench: TLSBench, load: Load, directory: Path, peers: list[Peer], rounds: int
) -> None:
    stage = Stage(directory, directory)
    run(bench, load, stage, directory, peers, program.sides, rounds)


BRIDGE = Program("tls", TLS, TLS_PEERS, SIDES, (), _measure_here)
WRAPPER = Program("tproxy", TPROXY, TPROXY_PEERS, SIDES[:1], (DIRECT,), _measure_here)


def main(program: Program = BRIDGE) -> int:
    """Run what the options ask for, and print it."""
    report = program.report
    document = str(report.document.relative_to(ROOT))
    options = read_options(f"scripts/bench {program.word}", __doc__, document)
    peers = installed(program.peers)
    size = QUICK if options.quick else Size()
    raise_limits(size.idle)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        make_identities(directory)
        load = Load(directory, "tls_load.c", "-lssl", "-lcrypto", "-lpthread")
        bench = TLSBench(load, directory, size, options.only)
        program.measure(program, bench, load, directory, peers, options.rounds)
    versions = {peer.name: peer.show_version() for peer in peers}
    versions |= dict.fromkeys(program.others, "")
    results = Results.of(
        bench.values, report, versions, options.rounds, size.slices, size.slices, size.idle
    )
    print(results.text())
    if options.save:
        results.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
