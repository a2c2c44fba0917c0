"""One connection of a program on this machine, from plaintext to mutual TLS.

The kernel has redirected it to us, and knows where it was to go. The names that this address was
looked up under say whom it is for; each that is allowed is tried, the newest first, until a server
shows a certificate for it. Before that the program hears nothing, and the server sees nothing of
our certificate.
"""

from _socket import socket
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from ipaddress import ip_address
from typing import Final

import trio

from mutual_tls import resumption, session
from mutual_tls.dial import DialError, Endpoint, IPAddress
from mutual_tls.end import TLSEnd, TLSError
from mutual_tls.netfilter.mark import OPTION
from mutual_tls.netfilter.original import NotRedirectedError, original_destination
from mutual_tls.outward import Outward, Server
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.relay import TLSRelay
from mutual_tls.settings import StrPath
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy_hostname import Hostname
from tls_tproxy.checkers import ask
from tls_tproxy.config import Config
from tls_tproxy.log import Log
from tls_tproxy.names import Names
from tls_tproxy.refusal import WrapReason
from tls_tproxy.starttls import StartTLS, decline_encryption, request_encryption
from tls_tproxy.wrap import Service, Wrap

# Names that are tried for one address. Each wrong one costs a handshake; behind an address of a
# content network there may be thousands, but few that one machine has looked up lately.
_MOST_TRIED: Final = 8

# A client connects a moment after it has heard the answer, and so have we; but in a flood the
# kernel may hand it to us later. Seconds that we look for a name, and between two looks.
_LOOK_FOR: Final = 0.5
_LOOK_EVERY: Final = 0.05


