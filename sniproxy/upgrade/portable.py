"""Connections that stand still, what is said of them to another process, and what that makes of it.

A client who waits is a descriptor, a deadline, and how its hello begins: the rest is still in the
socket. A connection that is relayed is two descriptors, and what is in pipes and in memory between
them.
"""

import contextlib
from _socket import SO_RCVLOWAT, SOCK_STREAM, SOL_SOCKET, socket
from collections.abc import Callable, Iterator
from socket import AF_UNIX
from typing import Any, Protocol

import trio

from sniproxy.engine.ending import Ending
from sniproxy.engine.linger import Linger
from sniproxy.engine.relay import READ_EVENTS, FlowState, OnEnd, Suspended
from sniproxy.hello_wait import HelloWait
from sniproxy.service.figures import HostFigures
from sniproxy.session import Held, Session, Sessions


class Parcel:
    """What goes to the other process: descriptors, and bytes."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.blob = bytearray()

    def put(self, *fds: int) -> int:
        """Put descriptors in; return where the first one is."""
        self.fds += fds
        return len(self.fds) - len(fds)

    def put_bytes(self, data: bytes) -> list[int]:
        """Put bytes in; return where they begin and end."""
        begin = len(self.blob)
        self.blob += data
        return [begin, len(self.blob)]


class Portable(Protocol):
    """A connection that stands still."""

    def describe(self, parcel: Parcel) -> dict[str, Any]:
        """Return what there is to know of it, and put the rest into a parcel."""

    def resume(self) -> None:
        """Go on with it."""

    def close(self) -> None:
        """Close it, for another process has it."""


class _Waiting:
    """A client who is not served yet: its hello has not come, or there is no backend."""

    def __init__(self, session: Session) -> None:
        shared = session.shared
        self._session = session
        self._deadline: float | None = None
        self._entry: str | None = None
        self._watcher: HelloWait | Held
        if session.held is not None:
            self._watcher = session.held
            self._entry = shared.room.entry(session.held)
            shared.room.discard(session.held)
        else:
            assert session.wait is not None
            self._watcher = session.wait
            self._deadline = shared.waiting.deadline(session.wait)
            shared.waiting.discard(session.wait)
        shared.loop.unwatch(session.client.fileno())

    def describe(self, parcel: Parcel) -> dict[str, Any]:
        session = self._session
        now = trio.current_time()
        return {
            "kind": "waiting",
            "fd": parcel.put(session.client.fileno()),
            "family": session.client.family,
            "address": session.address,
            "age": session.age(),
            # Seconds, and not times: clocks differ between processes.
            "left": None if self._deadline is None else self._deadline - now,
            "held": None if session.held is None else now - session.held.since,
            "head": parcel.put_bytes(session.head),
        }

    def resume(self) -> None:
        session = self._session
        try:
            session.shared.loop.watch(session.client.fileno(), self._watcher, READ_EVENTS)
        except OSError:  # ENOMEM, ENOSPC
            return session.abort()
        if session.held is not None and self._entry is not None:
            session.shared.room.restore(session.held, self._entry)
        elif session.wait is not None and self._deadline is not None:
            session.shared.waiting.restore(session.wait, self._deadline)

    def close(self) -> None:
        self._session.is_over = True
        self._session.shared.loop.close(self._session.client)
        self._session.shared.limit.remove()


class _Relayed:
    """A connection that is relayed."""

    def __init__(self, sessions: Sessions, suspended: Suspended) -> None:
        self._sessions = sessions
        self._suspended = suspended

    def describe(self, parcel: Parcel) -> dict[str, Any]:
        suspended = self._suspended
        flows = []
        for state in suspended.states():
            is_over = isinstance(state.pending, Ending)
            flows.append(
                {
                    "moved": state.moved,
                    "swept": state.swept,
                    "quiet": state.quiet,
                    "credit": state.credit,
                    "ended": state.ended,
                    "over": state.pending if is_over else None,
                    "pending": parcel.put_bytes(state.pending)
                    if isinstance(state.pending, bytes)
                    else None,
                    "piped": state.piped,
                    "pipe": None if state.pipe is None else parcel.put(*state.pipe),
                }
            )
        return {
            "kind": "relayed",
            "fd": parcel.put(suspended.near.fileno(), suspended.far.fileno()),
            "family": suspended.near.family,
            "flows": flows,
            "story": _tell_story(suspended.on_end),
        }

    def resume(self) -> None:
        self._suspended.resume()

    def close(self) -> None:
        self._suspended.close()
        _forget_served(self._sessions, self._suspended.on_end)


class _LastWords:
    """A client whose backend has closed, and who has not received all, or not ended."""

    def __init__(self, sessions: Sessions, linger: Linger) -> None:
        self._sessions = sessions
        self._linger = linger
        self._progress = sessions.relay.last_words.suspend(linger)

    def describe(self, parcel: Parcel) -> dict[str, Any]:
        linger = self._linger
        assert linger.moved is not None
        on_end, up, down = linger.moved
        return {
            "kind": "last_words",
            "fd": parcel.put(linger.sock.fileno()),
            "family": linger.sock.family,
            "moved": [up, down],
            "final": linger.final,
            "ended": linger.peer_has_ended,
            "progress": self._progress,
            "story": _tell_story(on_end),
        }

    def resume(self) -> None:
        with contextlib.suppress(OSError):  # it is reset
            self._sessions.relay.last_words.resume(self._linger, self._progress)

    def close(self) -> None:
        assert self._linger.moved is not None
        self._linger.let_go()
        _forget_served(self._sessions, self._linger.moved[0])


def suspend_each(sessions: Sessions) -> Iterator[Portable]:
    """Suspend what another process can go on with, one after the other, whenever one is asked for.

    First who waits, the oldest first; and then who talks. Not among them: who is just hearing an
    alert, and who is connected in this moment.
    """
    # To lend is to wait for the first byte of an answer. That goes on as all others do.
    for held in sessions.lent.items():
        held.on_answer()
    for wait in sessions.waiting.items():
        if wait in sessions.waiting and isinstance(wait.session, Session):
            yield _Waiting(wait.session)
    for guest in sessions.room.guests():
        if sessions.room.entry(guest) is not None and isinstance(guest, Held):
            yield _Waiting(guest.session)
    last_words = sessions.relay.last_words
    for linger in last_words.items():
        if linger in last_words:
            yield _LastWords(sessions, linger)
    for flow in sessions.relay.connections():
        if flow.can_be_suspended():
            yield _Relayed(sessions, Suspended(flow))


def _tell_story(on_end: OnEnd) -> dict[str, Any]:
    """Return what is known of a connection besides its bytes, by whom its end is told to."""
    known = getattr(on_end, "__self__", None)
    story: dict[str, Any] = {}
    if isinstance(known, Session):
        story["address"] = known.address
        story["name"] = None if known.name is None else known.name.decode("latin-1")
        story["age"] = known.age()
        story["entry"] = known.entry
        known = known.figures
    if isinstance(known, HostFigures):
        story["host"], story["owner"] = known.host, known.owner
    return story


def _forget_served(sessions: Sessions, on_end: OnEnd) -> None:
    """Count out a connection that another process counts from now on."""
    known = getattr(on_end, "__self__", None)
    if isinstance(known, Session):
        known = known.figures
    if isinstance(known, HostFigures):
        known.served -= 1
    sessions.served -= 1
    sessions.limit.remove()


# --- In the other process


class Revived(Protocol):
    """A connection that stands still, in the process that is to go on with it."""

    def begin(self) -> None:
        """Go on with it, and own its descriptors from now on; it has been counted as open."""


def revive(sessions: Sessions, record: dict[str, Any], fds: list[int], blob: memoryview) -> Revived:
    """Return what `describe` was said of.

    Args:
        sessions: all connections of this process.
        record: what was said.
        fds: the descriptors of the parcel; nothing is done with them yet.
        blob: its bytes.

    Raises:
        LookupError, TypeError, ValueError: that is not what `describe` says.
    """
    kinds: dict[str, Callable[..., Revived]] = {
        "waiting": _RevivedWaiting,
        "relayed": _RevivedRelayed,
        "last_words": _RevivedLast,
    }
    return kinds[record["kind"]](sessions, record, fds, blob)


class _RevivedWaiting:
    def __init__(
        self, sessions: Sessions, record: dict[str, Any], fds: list[int], blob: memoryview
    ) -> None:
        self._sessions = sessions
        self._client = record["family"], SOCK_STREAM, 0, fds[record["fd"]]
        self._address = _address(record)
        self._age, self._left, self._held = record["age"], record["left"], record["held"]
        begin, end = record["head"]
        self._head = bytes(blob[begin:end])

    def begin(self) -> None:
        shared = self._sessions
        now = trio.current_time()
        client = socket(*self._client)
        session = Session(shared, client, self._address)
        session.began = now - (self._age or 0.0)
        session.head = self._head
        # The mark is that of the other process; ours finds out anew what it waits for.
        client.setsockopt(SOL_SOCKET, SO_RCVLOWAT, 1)
        shared.begin_session(session)
        if self._left is not None and session.wait is not None and session.wait in shared.waiting:
            # No later than those who come now, should they have less time than there was.
            session.deadline = now + min(self._left, shared.config.hello_seconds)
            shared.waiting.restore(session.wait, session.deadline)
        if self._held is not None and session.wait is None and not session.is_over:
            session.hold().since = now - self._held


class _RevivedRelayed:
    def __init__(
        self, sessions: Sessions, record: dict[str, Any], fds: list[int], blob: memoryview
    ) -> None:
        self._sessions = sessions
        at = record["fd"]
        self._near = record["family"], SOCK_STREAM, 0, fds[at]
        self._far = AF_UNIX, SOCK_STREAM, 0, fds[at + 1]
        self._story = record["story"]
        up, down = (_flow_state(each, fds, blob) for each in record["flows"])
        self._states = up, down

    def begin(self) -> None:
        near, far = socket(*self._near), socket(*self._far)
        on_end = _adopt_story(self._sessions, self._story, near)
        self._sessions.relay.adopt(near, far, on_end, self._states).resume()


class _RevivedLast:
    def __init__(
        self, sessions: Sessions, record: dict[str, Any], fds: list[int], blob: memoryview
    ) -> None:
        self._sessions = sessions
        self._client = record["family"], SOCK_STREAM, 0, fds[record["fd"]]
        self._story = record["story"]
        self._up, self._down = record["moved"]
        self._final = Ending(record["final"])
        self._has_ended, self._progress = record["ended"], record["progress"]

    def begin(self) -> None:
        client = socket(*self._client)
        on_end = _adopt_story(self._sessions, self._story, client)
        up, down, final = self._up, self._down, self._final
        with contextlib.suppress(OSError):  # ENOMEM, ENOSPC: it is reset
            self._sessions.relay.last_words.add(
                client,
                lambda other: on_end(up, down, other or final),
                (on_end, up, down),
                peer_has_ended=self._has_ended,
                is_watched=False,
                final=final,
                progress=self._progress,
            )


def _flow_state(told: dict[str, Any], fds: list[int], blob: memoryview) -> FlowState:
    pending: bytes | Ending | None = None
    if told["over"] is not None:
        pending = Ending(told["over"])
    elif told["pending"] is not None:
        begin, end = told["pending"]
        pending = bytes(blob[begin:end])
    at = told["pipe"]
    pipe = None if at is None else (fds[at], fds[at + 1])
    numbers = told["moved"], told["swept"], told["quiet"], told["credit"]
    return FlowState(*numbers, told["ended"], pending, told["piped"], pipe)


def _adopt_story(sessions: Sessions, story: dict[str, Any], client: socket) -> OnEnd:
    """Count a connection in that another process has counted, and return whom to tell its end."""
    sessions.served += 1
    figures = None
    if sessions.figures is not None and "host" in story:
        figures = sessions.figures.served(story["host"], story["owner"])
    entry = story.get("entry", "")
    if not (entry or sessions.config.log_connections):
        return sessions.left if figures is None else figures.left
    if "address" not in story:
        # It was not to be logged before.
        with contextlib.suppress(OSError):
            story["address"] = client.getpeername()
    session = Session(sessions, client, _address(story))
    session.is_over = True
    session.figures = figures
    session.entry = entry
    session.began = trio.current_time() - (story.get("age") or 0.0)
    name = story.get("name")
    session.name = None if name is None else name.encode("latin-1")
    return session.on_end_after_header if entry else session.on_end


def _address(told: dict[str, Any]) -> Any:
    """Return an address as accept(2) has it; unknown is that of nobody."""
    return tuple(told.get("address") or ("0.0.0.0", 0))
