"""The daemon's command line, its environment and its exit codes."""

import argparse
import contextlib
import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from syslog import LOG_ERR
from typing import NoReturn

import trio

from sniproxy import __version__
from sniproxy.config import Config
from sniproxy.engine import descriptors, privileges, sandbox, standard
from sniproxy.engine.listener import NotListening, take_listening_socket
from sniproxy.engine.notify import Notifier
from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.engine.signals import Signals
from sniproxy.engine.syslogd import Syslog
from sniproxy.engine.workers import Worker, Workers
from sniproxy.fatal import FatalError, UsageError, attempt, print_out
from sniproxy.hosts import HostsDirectory
from sniproxy.log import Log
from sniproxy.serve import serve
from sniproxy_hostname import directory_namer

# More than any machine has processors. Each takes some ten megabytes.
_MOST_WORKERS = 1024

# More descriptors than that no process has.
_MOST_CONNECTIONS = 10**9 - 1

# What keeps the hosts directory from being searched until somebody mends it.
_NO_HOSTS = {errno.EACCES, errno.ENOENT, errno.ENOTDIR}

_DESCRIPTION = """\
Route TLS connections by server name to Unix sockets, without decrypting them.

Standard input is a listening TCP socket. The working directory is the hosts
directory: NAME/tls-socket is the socket of the host NAME, and a file
NAME/send-proxy-v1 makes its connections begin with a PROXY protocol header.
SIGHUP stops accepting and ends when the last connection has ended, or after
ten seconds.
"""
_HOW_TO_CALL = "sniproxy-listen :443 sniproxy"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"unable to understand the options: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the arguments `argv`; return its exit code."""
    # Until we serve, SIGINT ends us as it ends any program, not by an exception somewhere.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # From inetd standard error is the socket. It is connected before the root directory changes.
    syslogd = Syslog("sniproxy") if 2 in standard.copies_of_input() else None
    try:
        config = _config(argv)
        if config is not None:
            _run(config, syslogd)
    except FatalError as error:
        _complain(f"fatal: {error}", syslogd)
        return error.code
    finally:
        if syslogd is not None:
            syslogd.close()
    return 0


def _complain(message: str, syslogd: Syslog | None) -> None:
    if syslogd is not None:
        syslogd.write(LOG_ERR, message)
    else:
        with contextlib.suppress(OSError):  # nobody is left to tell
            os.write(2, f"sniproxy: {message}\n".encode(errors="backslashreplace"))


def _config(argv: Sequence[str] | None) -> Config | None:
    """Return what the options ask for; None if that was only to be told something."""
    parser = _Parser(
        prog="sniproxy",
        description=_DESCRIPTION,
        epilog=f"For example: cd /srv/hosts && {_HOW_TO_CALL}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "--hashed",
        action="store_true",
        help="the directories are named by the BLAKE3 of the hostname, 64 hex digits",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="serve with N processes, for more than one processor (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections",
        type=_connections,
        metavar="N",
        help="hold no more than N connections at a time, all processes together "
        "(default: what RLIMIT_NOFILE suffices for)",
    )
    parser.add_argument(
        "--chroot",
        action="store_true",
        help="make the hosts directory the root directory (needs root)",
    )
    parser.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        help="become that user, for good, before anything is accepted (needs root)",
    )
    parser.add_argument(
        "--no-sandbox",
        action="store_true",
        help="keep the rights to open files and the like, which serving does without",
    )
    parser.add_argument(
        "--no-owner-check",
        action="store_true",
        help="connect to any socket that a host's directory leads to, whoever listens there",
    )
    parser.add_argument(
        "--log",
        choices=("errors", "connections"),
        default="errors",
        help="log what went wrong, or also a line for each connection (default: %(default)s)",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    parser.add_argument("--version", action="store_true", help="print the version")
    options, unknown = parser.parse_known_args(argv)
    if options.help:
        print_out(parser.format_help())
        return None
    if options.version:
        print_out(f"sniproxy {__version__}\n")
        return None
    if unknown:
        parser.error(f"{unknown[0]!a} is none (see sniproxy --help)")
    if options.max_connections is not None and options.max_connections < options.workers:
        parser.error(f"--max-connections {options.max_connections} is not one for each worker")
    return Config(
        hashed=options.hashed,
        workers=options.workers,
        max_connections=options.max_connections,
        chroot=options.chroot,
        user=options.user,
        sandbox=not options.no_sandbox,
        check_owner=not options.no_owner_check,
        log_connections=options.log == "connections",
    )


def _number(text: str, most: int) -> int:
    # No more digits than that: int() refuses thousands of them in words of its own.
    if re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!a} is no number from 1 to {most}")


