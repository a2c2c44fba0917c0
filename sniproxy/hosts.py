"""A hostname becomes a connected backend: the directory of hosts, looked up by doing.

The lookup is one synchronous step. It changes the working directory into that of the host,
connects to the ten bytes `tls-socket`, and comes back; nothing else may run in between. So the
length of a path never matters (`sun_path` in unix(7) has 108 bytes, a hostname 253), and socket
and options come from the same directory even while a link to it is being swapped. Nothing is
tested before it is used, and nothing is remembered: whatever the administrator did last is what
the next connection finds.

Where that is allowed, `handoff-socket` comes first: its backend gets the client's connection itself
and not its bytes. Whatever is wrong with it, `tls-socket` is next, if there is one.

A host that wants clients to be kept while its backend is away says so by `hold`. That is looked for
with the options; what it contains is read only when there is no backend, and then it is the one
file that is opened here.

Names that no host has can have one all the same, if somebody has made it: `_.example.com` for those
below example.com, `_unknown` for any, and `_no-name` for clients who ask for none. A hostname does
not begin with an underscore, so no client can ask for these.
"""

import contextlib
import errno
import os
import re
import stat
from _socket import socket
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from time import perf_counter
from typing import Final

from sniproxy.engine.kernel import (
    AF_UNIX,
    SO_PEERCRED,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    access,
    chdir,
    fchdir,
)
from sniproxy.service.peer import UCRED
from sniproxy_hostname import Hostname

# As bytes; a str would have to be encoded for each connection.
_HERE: Final = b"."
_SOCKET: Final = b"tls-socket"
_HANDOFF_SOCKET: Final = b"handoff-socket"
_SEND_PROXY_V1: Final = b"send-proxy-v1"
_SEND_PROXY_V2: Final = b"send-proxy-v2"
_HOLD: Final = b"hold"

# Seconds to hold, as they are written, and what is more than enough for that; and how long it is
# where they are not, or may not be read. Ten are what a client waits for anything else here. More
# than five minutes no visitor waits.
_SECONDS: Final = re.compile(rb"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*")
_MOST_TEXT: Final = 64
HOLD_SECONDS: Final = 10.0
MOST_HOLD_SECONDS: Final = 300.0

# For names that no host has, and for clients who ask for none; and what is before a suffix.
UNKNOWN: Final = "_unknown"
NO_NAME: Final = "_no-name"
BELOW: Final = "_."

_STREAM: Final = SOCK_STREAM | SOCK_NONBLOCK
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class HostReason(StrEnum):
    """Why there is no backend: words for the log."""

    NO_SUCH_HOST = "no_such_host"
    NO_SOCKET = "no_socket"
    NOT_LISTENING = "not_listening"
    NOT_A_STREAM_SOCKET = "not_a_stream_socket"
    PERMISSION_DENIED = "permission_denied"
    LINK_LOOP = "link_loop"
    NAME_TOO_LONG = "name_too_long"
    WRONG_OWNER = "wrong_owner"
    WRITABLE_BY_OTHERS = "writable_by_others"
    HOSTS_NOT_SEARCHABLE = "hosts_not_searchable"
    BACKEND_BUSY = "backend_busy"
    BACKEND_FAILED = "backend_failed"


# The backend is away, or its successor is about to come: bind(2) makes the socket, with what the
# umask leaves of its mode, and chmod(2) and listen(2) come after that.
_AWAY: Final = frozenset(
    {
        HostReason.NO_SOCKET,
        HostReason.NOT_LISTENING,
        HostReason.PERMISSION_DENIED,
        HostReason.BACKEND_BUSY,
    }
)


class HostsState(StrEnum):
    """Whether the hosts directory that is open is still the one at its path: words for the log."""

    IN_PLACE = "in_place"
    MOVED = "moved"  # nothing is at its path
    REPLACED = "replaced"  # another directory is there, or is mounted over it
    REMOVED = "removed"


# What chdir(2) and connect(2) say when the host is not there, or not there for us.
_NO_DIRECTORY: Final = {
    errno.ENOENT: HostReason.NO_SUCH_HOST,
    errno.ENOTDIR: HostReason.NO_SUCH_HOST,
    errno.EACCES: HostReason.PERMISSION_DENIED,
    errno.ELOOP: HostReason.LINK_LOOP,
    errno.ENAMETOOLONG: HostReason.NAME_TOO_LONG,
}
_NO_BACKEND: Final = _NO_DIRECTORY | {
    errno.ENOENT: HostReason.NO_SOCKET,
    errno.ENOTDIR: HostReason.NO_SOCKET,
    # Nobody listens, or it is no socket at all.
    errno.ECONNREFUSED: HostReason.NOT_LISTENING,
    errno.ENOTSOCK: HostReason.NOT_LISTENING,
    # It has gone since: what handing over is told.
    errno.EPIPE: HostReason.NOT_LISTENING,
    errno.ECONNRESET: HostReason.NOT_LISTENING,
    errno.EPROTOTYPE: HostReason.NOT_A_STREAM_SOCKET,
    # The backlog is full. Linux gives no event for the moment when it no longer is.
    errno.EAGAIN: HostReason.BACKEND_BUSY,
}


class Step(StrEnum):
    """How far a lookup came that failed: words for the log."""

    HOSTS = "hosts"  # the directory of hosts can't be searched
    HOST = "host"  # there is no way into the directory of the host
    SOCKET = "socket"  # there is no way to its socket
    OWNER = "owner"  # the listener is somebody else's


