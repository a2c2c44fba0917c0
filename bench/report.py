"""Results → what people read: a table for a terminal, one for a page, and a plot."""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"


@dataclass(frozen=True)
class Report:
    """What is made of results.

    Attributes:
        title: Of the plot.
        ours: Whose ratios are told.
        compared: To whom: the better of them.
        compiled: The other build of ours, whose ratios are told as well; "" if there is none.
        shown: The rows of table and plot: titles, and the metrics behind them.
        results: Where the figures are kept,
        plot: the bars,
        document: and the table, between its marks.
    """

    title: str
    ours: str
    compared: tuple[str, ...]
    shown: dict[str, str]
    results: Path
    plot: Path
    document: Path
    compiled: str = ""


ROUTING = Report(
    "sniproxy beside the better of HAProxy and nginx",
    "sniproxy",
    ("HAProxy", "HAProxy, splice", "nginx stream"),
    {
        "CPU per connection, µs": "connect: CPU, µs",
        "CPU per connection, 10,000 hosts, µs": "connect, 10,000 hosts: CPU, µs",
        "CPU per connection, PROXY header, µs": "connect, PROXY header: CPU, µs",
        "CPU per connection beside the idle ones, µs": "connect beside idle: CPU, µs",
        "download, s/GB": "bulk down, 1 stream: time, s/GB",
        "download, CPU s/GB": "bulk down, 1 stream: CPU, s/GB",
        "upload, s/GB": "bulk up, 1 stream: time, s/GB",
        "upload, CPU s/GB": "bulk up, 1 stream: CPU, s/GB",
        "8 streams both ways, s/GB": "bulk both, 8 streams: time, s/GB",
        "8 streams both ways, CPU s/GB": "bulk both, 8 streams: CPU, s/GB",
        "round trip of a byte, µs": "ping: round trip, µs",
        "CPU per message, 500 busy connections, µs": "500 busy: CPU, µs",
        "private memory per idle connection, KB": "idle: private memory each, KB",
    },
    ROOT / "bench" / "results.json",
    ROOT / "docs" / "bench.svg",
    ROOT / "docs" / "speed-sniproxy.md",
    "sniproxy, compiled",
)

TLS = Report(
    "tls-bridge beside the best of HAProxy, nginx and stunnel",
    "tls-bridge",
    ("HAProxy", "HAProxy, HTTP", "nginx", "stunnel"),
    {
        f"{title}, {side}{unit}": metric.format(side)
        for title, unit, metric in (
            ("CPU per connection, full handshake", ", µs", "full handshake, {}: CPU, µs"),
            ("CPU per connection, resumed", ", µs", "resumed handshake, {}: CPU, µs"),
            ("download, CPU", ", s/GB", "bulk down, {}: CPU, s/GB"),
            ("upload, CPU", ", s/GB", "bulk up, {}: CPU, s/GB"),
            ("round trip of a byte", ", µs", "ping, {}: round trip, µs"),
            ("memory per idle connection", ", KB", "idle, {}: private memory each, KB"),
            ("the same, busy before", ", KB", "idle after bulk, {}: private memory each, KB"),
        )
        for side in ("ingress", "peer")
    },
    ROOT / "bench" / "tls-results.json",
    ROOT / "docs" / "tls-bench.svg",
    ROOT / "docs" / "speed.md",
)


TPROXY = Report(
    "tls-tproxy beside the best of HAProxy, nginx and stunnel",
    "tls-tproxy",
    ("HAProxy", "nginx", "stunnel"),
    {
        "time per connection, full handshake, µs": "full handshake, ingress: time, µs",
        "CPU per connection, full handshake, µs": "full handshake, ingress: CPU, µs",
        "time per connection, resumed, µs": "resumed handshake, ingress: time, µs",
        "CPU per connection, resumed, µs": "resumed handshake, ingress: CPU, µs",
        "download, s/GB": "bulk down, ingress: time, s/GB",
        "download, CPU, s/GB": "bulk down, ingress: CPU, s/GB",
        "upload, s/GB": "bulk up, ingress: time, s/GB",
        "upload, CPU, s/GB": "bulk up, ingress: CPU, s/GB",
        "round trip of a byte, µs": "ping, ingress: round trip, µs",
        "memory per idle connection, KB": "idle, ingress: private memory each, KB",
        "the same, busy before, KB": "idle after bulk, ingress: private memory each, KB",
    },
    ROOT / "bench" / "tproxy-results.json",
    ROOT / "docs" / "tproxy-bench.svg",
    ROOT / "docs" / "speed-tproxy.md",
)


