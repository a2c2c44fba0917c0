"""The command `sniproxy-status`: what a service has counted, for whoever may know."""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, NoReturn

from sniproxy import __version__
from sniproxy.service.fatal import FatalError, UsageError, print_out
from sniproxy.service.options import OptionParser
from sniproxy_status import prometheus, table
from sniproxy_status.reading import Report, read

# What shells say of a program that SIGINT has ended: what was written is not all.
_INTERRUPTED: Final = 130

# Seconds between two looks of --watch: as top has it, or less.
_EVERY: Final = 1.0

# To the upper left corner, each line's rest erased, and then all below: without flicker.
_HOME, _ERASE_LINE, _ERASE_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_CLEAR: Final = "\x1b[2J"

_DESCRIPTION = """\
Show what a service has counted, which tells that at its status socket, PATH.
Root and the user of the service see all hosts, others those that they own, with
the last refusals of each. With HOST, only these, and their last refusals.
"""
_EXIT_CODES = """\
Exit codes: 0 it was shown, 100 called wrongly, 111 nothing can be read there.
"""
_EXAMPLE = "sniproxy-status /run/sniproxy/status one.example"


def main(argv: Sequence[str] | None = None) -> int:
    """Show the status with the arguments `argv`; return the exit code."""
    try:
        _run(argv)
    except FatalError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 0  # who has seen enough closes the pipe
        print(f"sniproxy-status: fatal: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("sniproxy-status", _DESCRIPTION, _EXAMPLE)
    parser.epilog = f"{_EXIT_CODES}\n{parser.epilog}"
    parser.add_argument("path", nargs="?", metavar="PATH", help="the status socket")
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="a host (default: all)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--json", action="store_true", help="tell it as JSON")
    ways.add_argument(
        "--prometheus",
        action="store_true",
        help="tell it in the text format of Prometheus, for node_exporter's textfile collector",
    )
    ways.add_argument("--watch", action="store_true", help="show it anew each second")
    parser.add_argument(
        "--most-hosts",
        type=_number,
        default=prometheus.MOST_HOSTS,
        metavar="N",
        help="with --prometheus: tell of the N hosts with the most connections "
        "(default: %(default)s)",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    parser.add_argument("--version", action="store_true", help="print the version")
    return parser


def _number(text: str) -> int:
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!a} is no number")


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.help:
        return print_out(parser.format_help())
    if options.version:
        return print_out(f"sniproxy-status {__version__}\n")
    if options.path is None:
        parser.error("the PATH of a status socket is missing (see sniproxy-status --help)")
    if options.watch:
        return _watch(options.path, options.hosts)
    report = _read(options.path, options.hosts)
    if options.json:
        return print_out(json.dumps(_document(report), indent=1) + "\n")
    if options.prometheus:
        lines = prometheus.show(report, options.path, options.most_hosts)
    else:
        lines = table.show(
            report,
            now=time.time(),
            with_refusals=bool(options.hosts) or report.total is None,
            is_coloured=os.isatty(1) and "NO_COLOR" not in os.environ,
        )
    print_out("".join(f"{line}\n" for line in lines))
    unknown = [host for host in options.hosts if _canonical(host) not in report.hosts]
    for host in unknown if not options.prometheus else ():
        print_out(f"nothing is known of {table.printable(host)}\n")


def _canonical(host: str) -> str:
    return host.lower().removesuffix(".")


def _read(path: str, hosts: Sequence[str]) -> Report:
    """Return what is told of the hosts that were named; of all if none was.

    Raises:
        FatalError: it can't be read.
    """
    report = read(path)
    if hosts:
        wanted = {_canonical(host) for host in hosts}
        report.hosts = {name: host for name, host in report.hosts.items() if name in wanted}
    return report


def _document(report: Report) -> dict[str, Any]:
    document: dict[str, Any] = {
        "program": report.program,
        "version": report.version,
        "processes": [asdict(process) for process in report.processes],
    }
    if report.total is not None:
        document["total"] = asdict(report.total)
        document["seconds"] = {
            kind: {
                "count": latency.count,
                "sum": latency.seconds,
                "buckets": {str(2**n / 1e6): latency.buckets[n] for n in sorted(latency.buckets)},
            }
            for kind, latency in report.latencies.items()
        }
    document["hosts"] = [asdict(report.hosts[name]) for name in sorted(report.hosts)]
    return document


def _watch(path: str, hosts: Sequence[str]) -> None:
    """Show it again and again, until somebody presses ^C.

    Raises:
        UsageError: there is nobody who could see it.
    """
    if not os.isatty(1):
        raise UsageError("unable to watch: standard output is no terminal")
    is_coloured = "NO_COLOR" not in os.environ
    print_out(_CLEAR)
    with contextlib.suppress(KeyboardInterrupt):
        _watch_for_ever(path, hosts, is_coloured=is_coloured)


def _watch_for_ever(path: str, hosts: Sequence[str], *, is_coloured: bool) -> NoReturn:
    before: Report | None = None
    seen_at = 0.0
    while True:
        size = shutil.get_terminal_size()
        try:
            now = time.monotonic()
            report = _read(path, hosts)
        except FatalError as error:
            # It may be started anew in a moment.
            lines = ["trying again:", str(error)]
        else:
            lines = list(
                table.show(
                    report,
                    now=time.time(),
                    with_refusals=bool(hosts) or report.total is None,
                    is_coloured=is_coloured,
                    before=before,
                    seconds=max(now - seen_at, 0.001),
                )
            )
            before, seen_at = report, now
        fitting = [_cut(line, size.columns) for line in lines[: size.lines - 1]]
        shown = "".join(f"{line}{_ERASE_LINE}\n" for line in fitting)
        print_out(f"{_HOME}{shown}{_ERASE_BELOW}")
        time.sleep(_EVERY)


def _cut(line: str, columns: int) -> str:
    """Return as much of a line as the terminal has columns for, escape sequences not counted."""
    shown, left = "", columns
    for part in re.split(r"(\x1b\[[0-9]*m)", line):
        if part.startswith("\x1b"):
            shown += part
        else:
            shown += part[:left]
            left -= len(part[:left])
    return shown


if __name__ == "__main__":
    sys.exit(main())
