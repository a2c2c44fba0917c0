"""What a process counts, in all and for each host, for whoever asks at the status socket.

It is bounded in memory, whatever clients do: so many hosts, so many refusals of each, and of so
many hosts. What is asked for by a name that is no host here is counted in all alone.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

# Hosts that have figures of their own; one of 640 bytes at the most, so 40 MB.
_MOST_HOSTS: Final = 1 << 16

# Hosts of which refusals are kept, and how many of each: 20 of 400 bytes of 2,048 hosts are 16 MB.
_MOST_REFUSED: Final = 2048
_MOST_LAST: Final = 20

# Hosts that are looked at for one to be forgotten: those that have connections stay.
_MOST_LOOKS: Final = 100

# Hosts without a place among these, after which those are let go that have no connection.
_MOST_OTHERS: Final = 1000

# Of so many connections one is timed, the first one to begin with: it takes longer than all the
# rest of counting.
TIMED: Final = 16

# Bytes of a detail that are kept.
_LONGEST_DETAIL: Final = 300

# Twice of each microsecond up to 2**24, which are 17 seconds: longer than anything may take.
_BUCKETS: Final = 25


class Latency:
    """How long something took.

    Attributes:
        seconds: In all.
        buckets: How often it took less than 2**N microseconds, and not less than half of that; the
            last has whatever took longer.
    """

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.buckets = [0] * _BUCKETS

    def add(self, seconds: float) -> None:
        """Count one that took so long."""
        self.seconds += seconds
        self.buckets[min(int(seconds * 1e6).bit_length(), _BUCKETS - 1)] += 1

    def show(self) -> dict[str, Any]:
        """Return it as it is told."""
        return {
            "count": sum(self.buckets),
            "sum": round(self.seconds, 9),
            "buckets": {str(n): count for n, count in enumerate(self.buckets) if count},
        }


class Event(NamedTuple):
    """Something that went wrong with a host: when (Unix time), for whom, why, and in more words."""

    time: float
    client: str
    reason: str
    detail: str | None


# What is counted for a host.
_COUNTS: Final = ("served", "ended", "refused", "handed_over", "up", "down")


class HostFigures:
    """What was counted for one host.

    Attributes:
        host: Its name.
        owner: The uid of whom it belongs to; None if that is not known.
        served, ended, refused: Connections.
        handed_over: Of those that were served, those that the backend has got itself.
        up, down: Bytes from clients, and to them, of connections that have ended.
        reasons: How often each was refused for; none if it never was.
        last: The last things that went wrong.
    """

    __slots__ = (
        "down",
        "ended",
        "handed_over",
        "host",
        "last",
        "on_left",
        "owner",
        "reasons",
        "refused",
        "served",
        "up",
    )

    def __init__(self, host: str, owner: int | None, on_left: Callable[[], None]) -> None:
        self.host = host
        self.owner = owner
        self.served = self.ended = self.refused = self.handed_over = 0
        self.up = self.down = 0
        self.reasons: dict[str, int] | None = None
        self.last: deque[Event] | None = None
        self.on_left = on_left

    def left(self, up: int, down: int, ending: Any) -> None:
        """Count out a connection, and say that it has ended."""
        self.ended += 1
        self.up += up
        self.down += down
        self.on_left()

    def tell(self) -> dict[str, Any]:
        """Return all of it, for a process that goes on counting."""
        told = {name: getattr(self, name) for name in ("host", "owner", "reasons", *_COUNTS)}
        return told | {"last": [*self.last] if self.last else None}

    def add(self, told: dict[str, Any]) -> None:
        """Add what another process has counted for the same host."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + told[name])
        for reason, count in (told["reasons"] or {}).items():
            self.reasons = self.reasons or {}
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        if told["last"]:
            before = [Event(*each) for each in told["last"]]
            self.last = deque([*before, *(self.last or ())], maxlen=_MOST_LAST)

    def is_idle(self) -> bool:
        """Tell whether it may be forgotten."""
        return self.served == self.ended


