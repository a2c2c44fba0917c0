"""What stood in the way of a lookup: the step, the path, whose it is, and where links lead.

The lookup itself learns one error number from the kernel. When there is somebody to be told, the
way is gone once more, component by component, by lstat(2) and readlink(2), which need no more
rights than the lookup. What is found is what is there now; it may have been mended meanwhile.
"""

import os
import stat
from enum import StrEnum
from typing import Final, NamedTuple

from sniproxy.hosts import HostError, HostReason, HostsDirectory, Step

# As many links as the kernel follows, path_resolution(7).
_MOST_LINKS: Final = 40

# Components of a path that are looked at. Each takes a microsecond or two, while no connection has
# its turn; the longest way that means anything has some twenty.
_MOST_STEPS: Final = 100

# Links that are shown; who makes longer chains knows their end.
_MOST_SHOWN: Final = 3

_KINDS: Final = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


class Cause(StrEnum):
    """What stood in the way."""

    MISSING = "missing"  # there is no such entry
    DANGLING = "dangling"  # a link leads to nothing
    NOT_A_DIRECTORY = "not_a_directory"  # something on the way is none
    NOT_SEARCHABLE = "not_searchable"  # a directory on the way, for us
    NOT_WRITABLE = "not_writable"  # the socket, for us
    NOT_A_SOCKET = "not_a_socket"
    NOT_A_STREAM_SOCKET = "not_a_stream_socket"
    NOBODY_LISTENS = "nobody_listens"
    LINK_LOOP = "link_loop"
    TOO_LONG = "too_long"
    OTHER_OWNER = "other_owner"  # the listener belongs to somebody else
    WRITABLE_BY_OTHERS = "writable_by_others"
    OTHER = "other"  # what the kernel said is all that there is to say


class Entry(NamedTuple):
    """Something on the way.

    Attributes:
        path: As it was reached: from the directory of hosts, or from the root directory.
        status: What lstat(2) says of it.
    """

    path: str
    status: os.stat_result

    def __str__(self) -> str:
        """Return its path, and what it is, and whose."""
        return f"{self.path} ({show_status(self.status)})"


class Way(NamedTuple):
    """A path that was gone, as far as it went.

    Attributes:
        path: Where it was to lead.
        links: The links on it, and their targets, in order.
        directories: The directories that were searched, or were to be, in order; not the one where
            it began.
        last: The last entry that is there; None if the first is not.
        missing: The path that is not there, or can't be looked at; None if all is there.
        error: What the kernel said there; None if it was not asked, since the way is too long.
        in_link: Whether a link leads to what is missing.
    """

    path: str
    links: list[tuple[str, str]]
    directories: list[Entry]
    last: Entry | None
    missing: str | None
    error: OSError | None
    in_link: bool

    def __str__(self) -> str:
        """Return the path, and where links on it lead."""
        shown = [f"{path} -> {target}" for path, target in self.links[:_MOST_SHOWN]]
        if not shown:
            return self.path
        if len(self.links) > _MOST_SHOWN:
            shown.append("...")
        text = ", ".join(shown)
        return text if self.links[0][0] == self.path else f"{self.path}, {text}"


class Fault(NamedTuple):
    """Why there is no backend.

    Attributes:
        reason: The word for the log.
        reason_for_owner: The word that the host's owner may hear.
        step: Where the lookup ended.
        cause: What stood in the way.
        culprit: What has to be changed, or where something has to be made; None if it is not known.
        way: The path that was gone; None if none was.
        owner: The uid of whoever can mend it, as far as it is no matter for the administrator: the
            owner of the directory that was reached, or of the last one on the way.
        detail: All that in words.
        detail_for_owner: The same, but for what is behind directories that others keep closed.
    """

    reason: HostReason
    reason_for_owner: HostReason
    step: Step
    cause: Cause
    culprit: Entry | None
    way: Way | None
    owner: int | None
    detail: str
    detail_for_owner: str


def explain(hosts: HostsDirectory, error: HostError) -> Fault:
    """Say what stood in the way when `error` came of a lookup in `hosts`."""
    if error.step is Step.HOSTS or not error.exists or not hosts.is_here():
        detail = f"{error.step}: {error}"
        cause = Cause.MISSING if error.step is Step.HOST else Cause.NOT_SEARCHABLE
        fixed = error.reason, error.reason, error.step, cause
        return Fault(*fixed, None, None, error.owner, detail, detail)
    path = error.entry if error.step in (Step.HOST, Step.OWNER) else f"{error.entry}/{error.path}"
    way = go(path)
    cause, culprit, words = _find_cause(error, way)
    owner = error.owner if error.owner is not None else _nearest_owner(way)
    detail = f"{error.step}: {words}"
    # The words would let the owner look where only we may: whatever is behind a closed door that is
    # not their own is, for them, a closed door.
    reason, for_owner = error.reason, detail
    if way.missing is not None and way.error is None:
        # Nobody has looked what is farther on.
        reason = HostReason.PERMISSION_DENIED
        for_owner = f"{error.step}: {way.path} leads too far"
    elif (closed := _closed_to(owner, way)) is not None:
        reason = HostReason.PERMISSION_DENIED
        for_owner = f"{error.step}: {way.path} leads through {closed.path}, which is closed to you"
    return Fault(error.reason, reason, error.step, cause, culprit, way, owner, detail, for_owner)


