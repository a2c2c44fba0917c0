"""The command `sniproxy-check`: what keeps a host from being served, and what mends it.

A child looks, as the user that it has become, and writes what it finds into a pipe, as JSON: what
tenants' backends say is read by no one who may do more than the daemon. We tell people.
"""

import argparse
import json
import os
import pwd
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

from sniproxy import __version__
from sniproxy.service import privileges
from sniproxy.service.fatal import FatalError, UsageError, attempt, print_out
from sniproxy.service.options import OptionParser
from sniproxy_check.entries import Listing
from sniproxy_check.finding import Finding, Result
from sniproxy_check.report import find_hidden, name_users, printable, show_json, show_table
from sniproxy_check.view import View, view_of_process
from sniproxy_check.walk import Walk, find_shared
from sniproxy_hostname import InvalidHostname, directory_namer
from sniproxy_hostname._unicode import from_unicode

# Djb's convention, and the daemon's, for all but the first two.
_ALL_SERVED, _SOMETHING_WRONG = 0, 1

# Whom the units run the daemon as.
_USUAL_USER: Final = "sniproxy"

# Hosts that a note names: a line of a terminal.
_HOSTS_SHOWN: Final = 3

# Seconds for a handshake: as long as the daemon gives a client, cut in half, for there may be many.
_HANDSHAKE_SECONDS: Final = 5.0

_DESCRIPTION = """\
Look every host up as sniproxy does, and say for each whether it is served, or
what is wrong and the command that mends it. The working directory is the hosts
directory. Hosts that are named are asked for a TLS handshake, too.
"""
_EXIT_CODES = """\
Exit codes: 0 all are served, 1 something is wrong, 100 called wrongly, 111 a
system call failed. Commands that mend are to be run in the hosts directory.
"""
_EXAMPLE = "sniproxy-check -C /srv/hosts --as sniproxy one.example"


def main(argv: Sequence[str] | None = None) -> int:
    """Check hosts with the arguments `argv`; return the exit code."""
    try:
        return _run(argv)
    except FatalError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return _SOMETHING_WRONG  # who has seen enough closes the pipe; nobody knows the rest
        print(f"sniproxy-check: fatal: {error}", file=sys.stderr)
        return error.code


