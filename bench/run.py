"""The proxies side by side: the same clients, the same backend, in turn, round after round.

usage: scripts/bench [--rounds N] [--quick] [--only WORD] [--save]

What is printed are medians, and the ratio of ours to the better of HAProxy and nginx. Processor
time is that of the proxy's processes alone, so that clients, backend and a busy machine count for
little. A machine that others share takes half as much time again from one second to the next. So a
round is made of slices, each short and with all proxies in it, and a ratio is the median of what
the slices say one by one. Nothing here passes or fails: machines differ, ratios less.
"""

import argparse
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from load import BENCH, Load
from peers import (
    COMPILED,
    COMPILED_HANDING_OVER,
    COUNTING,
    HANDING_OVER,
    OURS,
    PEERS,
    TWO_WORKERS,
    Peer,
    Running,
    Setup,
)
from report import ROUTING, Results

sys.path.insert(0, str(BENCH.parent))

from tests.support import hellos

DIRECT = "direct"

AT_A_TIME = 200
MANY_STREAMS = 8
BUSY = 500
GIGABYTE = 1e9
PER_IDLE = 3  # descriptors for each idle connection; HAProxy sets some aside for pipes
FIRST_PORT = 20_000  # below those that the kernel takes for clients


class Size(NamedTuple):
    """How much of everything; a slice takes a tenth of a second or so from each proxy."""

    slices: int = 20
    connect_slices: int = 60  # these are short, and where the ratio has least to spare
    connections: int = 1_000
    hosts: int = 10_000
    bulk: int = 100_000_000  # bytes
    pings: int = 1_000
    busy_pings: int = 5_000
    idle: int = 10_000


QUICK = Size(1, 1, 200, 100, 5_000_000, 100, 1000, 1000)


class Proxy(NamedTuple):
    """One that is running, or nothing between clients and backend."""

    name: str
    port: int
    running: Running | None

    def processor_seconds(self) -> float:
        """Return the processor time that it has used."""
        return self.running.processor_seconds() if self.running else 0


class Bench:
    """What is measured, and the results: for each metric, for each proxy, a value a slice."""

    def __init__(self, load: Load, hello: Path, size: Size, only: str) -> None:
        self._load = load
        self._hello = hello
        self.size = size
        self._only = only
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def wanted(self, title: str) -> bool:
        """Tell whether `title` is to be measured."""
        return self._only in title

    def warm_up(self, proxy: Proxy, hosts: int = 1) -> None:
        """Connect to every host before anything is measured.

        Then what is allocated once is there, Python has learned which types it meets, and the
        kernel has read the directories.
        """
        count = max(hosts, self.size.connections)
        self._load.run("connect", proxy.port, self._hello, hosts, AT_A_TIME, count)

    def connect(self, title: str, proxy: Proxy, hosts: int = 1) -> None:
        """Connect, a byte back, close."""
        count = self.size.connections
        seconds, cpu, _ = self._measure(proxy, "connect", hosts, AT_A_TIME, count)
        self._note(f"{title}: time, µs", proxy, seconds / count * 1e6)
        self._note(f"{title}: CPU, µs", proxy, cpu / count * 1e6)

    def bulk(self, title: str, proxy: Proxy, streams: int, direction: str, many: int = 0) -> None:
        """Move `many` bytes, or as many as the size says, in each direction."""
        many = many or self.size.bulk
        each = many // streams // (2 if direction == "both" else 1)
        seconds, cpu, _ = self._measure(proxy, "bulk", direction, streams, each)
        self._note(f"{title}: time, s/GB", proxy, seconds / many * GIGABYTE)
        self._note(f"{title}: CPU, s/GB", proxy, cpu / many * GIGABYTE)

    def ping(self, title: str, proxy: Proxy, many: int, count: int) -> None:
        """Send one byte there and back, again and again."""
        _, cpu, printed = self._measure(proxy, "ping", many, count)
        self._note(f"{title}: round trip, µs", proxy, printed["median"] * 1e6)
        self._note(f"{title}: round trip, 99th percentile, µs", proxy, printed["p99"] * 1e6)
        self._note(f"{title}: CPU, µs", proxy, cpu / count * 1e6)

    def idle(self, title: str, proxy: Proxy, many: int) -> None:
        """Hold connections that do nothing; then connect beside them."""
        assert proxy.running is not None
        self.warm_up(proxy)
        time.sleep(0.5)  # for the last to be closed
        before = proxy.running.private_bytes()
        with self._load.ready("idle", proxy.port, self._hello, many) as clients:
            assert clients.stdout is not None
            clients.stdout.readline()
            memory = proxy.running.private_bytes() - before
            self._note(f"{title}: private memory each, KB", proxy, memory / many / 1024)
            before_cpu = proxy.processor_seconds()
            time.sleep(1)
            cpu = proxy.processor_seconds() - before_cpu
            self._note(f"{title}: CPU in a second, ms", proxy, cpu * 1000)
            for _ in range(self.size.slices):
                self.connect(f"connect beside {title}", proxy)
            clients.communicate()

    def _measure(
        self, proxy: Proxy, kind: str, *arguments: object
    ) -> tuple[float, float, dict[str, float]]:
        """Run clients; return the seconds, the proxy's processor seconds, and what they print."""
        with self._load.ready(kind, proxy.port, self._hello, *arguments) as clients:
            if kind == "ping":
                assert clients.stdout is not None
                clients.stdout.readline()
            before = proxy.processor_seconds()
            printed = self._load.go_on(clients)
        time.sleep(0.05)  # what follows the last byte, closing, is part of the work
        return printed["seconds"], proxy.processor_seconds() - before, printed

    def _note(self, metric: str, proxy: Proxy, value: float) -> None:
        if proxy.running or "CPU" not in metric:
            self.values[metric][proxy.name].append(value)


def host(number: int) -> str:
    """Return one of many names; bench/load.c counts in the digits."""
    return f"host{number:05}.example"


class Stage:
    """Where proxies run: a directory, ports, the backend behind them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = iter(range(FIRST_PORT, FIRST_PORT + 10_000))
        self.backend = directory / "backend"
        self.backend_port = next(self._ports)

    @contextmanager
    def proxy(self, peer: Peer, hosts: int = 1, *, header: bool = False) -> Iterator[Proxy]:
        """Run a proxy of its own."""
        port = next(self._ports)
        names = [host(number) for number in range(hosts)]
        setup = Setup(self._directory / str(port), port, self.backend, names, header)
        with peer.running(setup) as running:
            yield Proxy(peer.name, port, running)


def run(bench: Bench, load: Load, stage: Stage, peers: list[Peer], rounds: int) -> None:
    """Measure everything, round after round."""
    size = bench.size
    with ExitStack() as stack:
        stack.enter_context(load.serving("backend", stage.backend, stage.backend_port))

        def start(peers: list[Peer], hosts: int = 1, *, header: bool = False) -> list[Proxy]:
            proxies = []
            for peer in peers:
                proxies.append(stack.enter_context(stage.proxy(peer, hosts, header=header)))
                bench.warm_up(proxies[-1], hosts)
            return proxies

        with_header = [peer for peer in peers if peer.header]
        direct = Proxy(DIRECT, stage.backend_port, None)
        proxies = [direct, *start(peers)]
        # What is measured: a title, those who are, and how.
        works: list[tuple[str, list[Proxy], Callable[[str, Proxy], None]]] = [
            ("connect", proxies + start([TWO_WORKERS, COUNTING]), bench.connect),
            (
                f"connect, {size.hosts:,} hosts",
                start(peers, size.hosts),
                partial(bench.connect, hosts=size.hosts),
            ),
            ("connect, PROXY header", start(with_header, header=True), bench.connect),
            ("ping", proxies, partial(bench.ping, many=1, count=size.pings)),
            (f"{BUSY} busy", proxies, partial(bench.ping, many=BUSY, count=size.busy_pings)),
        ]
        for streams in 1, MANY_STREAMS:
            for direction in "down", "up", "both":
                title = f"bulk {direction}, {streams} {'stream' if streams == 1 else 'streams'}"
                bulk = partial(bench.bulk, streams=streams, direction=direction)
                works.append((title, proxies, bulk))

        # So many bytes that the time until they move does not count.
        handing_over = {HANDING_OVER.name, COMPILED_HANDING_OVER.name}
        without = [each for each in proxies if each.name in {DIRECT, *handing_over}]
        for direction in "down", "up":
            gigabyte = partial(bench.bulk, streams=1, direction=direction, many=int(GIGABYTE))
            works.append((f"gigabyte {direction}", without, gigabyte))

        shuffle = random.Random(rounds)  # noqa: S311 - the order need not be a secret
        for number in range(rounds):
            print(f"bench: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for title, measured, work in works:
                slices = size.connect_slices if title.startswith("connect") else size.slices
                for _ in range(slices if bench.wanted(title) else 0):
                    # In another order each time: the machine may get slower meanwhile, and whoever
                    # comes behind a busy one finds the processors warm.
                    for proxy in shuffle.sample(measured, len(measured)):
                        work(title, proxy)
            if bench.wanted("idle"):
                for peer in peers:
                    # Each time a new process: memory once used is not given back.
                    with stage.proxy(peer) as proxy:
                        bench.idle("idle", proxy, size.idle)


def read_options(program: str, description: str, document: str) -> argparse.Namespace:
    """Understand the command line; `document` is where the table goes."""
    parser = argparse.ArgumentParser(prog=program, description=description.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often to do all of it (%(default)s)"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="what has WORD in its title")
    parser.add_argument("--quick", action="store_true", help="small amounts: to try the program")
    parser.add_argument("--save", action="store_true", help=f"keep table and plot: {document}")
    return parser.parse_args()


def installed(peers: Sequence[Peer]) -> list[Peer]:
    """Return those that can be run; say which can't, and why."""
    for peer in peers:
        if peer.missing:
            print(f"bench: skipped {peer.name}: {peer.missing}")
    return [peer for peer in peers if not peer.missing]