def go(path: str) -> Way:
    """Follow `path` from the working directory as the kernel does, and note what is on the way."""
    way = Way(path, [], [], None, None, None, in_link=False)
    here = ""
    rest = path.split("/")[::-1]
    # For each link that leads to what is left, how much was left when it was met.
    within: list[int] = []
    steps = 0
    while rest:
        name = rest.pop()
        while within and len(rest) < within[-1]:
            within.pop()
        steps += 1
        if name in ("", ".") and steps <= _MOST_STEPS:
            continue
        there = f"{here}/{name}" if here and here != "/" else here + name
        here_it_ends = way._replace(missing=there, in_link=bool(within))
        if steps > _MOST_STEPS:
            return here_it_ends
        try:
            status = os.lstat(there)
            target = os.readlink(there) if stat.S_ISLNK(status.st_mode) else None
        except OSError as error:
            return here_it_ends._replace(error=error)
        if target is not None and status.st_size != len(os.fsencode(target)):
            # One of procfs, which shows what only we may read, and where no path need lead.
            return here_it_ends
        way = way._replace(last=Entry(there, status))
        if target is None:
            here = there
            if stat.S_ISDIR(status.st_mode):
                way.directories.append(Entry(there, status))
            continue
        if len(way.links) == _MOST_LINKS:
            return here_it_ends
        way.links.append((there, target))
        within.append(len(rest))
        rest += target.split("/")[::-1]
        if target.startswith("/"):
            here = "/"
    return way


def _find_cause(error: HostError, way: Way) -> tuple[Cause, Entry | None, str]:
    """Return what stood in the way, what has to be changed, and that in words."""
    last = way.last
    if error.reason is HostReason.WRONG_OWNER:
        return Cause.OTHER_OWNER, last, f"{_reached(way)}: {error}"
    if error.reason is HostReason.WRITABLE_BY_OTHERS:
        return Cause.WRITABLE_BY_OTHERS, last, f"{_reached(way)}: {error}"
    if error.reason is HostReason.LINK_LOOP:
        return Cause.LINK_LOOP, last, f"{way}: {error}"
    if error.reason is HostReason.NAME_TOO_LONG:
        return Cause.TOO_LONG, last, f"{way}: {error}"
    if way.missing is not None:
        return _find_missing(way)
    assert last is not None  # a path has a component, and all are there
    reached = _reached(way)
    if error.step is Step.HOST:
        if not stat.S_ISDIR(last.status.st_mode):
            return Cause.NOT_A_DIRECTORY, last, f"{reached} is no directory"
        if error.reason is HostReason.PERMISSION_DENIED:
            return Cause.NOT_SEARCHABLE, last, f"{reached} may not be searched"
    elif not stat.S_ISSOCK(last.status.st_mode):
        also = ", and may not be written" if error.reason is HostReason.PERMISSION_DENIED else ""
        return Cause.NOT_A_SOCKET, last, f"{reached} is no socket{also}"
    elif error.reason is HostReason.PERMISSION_DENIED:
        return Cause.NOT_WRITABLE, last, f"{reached} may not be written"
    elif error.reason is HostReason.NOT_LISTENING:
        return Cause.NOBODY_LISTENS, last, f"{reached}: nobody listens"
    elif error.reason is HostReason.NOT_A_STREAM_SOCKET:
        return Cause.NOT_A_STREAM_SOCKET, last, f"{reached} is no stream socket"
    return Cause.OTHER, last, f"{reached}: {error}"


def _find_missing(way: Way) -> tuple[Cause, Entry | None, str]:
    last = way.last
    if isinstance(way.error, PermissionError):
        closed = way.directories[-1] if way.directories else None
        if closed is None or closed.path != os.path.dirname(way.missing or ""):
            return Cause.OTHER, last, f"{way}: {way.error.strerror}"
        return Cause.NOT_SEARCHABLE, closed, f"{way}: {closed} may not be searched"
    if isinstance(way.error, NotADirectoryError):
        return Cause.NOT_A_DIRECTORY, last, f"{way}: {last} is no directory"
    if isinstance(way.error, FileNotFoundError):
        is_said = bool(way.links) and way.missing == way.links[-1][1]
        words = f"there is no {'such entry' if is_said else way.missing}"
        cause = Cause.DANGLING if way.in_link else Cause.MISSING
        return cause, last, f"{way}: {words}" if way.links else words
    why = "it leads too far" if way.error is None else way.error.strerror
    return Cause.OTHER, last, f"{way}: {why}"


def _reached(way: Way) -> str:
    """Return the path, and what is at its end."""
    assert way.last is not None or way.missing is not None
    if way.last is None:
        return str(way)
    if not way.links:
        return str(way.last)
    if way.last.path == way.links[-1][1]:
        return f"{way} ({show_status(way.last.status)})"
    return f"{way}: {way.last}"


def _nearest_owner(way: Way) -> int | None:
    """Return the uid of whoever owns the last directory on the way, or what is there instead."""
    nearest = way.directories[-1] if way.directories else way.last
    return None if nearest is None else nearest.status.st_uid


def _closed_to(owner: int | None, way: Way) -> Entry | None:
    """Return the first directory on the way that is somebody else's, and not open to everybody."""
    for directory in way.directories:
        mode = directory.status.st_mode
        # Searched, that is: who may not do that sees nothing in it. Groups do not count: whether
        # the owner is in one we do not know.
        if directory.status.st_uid != owner and not mode & stat.S_IXOTH:
            return directory
    return None


def show_status(status: os.stat_result) -> str:
    """Return what something is, its mode, and whose it is, by numbers: names are out of reach."""
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "entry")
    mode = stat.S_IMODE(status.st_mode)
    return f"{kind}, mode {mode:04o}, uid {status.st_uid}, gid {status.st_gid}"
