"""One connection until its two ends are joined: what the stories of all programs share.

A story is told by a coroutine, in `tell`, until the relay goes on. All that can go wrong is a
`Refusal`; whoever tells the story says what the client is told of it, and what the log.
"""

import contextlib
import os
import socket as std
from _socket import MSG_DONTWAIT, MSG_PEEK, SO_LINGER, SOL_SOCKET, socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import trio

from mutual_tls.dial import DialError
from mutual_tls.end import TLSEnd, TLSError, receive_some
from mutual_tls.exhausted import EXHAUSTED
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.relay import TLSRelay
from mutual_tls.settings import StrPath
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.story import Stories, Story, Timer
from sniproxy.engine.tcp import LINGER_0
from sniproxy.service.eventlog import EventLog, Seconds, show_address
from sniproxy.service.figures import Figures, HostFigures
from sniproxy.service.notify import Counts
from sniproxy.service.options import ServiceOptions

# What is timed for the status socket: from accept until both ends are joined.
LATENCIES: Final = ("setup",)

# Seconds in which a refusal has to be delivered; half of them are for the client to end, too.
_ANSWER_SECONDS = 2.0

# Bytes received at a time until the ends are joined: the flight of a handshake, and more.
CHUNK = 1 << 14

# Seconds that a client who has begun to say what it wants keeps its place, whoever waits for it. A
# handshake takes two round trips, so that is enough for those who don't dawdle.
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class SessionOptions(ServiceOptions):
    """What can be set for every program that speaks TLS, and what is fixed for a reason."""

    # Seconds from accept until the ends are joined: what the client says, names, connecting, TLS,
    # and answers. As the SNI router has it, for the same lost packets.
    setup_seconds: float = 10.0


class Sessions:
    """Everything that connections share, and how many there are.

    Args:
        options: limits.
        loop: drives the stories.
        relay: goes on when they are told.
        log: where bugs go, and lines for connections.
        limit: counts connections.
        nursery: where what only trio can wait for has its tasks.

    Attributes:
        served, refused: How many there were.
        silent: Clients who have not said a byte, the oldest first.
        unfinished: Those who have begun to say what they want, and since when.
        refusing: Clients who are being told that it can't be done, the oldest first.
    """

    def __init__(
        self,
        options: SessionOptions,
        loop: EventLoop,
        relay: TLSRelay,
        log: EventLog,
        limit: ConnectionLimit,
        nursery: trio.Nursery,
    ) -> None:
        self.options = options
        self.loop = loop
        self.relay = relay
        self.events = log
        self.limit = limit
        self.stories = Stories(loop, nursery, log.bug)
        relay.last_words.is_place_wanted = limit.is_place_wanted
        self.served = self.refused = 0
        self.figures: Figures | None = None  # of each host, if that is wanted
        self.is_cut = False  # whoever is left is reset
        self.silent: dict[Session, None] = {}
        self.unfinished: dict[Session, float] = {}
        self.refusing: dict[Session, None] = {}
        self._next_look: Timer | None = None

    def begin(self, session: "Session") -> None:
        """Begin the story of an accepted client."""
        self.limit.add()
        self.silent[session] = None
        self.stories.begin(session.story, session.run())

    def make_room(self) -> bool:
        """Let go who needs the place the least; return whether there was anybody.

        First one who has received all that there was for it, or is refused anyway; then who has
        been silent the longest; then who has been at it the longest, and for a second at least.
        """
        if self.relay.last_words.make_room():
            return True
        for session in self.refusing:
            session.story.abort()
            return True
        is_unheard = False
        for session in self.silent:
            if session.has_unread():
                is_unheard = True  # which has not had its turn; after that we are asked again
                continue
            session.give_way()
            return True
        if is_unheard:
            return True
        for session, since in self.unfinished.items():
            if (wait := since + _PATIENCE - trio.current_time()) <= 0:
                session.give_way()
                return True
            self._look_again(wait)
            break
        return False

    def _look_again(self, seconds: float) -> None:
        """Have whoever waits for a place ask again when so much time has passed."""
        if self._next_look is not None:
            self._next_look.cancel()
        self._next_look = self.stories.after(seconds, self.limit.let_look)

    def cut(self) -> int:
        """End whoever is left; return how many."""
        left = self.limit.open
        self.is_cut = True
        self.stories.abort_all()
        self.relay.abort_all()
        return left

    async def run(self) -> None:
        """Look at limits of time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stories.run)
            nursery.start_soon(self.relay.run)

    def count_in(self, figures: Figures) -> None:
        """Count there, from now on, what happens to the connections of each host."""
        self.figures = figures

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        """Yield the figures of each open connection's host, and its bytes there and back so far."""
        for on_end, up, down in self.relay.moved():
            session = getattr(on_end, "__self__", None)
            if isinstance(session, Session) and session.figures is not None:
                if session.is_tls_client:  # the relay counts from the plain end
                    up, down = down, up
                yield session.figures, up, down

    def counts(self) -> Counts:
        """Return how many there are, and were."""
        return Counts(self.limit.open, self.served, self.refused)