_workers = partial(_number, most=_MOST_WORKERS)
_connections = partial(_number, most=_MOST_CONNECTIONS)


def _run(config: Config, syslogd: Syslog | None) -> None:
    try:
        standard.fill_gaps()
        listening = take_listening_socket(0)
    except NotListening as error:
        raise UsageError(
            "unable to accept connections: standard input must be a listening TCP socket, but "
            f"{error}; pass one like this: {_HOW_TO_CALL}",
        ) from None
    except OSError as error:
        raise FatalError.of("use the socket on standard input", error) from error
    # All that is needed later is opened now: there may be no way to it in another root directory,
    # for another user, or in the sandbox.
    with attempt("start"):
        standard.let_go_of_input()
        log = Log(syslogd)
    try:
        share = descriptors.share(descriptors.raise_limit(), MOST_PIPES)
    except ValueError as error:
        raise FatalError(f"unable to serve a connection: {error}") from None
    if config.max_connections is not None:
        each = config.max_connections // config.workers
        share = share._replace(connections=min(share.connections, each))
    try:
        namer = directory_namer(config.hashed)
    except ImportError as error:
        raise UsageError(
            f"unable to hash names: Python's package blake3 is needed: {error}"
        ) from None
    notifier = Notifier()
    _drop_privileges(config)
    if syslogd is not None and config.chroot:
        syslogd.stay()
    try:
        hosts = HostsDirectory(namer, check_owner=config.check_owner)
    except OSError as error:
        kind = UsageError if error.errno in _NO_HOSTS else FatalError
        raise kind.of("search the hosts directory (the working directory)", error) from None
    with attempt("enter the sandbox (--no-sandbox does without)"):
        forbidden = sandbox.enter() if config.sandbox else ["nothing"]
    log.event("sandbox", forbids=",".join(forbidden))
    # What is here now stays: the collector need not look at it again.
    gc.freeze()
    orders: Signals | Worker = Signals()
    tells: Notifier | Worker = notifier
    try:
        if config.workers > 1:
            with attempt("start the workers"):
                worker = Workers(config.workers, notifier, log.worker_died).run(listening.close)
            if worker is None:
                return
            log.worker = worker.number
            orders = tells = worker
        try:
            trio.run(partial(serve, listening, hosts, config, share, log, orders, tells))
        except Exception as error:  # noqa: BLE001 - it is told in the log, and then in short
            # A bug, or no descriptors are left by now.
            log.bug(error)
            raise FatalError("unable to serve: the lines before this one say why") from None
    finally:
        notifier.close()
        hosts.close()


def _drop_privileges(config: Config) -> None:
    """Change the root directory and the user, if that was asked for."""
    identity = None
    if config.user is not None:
        try:
            identity = privileges.look_up(config.user)
        except privileges.IdentityError as error:
            message = f"unable to become the user {config.user!a}: {error}"
            raise UsageError(message) from None
    if config.chroot:
        with attempt("make the hosts directory the root directory"):
            privileges.enter_root()
    if identity is not None:
        with attempt(f"become the user {config.user!a}"):
            privileges.become(identity)
    if config.chroot or identity is not None:
        with attempt("drop all capabilities"):
            privileges.drop_capabilities()


if __name__ == "__main__":
    sys.exit(main())