POD = Report(
    "tproxy-pod beside the best of HAProxy, nginx and stunnel",
    "tproxy-pod",
    ("HAProxy", "nginx", "stunnel"),
    {
        **{
            title.format(way): metric.format(side)
            for title, metric in (
                ("CPU per connection, full handshake, {}, µs", "full handshake, {}: CPU, µs"),
                ("CPU per connection, resumed, {}, µs", "resumed handshake, {}: CPU, µs"),
                ("download, CPU, {}, s/GB", "bulk down, {}: CPU, s/GB"),
                ("upload, CPU, {}, s/GB", "bulk up, {}: CPU, s/GB"),
                ("round trip of a byte, {}, µs", "ping, {}: round trip, µs"),
                ("memory per idle connection, {}, KB", "idle, {}: private memory each, KB"),
                ("the same, busy before, {}, KB", "idle after bulk, {}: private memory each, KB"),
            )
            for side, way in (("ingress", "out"), ("peer", "in"))
        },
        "time per connection, pod to pod, µs": "connect, pod to pod: time, µs",
        "CPU of both per connection, pod to pod, µs": "connect, pod to pod: CPU, µs",
        "download, pod to pod, s/GB": "bulk down, pod to pod: time, s/GB",
        "upload, pod to pod, s/GB": "bulk up, pod to pod: time, s/GB",
        "round trip of a byte, pod to pod, µs": "ping, pod to pod: round trip, µs",
    },
    ROOT / "bench" / "pod-results.json",
    ROOT / "docs" / "pod-bench.svg",
    ROOT / "docs" / "speed-pod.md",
)