class Session(ABC):
    """One connection: its time limit, and how it ends.

    Attributes:
        source: Where the client comes from; None if that is not known, as on a Unix socket.
        began: When it was accepted, on trio's clock.
        blamed: Who is to blame if the time is over.
        far: What is to be closed as well, if the ends are not joined.
        figures: Of the host, once it is served and counted.
    """

    is_tls_client = False

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        self._shared = shared
        self.client = client
        self.source = None if client.family == std.AF_UNIX else address
        self.began = trio.current_time()
        self.story = Story(shared.stories)
        self.blamed: StrEnum = SessionReason.CLIENT_SILENT
        self.far: socket | None = None
        self.figures: HostFigures | None = None
        self._is_joined = False

    @abstractmethod
    async def tell(self) -> None:
        """Do what there is to do until the ends are joined.

        Raises:
            Refusal, DialError, TLSError: it can't.
        """

    @abstractmethod
    async def refuse(self, refusal: Refusal) -> None:
        """Tell the client."""

    @abstractmethod
    def report(self, refusal: Refusal) -> None:
        """Write the line of a refusal."""

    @abstractmethod
    def fields(self) -> dict[str, object]:
        """Return what the line of a connection says beside the client."""

    def host(self, refusal: Refusal | None = None) -> tuple[str, StrPath | None] | None:
        """Return what the connection is counted for; None if it is for nothing that is known here.

        Args:
            refusal: how it has ended, if it is not served.

        Returns:
            A name, and the path whose owner may hear of it; None if only the administrator may.
        """
        return None

    def note(self, refusal: Refusal) -> None:
        """Keep for whoever asks that a connection has failed that was served."""
        if self.figures is not None and self._shared.figures is not None:
            words = self.show_client(), refusal.reason, str(refusal)
            self._shared.figures.note(self.figures, *words)

    def has_ended(self, heard: int, ending: StrEnum) -> None:  # noqa: B027 - most have nothing to do
        """Do what is to be done when the connection that was relayed has ended.

        Args:
            heard: bytes that came from the other side.
            ending: how it has ended.
        """

    async def run(self) -> None:
        """Tell the story; see to it that nothing is left of it."""
        shared = self._shared
        try:
            try:
                with self.story.time_limit(shared.options.setup_seconds) as limit:
                    await self.tell()
                if limit.is_over:
                    raise Refusal(self.blamed, "the time was over")
            except Refusal as refusal:
                await self._end(refusal)
            except (DialError, TLSError) as error:
                await self._end(Refusal(error.reason, str(error)))
        except OSError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            shared.events.bug(error)
        finally:
            self._leave()
            shared.refusing.pop(self, None)
            if not self._is_joined:
                if shared.is_cut:
                    self.reset()
                for sock in self.client, self.far:
                    if sock is not None:
                        shared.loop.close(sock)
                shared.limit.remove()

    def has_unread(self) -> bool:
        """Tell whether there is something of the client, or its end, that nobody has read yet."""
        try:
            self.client.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass  # it has gone, and that is to be read, too
        return True

    async def hear(self) -> bytes:
        """Return the first bytes of the client; none if it leaves without a word.

        Raises:
            OSError: it has reset the connection.
        """
        said = await receive_some(self.story, self.client, CHUNK)
        if said:
            self.has_begun()
        return said

    def has_begun(self) -> None:
        """Be none of the silent clients, but one whose place others may get after a second."""
        self._shared.silent.pop(self, None)
        self._shared.unfinished[self] = trio.current_time()

    def give_way(self) -> None:
        """End this, since others wait for the place."""
        self.story.throw(Refusal(SessionReason.CAPACITY, ""))

    def is_understood(self, blamed: StrEnum) -> None:
        """Note that it is known what the client wants: it is not the one who is silent."""
        self._leave()
        self.blamed = blamed

    def join(self, plain: socket, end: TLSEnd, to_plain: bytes, to_tls: bytes) -> None:
        """Let the relay go on."""
        self.hand_over()
        self._shared.relay.join(plain, end, self.left, to_plain, to_tls)

    def hand_over(self) -> None:
        """Note that both sockets belong to a relay from now on, which calls `left` at the end."""
        self._is_joined = True
        self._shared.served += 1
        figures = self._shared.figures
        if figures is not None:
            figures.latencies["setup"].add(trio.current_time() - self.began)
            if (found := self.host()) is not None:
                name, path = found
                self.figures = figures.served(name, _owner(path))

    async def _end(self, refusal: Refusal) -> None:
        self._shared.refused += 1
        # First, so that whoever has heard the answer finds the line.
        self.report(refusal)
        if (figures := self._shared.figures) is not None:
            figures.refused(refusal.reason)
            if (found := self.host(refusal)) is not None:
                name, path = found
                words = refusal.reason, self.show_client(), str(refusal)
                figures.refused_at(name, _owner(path), *words)
        if refusal.reason is SessionReason.CAPACITY:
            return  # an answer would take up the place
        self._leave()
        self._shared.refusing[self] = None
        with self.story.time_limit(_ANSWER_SECONDS):
            await self.refuse(refusal)

    def _leave(self) -> None:
        """Be none of those who have not said what they want."""
        self._shared.silent.pop(self, None)
        self._shared.unfinished.pop(self, None)

    def _fail(self, error: OSError) -> None:
        if error.errno in EXHAUSTED:
            self._shared.events.exhausted(error)
        # Else the client has gone.
        self.reset()

    def reset(self) -> None:
        """Have the client see a reset when its socket is closed."""
        with contextlib.suppress(OSError):
            self.client.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)

    def left(self, up: int, down: int, ending: StrEnum) -> None:
        """Write the line of the connection, if lines are wanted, and count it out."""
        self.has_ended(down, ending)
        if self.is_tls_client:  # the relay has counted from the plain end
            up, down = down, up
        shared = self._shared
        if shared.options.log_connections:
            shared.events.event(
                "connection",
                client=self.show_client(),
                **self.fields(),
                up=up,
                down=down,
                seconds=Seconds(trio.current_time() - self.began),
                ending=ending,
            )
        if self.figures is not None:
            self.figures.left(up, down, ending)
        elif shared.figures is not None:
            shared.figures.left(up, down)
        shared.limit.remove()

    def show_client(self) -> str:
        """Return its address as people write it; whoever comes by a Unix socket has none."""
        return show_address(self.source) if self.source else "unix"


def _owner(path: StrPath | None) -> int | None:
    """Return the uid of whom an entry belongs to; None if nobody can say."""
    if path is None:
        return None
    try:
        return os.stat(path).st_uid
    except OSError:
        return None