def main() -> int:
    """Run what the options ask for, and print it."""
    options = read_options("scripts/bench routing", __doc__, "docs/speed-sniproxy.md")
    ours = [OURS, COMPILED, HANDING_OVER, COMPILED_HANDING_OVER]
    peers = installed([*ours, *PEERS[1:]])
    size = QUICK if options.quick else Size()
    size = size._replace(idle=raise_limits(size.idle))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        # Workers of other users must come through to the backend.
        directory = Path(name)
        directory.chmod(0o755)
        load = Load(directory, "load.c")
        hello = directory / "hello"
        hello.write_bytes(hellos.chromium_hello(host(0)))
        bench = Bench(load, hello, size, options.only)
        run(bench, load, Stage(directory), peers, options.rounds)
    versions = {DIRECT: ""} | {peer.name: peer.show_version() for peer in peers}
    results = Results.of(
        bench.values, ROUTING, versions, options.rounds, size.slices, size.connect_slices, size.idle
    )
    print(results.text())
    cpu = bench.values["connect: CPU, µs"]
    if cpu:
        slices = zip(cpu[COUNTING.name], cpu[OURS.name], strict=True)
        cost = statistics.median(counted / plain for counted, plain in slices)
        print(f"Counting for the status socket: {cost:.3f} of the CPU time without it.")
    if cpu and COMPILED.name in cpu:
        slices = zip(cpu[COMPILED.name], cpu[OURS.name], strict=True)
        cost = statistics.median(compiled / pure for compiled, pure in slices)
        print(f"Compiled: {cost:.3f} of the CPU time of the sources.")
    for peer in HANDING_OVER, COMPILED_HANDING_OVER:
        for line in handed_over(peer.name, bench.values):
            print(line)
    if options.save:
        results.keep()
    return 0


def handed_over(name: str, values: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Yield what handing over gives one of ours: ratios to the better peer, or to no proxy."""
    for metric, of_each in values.items():
        ours = of_each.get(name)
        if not ours:
            continue
        if "CPU" in metric:
            others = [of_each[each] for each in ROUTING.compared if of_each.get(each)]
            whose = "the better peer's"
        else:
            others = [of_each[DIRECT]] if DIRECT in of_each else []
            whose = "that without a proxy"
        if others:
            better = min(others, key=statistics.median)
            ratios = [each / theirs for each, theirs in zip(ours, better, strict=True) if theirs]
            if ratios:
                ratio = statistics.median(ratios)
                what = metric.rpartition(",")[0]
                yield f"{name.removeprefix('sniproxy, ')}, {what}: {ratio:.3f} of {whose}."


def raise_limits(idle: int) -> int:
    """Allow as many descriptors as a proxy takes for so many idle ones; return for how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(PER_IDLE * idle, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    except (OSError, ValueError):
        limit = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return min(idle, limit // PER_IDLE // 1000 * 1000)


if __name__ == "__main__":
    sys.exit(main())