@dataclass(frozen=True)
class Results:
    """Medians, and ratios.

    Attributes:
        report: What is made of them.
        machine: What they were measured on.
        rounds: How often.
        slices: And how often in each,
        connect_slices: and for connections.
        idle: How many connections were idle at a time.
        versions: Whom, in the order of the columns.
        medians: For each metric, whose title ends with its unit, the median of each proxy.
        ratios: Ours to the better of those who are compared, whose median is the lower: the median
            of the ratios, each of two values from the same slice. So what slows the machine down
            for a while slows down both. (Where connections are idle, from the same round.)
        compiled: The same of the compiled build.
    """

    report: Report
    machine: str
    rounds: int
    slices: int
    connect_slices: int
    idle: int
    versions: dict[str, str]
    medians: dict[str, dict[str, float]]
    ratios: dict[str, float]
    compiled: dict[str, float]

    @classmethod
    def of(
        cls,
        values: Mapping[str, Mapping[str, Sequence[float]]],
        report: Report,
        versions: dict[str, str],
        rounds: int,
        slices: int,
        connect_slices: int,
        idle: int,
    ) -> "Results":
        """Take the medians of all slices."""
        medians = {
            metric: {name: median(each) for name, each in by_name.items()}
            for metric, by_name in values.items()
        }

        def ratios(name: str) -> dict[str, float]:
            found = {}
            for metric, by_name in values.items():
                others = [name for name in report.compared if name in by_name]
                if name in by_name and others:
                    better = min(others, key=medians[metric].__getitem__)
                    pairs = zip(by_name[name], by_name[better], strict=True)
                    if each := [ours / theirs for ours, theirs in pairs if theirs]:
                        found[metric] = median(each)
            return found

        fixed = report, _machine(), rounds, slices, connect_slices, idle, versions, medians
        return cls(*fixed, ratios(report.ours), ratios(report.compiled))

    def keep(self) -> None:
        """Keep them: as JSON, as a plot, and as the table in a document."""
        report, figures = self.report, asdict(self)
        del figures["report"]
        text = json.dumps(figures, indent=2, ensure_ascii=False)
        report.results.write_text(text + "\n", "utf-8")
        report.plot.write_text(self.plot(), "utf-8")
        before, rest = report.document.read_text("utf-8").split(BEGIN)
        _, after = rest.split(END)
        report.document.write_text(before + BEGIN + self.markdown() + END + after, "utf-8")

    def text(self) -> str:
        """Return all of it as a table."""
        measured = {name for row in self.medians.values() for name in row}
        names = [name for name in self.versions if name in measured]
        names += sorted(measured - set(names))
        told = self._told()
        rows = [["", *names, *told]]
        for metric, medians in self.medians.items():
            cells = [_number(medians[name]) if name in medians else "" for name in names]
            cells += [f"{each[metric]:.2f}" if metric in each else "" for each in told.values()]
            rows.append([metric, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        layout = f"{{:{widths[0]}}}" + "".join(f"{{:>{width + 2}}}" for width in widths[1:])
        lines = [layout.format(*row) for row in rows]
        return "\n".join([self._caption(), "", *lines])

    def markdown(self) -> str:
        """Return the rows that the document shows."""
        names, told = list(self.versions), self._told()
        lines = [
            f"| | {' | '.join([*names, *told])} |",
            f"| --- |{' ---: |' * (len(names) + len(told))}",
        ]
        for title, metric in self.report.shown.items():
            medians = self.medians.get(metric, {})
            cells = [_number(medians[name]) if name in medians else "" for name in names]
            cells += [f"**{each[metric]:.2f}**" if metric in each else "" for each in told.values()]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", self._caption(), ""])

    def plot(self) -> str:
        """Return the same rows as bars, each as a share of what the better peer takes."""
        bars = [
            (title, self.ratios[metric])
            for title, metric in self.report.shown.items()
            if metric in self.ratios
        ]
        unit, left, top, step = 220, 350, 64, 26
        # Room for the longest bar, and for the number at its end.
        longest = max([2.0, *(ratio for _, ratio in bars)])
        width, height = left + round(longest * unit) + 50, top + step * len(bars) + 16
        parts = [
            f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
 width="{width}" height="{height}" font-family="sans-serif" font-size="13">""",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="12" y="24" font-size="16" font-weight="bold">{self.report.title}</text>',
            '<text x="12" y="44" fill="#555">shorter is better; the line is where they are</text>',
        ]
        for row, (title, ratio) in enumerate(bars):
            y = top + row * step
            length = ratio * unit
            colour = "#2a7f62" if ratio <= 1 else "#b5651d"
            title = re.sub(r", (µs|KB|s/GB)$", "", title)
            parts += [
                f'<text x="{left - 10}" y="{y + 14}" text-anchor="end">{title}</text>',
                f'<rect x="{left}" y="{y + 2}" width="{length:.0f}" height="16" fill="{colour}"/>',
                f'<text x="{left + length + 6:.0f}" y="{y + 14}">{ratio:.2f}</text>',
            ]
        line = left + unit
        parts.append(
            f'<line x1="{line}" x2="{line}" y1="{top - 6}" y2="{height - 10}" stroke="#333"'
            ' stroke-dasharray="4 3"/>'
        )
        return "\n".join([*parts, "</svg>", ""])

    def _told(self) -> dict[str, dict[str, float]]:
        """Return the ratios that are told, by the title of their column."""
        told = {"ratio": self.ratios}
        return told | {"ratio, compiled": self.compiled} if self.compiled else told

    def _caption(self) -> str:
        versions = ", ".join(
            f"{name} {version}" for name, version in self.versions.items() if version
        )
        return (
            f"Medians of {self.rounds * self.slices} slices in {self.rounds} rounds, "
            f"{self.rounds * self.connect_slices} for connections, on {self.machine}: {versions}. "
            f"{self.idle:,} connections were idle at a time."
        )


def _number(value: float) -> str:
    """Return three digits of `value`, or as many as stand before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text("utf-8")
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    return (
        f"{os.cpu_count()} processors {model[1] if model else platform.machine()}, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )
