"""What a service tells at its status socket: lines of JSON, read, checked and added up."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from sniproxy.service.fatal import FatalError

# Seconds of silence after which the service is taken for stuck: it needs a second for 50,000 hosts,
# and one of its processes that has died is replaced in another.
_PATIENCE: Final = 10.0

# Bytes of a line: 20 refusals of 400 are far less. What is longer is none of ours.
_LONGEST_LINE: Final = 1 << 20

# Refusals of a host that are kept when several processes tell of it: as many as each keeps.
_MOST_LAST: Final = 20


@dataclass(slots=True)
class Latency:
    """How long something took.

    Attributes:
        count: How often it was done.
        seconds: How long in all.
        buckets: How often it took less than 2**N microseconds, and not less than half of that.
    """

    count: int = 0
    seconds: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, told: dict[str, Any]) -> None:
        """Add what a process has told."""
        self.count += int(told["count"])
        self.seconds += float(told["sum"])
        for number, count in told["buckets"].items():
            self.buckets[int(number)] = self.buckets.get(int(number), 0) + int(count)

    def below(self, share: float) -> float | None:
        """Return how many seconds so large a share took less than; None if there was nothing."""
        seen = 0
        for number in sorted(self.buckets):
            seen += self.buckets[number]
            if seen >= share * self.count:
                return float(2**number) / 1e6
        return None


@dataclass(slots=True)
class Counts:
    """What was counted, of all hosts or of one.

    Attributes:
        open, served, refused: Connections.
        up, down: Bytes from clients, and to them.
        reasons: How often clients were refused for each.
    """

    open: int = 0
    served: int = 0
    refused: int = 0
    up: int = 0
    down: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, told: dict[str, Any]) -> None:
        """Add what a process has told."""
        self.open += int(told["open"])
        self.served += int(told["served"])
        self.refused += int(told["refused"])
        self.up += int(told["up"])
        self.down += int(told["down"])
        for reason, count in told["reasons"].items():
            self.reasons[str(reason)] = self.reasons.get(str(reason), 0) + int(count)


@dataclass(slots=True)
class Refusal:
    """The last thing, or one of the last, that went wrong with a host; `time` is Unix time."""

    time: float
    client: str
    reason: str
    detail: str | None


@dataclass(slots=True)
class Host(Counts):
    """What was counted for a host.

    Attributes:
        host: Its name.
        owner: The uid of whom it belongs to; None if the service knows none.
        last: What went wrong last, the oldest first.
    """

    host: str = ""
    owner: int | None = None
    last: list[Refusal] = field(default_factory=list)

    def add(self, told: dict[str, Any]) -> None:
        """Add what a process has told."""
        Counts.add(self, told)
        self.owner = told["owner"] if told["owner"] is not None else self.owner
        for each in told["last"]:
            detail = None if each["detail"] is None else str(each["detail"])
            self.last.append(
                Refusal(float(each["time"]), str(each["client"]), str(each["reason"]), detail)
            )
        self.last.sort(key=lambda refusal: refusal.time)
        del self.last[:-_MOST_LAST]


@dataclass(slots=True)
class Process:
    """One of the processes that serve; `uptime` in seconds."""

    pid: int
    worker: int | None
    uptime: float


@dataclass(slots=True)
class Report:
    """All that was told.

    Attributes:
        program, version: Of the service.
        processes: That have spoken.
        total: Of all hosts; None for who hears of their own hosts alone.
        latencies: By what was timed.
        hosts: By name.
    """

    program: str = ""
    version: str = ""
    processes: list[Process] = field(default_factory=list)
    total: Counts | None = None
    latencies: dict[str, Latency] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)

    def uptime(self) -> float:
        """Return the seconds for which something was counted."""
        return max((process.uptime for process in self.processes), default=0.0)

    def add(self, told: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is none of a status socket.
        """
        match told["kind"]:
            case "process":
                self._add_process(told)
            case "host":
                name = str(told["host"])
                self.hosts.setdefault(name, Host(host=name)).add(told)
            case kind:
                raise ValueError(f"unknown kind {kind!a}")

    def _add_process(self, told: dict[str, Any]) -> None:
        self.program, self.version = str(told["program"]), str(told["version"])
        worker = None if told["worker"] is None else int(told["worker"])
        self.processes.append(Process(int(told["pid"]), worker, float(told["uptime"])))
        if told["sees"] == "all":
            if self.total is None:
                self.total = Counts()
            self.total.add(told)
            for kind, each in told["seconds"].items():
                self.latencies.setdefault(str(kind), Latency()).add(each)


def read(path: str) -> Report:
    """Return what the service at a status socket tells.

    Raises:
        FatalError: there is none, or it does not say what a service says.
    """
    report = Report()
    is_whole = False
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(path)
            for line in _lines(sock, path):
                told = json.loads(line)
                if told["kind"] == "end":
                    is_whole = True
                    break
                report.add(told)
    except TimeoutError:
        message = f"unable to read {path}: nothing was said for {_PATIENCE:g} seconds"
        raise FatalError(message) from None
    except OSError as error:
        # A path that is too long has no errno.
        raise FatalError(f"unable to connect to {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"unable to read {path}: it is no status socket ({type(error).__name__}: {error})"
        raise FatalError(message) from None
    if not is_whole:
        raise FatalError(
            f"unable to read {path}: it has closed before the end; it may be asked too often, or "
            "one of its processes hangs"
        )
    return report


def _lines(sock: socket.socket, path: str) -> Iterator[bytes]:
    """Yield whole lines until the end.

    Raises:
        ValueError: one is too long.
        OSError: of the socket.
    """
    rest = b""
    while chunk := sock.recv(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:
            raise ValueError(f"a line of {path} has more than {_LONGEST_LINE} bytes")
