"""The command line of tls-tproxy, and its start: what takes privileges, and then giving them up."""

# First of all: until it is loaded, process 1 loses signals.
import sniproxy.service.process1  # noqa: F401  # isort: skip

import pwd
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from mutual_tls.identity import Files, Identities
from mutual_tls.netfilter.command import Cgroup
from mutual_tls.netfilter.memory import NO_MEMORY
from mutual_tls.netfilter.table import Nft, NftError
from mutual_tls.redirected import LOOPBACK, listen, marking_capabilities, open_nft, port_option
from mutual_tls.session import LATENCIES
from mutual_tls.start import enter_sandbox, give_up_privileges
from sniproxy.service import standard
from sniproxy.service.fatal import FatalError, UsageError, attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import OptionParser, service_fields
from sniproxy.service.start import (
    open_status_socket,
    run_program,
    run_service,
    share_descriptors,
)
from sniproxy.service.syslogd import Syslog
from tls_tproxy.checkers import Checkers, UnknownCheckerError
from tls_tproxy.config import Config
from tls_tproxy.log import Log
from tls_tproxy.names import Names, open_packet_socket
from tls_tproxy.redirect import Redirection, stop_refusing
from tls_tproxy.serve import Watch, serve, show_ports
from tls_tproxy.wrap import Wrap, parse_port_map

_PROGRAM: Final = "tls-tproxy"

_DESCRIPTION = """\
Put mutual TLS around programs of this machine that have none.

A program connects in plaintext to a port that is taken; the kernel redirects
the connection to us, and it leaves with TLS and our certificate, for the name
that the program has looked up in the DNS. Which ports, names and certificates,
the directory wrap/ says, or the options. It takes root at the start, or
CAP_NET_ADMIN and CAP_NET_RAW.
"""
_EXAMPLE = "tls-tproxy --cert cert.pem --key key.pem --cacert ca.pem --portMap 8443:443"

# What may be a link in the working directory, or has links in it; see `wrap`.
_ENTRIES: Final = ("wrap", "wrap/*", "wrap/names/*", "wrap/names/*/*")

# Descriptors that one connection takes beside the two that every program counts.
_NO_PIPES: Final = 0

