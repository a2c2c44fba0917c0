"""The options that every program has, and how options are understood."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from sniproxy import __version__
from sniproxy.service import bind, privileges
from sniproxy.service.fatal import UsageError, print_out

# More than any machine has processors. Each takes some ten megabytes.
_MOST_WORKERS = 1024

# More descriptors than that no process has.
_MOST_CONNECTIONS = 10**9 - 1

# A day: longer than anybody watches a drain.
_LONGEST_DRAIN = 24 * 60 * 60

# A year: who wants longer wants no limit.
_LONGEST_TIMEOUT = 365 * 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """What can be set for every program. The defaults are the contract."""

    # Processes that serve. One keeps a processor busy at ten thousand connections a second.
    workers: int = 1

    # Connections that may be open at a time; None for as many as there are descriptors for.
    max_connections: int | None = None

    # Whether the working directory becomes the root directory, and which user the process becomes.
    chroot: bool = False
    user: str | None = None

    # Whether to give up, where the kernel lets us, all rights that serving does without.
    sandbox: bool = True

    # Whether to write a line for each connection that has ended, not only for those refused; and
    # whether lines are JSON.
    log_connections: bool = False
    log_json: bool = False

    # The path of the socket at which the counts are told; None for none.
    status_socket: str | None = None

    # Seconds that a drain waits for the last connection to end.
    drain_seconds: float = 10.0

    # Seconds after which a connection is ended on which nothing was moved in either direction.
    # 0 is never: TLS carries protocols that are silent for days, and keep-alive notices the dead.
    idle_seconds: float = 0.0

    # The same for a connection one of whose directions has ended. An hour, since many programs
    # never close the other one by themselves, and few go on after such a silence. 0 is never.
    half_closed_seconds: float = 3600.0


class OptionParser(argparse.ArgumentParser):
    """Understands the options that every program has, and those that are added.

    Args:
        program: its name.
        description: what --help says of it.
        example: a command line that works.
        build: what --version says beside the version.
    """

    def __init__(self, program: str, description: str, example: str, build: str = "") -> None:
        super().__init__(
            prog=program,
            description=description,
            epilog=f"For example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self._version = f"{program} {__version__} {build}".rstrip()

    def add_service_options(self) -> None:
        """Add the options that every program has, after its own."""
        self.add_argument(
            "--workers",
            type=_workers,
            default=1,
            metavar="N",
            help="serve with N processes, for more than one processor (default: %(default)s)",
        )
        self.add_argument(
            "--max-connections",
            type=_connections,
            metavar="N",
            help="hold no more than N connections at a time, all processes together "
            "(default: what RLIMIT_NOFILE suffices for)",
        )
        self.add_argument(
            "--drain",
            type=_drain,
            default=10.0,
            metavar="SECONDS",
            help="wait that long for connections to end, once asked to end (default: 10)",
        )
        self.add_argument(
            "--idle-timeout",
            type=_timeout,
            default=0.0,
            metavar="SECONDS",
            help="end a connection that moved no byte for that long; 0 is never (default: 0)",
        )
        self.add_argument(
            "--half-closed-timeout",
            type=_timeout,
            default=3600.0,
            metavar="SECONDS",
            help="the same, once one of its directions has ended (default: 3600)",
        )
        self.add_argument(
            "--chroot",
            action="store_true",
            help="make the working directory the root directory (needs root)",
        )
        self.add_argument(
            "--user",
            metavar="NAME[:GROUP]",
            help="become that user, for good, before anything is accepted (needs root)",
        )
        self.add_argument(
            "--no-sandbox",
            action="store_true",
            help="keep the rights to open files and the like, which serving does without",
        )
        self.add_argument(
            "--log",
            choices=("errors", "connections"),
            default="errors",
            help="log what went wrong, or also a line for each connection (default: %(default)s)",
        )
        self.add_argument(
            "--log-format",
            choices=("text", "json"),
            default="text",
            help="write lines as KEY=VALUE, or each as an object of JSON (default: %(default)s)",
        )
        self.add_argument(
            "--status-socket",
            type=socket_path,
            metavar="PATH",
            help="tell there what was counted, in all and for each host; sniproxy-status reads it",
        )
        self.add_argument(
            "--check-options",
            action="store_true",
            help="say whether the options are right, and end",
        )
        self.add_argument("-h", "--help", action="store_true", help="print this")
        self.add_argument("--version", action="store_true", help="print the version")

    def understand(
        self,
        argv: Sequence[str] | None,
        check: Callable[[argparse.Namespace], None] = lambda options: None,
    ) -> argparse.Namespace | None:
        """Return the options in `argv`; None if they ask to be told something, which is done.

        Args:
            argv: the command line.
            check: called with the options, to say what else is wrong with them, by `error`.

        Raises:
            UsageError: there is something wrong with them.
            FatalError: standard output can't be written.
        """
        options, unknown = self.parse_known_args(argv)
        if options.help:
            print_out(self.format_help())
            return None
        if options.version:
            print_out(f"{self._version}\n")
            return None
        if unknown:
            kind = "option" if unknown[0].startswith("-") else "argument"
            self.error(f"unknown {kind} {unknown[0]!a} (see {self.prog} --help)")
        if options.max_connections is not None and options.max_connections < options.workers:
            self.error(
                f"--max-connections {options.max_connections} is less than one for each of "
                f"{options.workers} workers"
            )
        check(options)
        if options.check_options:
            look_up_user(options.user)
            return None
        return options

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the options.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"unable to understand the options: {message}")


def service_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `ServiceOptions`, as they were given."""
    return {
        "workers": options.workers,
        "max_connections": options.max_connections,
        "chroot": options.chroot,
        "user": options.user,
        "sandbox": not options.no_sandbox,
        "log_connections": options.log == "connections",
        "log_json": options.log_format == "json",
        "status_socket": options.status_socket,
        "drain_seconds": options.drain,
        "idle_seconds": options.idle_timeout,
        "half_closed_seconds": options.half_closed_timeout,
    }


def look_up_user(user: str | None) -> privileges.Identity | None:
    """Return whom the option --user means; None if it was not given.

    Raises:
        UsageError: there is no such user or group.
    """
    if user is None:
        return None
    try:
        return privileges.look_up(user)
    except privileges.IdentityError as error:
        message = f"unable to become the user {user!a}: {error}"
        raise UsageError(message) from None


def _number(text: str, least: int, most: int) -> int:
    # No more digits than that: int() refuses thousands of them in words of its own.
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!a} is not a number from {least} to {most}")


def _seconds(text: str, most: int) -> float:
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and float(text) <= most:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!a} is not a number of seconds from 0 to {most}")


def socket_path(text: str) -> str:
    """Return the path of a Unix socket.

    Raises:
        argparse.ArgumentTypeError: no socket can have it.
    """
    try:
        return bind.check_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"unable to listen on {text!a}: {error}") from None


_workers: Callable[[str], int] = partial(_number, least=1, most=_MOST_WORKERS)
_connections: Callable[[str], int] = partial(_number, least=1, most=_MOST_CONNECTIONS)
_drain: Callable[[str], float] = partial(_seconds, most=_LONGEST_DRAIN)
_timeout: Callable[[str], float] = partial(_seconds, most=_LONGEST_TIMEOUT)
