"""What names say by themselves: those of hosts' directories, and those of what is in them."""

import difflib
import os
import re
import shlex
import stat
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple

from sniproxy.explain import go
from sniproxy.hosts import BELOW, NO_NAME, UNKNOWN
from sniproxy_check.finding import CheckReason, Finding
from sniproxy_hostname import Hostname, InvalidHostname
from sniproxy_hostname._unicode import from_unicode

# The two sockets of a host: whose bytes are relayed, and who gets connections themselves.
TLS_SOCKET: Final = "tls-socket"
HANDOFF_SOCKET: Final = "handoff-socket"

# What the daemon looks for in the directory of a host.
ENTRIES: Final = (TLS_SOCKET, HANDOFF_SOCKET, "send-proxy-v1", "send-proxy-v2", "hold")

# What other programs call the first version.
_OF_OTHERS: Final = ("send-proxy",)

# How alike two names are, from 0 to 1, of which one is meant by the other: tls_socket and tls-sock
# are .9, tls.key and tls-cert below .6.
_ALIKE: Final = 0.75

# Entries of a host's directory that are looked at: a document root may have a million.
_MOST_FILES: Final = 1000

_HASH: Final = re.compile("[0-9a-f]{64}")
_LIKE_A_HASH: Final = re.compile("[0-9a-fA-F]{40,}")


def host_of(entry: str) -> Hostname | None:
    """Return the hostname that a directory of that name is for; None if it is for none."""
    try:
        name = Hostname(entry.encode())
    except (InvalidHostname, UnicodeEncodeError):
        return None
    return name if name == entry else None


def check_name(
    entry: str, directory_name: Callable[[Hostname], str], *, hashed: bool
) -> Finding | None:
    """Say what is wrong with the name of a directory of hosts; None if nothing is.

    Args:
        entry: the name.
        directory_name: what the directory of a host is called.
        hashed: whether directories are named by hashes.
    """
    if hashed:
        if _HASH.fullmatch(entry):
            return None
    elif host_of(entry.removeprefix(BELOW)) is not None:
        return None
    if entry in (UNKNOWN, NO_NAME):
        return None
    if _LIKE_A_HASH.fullmatch(entry):
        return _like_a_hash(entry, hashed=hashed)
    try:
        wanted = directory_name(from_unicode(entry))
    except InvalidHostname as error:
        detail = f"{entry!a} is no hostname: {error}"
        return Finding(CheckReason.NEVER_MATCHES, detail, _move(entry, "NAME"))
    if hashed:
        detail = f"{entry!a} is a plain name, and the daemon is started with --hashed"
        return Finding(CheckReason.NEVER_MATCHES, detail, _move(entry, wanted))
    detail = f"clients' names are never written {entry!a}: it should be {wanted}"
    return Finding(CheckReason.NOT_CANONICAL, detail, _move(entry, wanted))


def is_meant_for(entry: str, name: Hostname) -> bool:
    """Tell whether somebody has meant an entry of the hosts directory for a host."""
    try:
        return from_unicode(entry) == name
    except InvalidHostname:
        return False


def _like_a_hash(entry: str, *, hashed: bool) -> Finding:
    if not hashed:
        detail = f"{entry} looks like a hash, and the daemon is started without --hashed"
        return Finding(CheckReason.NEVER_MATCHES, detail, _move(entry, "NAME"))
    lower = entry.lower()
    if _HASH.fullmatch(lower):
        detail = f"a hash is written in small letters, not as {entry}"
        return Finding(CheckReason.NEVER_MATCHES, detail, _move(entry, lower))
    detail = f"a hash has 64 hexadecimal digits, and {entry} has {len(entry)}"
    mend = f'mv -- {shlex.quote(entry)} "$(sniproxy-hostname --hashed NAME)"'
    return Finding(CheckReason.NEVER_MATCHES, detail, mend)


