"""The walk: each host is looked up as the daemon does it, by the daemon's own code.

What failed is explained, and given a command that mends it. What was reached can be asked for a
handshake. Nothing is changed anywhere.
"""

import os
import shlex
import socket
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from sniproxy.explain import Cause, Entry, Fault, Way, explain, go
from sniproxy.hosts import (
    HAND_OVER,
    HOLD_SECONDS,
    MOST_HOLD_SECONDS,
    HostError,
    HostReason,
    HostsDirectory,
    Step,
    hold_seconds,
    read_option,
)
from sniproxy.service.peer import credentials
from sniproxy.service.privileges import Identity
from sniproxy_check import entries, view
from sniproxy_check.client import Clients
from sniproxy_check.entries import HANDOFF_SOCKET, TLS_SOCKET
from sniproxy_check.finding import CheckReason, Finding, Result, one_line
from sniproxy_check.handshake import Answer, probe
from sniproxy_hostname import Hostname

T = TypeVar("T")

# Looks at a full backlog, and the seconds between them: whoever accepts at all does in that time.
_TRIES: Final = 20
_PAUSE: Final = 0.05

# What is to be done about answers. The directory is filled in.
_MEND_ANSWER: Final = {
    Answer.CLOSES_AT_ONCE: "# look into the log of the backend",
    Answer.SPEAKS_PLAIN_HTTP: "# have the backend speak TLS there (nginx: listen unix:... ssl)",
    Answer.NOT_TLS: "# have a backend listen there that speaks TLS",
    Answer.SILENT: "# look whether the backend hangs, or waits for another protocol",
    Answer.HANDSHAKE_FAILED: "# look into the log of the backend",
    # Not by touch(1), which follows links: whatever there is of that name counts.
    Answer.WANTS_PROXY_HEADER: "mkdir {place}/send-proxy-v{wanted}",
    Answer.REFUSES_PROXY_HEADER: "rm -r {place}/send-proxy-v{sent}",
    Answer.WANTS_OTHER_PROXY_HEADER: "mv {place}/send-proxy-v{sent} {place}/send-proxy-v{wanted}",
    Answer.CERTIFICATE_FOR_OTHERS: "# give the backend a certificate for {name}",
    Answer.CERTIFICATE_EXPIRED: "# renew the certificate for {name}, and reload the backend",
    Answer.CERTIFICATE_NOT_YET_VALID: "# set the clock, or wait; else renew the certificate",
    Answer.CERTIFICATE_EXPIRES_SOON: "# renew the certificate for {name}, and reload the backend",
}

# And where the backend is at `handoff-socket`.
_MEND_DIRECT: Final = _MEND_ANSWER | {
    Answer.CLOSES_AT_ONCE: "# look into its log; if it takes no descriptors it is for tls-socket",
    Answer.SILENT: "# look whether it hangs; if it takes no descriptors it is for tls-socket",
    Answer.SPEAKS_PLAIN_HTTP: "# have the backend speak TLS there",
    Answer.WANTS_PROXY_HEADER: "# have the backend expect no header there: it sees the client",
}