class HostError(Exception):
    """There is no backend to be had; the message says it in the kernel's words.

    Attributes:
        reason: Why.
        step: Where the lookup ended.
        entry: What was looked for in the hosts directory.
        exists: Whether that has an entry of that name.
        owner: The uid of the directory that was reached; None if none was.
        listener: The uid of who listens, if that is what is wrong.
        path: Which of the two sockets of a host it is about.
        hold: How many seconds a client is to be kept for whom this may pass; 0 if it is final.
    """

    def __init__(
        self,
        reason: HostReason,
        detail: str,
        step: Step,
        *,
        entry: str = "",
        exists: bool = True,
        owner: int | None = None,
        listener: int | None = None,
        path: bytes = _SOCKET,
        hold: float = 0.0,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.step = step
        self.entry = entry
        self.exists = exists
        self.owner = owner
        self.listener = listener
        self.path = path.decode()
        self.hold = hold


# What a backend at `handoff-socket` wants in the place of a PROXY header.
HAND_OVER: Final = -1

# The connected socket, non-blocking; the version of the PROXY header that the backend wants, 0 for
# none, or `HAND_OVER` if it wants the client's connection itself; whether the host is held while
# its backend is away; the uid of its directory; and what that is called.
Found = tuple[socket, int, bool, int, str]


class HostsDirectory:
    """The working directory, as the directory of hosts.

    Args:
        directory_name: what the directory of a host is called.
        check_owner: whether a listener has to be one that the directory's owner may speak for.
        hands_over: whether backends may have the client's connection itself.

    Attributes:
        directory_name: As above.
        path: Where it was at the start, seen from the root directory, as the bytes that the kernel
            has; None if that is not known.
        connecting_at: When connect(2) was last about to be called, by time.perf_counter.

    Raises:
        OSError: the working directory can't be searched.
    """

    def __init__(
        self,
        directory_name: Callable[[Hostname], str],
        *,
        check_owner: bool = True,
        hands_over: bool = False,
    ) -> None:
        self.directory_name = directory_name
        self.connecting_at = 0.0
        self._checks_owner = check_owner
        self._hands_over = hands_over
        self._undelivered: OSError | None = None
        # O_PATH: to come back to a directory the right to search it is enough, open(2).
        self._fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fchdir(self._fd)
            if not os.fstat(self._fd).st_nlink:
                # Removed. It can be searched, but nothing will ever be in it.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError:
            self.close()
            raise
        self._away = False
        try:
            self.path: bytes | None = os.getcwdb()
        except OSError:  # ENOENT: there is no way to it from the root directory, getcwd(3)
            self.path = None

    def state(self) -> HostsState | None:
        """Tell whether it is still at its path; None if this process can't see that."""
        here = os.fstat(self._fd)
        if not here.st_nlink:
            return HostsState.REMOVED
        if self.path is None:
            return None
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return HostsState.MOVED
        except OSError:  # EACCES: after a change of the user, for one
            return None
        return HostsState.IN_PLACE if os.path.samestat(here, there) else HostsState.REPLACED

    def fileno(self) -> int:
        """Return the descriptor of the directory."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor of the directory."""
        os.close(self._fd)

    def is_here(self) -> bool:
        """Tell whether it is the working directory, as it is between two lookups.

        It is not if the way back was barred after the last one.
        """
        return not self._away

    def connect(self, host: Hostname | None) -> Found:
        """Connect to the backend of `host`; None is a client who asks for none.

        Raises:
            HostError: there is no such host, or its backend can't be reached.
        """
        if self._away:
            # The way back was barred the last time. From a tenant's directory nothing is looked up.
            self._return()
        if host is None:
            return self._connect_default(NO_NAME)
        # A call less: `str` would make a copy.
        entry = host if self.directory_name is str else self.directory_name(host)
        try:
            return self._connect(entry)
        except HostError as error:
            if error.exists or error.reason is not HostReason.NO_SUCH_HOST:
                raise
            unknown = error
        # Nearest first. A hash says nothing of what its name is below.
        for suffix in _suffixes(host) if entry == host else ():
            if access(f"{BELOW}{suffix}", os.F_OK, follow_symlinks=False):
                return self._connect_default(f"{BELOW}{suffix}")
        if access(UNKNOWN, os.F_OK, follow_symlinks=False):
            return self._connect_default(UNKNOWN)
        raise unknown

    def connect_relayed(self, host: Hostname | None, undelivered: OSError) -> Found:
        """Connect to the backend of `host` at `tls-socket`, as `connect` does.

        Args:
            host: as above.
            undelivered: what came of handing the client over.

        Raises:
            HostError: as above. If there is no such socket it is about the other one.
        """
        self._undelivered = undelivered
        try:
            return self.connect(host)
        finally:
            self._undelivered = None

    def try_handoff(self, entry: str) -> None:
        """Connect to the `handoff-socket` of an entry, if it has one, and close the connection.

        Raises:
            HostError: as above, whatever there is beside that socket; and a link to nothing counts,
                too, where `connect` does as if there were none.
        """
        self._away = True
        try:
            chdir(entry)
            directory = os.stat(_HERE)
            found = self._connect_handoff(entry, directory)
            if found is None and access(_HANDOFF_SOCKET, os.F_OK, follow_symlinks=False):
                error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                found = _no_backend(entry, directory.st_uid, error, _HANDOFF_SOCKET)
        except OSError as error:
            raise _no_directory(entry, error) from None
        finally:
            self._return()
        if isinstance(found, socket):
            found.close()
        elif found is not None:
            raise found

    def connect_entry(self, entry: str) -> Found:
        """Connect to the backend of an entry of the hosts directory, as `connect` does.

        Raises:
            HostError: as above.
        """
        return self._connect_default(entry) if entry.startswith("_") else self._connect(entry)

    def _connect_default(self, entry: str) -> Found:
        """Connect to a backend that serves names without a host.

        Whoever may add hosts is not to take names that are not theirs. So the entry, be it a link,
        and the directory that it leads to have to be the administrator's; or, for names below that
        of a host, its owner's.

        Raises:
            HostError: there is no such host, or it is somebody's who may not have it, or its
                backend can't be reached.
        """
        try:
            made_by = os.lstat(entry).st_uid
        except PermissionError as barred:
            raise _not_searchable(barred) from None
        except OSError as error:
            reason = HostReason.NO_SUCH_HOST
            raise HostError(reason, _words(error), Step.HOST, entry=entry, exists=False) from None
        allowed = {0, os.fstat(self._fd).st_uid}
        if entry.startswith(BELOW):
            with contextlib.suppress(OSError):
                allowed.add(os.stat(entry.removeprefix(BELOW)).st_uid)
        if made_by not in allowed:
            raise _not_theirs(entry, made_by)
        return self._connect(entry, allowed)

    def _connect(self, entry: str, allowed: Collection[int] | None = None) -> Found:
        """Connect to the backend of an entry, and come back.

        Args:
            entry: of the hosts directory.
            allowed: whom its directory may belong to; None for anybody.
        """
        self._away = True
        try:
            found = self._connect_there(entry, allowed)
        except BaseException:
            self._return()
            raise
        try:
            self._return()
        except HostError:
            found[0].close()
            raise
        return found

    def _return(self) -> None:
        try:
            fchdir(self._fd)
        except OSError as error:
            # EACCES, for one: somebody has closed the directory of hosts to us.
            raise _not_searchable(error) from None
        self._away = False

    def _connect_there(self, directory_name: str, allowed: Collection[int] | None) -> Found:
        """Enter the directory of the host, and connect."""
        try:
            chdir(directory_name)
        except OSError as error:
            raise _no_directory(directory_name, error) from None
        backend = owner = handoff = None
        holds = False
        try:
            # Of the directory that was reached, whatever links led to it.
            directory = os.stat(_HERE)
            owner = directory.st_uid
            if allowed is not None and owner not in allowed:
                raise _not_theirs(directory_name, owner)
            if self._hands_over:
                handoff = self._connect_handoff(directory_name, directory)
                if isinstance(handoff, socket):
                    return handoff, HAND_OVER, False, owner, directory_name
            # An entry of that name, whatever it is: a dangling link was put there on purpose, too.
            # Who wants both gets the one that says more.
            if access(_SEND_PROXY_V2, os.F_OK, follow_symlinks=False):
                proxy = 2
            else:
                proxy = int(access(_SEND_PROXY_V1, os.F_OK, follow_symlinks=False))
            holds = access(_HOLD, os.F_OK, follow_symlinks=False)
            # The last: it wakes the backend, which is to find the hello when it is awake.
            backend = socket(AF_UNIX, _STREAM)
            self.connecting_at = perf_counter()
            backend.connect(_SOCKET)
            if self._checks_owner:
                self._check_owner(directory_name, directory, backend)
        except BaseException as failed:
            if backend is not None:
                backend.close()
            if isinstance(failed, OSError):
                fault = _no_backend(directory_name, owner, failed)
                if isinstance(handoff, HostError) and fault.reason is HostReason.NO_SOCKET:
                    fault = handoff
                if holds and fault.reason in _AWAY:
                    fault.hold = read_hold()
                raise fault from None
            raise
        return backend, proxy, holds, owner, directory_name

    def _connect_handoff(self, entry: str, directory: os.stat_result) -> socket | HostError | None:
        """Connect to `handoff-socket`, here; return what is wrong, or None if there is none."""
        if self._undelivered is not None:
            return _no_backend(entry, directory.st_uid, self._undelivered, _HANDOFF_SOCKET)
        backend = socket(AF_UNIX, _STREAM)
        try:
            self.connecting_at = perf_counter()
            backend.connect(_HANDOFF_SOCKET)
            if self._checks_owner:
                self._check_owner(entry, directory, backend)
        except FileNotFoundError:
            fault = None
        except OSError as error:
            fault = _no_backend(entry, directory.st_uid, error, _HANDOFF_SOCKET)
        except HostError as fault_of_owner:
            fault = fault_of_owner
            fault.path = _HANDOFF_SOCKET.decode()
        else:
            return backend
        backend.close()
        return fault

    def _check_owner(self, entry: str, directory: os.stat_result, backend: socket) -> None:
        """Make sure that the listener is one that the directory's owner may speak for.

        Links can lead anywhere, and whoever may write in a directory can put one there. So the
        listener has to belong to the owner of the directory. It may belong to anyone where an
        administrator alone can have put it: the owner is root or the owner of the directory of
        hosts, and nobody else may write (an ACL that lets others shows as the group's bit, acl(5)).
        """
        owner = directory.st_uid
        writable_by_others = directory.st_mode & _WRITABLE_BY_OTHERS
        if owner == 0:
            # Such as /tmp: a tenant could link a name to it, and put there a link to a root daemon.
            if writable_by_others:
                raise HostError(
                    HostReason.WRITABLE_BY_OTHERS,
                    "the directory belongs to root and others may write in it",
                    Step.OWNER,
                    entry=entry,
                    owner=owner,
                )
            return
        # Not by `peer.credentials`: a call less, for each connection.
        credentials = backend.getsockopt(SOL_SOCKET, SO_PEERCRED, UCRED.size)
        _, listener, _ = UCRED.unpack(credentials)
        if listener == owner:
            return
        if owner == os.fstat(self._fd).st_uid and not writable_by_others:
            return
        raise HostError(
            HostReason.WRONG_OWNER,
            f"the directory belongs to uid {owner}, the listener to uid {listener}",
            Step.OWNER,
            entry=entry,
            owner=owner,
            listener=listener,
        )


def read_hold(path: bytes = _HOLD) -> float:
    """Return how many seconds a host is held whose option `path` is; 0 if there is none."""
    text = read_option(path)
    if text is None:
        return 0.0
    seconds = hold_seconds(text)
    return HOLD_SECONDS if seconds is None else min(seconds, MOST_HOLD_SECONDS)


def hold_seconds(text: bytes) -> float | None:
    """Return the number of seconds that `hold` contains; None if that is no number."""
    found = _SECONDS.fullmatch(text)
    return float(found[1]) if found else None


def read_option(path: bytes) -> bytes | None:
    """Return how an option begins; None if there is none, nothing if it may not be read.

    It is what a file contains. Or it is what a link leads to, which is not followed: for hosts
    elsewhere, as a sandbox lets no file be read that is not below the hosts directory.
    """
    try:
        return os.readlink(path)[:_MOST_TEXT]
    except FileNotFoundError:
        return None
    except OSError:  # EINVAL: it is no link
        return _read(path)


def _read(path: bytes) -> bytes:
    """Return what a file contains; nothing if it is none, or may not be read. It never waits."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError:
        return b""
    try:
        return os.read(fd, _MOST_TEXT)
    except OSError:  # EISDIR, EAGAIN
        return b""
    finally:
        os.close(fd)


def _no_backend(entry: str, owner: int | None, error: OSError, path: bytes = _SOCKET) -> HostError:
    """Return what is wrong, if connect(2) failed, or what came after it."""
    reason = _NO_BACKEND.get(error.errno or 0, HostReason.BACKEND_FAILED)
    fixed = reason, _words(error), Step.SOCKET
    return HostError(*fixed, entry=entry, owner=owner, path=path)


def _no_directory(directory_name: str, error: OSError) -> HostError:
    """Return what is wrong, if the directory of a host could not be entered."""
    try:
        os.lstat(directory_name)
        exists = True
    except PermissionError as barred:
        # There was no need for it before: to be in the directory of hosts is enough, but not to
        # look up anything there.
        return _not_searchable(barred)
    except OSError:
        exists = False
    reason = _NO_DIRECTORY.get(error.errno or 0, HostReason.BACKEND_FAILED)
    return HostError(reason, _words(error), Step.HOST, entry=directory_name, exists=exists)


def _not_theirs(entry: str, owner: int) -> HostError:
    detail = f"it belongs to uid {owner}, who may not serve these names"
    return HostError(HostReason.WRONG_OWNER, detail, Step.OWNER, entry=entry, owner=owner)


def _suffixes(host: Hostname) -> Iterator[str]:
    """Yield what a name is below, the nearest first."""
    suffix = str(host)
    while suffix := suffix.partition(".")[2]:
        yield suffix


def _not_searchable(error: OSError) -> HostError:
    detail = f"unable to search the hosts directory: {_words(error)}"
    return HostError(HostReason.HOSTS_NOT_SEARCHABLE, detail, Step.HOSTS, exists=False)


def _words(error: OSError) -> str:
    return error.strerror or str(error)
