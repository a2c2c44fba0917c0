"""What a service tells at its status socket: lines of JSON, read, checked and added up.

Root may be reading, and anybody may be at the other end: what is not as it should be is refused,
and nothing is without a bound.
"""

import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from sniproxy.service.fatal import FatalError

# Seconds of silence after which the service is taken for stuck: it needs a second for 50,000 hosts,
# and one of its processes that has died is replaced in another.
_PATIENCE: Final = 10.0

# Seconds for all of it: 64 processes with as many hosts as each can have take half of that.
_LONGEST: Final = 60.0

# Bytes of a line: 20 refusals of 400 are far less. What is longer is none of ours. And of all.
_LONGEST_LINE: Final = 1 << 20
_MOST_BYTES: Final = 1 << 30

# Hosts, twice as many as a process keeps, and reasons, of which there are some fifty.
_MOST_HOSTS: Final = 1 << 17
_MOST_REASONS: Final = 1000

# What counts and times can be: what fits into 63 bits, and times of this century and the next.
_HIGHEST: Final = 1 << 63
_LATEST: Final = 1 << 33
_MOST_BUCKETS: Final = 64

# What programs, versions and what is timed are called.
_WORD: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}")
_KIND: Final = re.compile(r"[a-z_]{1,32}")

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
        self.seconds += _seconds(told["sum"])
        for number, count in told["buckets"].items():
            bucket = int(number)
            if not 0 <= bucket < _MOST_BUCKETS:
                raise ValueError(f"there is no bucket {bucket}")
            self.buckets[bucket] = self.buckets.get(bucket, 0) + _count(count)
            self.count += _count(count)

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
        handed_over: Of those that were served, those that the backend has got itself.
        up, down: Bytes from clients, and to them.
        reasons: How often clients were refused for each.
    """

    open: int = 0
    served: int = 0
    refused: int = 0
    handed_over: int = 0
    up: int = 0
    down: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, told: dict[str, Any]) -> None:
        """Add what a process has told."""
        self.open += _count(told["open"])
        self.served += _count(told["served"])
        self.refused += _count(told["refused"])
        # Not told by who hands nothing over.
        self.handed_over += _count(told.get("handed_over", 0))
        self.up += _count(told["up"])
        self.down += _count(told["down"])
        for reason, count in told["reasons"].items():
            name = _text(reason)
            if len(self.reasons) >= _MOST_REASONS:
                raise ValueError(f"there are more than {_MOST_REASONS} reasons")
            self.reasons[name] = self.reasons.get(name, 0) + _count(count)


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
        if told["owner"] is not None:
            self.owner = _count(told["owner"])
        for each in told["last"]:
            detail = None if each["detail"] is None else _text(each["detail"])
            words = _text(each["client"]), _text(each["reason"]), detail
            self.last.append(Refusal(_seconds(each["time"]), *words))
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
        hands_over: Whether backends can get connections themselves, as far as that is known.
    """

    program: str = ""
    version: str = ""
    processes: list[Process] = field(default_factory=list)
    total: Counts | None = None
    latencies: dict[str, Latency] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    hands_over: bool = False

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
                name = _text(told["host"])
                if len(self.hosts) >= _MOST_HOSTS:
                    raise ValueError(f"there are more than {_MOST_HOSTS} hosts")
                self.hosts.setdefault(name, Host(host=name)).add(told)
                self.hands_over |= "handed_over" in told
            case kind:
                raise ValueError(f"unknown kind {kind!a}")

    def _add_process(self, told: dict[str, Any]) -> None:
        self.program = _word(told["program"], _WORD)
        self.version = _word(told["version"], _WORD)
        worker = None if told["worker"] is None else _count(told["worker"])
        self.processes.append(Process(_count(told["pid"]), worker, _seconds(told["uptime"])))
        if told["sees"] == "all":
            if self.total is None:
                self.total = Counts()
            self.total.add(told)
            self.hands_over |= "handed_over" in told
            for kind, each in told["seconds"].items():
                self.latencies.setdefault(_word(kind, _KIND), Latency()).add(each)


def _count(value: object) -> int:
    if isinstance(value, int) and 0 <= value < _HIGHEST:
        return value
    raise ValueError(f"{value!a:.40} is no count")


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and 0 <= value < _LATEST:
        return float(value)
    raise ValueError(f"{value!a:.40} is no time")


def _word(value: object, allowed: re.Pattern[str]) -> str:
    if isinstance(value, str) and allowed.fullmatch(value):
        return value
    raise ValueError(f"{value!a:.40} is no word")


def _text(value: object) -> str:
    """Return a text that can be written in UTF-8: JSON can have halves of characters."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    raise ValueError(f"{value!a:.40} is no text")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def read(path: str) -> Report:
    """Return what the service at a status socket tells.

    Raises:
        FatalError: there is none, or it does not say what a service says.
    """
    report = Report()
    is_whole = False
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(path)
        except OSError as error:
            raise FatalError(f"unable to connect to {path}: {_why(path, error)}") from None
        try:
            for line in _lines(sock):
                told = json.loads(line, parse_constant=_refuse_constant)
                if told["kind"] == "end":
                    is_whole = True
                    break
                report.add(told)
            if is_whole and not report.processes:
                raise ValueError("no process has spoken")
        except TimeoutError:
            message = f"unable to read {path}: nothing was said for {_PATIENCE:g} seconds"
            raise FatalError(message) from None
        except OSError as error:
            raise FatalError.of(f"read {path}", error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
            message = f"unable to read {path}: it is no status socket ({said!a:.100})"
            raise FatalError(message) from None
    if not is_whole:
        raise FatalError(
            f"unable to read {path}: it has closed before the end; it may be asked too often, or "
            "one of its processes hangs"
        )
    return report


def _why(path: str, error: OSError) -> str:
    """Say why nobody can connect to a path."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        is_socket = True
    if not is_socket:
        return "it is no socket"
    return error.strerror or str(error)  # a path that is too long has no errno


def _lines(sock: socket.socket) -> Iterator[bytes]:
    """Yield whole lines until the end.

    Raises:
        ValueError: one is too long, or there are too many, or it takes too long.
        OSError: of the socket.
    """
    rest = b""
    size = 0
    deadline = time.monotonic() + _LONGEST
    while chunk := sock.recv(1 << 16):
        size += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE} bytes")
        if size > _MOST_BYTES:
            raise ValueError(f"it says more than {_MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"it has not ended after {_LONGEST:g} seconds")
