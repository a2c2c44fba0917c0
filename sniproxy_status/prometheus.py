"""The text format 0.0.4 of Prometheus, for node_exporter's textfile collector.

Each host is several time series, and a database of those suffers from many. So hosts are bounded:
those with the most connections so far. There is no series for the others together, as it would
fall whenever one of them comes among the most.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from sniproxy_status.reading import Latency, Report

# Each of 1,000 hosts is some ten series: as much as one target should have.
MOST_HOSTS: Final = 1000

# Buckets that are shown, of those that are counted: 2**N microseconds, from 16 microseconds to 17
# seconds, each four times the one before. Always the same: a series is not to begin late.
_BUCKETS: Final = 25
_BOUNDS: Final = range(4, _BUCKETS, 2)

_PREFIX: Final = "sniproxy"

_HANDED_OVER: Final = "Of those served, those that backends have got themselves."

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]  # what is behind the metric's name, its labels, and its value


def show(report: Report, path: str, most_hosts: int = MOST_HOSTS) -> Iterator[str]:
    """Yield the lines of a report.

    Args:
        report: what was told.
        path: of the socket; it tells apart the same program when it is started twice.
        most_hosts: how many hosts have series of their own.
    """
    here = {
        "program": report.program,
        "socket": os.fsencode(path).decode("utf-8", "backslashreplace"),
    }
    yield from _metric("uptime_seconds", "gauge", "Since when it is counted.", [
        ("", here, report.uptime())
    ])  # fmt: skip
    yield from _metric("processes", "gauge", "Processes that serve.", [
        ("", here, len(report.processes))
    ])  # fmt: skip
    if (total := report.total) is not None:
        yield from _metric("connections_open", "gauge", "Connections that are open.", [
            ("", here, total.open)
        ])  # fmt: skip
        yield from _metric("connections_served_total", "counter", "Connections served so far.", [
            ("", here, total.served)
        ])  # fmt: skip
        if report.hands_over:
            yield from _metric("connections_handed_over_total", "counter", _HANDED_OVER, [
                ("", here, total.handed_over)
            ])  # fmt: skip
        yield from _metric("connections_refused_total", "counter", "Clients refused so far.", [
            ("", here | {"reason": reason}, count)
            for reason, count in sorted(total.reasons.items())
        ])  # fmt: skip
        yield from _metric("bytes_total", "counter", "Bytes from clients (up) and to them.", [
            ("", here | {"direction": "up"}, total.up),
            ("", here | {"direction": "down"}, total.down),
        ])  # fmt: skip
    for kind, latency in sorted(report.latencies.items()):
        samples = _histogram(here, latency)
        yield from _metric(f"{kind}_seconds", "histogram", f"How long it took: {kind}.", samples)
    yield from _show_hosts(report, here, most_hosts)


def _show_hosts(report: Report, here: dict[str, str], most_hosts: int) -> Iterator[str]:
    hosts = sorted(
        report.hosts.values(), key=lambda host: (-host.served - host.refused, host.host)
    )[:most_hosts]
    of = {host.host: here | {"host": host.host} for host in hosts}
    yield from _metric("host_connections_open", "gauge", "Connections of a host.", [
        ("", of[host.host], host.open) for host in hosts
    ])  # fmt: skip
    yield from _metric("host_connections_served_total", "counter", "Those served so far.", [
        ("", of[host.host], host.served) for host in hosts
    ])  # fmt: skip
    if report.hands_over:
        yield from _metric("host_connections_handed_over_total", "counter", _HANDED_OVER, [
            ("", of[host.host], host.handed_over) for host in hosts
        ])  # fmt: skip
    yield from _metric("host_connections_refused_total", "counter", "Those refused so far.", [
        ("", of[host.host] | {"reason": reason}, count)
        for host in hosts
        for reason, count in sorted(host.reasons.items())
    ])  # fmt: skip
    yield from _metric("host_bytes_total", "counter", "Bytes of a host, up and down.", [
        ("", of[host.host] | {"direction": direction}, size)
        for host in hosts
        for direction, size in (("up", host.up), ("down", host.down))
    ])  # fmt: skip


def _histogram(here: dict[str, str], latency: Latency) -> Iterator[Sample]:
    seen = 0
    for number in range(_BUCKETS):
        seen += latency.buckets.get(number, 0)
        if number in _BOUNDS:
            yield "_bucket", here | {"le": repr(2**number / 1e6)}, seen
    yield "_bucket", here | {"le": "+Inf"}, latency.count
    yield "_sum", here, latency.seconds
    yield "_count", here, latency.count


def _metric(name: str, kind: str, told: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {_PREFIX}_{name} {told}"
    yield f"# TYPE {_PREFIX}_{name} {kind}"
    for suffix, labels, value in samples:
        shown = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        yield f"{_PREFIX}_{name}{suffix}{{{shown}}} {value!r}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