class Walk:
    """Looks hosts up, in the working directory.

    Args:
        directory_name: what the directory of a host is called.
        hashed: whether that is a hash.
        check_owner: whether listeners have to belong to the owner of the directory.
        hands_over: whether `handoff-socket` counts.
        identity: the user of the daemon, if we are somebody else and could not become that one.
        user: whom rights are to be given to, for the commands that mend.
        chroot: whether absolute links lead elsewhere for the daemon, and we are not in its root.
        seconds: how long a handshake may take.
        listing: what is in the directory of hosts, as far as somebody knows who may list it.
    """

    def __init__(
        self,
        directory_name: Callable[[Hostname], str],
        *,
        hashed: bool,
        check_owner: bool,
        hands_over: bool = False,
        identity: Identity | None,
        user: str,
        chroot: bool,
        seconds: float,
        listing: entries.Listing,
    ) -> None:
        self._listing = listing
        self._directory_name = directory_name
        self._hashed = hashed
        self._identity = identity
        self._user = user
        self._chroot = chroot
        self._seconds = seconds
        self._hands_over = hands_over
        # The entries themselves are looked up, so that hashes can be, too.
        self._hosts = HostsDirectory(str, check_owner=check_owner, hands_over=hands_over)
        # The same, where nobody can be handed over: what `tls-socket` is like by itself.
        self._relayed = HostsDirectory(str, check_owner=check_owner)

    def look_named(self, name: Hostname) -> Result:
        """Look at a host that was named, and shake hands with its backend."""
        entry = self._directory_name(name)
        if not os.path.lexists(entry) and (other := self._find_other_spelling(name)) is not None:
            return self.look(other, name=str(name), handshake=True)
        return self.look(entry, name=str(name), handshake=True)

    def _find_other_spelling(self, name: Hostname) -> str | None:
        """Return the entry that was meant for a host, and is not what the daemon opens for it."""
        found = self._listing.hosts or ()
        return next((entry for entry in found if entries.is_meant_for(entry, name)), None)

    def look(self, entry: str, *, name: str | None = None, handshake: bool) -> Result:
        """Look at an entry of the hosts directory.

        Args:
            entry: its name.
            name: that of the host, if it is known; it is where names are not hashed.
            handshake: whether the backend is to be asked for one.
        """
        wrong = entries.check_name(entry, self._directory_name, hashed=self._hashed)
        if wrong is not None:
            return Result(entry, name, findings=(wrong,))
        if name is None and not self._hashed:
            name = entry
        files, sockets = self._listing.files_of(entry)
        findings = entries.check_files(entry, files, sockets, hands_over=self._hands_over)
        unclear = self._find_unclear_hold(entry)
        links = self._find_absolute_links(entry)
        try:
            backend, proxy, owner, served_by = _patiently(lambda: self._connect(entry))
        except HostError as error:
            fault = explain(self._hosts, error)
            failed = self._show(entry, fault, error)
            # A name that is wrong comes before what that name keeps from being found.
            is_missing = fault.step is Step.SOCKET and fault.cause is Cause.MISSING
            if is_missing and findings:
                failed = failed._replace(mend="# the command above mends this, too")
            found = [*findings, failed] if is_missing else [failed, *findings]
            if is_missing:
                found = [*self._find_idle_handoff(entry), *found]
            found += self._find_other(error.entry, error.path, fault.owner, error)
            return Result(entry, name, fault.owner, findings=(*links, *found, *unclear))
        is_direct = proxy == HAND_OVER
        path = HANDOFF_SOCKET if is_direct else TLS_SOCKET
        with backend:
            pid, uid, _ = credentials(backend)
        barred = self._find_barred(entry, path, owner)
        other = self._find_other(served_by, path, owner)
        if barred and is_direct and not other and os.path.lexists(f"{served_by}/{TLS_SOCKET}"):
            barred = [_of_one(barred[0], HANDOFF_SOCKET)]
        findings = [*links, *barred, *findings, *other, *unclear]
        fixed = served_by, name, owner, (pid, uid)
        result = Result(
            *fixed,
            is_handed_over=is_direct,
            has_idle_handoff=bool(self._find_idle_handoff(served_by)),
            findings=tuple(findings),
        )
        if not handshake or name is None or name.startswith("_"):
            return result
        return self._ask(result, entry, name, proxy)

    def _connect(self, entry: str) -> tuple[socket.socket, int, int, str]:
        """Connect as the daemon does.

        Raises:
            HostError: there is no backend to be had.
        """
        if os.path.lexists(entry):
            backend, proxy, _, owner, served_by = self._hosts.connect_entry(entry)
        else:  # it may be one of those that are served all the same
            backend, proxy, _, owner, served_by = self._hosts.connect(_as_host(entry))
        return socket.socket(fileno=backend.detach()), proxy, owner, served_by

    def _find_idle_handoff(self, entry: str) -> list[Finding]:
        """Say if there is a socket for handing over that the daemon does not look for."""
        path = f"{entry}/{HANDOFF_SOCKET}"
        if self._hands_over or not os.path.lexists(path):
            return []
        detail = f"{path} does nothing: the daemon is started without --handoff"
        return [Finding(CheckReason.HANDOFF_IS_OFF, detail, "# start the daemon with --handoff")]

    def _find_other(
        self, entry: str, used: str, owner: int | None, error: HostError | None = None
    ) -> list[Finding]:
        """Say what is wrong with the other one of a host's two sockets, if it has both.

        Args:
            entry: that of the host.
            used: the one that the lookup ended at.
            owner: of its directory.
            error: why there is no backend, if that is so.
        """
        is_of_socket = error is None or (
            # A directory that others may write in is wrong for both.
            error.step in (Step.SOCKET, Step.OWNER)
            and error.reason is not HostReason.WRITABLE_BY_OTHERS
        )
        if not self._hands_over or not is_of_socket:
            return []
        other = TLS_SOCKET if used == HANDOFF_SOCKET else HANDOFF_SOCKET
        if not os.path.lexists(f"{entry}/{other}"):
            return []
        try:
            _patiently(lambda: self._try(entry, other))
        except HostError as failure:
            found = [self._show(entry, explain(self._hosts, failure), failure)]
        else:
            found = self._find_barred(entry, other, owner)
        return [_of_one(each, other) for each in found]

    def _try(self, entry: str, path: str) -> None:
        """Connect to one of a host's sockets, as the daemon does if the other one is of no use.

        Raises:
            HostError: what is wrong with it.
        """
        if path == HANDOFF_SOCKET:
            self._hosts.try_handoff(entry)
        else:
            self._relayed.connect_entry(entry)[0].close()

    def _ask(self, result: Result, entry: str, name: str, proxy: int) -> Result:
        """Ask a backend that was reached for a handshake."""
        if proxy != HAND_OVER:
            asked, expires = self._shake_hands(entry, name, proxy)
        else:
            try:
                clients = Clients(self._seconds)
            except OSError as error:
                why = f"no handshakes with whom clients are handed over to: {error.strerror}"
                return result._replace(unasked=f"{why}, for TCP over loopback")
            try:
                asked, expires = self._shake_hands(entry, name, 0, clients)
            finally:
                clients.close()
        findings = (*result.findings, *asked)
        return result._replace(is_asked=True, expires=expires, findings=findings)

    def _shake_hands(
        self, entry: str, name: str, proxy: int, clients: Clients | None = None
    ) -> tuple[list[Finding], float | None]:
        """Shake hands; with `clients`, over connections that the backend is given."""

        def connect() -> socket.socket:
            return _patiently(lambda: self._connect(entry))[0]

        def give(_: socket.socket) -> None:
            assert clients is not None
            found = _patiently(lambda: self._connect(entry))
            clients.give(found[0], found[2])

        try:
            if clients is None:
                said = probe(connect, name, proxy=proxy, seconds=self._seconds)
            else:
                here = clients.connect
                said = probe(here, name, proxy=proxy, seconds=self._seconds, on_hello=give)
        except HostError as error:
            fault = explain(self._hosts, error)
            return [self._show(entry, fault, error)], None
        except OSError as error:
            path = TLS_SOCKET if clients is None else HANDOFF_SOCKET
            detail = f"the connection to {entry}/{path} failed: {error.strerror or error}"
            mend = _MEND_ANSWER[Answer.CLOSES_AT_ONCE]
            return [Finding(HostReason.BACKEND_FAILED, detail, mend)], None
        if said.answer is Answer.SPEAKS_TLS:
            return [], said.expires
        mends = _MEND_ANSWER if clients is None else _MEND_DIRECT
        mend = mends[said.answer].format(
            place=shlex.quote(entry), name=name, sent=proxy, wanted=said.wants
        )
        return [Finding(said.answer, said.detail, mend)], said.expires

    def _find_unclear_hold(self, entry: str) -> list[Finding]:
        """Say if a host is not held for as long as its `hold` seems to say."""
        path = f"{entry}/hold"
        try:
            status = os.lstat(path)
            text = read_option(os.fsencode(path))
            here, there = os.path.realpath("."), os.path.realpath(entry)
        except OSError:
            return []
        seconds = None if text is None else hold_seconds(text)
        can_read = self._identity is None or view.may(self._identity, path, status, view.READ)
        if not stat.S_ISLNK(status.st_mode) and not Path(there).is_relative_to(here):
            wrong = f"no file is read outside of the hosts directory: {HOLD_SECONDS:g}"
        elif not can_read:
            wrong = f"{self._user} may not read it, by its mode: {HOLD_SECONDS:g}"
        elif seconds is None:
            wrong = f"there is no number of seconds in it: {HOLD_SECONDS:g}"
        elif seconds > MOST_HOLD_SECONDS:
            wrong = f"{seconds:g} seconds are too many: {MOST_HOLD_SECONDS:g}"
        else:
            return []
        # A link that says it can be read anywhere. And whatever is there now is not followed.
        wanted = HOLD_SECONDS if seconds is None else min(seconds, MOST_HOLD_SECONDS)
        mend = f"ln -sfT {wanted:g} {shlex.quote(path)}"
        return [Finding(CheckReason.UNCLEAR_HOLD, f"{path}: {wrong} are taken", mend)]

    # What somebody else may not do.

    def _find_absolute_links(self, entry: str) -> list[Finding]:
        """Say which links lead elsewhere in the daemon's root directory, if that is not ours."""
        if not self._chroot:
            return []
        sockets = (HANDOFF_SOCKET, TLS_SOCKET) if self._hands_over else (TLS_SOCKET,)
        links = [link for each in sockets for link in go(f"{entry}/{each}").links]
        return [
            Finding(
                CheckReason.ABSOLUTE_IN_CHROOT,
                f"{path} -> {target}: with --chroot that is {target} in the hosts directory",
                f"ln -sfn RELATIVE_PATH {shlex.quote(path)}",
            )
            for path, target in dict.fromkeys(links)  # those that lead to the directory once
            if target.startswith("/")
        ]

    def _find_barred(self, entry: str, path: str, owner: int | None) -> list[Finding]:
        """Say what bars the daemon's user, as far as modes tell, from where we have been."""
        if self._identity is None:
            return []
        way = go(f"{entry}/{path}")
        for each in way.directories:
            if not view.may(self._identity, each.path, each.status, view.SEARCH):
                return [self._barred(way, each, "searched", owner)]
        last = way.last
        if last is not None and not view.may(self._identity, last.path, last.status, view.WRITE):
            return [self._barred(way, last, "written", owner)]
        return []

    def _barred(self, way: Way, barred: Entry, done: str, owner: int | None) -> Finding:
        detail = f"socket: {way}: {barred} may not be {done} by {self._user}, by its mode"
        is_meant = barred.status.st_uid == owner
        return Finding(HostReason.PERMISSION_DENIED, detail, self._grant(barred, is_meant=is_meant))

    # What is to be done. Whoever runs it is root, perhaps, and the links and files are a tenant's:
    # so no command changes anything but the host itself, or what its owner owns.

    def _grant(self, entry: Entry, *, is_meant: bool) -> str:
        """Return what gives the daemon's user the right that it lacks.

        Args:
            entry: what may not be used.
            is_meant: whether it is known that its owner means that.
        """
        right = "x" if stat.S_ISDIR(entry.status.st_mode) else "rw"
        command = f"setfacl --modify user:{self._user}:{right} {shlex.quote(entry.path)}"
        if is_meant:
            return command
        # A link may have led there that was not meant.
        return f"# if uid {entry.status.st_uid} means that: {one_line(command)}"

    def _show(self, entry: str, fault: Fault, error: HostError) -> Finding:
        """Return a fault with what mends it."""
        missing = None
        if fault.way is not None and isinstance(fault.way.error, FileNotFoundError):
            missing = fault.way.missing
        is_absolute = missing is not None and missing.startswith("/")
        mend = self._mend(entry, fault, error)
        return Finding(fault.reason, fault.detail, mend, missing if is_absolute else None)

    def _mend(self, entry: str, fault: Fault, error: HostError) -> str:
        place = shlex.quote(entry)
        path = f"{place}/{error.path}"
        links = [link for link, _ in fault.way.links] if fault.way is not None else []
        if fault.step is Step.HOSTS:
            return f"setfacl --modify user:{self._user}:x ."
        if fault.cause is Cause.NOT_SEARCHABLE or fault.cause is Cause.NOT_WRITABLE:
            assert fault.culprit is not None
            assert fault.way is not None
            if error.owner is not None:  # a directory was reached, and it is somebody's
                is_meant = fault.culprit.status.st_uid == error.owner
            else:
                is_meant = self._is_administrators(fault.way)
            return self._grant(fault.culprit, is_meant=is_meant)
        if fault.step is Step.OWNER:
            return self._mend_owner(place, fault, error, is_link=bool(links))
        if fault.reason is HostReason.BACKEND_BUSY:
            return "# look whether the backend hangs: it accepts no connection"
        if fault.reason is HostReason.BACKEND_FAILED:
            return "# look into the log of the backend, and of the kernel"
        if fault.step is Step.HOST:
            if fault.cause is Cause.MISSING:
                return f"mkdir {place} && ln -s SOCKET {path}"
            if links:
                return f"ln -sfn DIRECTORY {place}"
            return f"rm {place} && mkdir {place}"
        if os.path.islink(f"{entry}/{error.path}"):
            if fault.cause is Cause.NOBODY_LISTENS:
                return "# start the backend, which is to listen there"
            return f"ln -sfn SOCKET {path}"
        if fault.cause is Cause.NOBODY_LISTENS:
            return f"rm {path}  # and start the backend, which makes it anew"
        if fault.cause is Cause.MISSING:
            return f"ln -s SOCKET {path}  # or have the backend listen there"
        return f"rm -r {path} && ln -s SOCKET {path}"

    def _mend_owner(self, place: str, fault: Fault, error: HostError, *, is_link: bool) -> str:
        if fault.cause is Cause.WRITABLE_BY_OTHERS:
            return f"ln -sfn DIRECTORY {place}" if is_link else f"chmod go-w {place}"
        if error.listener is None:  # it is a directory for names that are not a host's
            return f"# if an administrator means that: chown --no-dereference 0 {place}"
        # It may lead to the socket of somebody who knows nothing of it.
        who = f"# have uid {fault.owner} run the backend"
        return f"{who}; if uid {error.listener} is meant: chown {error.listener} {place}"

    def _is_administrators(self, way: Way) -> bool:
        """Tell whether all links on a way are root's, or the owner's of the hosts directory."""
        try:
            trusted = {0, os.stat(".").st_uid}
            return all(os.lstat(link).st_uid in trusted for link, _ in way.links)
        except OSError:
            return False

    def close(self) -> None:
        """Close the hosts directory."""
        self._hosts.close()
        self._relayed.close()


