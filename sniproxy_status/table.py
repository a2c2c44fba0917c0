"""A report for people, in lines."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from sniproxy_status.reading import Counts, Host, Latency, Report

_BOLD, _RED, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

# Columns of a host's name before the others are moved to the right.
_WIDEST_NAME: Final = 40

_HEADINGS: Final = ("open", "served", "refused", "up", "down")
_HANDED_OVER: Final = "handed over"


def show(
    report: Report,
    *,
    now: float,
    with_refusals: bool,
    is_coloured: bool = False,
    before: Report | None = None,
    seconds: float = 1.0,
) -> Iterator[str]:
    """Yield the lines.

    Args:
        report: what was told.
        now: the time, in Unix time.
        with_refusals: whether the last refusals of each host are shown.
        is_coloured: whether a terminal shows them.
        before: what was told some time ago, for what happens in a second; None for no such column.
        seconds: how long ago that was.
    """

    def bold(text: str) -> str:
        return f"{_BOLD}{text}{_PLAIN}" if is_coloured else text

    pids = " ".join(str(process.pid) for process in report.processes)
    up = show_seconds(report.uptime())
    yield bold(f"{report.program} {report.version}, process {pids}, up {up}")
    if report.total is not None:
        yield from _show_total(report.total, before.total if before else None, seconds)
    for kind, latency in sorted(report.latencies.items()):
        if latency.count:
            yield f"{kind}: {_show_latency(latency)}"
    hosts = sorted(
        report.hosts.values(),
        key=lambda host: (-host.open, -host.served - host.refused, host.host),
    )
    yield ""
    yield from _show_hosts(hosts, now, bold, before, seconds, is_coloured=is_coloured)
    if with_refusals:
        for host in hosts:
            if host.last:
                yield ""
                yield bold(printable(host.host))
                for refusal in host.last:
                    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(refusal.time))
                    told = f"{when}  {refusal.client}  {refusal.reason}  {refusal.detail or ''}"
                    yield f"  {printable(told).rstrip()}"


def _show_total(total: Counts, before: Counts | None, seconds: float) -> Iterator[str]:
    handed_over = f" ({total.handed_over} handed over)" if total.handed_over else ""
    line = (
        f"{total.open} open, {total.served} served{handed_over}, {total.refused} refused, "
        f"{show_bytes(total.up)} up, {show_bytes(total.down)} down"
    )
    if before is not None:
        served = max(total.served - before.served, 0) / seconds
        moved = max(total.up + total.down - before.up - before.down, 0) / seconds
        line += f"; {served:.1f} connections and {show_bytes(moved)} in a second"
    yield line
    if total.reasons:
        most = sorted(total.reasons.items(), key=lambda each: (-each[1], each[0]))
        yield "refused: " + ", ".join(f"{printable(reason)} {count}" for reason, count in most)


def _show_latency(latency: Latency) -> str:
    mean = latency.seconds / latency.count
    half, most = latency.below(0.5), latency.below(0.99)
    assert half is not None
    assert most is not None
    return f"mean {_short(mean)}, half below {_short(half)}, 99 % below {_short(most)}"


def _show_hosts(
    hosts: Sequence[Host],
    now: float,
    bold: Callable[[str], str],
    before: Report | None,
    seconds: float,
    *,
    is_coloured: bool,
) -> Iterator[str]:
    names = [printable(host.host) for host in hosts]
    width = max(min(max(map(len, names), default=0), _WIDEST_NAME), len("host"))
    heading = f"{'host':<{width}}" + "".join(f"  {each:>9}" for each in _HEADINGS)
    hands_over = any(host.handed_over for host in hosts)
    if hands_over:
        heading += f"  {_HANDED_OVER}"
    if before is not None:
        heading += f"  {'per sec.':>9}"
    yield bold(f"{heading}  last refusal")
    for name, host in zip(names, hosts, strict=True):
        cells = [
            str(host.open), str(host.served), str(host.refused),
            show_bytes(host.up), show_bytes(host.down),
        ]  # fmt: skip
        if hands_over:
            cells.append(f"{host.handed_over:>{len(_HANDED_OVER)}}")
        if before is not None:
            known = before.hosts.get(host.host)
            new = host.served - known.served if known is not None else host.served
            cells.append(f"{max(new, 0) / seconds:.1f}")
        line = f"{name:<{width}}" + "".join(f"  {cell:>9}" for cell in cells)
        if host.last:
            last = host.last[-1]
            told = f"{printable(last.reason)}, {show_seconds(max(now - last.time, 0))} ago"
            line += f"  {_RED}{told}{_PLAIN}" if is_coloured else f"  {told}"
        yield line


def show_bytes(size: float) -> str:
    """Return a size with the unit that suits it."""
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def show_seconds(seconds: float) -> str:
    """Return a time in the two largest of its units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _short(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def printable(text: str) -> str:
    """Return `text` with what a terminal would obey escaped: names and details are tenants'."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )
