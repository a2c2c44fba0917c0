"""The SNI router's command line, and its start."""

# First of all: until it is loaded, process 1 loses signals.
import sniproxy.service.process1  # noqa: F401  # isort: skip

import errno
import os
import sys
from _socket import SO_REUSEPORT, SOL_SOCKET, socket
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

from sniproxy.config import Config
from sniproxy.engine import loop
from sniproxy.engine.listener import is_multipath
from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.hand_over import HandOver
from sniproxy.hosts import HostsDirectory
from sniproxy.inherited import take_listening_sockets, use_given_socket
from sniproxy.log import Log
from sniproxy.serve import serve
from sniproxy.service import privileges, sandbox, standard
from sniproxy.service.fatal import FatalError, UsageError, attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import OptionParser, look_up_user, service_fields, socket_path
from sniproxy.service.start import (
    drop_privileges,
    open_status_socket,
    run_program,
    run_service,
    share_descriptors,
)
from sniproxy.service.syslogd import Syslog
from sniproxy.session import LATENCIES
from sniproxy.upgrade.process import Upgrade
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
# What a copy in the background says to its caller when it has taken over; else it says why not.
_TAKEN = b"+\n"

_EXAMPLE = "sniproxy-listen :443 sniproxy"
_HOW_TO_CALL = (
    f"{_EXAMPLE} (in a systemd service: StandardInput=socket, and a socket unit of the same name, "
    "or Sockets=)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the arguments `argv`; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv

    def body(syslogd: Syslog | None) -> None:
        asked = _config(arguments)
        if isinstance(asked, Config):
            path = asked.upgrade_socket
            if path is None:
                return _run(asked, arguments, syslogd, None)
            with closing(Upgrade(path, stays=asked.stays)) as upgrade:
                _run(asked, arguments, syslogd, upgrade)
        elif asked is not None:
            _upgrade(asked, syslogd)

    return run_program("sniproxy", body)


def _build() -> str:
    """Return whether the rooms that every connection passes are compiled, of which this is one."""
    is_compiled = isinstance(loop.__spec__.loader, ExtensionFileLoader)
    return "(compiled)" if is_compiled else "(pure Python)"


def _config(argv: Sequence[str]) -> Config | str | None:
    """Return what the options ask for: a copy to be upgraded; None if there is nothing to serve."""
    parser = OptionParser("sniproxy", _DESCRIPTION, f"cd /srv/hosts && {_EXAMPLE}", _build())
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
    parser.add_argument(
        "--upgrade-socket",
        type=socket_path,
        metavar="PATH",
        help="take over from the copy that listens there, with all its connections, if there is "
        "one; and listen there for the next one",
    )
    parser.add_argument(
        "--upgrade",
        type=socket_path,
        metavar="PATH",
        help="start a copy in the background that takes over from the one that listens there, with "
        "the options of that, and end when it has",
    )
    parser.add_argument(
        "--stay",
        action="store_true",
        help="when a copy has taken over, stay until it ends, and pass signals on to it: for a "
        "supervisor such as s6",
    )
    parser.add_service_options()
    options = parser.understand(argv)
    if options is None:
        return None
    if options.upgrade is not None:
        if len(argv) > len(("--upgrade", "PATH")):
            parser.error("--upgrade takes no other options: the copy has those of the old one")
        return str(options.upgrade)
    return Config(
        hashed=options.hashed,
        check_owner=not options.no_owner_check,
        hands_over=options.handoff,
        upgrade_socket=options.upgrade_socket,
        stays=options.stay,
        **service_fields(options),
    )


def _upgrade(path: str, syslogd: Syslog | None) -> None:
    """Have a copy take over from the one that listens at `path`; return when it has.

    Raises:
        FatalError: it has not. In the copy: as `_run`.
    """
    with attempt("start a copy"):
        reading, writing = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0 and os.fork():
            # So that the copy is a child of process 1 from the beginning: a supervisor that is told
            # of it is to hear of its end.
            os._exit(0)
    if pid:
        os.close(writing)
        os.waitpid(pid, 0)
        with open(reading, "rb") as answer:
            said = answer.readline()
        if not said.startswith(_TAKEN):
            why = said.decode(errors="replace").strip() or "the new copy has ended"
            raise FatalError(f"unable to upgrade: {why}")
        return
    os.close(reading)
    # Not to be ended by the terminal of whoever has called us.
    os.setsid()

    def answer_caller(said: bytes) -> None:
        nonlocal writing
        if writing != -1:
            os.write(writing, said)
            os.close(writing)
            writing = -1

    try:
        upgrade = Upgrade(path, partial(answer_caller, _TAKEN), has_to_be_there=True)
        with closing(upgrade):
            uid, gid = upgrade.owner
            if uid != 0 and os.geteuid() == 0:
                # Whatever its options say: somebody else may have made it that user.
                identity = look_up_user(f"{uid}:{gid}")
                assert identity is not None
                with attempt("become the user of the old copy"):
                    privileges.become(identity)
            upgrade.continue_log()
            config = _config(upgrade.arguments)
            assert isinstance(config, Config)
            assert upgrade.hosts is not None
            with attempt("enter the hosts directory of the old copy"):
                # We stay where we are, if that is the same: in a mount namespace of its own, as
                # systemd makes one, what is mounted below its directory goes with it.
                if not _is_here(upgrade.hosts):
                    os.fchdir(upgrade.hosts)
            _run(config, upgrade.arguments, syslogd, upgrade)
    except FatalError as error:
        answer_caller(f"{error}\n".encode(errors="backslashreplace"))
        raise


def _is_here(directory: int) -> bool:
    """Tell whether a descriptor is that of the working directory."""
    try:
        return os.path.samestat(os.stat(os.curdir), os.fstat(directory))
    except OSError:  # we may not search it
        return False


def _run(
    config: Config, arguments: Sequence[str], syslogd: Syslog | None, upgrade: Upgrade | None
) -> None:
    if upgrade is not None and upgrade.listening is not None:
        listening = use_given_socket(upgrade.listening)
    else:
        [(listening, _)] = take_listening_sockets(_HOW_TO_CALL)
    with closing(listening):
        _serve_on(listening, config, arguments, syslogd, upgrade)


def _serve_on(
    listening: socket,
    config: Config,
    arguments: Sequence[str],
    syslogd: Syslog | None,
    upgrade: Upgrade | None,
) -> None:
    hand_over = _hand_over(listening) if config.hands_over else None
    # All that is needed later is opened now: there may be no way to it in another root directory,
    # for another user, or in the sandbox.
    with attempt("start"):
        standard.replace_copies_of_input()
        log = Log(syslogd, os.environ if upgrade is None else upgrade.environment)
        log.is_json = config.log_json
    given = None if upgrade is None else upgrade.status
    status = open_status_socket(config, "sniproxy", LATENCIES, given)
    share = share_descriptors(config, MOST_PIPES, log)
    try:
        namer = directory_namer(config.hashed)
    except ImportError as error:
        raise UsageError(
            f"unable to hash names: Python's package blake3 is needed: {error}"
        ) from None
    notifier = Notifier(os.environ if upgrade is None else upgrade.environment)
    drop_privileges(config)
    if hand_over is not None:
        with attempt("drop all capabilities"):
            # One may have been given for that alone.
            privileges.drop_capabilities()
    if syslogd is not None and config.chroot:
        syslogd.stay()
    try:
        hosts = HostsDirectory(namer, check_owner=config.check_owner, hands_over=config.hands_over)
    except OSError as error:
        kind = UsageError if error.errno in _NO_HOSTS else FatalError
        raise kind.of("search the hosts directory (the working directory)", error) from None
    if upgrade is not None:
        told = None if status is None else (status.path, status.fileno())
        upgrade.introduce(arguments, listening.fileno(), hosts.fileno(), told, log.upgrade_failed)
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
                upgrade=upgrade,
            ),
            listening.close,
            status=status,
            upgrade=upgrade,
        )
        if upgrade is not None:
            upgrade.stay()
    finally:
        notifier.close()
        hosts.close()


def _hand_over(listening: socket) -> HandOver:
    """Return what gives clients to backends.

    Raises:
        UsageError: they could take the port from us then.
        FatalError: a system call failed.
    """
    if is_multipath(listening):
        raise UsageError("unable to hand over connections (--handoff) of Multipath TCP")
    if listening.getsockopt(SOL_SOCKET, SO_REUSEPORT):
        raise UsageError(
            "unable to hand over connections (--handoff) of a listening socket with "
            "SO_REUSEPORT: whoever gets one could listen there, too"
        )
    with attempt("hand over connections (--handoff)"):
        return HandOver(listening)


if __name__ == "__main__":
    sys.exit(main())
