"""The SNI router's command line, and its start."""

# First of all: until it is loaded, process 1 loses signals.
import sniproxy.service.process1  # noqa: F401  # isort: skip

import errno
import sys
from _socket import SO_REUSEPORT, SOL_SOCKET, socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sniproxy.config import Config
from sniproxy.engine.listener import is_multipath
from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.hand_over import HandOver
from sniproxy.hosts import HostsDirectory
from sniproxy.inherited import take_listening_sockets
from sniproxy.log import Log
from sniproxy.serve import serve
from sniproxy.service import privileges, sandbox, standard
from sniproxy.service.fatal import FatalError, UsageError, attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import OptionParser, service_fields
from sniproxy.service.start import (
    drop_privileges,
    open_status_socket,
    run_program,
    run_service,
    share_descriptors,
)
from sniproxy.service.syslogd import Syslog
from sniproxy.session import LATENCIES
from sniproxy_hostname import directory_namer

# What keeps the hosts directory from being searched until somebody mends it.
_NO_HOSTS = {errno.EACCES, errno.ENOENT, errno.ENOTDIR}

_DESCRIPTION = """\
Route TLS connections by server name to Unix sockets, without decrypting them.

Standard input is a listening TCP socket. The working directory is the hosts
directory: NAME/tls-socket is the socket of the host NAME. Beside it, the files
send-proxy-v1 and send-proxy-v2 make its connections begin with a PROXY
protocol header, and hold, with seconds in it, keeps clients while nobody
listens there: sniproxy-hosts(5).
SIGHUP stops accepting and ends when the last connection has ended, or after
ten seconds.
"""
_EXAMPLE = "sniproxy-listen :443 sniproxy"
_HOW_TO_CALL = (
    f"{_EXAMPLE} (in a systemd service: StandardInput=socket, and a socket unit of the same name, "
    "or Sockets=)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the arguments `argv`; return its exit code."""

    def body(syslogd: Syslog | None) -> None:
        config = _config(argv)
        if config is not None:
            _run(config, syslogd)

    return run_program("sniproxy", body)


def _config(argv: Sequence[str] | None) -> Config | None:
    """Return what the options ask for; None if there is nothing to serve."""
    parser = OptionParser("sniproxy", _DESCRIPTION, f"cd /srv/hosts && {_EXAMPLE}")
    parser.add_argument(
        "--hashed",
        action="store_true",
        help="the directories are named by the BLAKE3 of the hostname, 64 hex digits",
    )
    parser.add_argument(
        "--no-owner-check",
        action="store_true",
        help="connect to any socket that a host's directory leads to, whoever listens there",
    )
    parser.add_argument(
        "--handoff",
        action="store_true",
        help="give the client's connection itself to a host that listens at handoff-socket",
    )
    parser.add_service_options()
    options = parser.understand(argv)
    if options is None:
        return None
    return Config(
        hashed=options.hashed,
        check_owner=not options.no_owner_check,
        hands_over=options.handoff,
        **service_fields(options),
    )


def _run(config: Config, syslogd: Syslog | None) -> None:
    [(listening, _)] = take_listening_sockets(_HOW_TO_CALL)
    hand_over = _hand_over(listening) if config.hands_over else None
    # All that is needed later is opened now: there may be no way to it in another root directory,
    # for another user, or in the sandbox.
    with attempt("start"):
        standard.replace_copies_of_input()
        log = Log(syslogd)
        log.is_json = config.log_json
    status = open_status_socket(config, "sniproxy", LATENCIES)
    share = share_descriptors(config, MOST_PIPES, log)
    try:
        namer = directory_namer(config.hashed)
    except ImportError as error:
        raise UsageError(
            f"unable to hash names: Python's package blake3 is needed: {error}"
        ) from None
    notifier = Notifier()
    drop_privileges(config)
    if syslogd is not None and config.chroot:
        syslogd.stay()
    try:
        hosts = HostsDirectory(namer, check_owner=config.check_owner, hands_over=config.hands_over)
    except OSError as error:
        kind = UsageError if error.errno in _NO_HOSTS else FatalError
        raise kind.of("search the hosts directory (the working directory)", error) from None
    with attempt("enter the sandbox (--no-sandbox does without)"):
        # What `hold` contains is read there.
        forbidden = sandbox.enter([Path()]) if config.sandbox else ["nothing"]
    log.event("sandbox", forbids=",".join(forbidden))
    if hand_over is not None:
        log.event("handoff", guarded="yes" if hand_over.is_guarded else "no")
    try:
        run_service(
            config,
            log,
            notifier,
            partial(
                serve,
                listening,
                hosts,
                config,
                share,
                log,
                status=status,
                hand_over=hand_over,
            ),
            listening.close,
            status=status,
        )
    finally:
        notifier.close()
        hosts.close()


def _hand_over(listening: socket) -> HandOver:
    """Return what gives clients to backends.

    Raises:
        UsageError: they could take the port from us then.
        FatalError: a system call failed.
    """
    with ExitStack() as stack:
        stack.callback(listening.close)
        if is_multipath(listening):
            raise UsageError("unable to hand over connections (--handoff) of Multipath TCP")
        if listening.getsockopt(SOL_SOCKET, SO_REUSEPORT):
            raise UsageError(
                "unable to hand over connections (--handoff) of a listening socket with "
                "SO_REUSEPORT: whoever gets one could listen there, too"
            )
        with attempt("hand over connections (--handoff)"):
            hand_over = HandOver(listening)
            # There is nothing else that a right would be needed for, unless we are root.
            privileges.drop_capabilities()
        stack.pop_all()
    return hand_over


if __name__ == "__main__":
    sys.exit(main())