class Sessions(session.Sessions):
    """Everything that connections share.

    Args:
        config: what can be set.
        wrap: what the directory says.
        names: what addresses are called.
        log: where refusals go, too.
    """

    def __init__(
        self,
        config: Config,
        wrap: Wrap,
        names: Names,
        loop: EventLoop,
        relay: TLSRelay,
        log: Log,
        limit: ConnectionLimit,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(config, loop, relay, log, limit, nursery)
        self.wrap = wrap
        self.names = names
        self.log = log
        self.resumption = resumption.Sessions()

    def accept(self, client: socket, address: Address) -> None:
        """Begin the story of an accepted client."""
        self.begin(Session(self, client, address))


class Session(session.Session):
    """A program has connected in plaintext."""

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        super().__init__(shared, client, address)
        self.shared = shared
        self.destination: Endpoint | None = None
        self.name: str | None = None
        self._outward = Outward(self, shared.resumption)
        # What a client of PostgreSQL has said beyond its wish for encryption, which is declined.
        self._said = b""
        self._has_declined = False
        self._reached: TLSEnd | None = None

    async def tell(self) -> None:
        """Find out whom it is for, and reach it."""
        try:
            self.destination = Endpoint(*original_destination(self.client))
        except NotRedirectedError as error:
            raise Refusal(WrapReason.NOT_REDIRECTED, str(error)) from None
        # It need not say anything: many a protocol has the server speak first.
        self.blamed = WrapReason.SERVER_SILENT
        # Nor does it matter who is silent: the clients of one server that is down are not to keep
        # all places from those of others.
        self.has_begun()
        address = ip_address(self.destination.host.partition("%")[0])
        names = await self._find_names(address)
        services = self._find_services(names, self.destination.port, address)
        self._reached = await self._reach_one(services, self.destination.host)
        self.join(self.client, self._reached, b"", self._said)

    def has_ended(self, heard: int, ending: StrEnum) -> None:
        """Keep the session of TLS: only now it is sure that something has been read."""
        if self._reached is not None:
            self._outward.keep_session(self._reached)
            self._outward.report_failure(heard, ending)
            self._reached = None

    async def _find_names(self, address: IPAddress) -> list[Hostname]:
        """Return what an address is called, the likeliest name first.

        Raises:
            Refusal: nobody here has looked up a name for it.
        """
        with self.story.time_limit(_LOOK_FOR):
            while not (names := self._names(address)):
                await self.story.sleep(_LOOK_EVERY)
        self.name = ",".join(names) or None
        if not names:
            trouble = self.shared.names.hosts_trouble
            detail = "no name was looked up for that address" + (f"; {trouble}" if trouble else "")
            raise Refusal(WrapReason.NO_NAME, detail)
        return names

    def _names(self, address: IPAddress) -> list[Hostname]:
        """Return what an address is called: fixed names first, for nobody can forge them."""
        fixed = self.shared.wrap.fixed_names(address)
        return list(dict.fromkeys([*fixed, *self.shared.names.of(address)]))

    def _find_services(
        self, names: Sequence[Hostname], port: int, address: IPAddress
    ) -> list[Service]:
        """Return how the connection may be wrapped, the likeliest way first.

        Raises:
            Refusal: in no way.
        """
        services = []
        first: Refusal | None = None
        for name in names:
            try:
                services.append(self.shared.wrap.find(name, port, address))
            except Refusal as refusal:
                # That name is elsewhere, so the DNS errs, or is forged. Whoever meant that name is
                # not to reach another one in its place.
                if refusal.reason is WrapReason.ADDRESS_NOT_ALLOWED:
                    raise
                first = first or refusal
        if not services:
            assert first is not None
            raise first
        return services[:_MOST_TRIED]

    async def _reach_one(self, services: Sequence[Service], host: str) -> TLSEnd:
        """Reach the server for the first of these for whom it shows a certificate.

        Raises:
            DialError, TLSError, Refusal: for none. What is wrong with the newest is what is told:
                most likely it is the one that the client has meant.
        """
        first: DialError | TLSError | Refusal | None = None
        deadline = self.began + self.shared.options.setup_seconds
        for service in services:
            if service.starttls is StartTLS.POSTGRES and not self._has_declined:
                self._has_declined = True
                self.blamed = SessionReason.CLIENT_SILENT
                self._said = await decline_encryption(self.story, self.client)
                self.blamed = WrapReason.SERVER_SILENT
            # Half of what is left: the newest is the likeliest, and a silent one is not to take the
            # time of all others.
            left = deadline - trio.current_time()
            share = left if service is services[-1] else left / 2
            try:
                with self.story.time_limit(share):
                    end = await self._reach(service, host)
                    self.name = service.name
                    return end
                raise Refusal(WrapReason.SERVER_SILENT, "the time was over")
            except (DialError, TLSError, Refusal) as error:
                first = first or error
                self._outward.close()
        assert first is not None
        raise first

    async def _reach(self, service: Service, host: str) -> TLSEnd:
        server = Server(
            Endpoint(host, service.port),
            service.name,
            service.identity,
            service.rules,
            options=(OPTION,),
            check=partial(ask, service.checkers, [service.name]) if service.checkers else None,
            before_tls=request_encryption if service.starttls is StartTLS.POSTGRES else None,
        )
        return await self._outward.reach(server)

    def give_way(self) -> None:
        """End this, since others wait for the place; by a reset, too."""
        self.reset()
        super().give_way()

    async def refuse(self, refusal: Refusal) -> None:
        """Reset the connection, so that the program fails at once, and not as if all was said."""
        self.reset()

    def report(self, refusal: Refusal) -> None:
        """Write the line of a refusal."""
        destination = str(self.destination) if self.destination else None
        self.shared.log.refusal(refusal, self.show_client(), destination, self.name)

    def host(self, refusal: Refusal | None = None) -> tuple[str, StrPath | None] | None:
        """Return the name that it is for; the owner of that name's directory may know."""
        # Several are known by one address, and nobody knows whom it was for.
        if self.name is None or "," in self.name:
            return None
        directory = self.shared.wrap.directory(self.name)
        return None if directory is None else (self.name, directory)

    def fields(self) -> dict[str, object]:
        """Return what the line of a connection says beside the client."""
        return {"destination": self.destination, "name": self.name}