def _parser() -> OptionParser:
    parser = OptionParser("sniproxy-check", _DESCRIPTION, _EXAMPLE)
    parser.epilog = f"{_EXIT_CODES}\n{parser.epilog}"
    parser.add_argument("names", nargs="*", metavar="NAME", help="a host (default: all of them)")
    parser.add_argument("-C", dest="hosts", metavar="DIR", help="the hosts directory")
    parser.add_argument(
        "--as",
        dest="user",
        metavar="USER[:GROUP]",
        help="look as that user does, whom the daemon runs as (by anybody but root: work out from "
        "modes what that user may do)",
    )
    parser.add_argument("--chroot", action="store_true", help="the daemon is started with --chroot")
    parser.add_argument(
        "--handoff", action="store_true", help="the daemon is started with --handoff"
    )
    parser.add_argument(
        "--handshake", action="store_true", help="ask all hosts for a TLS handshake"
    )
    parser.add_argument("--hashed", action="store_true", help="the daemon is started with --hashed")
    parser.add_argument("--json", action="store_true", help="tell it as JSON")
    parser.add_argument(
        "--no-owner-check",
        action="store_true",
        help="the daemon is started with --no-owner-check",
    )
    parser.add_argument(
        "--pid",
        type=_pid,
        metavar="PID",
        help="look as that running daemon does: its user, its options, and by root its root "
        "directory and its hosts directory",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    parser.add_argument("--version", action="store_true", help="print the version")
    return parser


def _pid(text: str) -> int:
    if re.fullmatch("[1-9][0-9]{0,9}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!a} is no process id")


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.help:
        print_out(parser.format_help())
        return _ALL_SERVED
    if options.version:
        print_out(f"sniproxy-check {__version__}\n")
        return _ALL_SERVED
    view, user = _view(options)
    results = [find_hidden(each, chroot=view.chroot) for each in _look(view, user, options)]
    shared = find_shared(results)
    results = [
        each._replace(findings=(*each.findings, shared[each.entry]))
        if each.entry in shared
        else each
        for each in results
    ]
    notes = [*_notes(view, user, options), *_notes_of(results)]
    if options.json:
        print_out(show_json(results, notes))
    else:
        is_coloured = os.isatty(1) and "NO_COLOR" not in os.environ
        lines = show_table(results, notes, is_coloured=is_coloured)
        print_out("".join(f"{line}\n" for line in lines))
    return _SOMETHING_WRONG if any(each.findings for each in results) else _ALL_SERVED


def _view(options: argparse.Namespace) -> tuple[View, str]:
    """Return how to look, and what the daemon's user is called.

    Raises:
        UsageError: there is no such user or process.
    """
    identity = None
    hashed, check_owner = options.hashed, not options.no_owner_check
    hands_over = options.handoff
    user = options.user
    if options.pid is not None:
        seen = view_of_process(options.pid)
        identity = seen.identity
        hashed, check_owner = hashed or seen.hashed, check_owner and seen.check_owner
        hands_over = hands_over or seen.hands_over
    if user is None and options.pid is None and os.geteuid() != 0 and _exists(_USUAL_USER):
        user = _USUAL_USER
    if user is not None:
        try:
            identity = privileges.look_up(user)
        except privileges.IdentityError as error:
            raise UsageError(f"unable to look as the user {user!a}: {error}") from None
        user = user.partition(":")[0]
    elif identity is not None:
        user = _user_name(identity.uid)
    view = View(
        options.hosts,
        options.pid,
        identity,
        chroot=options.chroot,
        hashed=hashed,
        check_owner=check_owner,
        hands_over=hands_over,
    )
    return view, user or _USUAL_USER


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _notes(view: View, user: str, options: argparse.Namespace) -> Iterator[str]:
    """Say where our sight ends."""
    if os.geteuid() == 0:
        if view.identity is None:
            yield "looked as root, who may do everything: --as USER, or --pid PID, is the daemon's"
    else:
        who = _user_name(os.geteuid())
        if view.identity is None:
            yield (
                f"looked as {who}: what the daemon's user may do, --as USER works out; "
                "sniproxy-status shows what it was refused"
            )
        else:
            yield f"looked as {who}: what {user} may do was worked out from modes, and not tried"
        yield "what a root directory of its own hides from the daemon, only root can see"
    if not options.handshake and not options.names:
        yield "no handshakes: name hosts for them, or --handshake"


def _notes_of(results: Sequence[Result]) -> Iterator[str]:
    """Say what is worth knowing of hosts, and nothing that has to be mended."""
    idle = [each.name or each.entry for each in results if each.has_idle_handoff]
    if idle:
        shown = ", ".join(map(printable, idle[:_HOSTS_SHOWN]))
        more = f" and {len(idle) - _HOSTS_SHOWN} more" if len(idle) > _HOSTS_SHOWN else ""
        yield f"handoff-socket counts only with --handoff, and is not used: {shown}{more}"
    yield from sorted({each.unasked for each in results if each.unasked is not None})


# The child, and what it says.


def _look(view: View, user: str, options: argparse.Namespace) -> list[Result]:
    """Have a child look; return what it has found."""
    try:
        namer = directory_namer(view.hashed)
    except ImportError as error:
        raise UsageError(f"unable to hash names: {error}") from None
    # What would be loaded later, when there may be no way to it.
    "a".encode("idna")
    with attempt("start a process"):
        reading, writing = os.pipe()
        child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with open(writing, "w") as pipe:
                _work(pipe, view, user, options, namer)
            code = 0
        except BrokenPipeError:
            pass
        finally:
            os._exit(code)
    os.close(writing)
    results = []
    total = 0
    is_shown = os.isatty(2) and not options.json
    failure: FatalError | None = None
    with open(reading) as pipe:
        for line in pipe:
            said = json.loads(line)
            if "total" in said:
                total = said["total"]
            elif "fatal" in said:
                kind = UsageError if said["code"] == UsageError.code else FatalError
                failure = kind(name_users(said["fatal"]))
            else:
                results.append(Result.from_json(said))
                if is_shown and len(results) % _SHOW_EVERY == 0:
                    _show_progress(len(results), total)
    if is_shown and total >= _SHOW_EVERY:
        sys.stderr.write("\r\x1b[K")
    _, status = os.waitpid(child, 0)
    if failure is not None:
        raise failure
    if status:
        raise FatalError("unable to look: the lines before this one say why")
    return results


# Hosts between two looks of somebody who waits, and characters of the bar.
_SHOW_EVERY: Final = 200
_BAR: Final = 40


def _show_progress(done: int, total: int) -> None:
    full = _BAR * done // max(total, 1)
    sys.stderr.write(f"\r[{'#' * full}{'.' * (_BAR - full)}] {done} of {total}")
    sys.stderr.flush()


def _work(pipe: IO[str], view: View, user: str, options: argparse.Namespace, namer: Any) -> None:
    """Look, and say what is found."""
    try:
        is_root = os.geteuid() == 0  # who can become whoever is to look
        listing = view.enter(options.names)
        walk = Walk(
            namer,
            hashed=view.hashed,
            check_owner=view.check_owner,
            hands_over=view.hands_over,
            identity=None if is_root or _is_us(view.identity) else view.identity,
            user=user,
            chroot=view.chroot and not is_root,
            seconds=_HANDSHAKE_SECONDS,
            listing=listing,
        )
        try:
            for result in _results(pipe, walk, listing, options):
                pipe.write(json.dumps(result.to_json()) + "\n")
        finally:
            walk.close()
    except FatalError as error:
        pipe.write(json.dumps({"fatal": str(error), "code": error.code}) + "\n")


def _is_us(identity: privileges.Identity | None) -> bool:
    return identity is not None and identity.uid == os.geteuid()


def _results(
    pipe: IO[str], walk: Walk, listing: Listing, options: argparse.Namespace
) -> Iterator[Result]:
    if options.names:
        for name in options.names:
            yield _look_named(walk, name)
        return
    found = listing.hosts
    if found is None:
        raise FatalError(f"unable to list the hosts directory; name your hosts: {listing.error}")
    pipe.write(json.dumps({"total": len(found)}) + "\n")
    for entry in found:
        yield walk.look(entry, handshake=options.handshake)


def _look_named(walk: Walk, name: str) -> Result:
    """Look at what somebody has called a host: by its name, however it is written, or its entry."""
    if "/" not in name and name not in (".", "..") and os.path.lexists(name):
        return walk.look(name, handshake=True)
    try:
        return walk.look_named(from_unicode(name))
    except InvalidHostname as error:
        finding = Finding(
            "invalid_name", f"{name!a} is no hostname: {error}", "sniproxy-hostname NAME"
        )
        return Result(name, name, findings=(finding,))


if __name__ == "__main__":
    sys.exit(main())