class Figures:
    """What a process has counted.

    Args:
        kinds: what is timed.

    Attributes:
        on_left: Called when a connection has ended that was counted for a host.
        handed_over: Connections that backends have got themselves; None where none can be.
        hosts: By name; the longest known first.
        reasons: How often clients were refused for each.
        latencies: By kind.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.on_left: Callable[[], None] = lambda: None
        self.handed_over: int | None = None
        self._began = time.monotonic()
        self.hosts: dict[str, HostFigures] = {}
        self._refused: dict[str, None] = {}  # hosts of which refusals are kept, the latest last
        self.reasons: dict[str, int] = {}
        self.latencies = {kind: Latency() for kind in kinds}
        # Bytes of hosts that are not among these any more; and such as have connections still.
        self._up = self._down = 0
        self._others: list[HostFigures] = []

    def tell(self) -> dict[str, Any]:
        """Return all of it, for a process that goes on counting."""
        self._fold()
        latencies = {kind: [each.seconds, each.buckets] for kind, each in self.latencies.items()}
        return {
            "hosts": [each.tell() for each in self.hosts.values()],
            "reasons": self.reasons,
            "latencies": latencies,
            "moved": [self._up, self._down],
            "handed_over": self.handed_over,
        }

    def add(self, told: dict[str, Any]) -> None:
        """Add what another process has counted."""
        self._up += told["moved"][0]
        self._down += told["moved"][1]
        if told["handed_over"] is not None:
            self.handed_over = (self.handed_over or 0) + told["handed_over"]
        for reason, count in told["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for kind, (seconds, buckets) in told["latencies"].items():
            latency = self.latencies[kind]
            latency.seconds += seconds
            latency.buckets = [
                ours + theirs for ours, theirs in zip(latency.buckets, buckets, strict=True)
            ]
        for host in told["hosts"]:
            figures = self._find(host["host"], host["owner"])
            figures.add(host)
            if figures.last:
                self._refused[figures.host] = None

    def uptime(self) -> float:
        """Return how many seconds it has been counted for."""
        return time.monotonic() - self._began

    def show(self) -> dict[str, Any]:
        """Return what is told of all hosts together."""
        latencies = {kind: each.show() for kind, each in self.latencies.items()}
        shown: dict[str, Any] = {"reasons": self.reasons, "seconds": latencies}
        if self.handed_over is not None:
            shown["handed_over"] = self.handed_over
        return shown

    def served(self, host: str, owner: int | None) -> HostFigures:
        """Count a connection that is served from now on; its end is to be told to what is returned.

        Args:
            host: whose.
            owner: to whom that host belongs now; None if that is not known. What was counted for
                another owner is forgotten: it is none of the new one's business.
        """
        figures = self._find(host, owner)
        figures.served += 1
        return figures

    def hand_over(self, host: str, owner: int | None) -> HostFigures:
        """Count a connection that its backend has got itself, and that has ended for us.

        Args:
            host: whose, as for `served`; and so is what is returned.
            owner: likewise.
        """
        figures = self.served(host, owner)
        figures.handed_over += 1
        self.handed_over = (self.handed_over or 0) + 1
        return figures

    def moved(self) -> tuple[int, int]:
        """Return the bytes there and back of all connections that have ended."""
        self._fold()
        up, down = self._up, self._down
        for figures in (*self.hosts.values(), *self._others):
            up += figures.up
            down += figures.down
        return up, down

    def refused(self, reason: str) -> None:
        """Count a client that was refused."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def refused_at(
        self, host: str, owner: int | None, reason: str, client: str, detail: str | None
    ) -> None:
        """Count a client that was refused at a host, for the host alone, and keep why.

        Args:
            host: what it has asked for; there is such a host.
            owner: as for `served`.
            reason: a word, as the owner may hear it.
            client: its address.
            detail: the reason in more words, likewise.
        """
        figures = self._find(host, owner)
        figures.refused += 1
        if figures.reasons is None:
            figures.reasons = {}
        figures.reasons[reason] = figures.reasons.get(reason, 0) + 1
        self._keep(figures, Event(time.time(), client, reason, detail and detail[:_LONGEST_DETAIL]))

    def note(self, figures: HostFigures, client: str, reason: str, detail: str) -> None:
        """Keep something that went wrong with a connection that was served."""
        if self.hosts.get(figures.host) is not figures:
            return  # it has another owner since, or was forgotten
        self._keep(figures, Event(time.time(), client, reason, detail))

    def left(self, up: int, down: int) -> None:
        """Count a connection that has ended, and was counted for no host."""
        self._up += up
        self._down += down

    def _fold(self) -> None:
        """Let go of hosts that are not among ours, and have no connection any more."""
        others = self._others
        self._others = [figures for figures in others if not figures.is_idle()]
        for figures in others:
            if figures.is_idle():
                self.left(figures.up, figures.down)

    def _keep(self, figures: HostFigures, event: Event) -> None:
        self._refused.pop(figures.host, None)
        self._refused[figures.host] = None
        if figures.last is None:
            figures.last = deque(maxlen=_MOST_LAST)
            if len(self._refused) > _MOST_REFUSED:
                oldest = next(iter(self._refused))
                del self._refused[oldest]
                if oldest in self.hosts:
                    self.hosts[oldest].last = None
        figures.last.append(event)

    def _find(self, host: str, owner: int | None) -> HostFigures:
        """Return the figures of a host that belongs to `owner`, new ones if there are none."""
        figures = self.hosts.get(host)
        if figures is None or (figures.owner != owner and owner is not None):
            figures = self._add(host, owner)
        return figures

    def _add(self, host: str, owner: int | None) -> HostFigures:
        figures = HostFigures(host, owner, self.on_left)
        self._refused.pop(host, None)
        before = self.hosts.get(host)
        is_full = before is None and len(self.hosts) >= _MOST_HOSTS and not self._forget_one()
        if is_full or before is not None:
            # Whose bytes are counted in all alone from now on.
            if len(self._others) >= _MOST_OTHERS:
                self._fold()
            self._others.append(figures if before is None else before)
        if not is_full:
            self.hosts[host] = figures
        return figures

    def _forget_one(self) -> bool:
        """Forget the host that has been known the longest, of those that nobody is connected to."""
        for _ in range(_MOST_LOOKS):
            host = next(iter(self.hosts))
            figures = self.hosts.pop(host)
            if figures.is_idle():
                self.left(figures.up, figures.down)
                self._refused.pop(host, None)
                return True
            self.hosts[host] = figures
        return False
