"""One connection until its tunnel stands: what the stories in `ingress` and `peer_side` share.

When the tunnel stands the relay goes on.
All that can go wrong is a `Refusal`, and what the client is told of it stands in one table.
"""

import contextlib
import hashlib
import os
import socket as std
from _socket import MSG_DONTWAIT, MSG_PEEK, SO_LINGER, SOL_SOCKET, socket
from collections.abc import Callable
from pathlib import Path

import trio

from mutual_tls import resumption
from mutual_tls.dial import EXHAUSTED, DialError, Endpoint
from mutual_tls.end import TLSEnd, TLSError
from mutual_tls.identity import Identities
from mutual_tls.relay import Ending, TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.story import Stories, Story
from sniproxy.engine.tcp import LINGER_0
from sniproxy.service.eventlog import show_address
from sniproxy.service.notify import Counts
from tls_bridge.config import Config
from tls_bridge.log import Log
from tls_bridge.refusal import BridgeReason, Reason, Refusal

# Seconds in which a refusal has to be delivered; half of them are for the client to end, too.
_ANSWER_SECONDS = 2.0


class Sessions:
    """Everything that connections share, and how many there are.

    Args:
        program: its name, for Via and Proxy-Status.
        nursery: where what only trio can wait for has its tasks.
    """

    def __init__(
        self,
        program: str,
        config: Config,
        identities: Identities,
        loop: EventLoop,
        relay: TLSRelay,
        log: Log,
        limit: ConnectionLimit,
        nursery: trio.Nursery,
    ) -> None:
        self.program = program
        # RFC 9110 §7.6.3: a proxy may go by a pseudonym. The same in every process and after every
        # start, and another one in every other place.
        place = f"{os.uname().nodename}:{program}:{Path.cwd()}"
        self.pseudonym = f"{program}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
        self.config = config
        self.identities = identities
        self.loop = loop
        self.relay = relay
        self.log = log
        self.limit = limit
        self.stories = Stories(loop, nursery, log.bug)
        relay.last_words.is_place_wanted = limit.is_place_wanted
        self.resumption = resumption.Sessions()
        self.served = self.refused = 0
        # Clients who have not said yet what they want, the oldest first.
        self.silent: dict[Session, None] = {}
        # Clients who are being told that it can't be done, the oldest first.
        self.refusing: dict[Session, None] = {}

    def begin(
        self, make: Callable[["Sessions", socket, Address], "Session"], client: socket, to: Address
    ) -> None:
        """Begin the story of an accepted client."""
        self.limit.add()
        session = make(self, client, to)
        self.silent[session] = None
        self.stories.begin(session.story, session.run())

    def make_room(self) -> bool:
        """Let go who needs the place the least; return whether there was anybody.

        First one who has received all that there was for it, or is refused anyway; then who has
        been silent the longest.
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
            session.story.throw(Refusal(BridgeReason.CAPACITY, ""))
            return True
        return is_unheard

    def cut(self) -> int:
        """End whoever is left; return how many."""
        left = self.limit.open
        self.stories.abort_all()
        self.relay.abort_all()
        return left

    async def run(self) -> None:
        """Look at limits of time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stories.run)
            nursery.start_soon(self.relay.run)

    def counts(self) -> Counts:
        """Return how many there are, and were."""
        return Counts(self.limit.open, self.served, self.refused)


class Session:
    """What the three stories have in common: their time limit, and how they end."""

    is_tls_client = False

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        self.shared = shared
        self.client = client
        # Where the client comes from; None if that is not known, as on a Unix socket.
        self.source = None if client.family == std.AF_UNIX else address
        self.began = trio.current_time()
        self.story = Story(shared.stories)
        self.target: Endpoint | None = None
        self.peer: str | None = None
        self.silent = BridgeReason.CLIENT_SILENT  # who is to blame if the time is over
        self.far: socket | None = None  # what is to be closed, if the tunnel does not stand
        self.is_joined = False

    async def run(self) -> None:
        """Tell the story; see to it that nothing is left of it."""
        try:
            try:
                with self.story.time_limit(self.shared.config.setup_seconds) as limit:
                    await self.tell()
                if limit.is_over:
                    raise Refusal(self.silent, "the time was over")
            except Refusal as refusal:
                await self._end(refusal)
            except (DialError, TLSError) as error:
                await self._end(Refusal(error.reason, str(error)))
        except OSError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            self.shared.log.bug(error)
        finally:
            self.shared.silent.pop(self, None)
            self.shared.refusing.pop(self, None)
            if not self.is_joined:
                self._close()

    async def tell(self) -> None:
        """Do what there is to do until the tunnel stands.

        Raises:
            Refusal, DialError, TLSError: it can't.
        """
        raise NotImplementedError

    async def refuse(self, refusal: Refusal) -> None:
        """Tell the client."""
        raise NotImplementedError

    def has_unread(self) -> bool:
        """Tell whether the client has said something that nobody has read yet."""
        try:
            return bool(self.client.recv(1, MSG_PEEK | MSG_DONTWAIT))
        except OSError:
            return False

    def is_understood(self, target: Endpoint) -> None:
        """Note what the client wants: from now on it is not the one who is silent."""
        self.target = target
        self.shared.silent.pop(self, None)
        self.silent = BridgeReason.PEER_SILENT

    def join(self, plain: socket, end: TLSEnd, to_plain: bytes, to_tls: bytes) -> None:
        """Let the relay go on."""
        self.is_joined = True
        self.shared.served += 1
        self.shared.relay.join(plain, end, self._left, to_plain, to_tls)

    def report(self, reason: Reason, detail: str) -> None:
        """Write the line of a refusal, and count it."""
        self.shared.refused += 1
        target = str(self.target) if self.target else None
        client = show_client(self.source)
        self.shared.log.refusal(reason, client, target, self.peer, detail)

    async def _end(self, refusal: Refusal) -> None:
        # First, so that whoever has heard the answer finds the line.
        self.report(refusal.reason, str(refusal))
        if refusal.reason is BridgeReason.CAPACITY:
            return  # an answer would take up the place
        self.shared.silent.pop(self, None)
        self.shared.refusing[self] = None
        with self.story.time_limit(_ANSWER_SECONDS):
            await self.refuse(refusal)

    def _fail(self, error: OSError) -> None:
        if error.errno in EXHAUSTED:
            self.shared.log.exhausted(error)
        # Else the client has gone.
        with contextlib.suppress(OSError):
            self.client.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)

    def _close(self) -> None:
        for sock in self.client, self.far:
            if sock is not None:
                self.shared.loop.close(sock)
        self.shared.limit.remove()

    def _left(self, up: int, down: int, ending: Ending) -> None:
        if self.is_tls_client:  # the relay has counted from the plain end
            up, down = down, up
        shared = self.shared
        if shared.config.log_connections:
            shared.log.event(
                "connection",
                client=show_client(self.source),
                name=self.target,
                peer=self.peer,
                up=up,
                down=down,
                seconds=f"{trio.current_time() - self.began:.3f}",
                ending=ending,
            )
        shared.limit.remove()


def show_client(source: Address | None) -> str:
    """Return an address the way people write it; whoever comes by a Unix socket has none."""
    return show_address(source) if source else "unix"
