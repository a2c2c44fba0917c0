"""What the stories in `ingress` and `peer_side` share."""

import hashlib
import os
from _socket import socket
from abc import abstractmethod
from pathlib import Path

import trio

from mutual_tls import resumption, session
from mutual_tls.dial import Endpoint
from mutual_tls.identity import Identities
from mutual_tls.refusal import Refusal
from mutual_tls.relay import TLSRelay
from mutual_tls.settings import StrPath
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from tls_bridge.config import Config
from tls_bridge.http_connect import PeerRefusal
from tls_bridge.log import Log
from tls_bridge.refusal import ANSWERS, BridgeReason


class Sessions(session.Sessions):
    """Everything that connections share.

    Args:
        program: its name, for Via and Proxy-Status.
        config: what can be set.
        identities: who we are.
        log: where refusals go, too.

    Attributes:
        pseudonym: What this program calls itself in Via.
        via: The field that says that a message came by here: its name and its value.
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
        super().__init__(config, loop, relay, log, limit, nursery)
        self.program = program
        self.pseudonym = pseudonym(program)
        self.via = b"Via", f"1.1 {self.pseudonym}".encode()
        self.config = config
        self.identities = identities
        self.log = log
        self.resumption = resumption.Sessions()


class Session(session.Session):
    """One connection: what it asks for, and who carries it.

    Attributes:
        directories: Where each host has one.
    """

    directories: str

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        super().__init__(shared, client, address)
        self.shared = shared
        self.target: Endpoint | None = None
        self.peer: str | None = None

    async def tell(self) -> None:
        """Hear the client, and do what it asks for. One that leaves without a word has no story."""
        if said := await self.hear():
            await self.serve(said)

    @abstractmethod
    async def serve(self, said: bytes) -> None:
        """Do what there is to do until the tunnel stands.

        Args:
            said: the first bytes of the client.

        Raises:
            Refusal, DialError, TLSError: it can't.
        """

    def wants(self, target: Endpoint) -> None:
        """Note what the client wants."""
        self.target = target
        self.is_understood(BridgeReason.PEER_SILENT)

    def report(self, refusal: Refusal) -> None:
        """Write the line of a refusal, with the status that the client is given."""
        if isinstance(refusal, PeerRefusal):
            status = refusal.response.status
        else:
            status = ANSWERS[refusal.reason].status
        target = str(self.target) if self.target else None
        self.shared.log.refusal(refusal, status, self.show_client(), target, self.peer)

    def host(self, refusal: Refusal | None = None) -> tuple[str, StrPath | None] | None:
        """Return what it asks for, and its directory, unless nothing is said of that."""
        if self.target is None:
            return None
        if refusal is not None and refusal.reason is BridgeReason.NO_ROUTE:
            return None
        return str(self.target), f"{self.directories}/{self.target.host}"

    def fields(self) -> dict[str, object]:
        """Return what the line of a connection says beside the client."""
        return {"name": self.target, "peer": self.peer}


def pseudonym(program: str) -> str:
    """Return what a program calls itself in Via: RFC 9110 §7.6.3 allows a pseudonym.

    The same in every process and after every start, and another one in every other directory, be it
    the root directory of each.
    """
    # By no path: the user that we are may have no way to it.
    status = os.stat(".")
    place = f"{os.uname().nodename}:{program}:{Path.cwd()}:{status.st_dev}:{status.st_ino}"
    return f"{program}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
