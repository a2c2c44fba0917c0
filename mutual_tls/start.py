"""The start of a program that speaks TLS: what is loaded before, and locked up after."""

import errno
import os
import sys
from collections.abc import Collection, Iterable
from importlib import import_module
from pathlib import Path
from typing import Final

from mutual_tls.identity import system_authorities
from mutual_tls.session import SessionOptions
from mutual_tls.verify import parse_rule
from sniproxy.service import sandbox
from sniproxy.service.eventlog import EventLog
from sniproxy.service.fatal import FatalError, UsageError, attempt
from sniproxy.service.start import drop_privileges

# Where the system keeps what is read to find addresses, and the authorities that it trusts.
_READABLE: Final = tuple(map(Path, ("/etc", "/usr", "/lib", "/lib64", "/run/systemd/resolve")))


def give_up_privileges(options: SessionOptions, keep: Collection[int] | None = None) -> None:
    """Load what comes late, then change the root directory and the user, if that is asked for.

    Args:
        options: say whether.
        keep: as for `drop_privileges`.

    Raises:
        UsageError: the user that we are then may not search the working directory.
        FatalError: a system call failed.
    """
    _load_what_comes_late()
    if options.chroot:
        # Where they are out of reach by then. Else they are read with the first identity that has
        # none of its own.
        with attempt("read whom the system trusts"):
            system_authorities()
    drop_privileges(options, keep)
    try:
        Path().stat()
    except OSError as error:
        kind = UsageError if error.errno == errno.EACCES else FatalError
        raise kind.of("search the working directory", error) from None


def _load_what_comes_late() -> None:
    """Load what would be loaded with the first name, rule or certificate.

    In another root directory, or as another user, it may be out of reach by then.
    """
    "ü.example".encode("idna")  # the codec by which `ssl` and `socket` have all names encoded
    parse_rule("ü.example")  # the tables of Unicode
    # By which cryptography verifies signatures.
    import_module("cryptography.hazmat.backends.openssl.backend")


def enter_sandbox(
    options: SessionOptions, log: EventLog, places: Iterable[Path], *, may_bind: bool = False
) -> None:
    """Enter the sandbox, unless an option says not to, and tell what it forbids.

    Args:
        options: say whether.
        log: where it is told.
        places: files and directories that may be read beside the working directory and what is in
            it. They, and what is in them, may be links to anywhere: identities above all.
        may_bind: whether connections may be given any address of their own.

    Raises:
        FatalError: the kernel refuses.
    """
    with attempt("enter the sandbox (--no-sandbox does without)"):
        # Some modules are loaded when they are first needed.
        modules = [Path(path) for path in sys.path if path]
        reached = [directory for place in places for directory in _reached(place)]
        readable = [Path(), *_READABLE, *modules, *reached]
        forbidden = ["nothing"]
        if options.sandbox:
            forbidden = sandbox.enter(readable, may_connect=True, may_bind=may_bind)
    log.event("sandbox", forbids=",".join(forbidden))


def _reached(place: Path) -> list[Path]:
    """Return the directories that a place is in or is, and those that links there lead to."""
    # Not by pathlib: what is out of reach for the user that we are now is no error yet.
    inside = place.glob("*") if os.path.isdir(place) else ()
    links = [path for path in (place, *inside) if os.path.islink(path)]
    paths = [place, *(Path(os.path.realpath(link)) for link in links)]
    return [path if os.path.isdir(path) else path.parent for path in paths]