# The levels of the first tls-tproxy's log, and whether connections are logged at each.
_LEVELS: Final = {
    **dict.fromkeys(("panic", "fatal", "error", "warn", "warning"), False),
    **dict.fromkeys(("info", "debug", "trace"), True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run tls-tproxy with the arguments `argv`; return its exit code."""
    return run_program(_PROGRAM, partial(_run, argv))


def _read_options(argv: Sequence[str] | None) -> tuple[Config, bool] | None:
    """Return what the options say, and whether to remove what fail-closed has left, and end."""
    parser = OptionParser(_PROGRAM, _DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "--portMap",
        type=_port_map,
        default={},
        metavar="FROM:TO[,FROM:TO...]",
        help="take connections to port FROM, which leave to port TO",
    )
    parser.add_argument("--cert", metavar="FILE", help="the certificate to show, and its chain")
    parser.add_argument("--key", metavar="FILE", help="its key")
    parser.add_argument(
        "--cacert",
        metavar="FILE",
        help="the authorities that servers' certificates are to be of (default: the system's)",
    )
    parser.add_argument(
        "--certCheckerPlugin",
        metavar="NAME",
        help="ask that certificate checker, too: san, spki-pin, or a plugin",
    )
    parser.add_argument(
        "--user-only",
        type=_user,
        action="append",
        default=[],
        metavar="NAME",
        help="take connections of this user's programs only; may be given several times",
    )
    parser.add_argument(
        "--cgroup",
        type=_cgroup,
        metavar="PATH",
        help="take connections of the programs in this control group only, such as /a.slice",
    )
    parser.add_argument(
        "--port",
        type=port_option,
        default=0,
        metavar="PORT",
        help="the port of ours, on the loopback addresses, to which they are redirected "
        "(default: any)",
    )
    parser.add_argument(
        "--fail-closed",
        action="store_true",
        help="refuse those connections when we have ended, however that was (needs --port)",
    )
    parser.add_argument(
        "--stop-refusing",
        action="store_true",
        help="remove what --fail-closed has left for --port, and end",
    )
    parser.add_argument(
        "--logLevel",
        choices=_LEVELS,
        metavar="LEVEL",
        help="the same as --log: connections from info on, errors before",
    )
    parser.add_service_options()

    def check(options: Namespace) -> None:
        if bool(options.cert) != bool(options.key):
            parser.error("--cert and --key go together")
        if options.cacert and not options.cert:
            parser.error("--cacert goes with --cert and --key")
        for word in "fail_closed", "stop_refusing":
            if getattr(options, word) and not options.port:
                parser.error(f"--{word.replace('_', '-')} needs --port: the rules are known by it")

    options = parser.understand(argv, check)
    if options is None:
        return None
    config = Config(
        ports=options.portMap,
        identity=_files(options),
        checker=options.certCheckerPlugin,
        users=tuple(options.user_only),
        cgroup=options.cgroup,
        port=options.port,
        fail_closed=options.fail_closed,
        **service_fields(options),
    )
    if options.logLevel:
        config = replace(config, log_connections=_LEVELS[options.logLevel])
    return config, options.stop_refusing


def _files(options: Namespace) -> Files | None:
    if not options.cert:
        return None
    # As they are: with --chroot, they are looked for in the new root directory.
    return Files(options.cert, options.key, options.cacert)


def _port_map(text: str) -> dict[int, int]:
    try:
        return parse_port_map(text)
    except ValueError as error:
        raise ArgumentTypeError(f"unable to understand {text!a}: {error}") from None


def _user(text: str) -> int:
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        # Ids have 32 bits, and the highest of them stands for "as it is".
        if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < (1 << 32) - 1:
            return int(text)
        raise ArgumentTypeError(f"there is no user {text!a}") from None


def _cgroup(text: str) -> Cgroup:
    try:
        return Cgroup.find(text)
    except (ValueError, OSError) as error:
        raise ArgumentTypeError(str(error)) from None


def _run(argv: Sequence[str] | None, syslogd: Syslog | None) -> None:
    understood = _read_options(argv)
    if understood is None:
        return
    config, is_to_stop_refusing = understood
    if not is_to_stop_refusing and not config.ports and not Path("wrap").is_dir():
        raise UsageError("unable to wrap anything: there is no --portMap, and no directory wrap")
    with attempt("start"):
        standard.open_missing()
        standard.replace_copies_of_input()
        log = Log(syslogd)
        log.is_json = config.log_json
    with ExitStack() as ends:
        nft = open_nft(config)
        ends.callback(nft.close)
        try:
            if is_to_stop_refusing:
                stop_refusing(nft, config.port)
            else:
                _serve(config, log, nft, ends)
        except NftError as error:
            raise FatalError(f"unable to redirect connections: {error}") from None


def _serve(config: Config, log: Log, nft: Nft, ends: ExitStack) -> None:
    listening = listen(LOOPBACK, config.port)
    for sock in listening:
        ends.callback(sock.close)
    port: int = listening[0].getsockname()[1]
    status = open_status_socket(config, _PROGRAM, LATENCIES)
    share = share_descriptors(config, _NO_PIPES, log)
    with attempt("watch DNS answers (it takes CAP_NET_RAW)"):
        packets = [ends.enter_context(open_packet_socket()) for _ in range(config.workers)]
    notifier = Notifier()
    ends.callback(notifier.close)
    give_up_privileges(config, marking_capabilities())
    identities = Identities(log.identity)
    directory = Path()
    try:
        wrap = Wrap(
            directory,
            identities,
            Checkers(),
            log.problem,
            ports=config.ports,
            identity=config.identity,
            checker=config.checker,
        )
    except UnknownCheckerError as error:
        raise UsageError(f"unable to check certificates: {error}") from None
    names = [Names(sock, accept_cname=wrap.accepts_cname) for sock in packets]
    entries = (path for each in _ENTRIES for path in directory.glob(each))
    files = [Path(path) for path in config.identity or () if path]
    enter_sandbox(config, log, [directory / "identity", *entries, *files])
    ports = wrap.ports()
    try:
        redirection = Redirection(
            nft,
            port,
            ports,
            users=config.users,
            cgroup=config.cgroup,
            fail_closed=config.fail_closed,
        )
    except ValueError as error:  # our own port is among them
        kind = UsageError if config.port else FatalError  # the next start has another one
        raise kind(f"unable to redirect connections: {error}") from None
    if not redirection.remembers:
        log.problem(NO_MEMORY)
    log.ports(show_ports(ports))

    watch = Watch(wrap, nft, redirection, log)

    def stop_listening() -> None:
        for sock in listening:
            sock.close()
        watch.stop()

    run_service(
        config,
        log,
        notifier,
        partial(serve, listening, wrap, names, watch.stop, config, share, log, status=status),
        stop_listening,
        watch.look,
        status,
    )


if __name__ == "__main__":
    sys.exit(main())