def _patiently(look: Callable[[], T]) -> T:
    """Return what a look gives; wait for a place in a backlog that is full.

    Raises:
        HostError: there is no backend to be had.
    """
    for left in reversed(range(_TRIES)):
        try:
            return look()
        except HostError as error:
            if error.reason is not HostReason.BACKEND_BUSY or not left:
                raise
            time.sleep(_PAUSE)
    raise AssertionError("the last look ends in one way or the other")


def _of_one(finding: Finding, path: str) -> Finding:
    """Return what is wrong with one of two sockets, as it matters while the other serves."""
    word = CheckReason.NOT_HANDED_OVER if path == HANDOFF_SOCKET else CheckReason.NOT_RELAYED
    detail = f"{path} can't be used ({finding.word}): {finding.detail}"
    return finding._replace(word=word, detail=detail)


def find_shared(results: Sequence[Result]) -> dict[str, Finding]:
    """Say which hosts share a process with hosts of other owners: entries, and what is wrong.

    A browser reuses a connection for another name that its certificate has (RFC 9113 §9.1.1), and
    then the process alone keeps the two tenants apart.
    """
    of_process: dict[int, list[Result]] = {}
    for each in results:
        # The first process listens for others, as systemd does; 0 is one that can't be seen.
        if each.listener is not None and each.listener[0] > 1 and each.owner is not None:
            of_process.setdefault(each.listener[0], []).append(each)
    found = {}
    for process, same in of_process.items():
        if len({each.owner for each in same}) < 2:
            continue
        for each in same:
            other = next(other for other in same if other.owner != each.owner)
            detail = (
                f"the process {process} listens for {each.entry} (uid {each.owner}) and for "
                f"{other.entry} (uid {other.owner}): visitors of one may reach the other's site"
            )
            mend = "# run a process for each owner, or give no certificate both names"
            found[each.entry] = Finding(CheckReason.SHARED_PROCESS, detail, mend)
    return found


def _as_host(entry: str) -> Hostname:
    """Return an entry as what the lookup takes; it is one component of a path, and no more."""
    return str.__new__(Hostname, entry)