def check_files(
    place: str, files: Sequence[str], sockets: Sequence[str], *, hands_over: bool
) -> list[Finding]:
    """Say which entries of a host's directory are not what somebody takes them for.

    Args:
        place: the directory.
        files: the names in it.
        sockets: those of sockets among them.
        hands_over: whether the daemon looks for `handoff-socket`.
    """
    findings = []
    # But `hold`: it is so short that `old` is nearly the same.
    missing = [each for each in ENTRIES if each not in files and each != "hold"]
    if not hands_over and HANDOFF_SOCKET in missing:
        missing.remove(HANDOFF_SOCKET)  # nobody has meant what does not count
    if "send-proxy-v1" in files and "send-proxy-v2" in files:
        detail = f"{place} has send-proxy-v1 and send-proxy-v2: version 2 is sent"
        mend = f"rm {shlex.quote(place)}/send-proxy-v1"
        findings.append(Finding(CheckReason.TWO_PROXY_HEADERS, detail, mend))
    for name in files:
        path = f"{place}/{name}"
        if name in ENTRIES:
            continue
        if name in _OF_OTHERS:
            detail = f"this version knows no {name}, so {path} does nothing"
            mend = _move(path, f"{place}/send-proxy-v1")
            findings.append(Finding(CheckReason.UNKNOWN_FILE, detail, mend))
        elif (meant := _meant(name, missing, files, sockets)) is not None:
            detail = f"{path} does nothing: it has to be called {meant}"
            findings.append(Finding(CheckReason.MISSPELT, detail, _move(path, f"{place}/{meant}")))
    return findings


def _meant(
    name: str, missing: Sequence[str], files: Sequence[str], sockets: Sequence[str]
) -> str | None:
    """Return what an entry was to be called, if that is not there and nothing else is as likely."""
    alike = difflib.get_close_matches(name.lower(), missing, n=1, cutoff=_ALIKE)
    if alike:
        return alike[0]
    # Whatever it is called: there is no other socket for a backend, and no link to this one.
    if sockets == [name] and TLS_SOCKET in missing and HANDOFF_SOCKET not in files:
        return TLS_SOCKET
    return None


class Listing(NamedTuple):
    """What is in the directory of hosts, and in those of hosts.

    It is read by whoever has called us: the daemon needs no right to list anything, and has none.

    Attributes:
        hosts: The entries that are, or seem to be meant as, hosts; None if nobody may list them.
        error: Why not.
        files: For an entry, the names in it, and those of sockets among them.
    """

    hosts: list[str] | None
    error: str | None
    files: dict[str, tuple[list[str], list[str]]]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Listing":
        """List the working directory, and the directories of these; of all where there are none."""
        hosts, error = None, None
        try:
            with os.scandir(".") as found:
                hosts = sorted(each.name for each in found if _seems_a_host(each))
        except OSError as failure:
            error = failure.strerror or str(failure)
        listed = [name for name in names or hosts or () if _is_administrators(name)]
        return cls(hosts, error, {entry: list_files(entry) for entry in listed})

    def files_of(self, entry: str) -> tuple[list[str], list[str]]:
        """Return the names in the directory of a host, and those of sockets among them."""
        return self.files.get(entry, ([], []))


def _is_administrators(entry: str) -> bool:
    """Tell whether an entry leads where the administrator says: tenants' links lead anywhere."""
    try:
        trusted = {0, os.stat(".").st_uid, os.geteuid()}
        return all(os.lstat(link).st_uid in trusted for link, _ in go(entry).links)
    except OSError:
        return False


def _seems_a_host(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False  # no client's name begins that way: somebody has put it aside
    # A README is no mistake.
    return not entry.is_file(follow_symlinks=False)


def list_files(place: str) -> tuple[list[str], list[str]]:
    """Return the names in a directory, and those of sockets among them; none if nobody may look."""
    try:
        with os.scandir(place) as entries:
            found = sorted(islice(entries, _MOST_FILES), key=lambda entry: entry.name)
    except OSError:
        return [], []
    sockets = [each.name for each in found if _is_socket(each)]
    return [each.name for each in found], sockets


def _is_socket(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
        return False
    try:
        return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return False


def _move(source: str, target: str) -> str:
    return f"mv -- {shlex.quote(source)} {shlex.quote(target)}"
