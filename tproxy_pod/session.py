"""One connection of the pod: out, from plaintext to mutual TLS, or in, the other way round.

The kernel has led it to us, and knows where it was to go. What the directory says of that address,
or of that port, is looked up, and then the other end is reached: a server that shows a certificate
for its address, or the program here, from the client's own address.
"""

import errno
import ipaddress
import ssl
from _socket import MSG_DONTWAIT, MSG_PEEK, socket
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final

import trio

from mutual_tls import resumption, session
from mutual_tls.dial import DialError, DialReason, Endpoint, dial, dial_unix
from mutual_tls.end import TLSEnd, TLSError, TLSReason, send_all
from mutual_tls.identity import IdentityError
from mutual_tls.netfilter.mark import OPTION, OPTION_FOR_CLIENT
from mutual_tls.netfilter.original import NotRedirectedError, original_destination
from mutual_tls.netfilter.transparent import bind_as
from mutual_tls.outward import Outward, Server
from mutual_tls.proxy import proxy_header
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.relay import TLSRelay
from mutual_tls.settings import StrPath
from mutual_tls.verify import Certificate, CertificateError, matches
from sniproxy.engine.ending import Ending
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.relay import Relay
from sniproxy.engine.story import Story, Timer
from sniproxy.service.figures import HostFigures
from tproxy_pod.config import Config
from tproxy_pod.log import Direction, Log
from tproxy_pod.peers import Peers
from tproxy_pod.pod import Egress, Ingress, Mode, Pod
from tproxy_pod.ready import Ready
from tproxy_pod.refusal import PodReason


class PlainEnding(StrEnum):
    """How a connection without TLS was broken off."""

    CLIENT_RESET = "client_reset"
    SERVER_RESET = "server_reset"


# RFC 8446 §5.1: the first byte of a record with a handshake message, and so of a TLS connection.
_HANDSHAKE: Final = b"\x16"

# What a plain server does with a hello: it answers something else, or ends, or breaks off. Not what
# says something of a certificate: whoever has shown one speaks TLS.
_MAY_BE_PLAIN: Final = frozenset(
    {TLSReason.NOT_TLS, TLSReason.TLS_CLOSED, TLSReason.TLS_RESET, TLSReason.TLS_FAILED}
)

# How a connection without TLS ends, where that is not called as it is with TLS.
_ENDINGS: Final[Mapping[Ending, PlainEnding]] = {
    Ending.NEAR_RESET: PlainEnding.CLIENT_RESET,
    Ending.FAR_RESET: PlainEnding.SERVER_RESET,
}

# Seconds for which a client is listened to that may speak TLS or not: a hello comes with the first
# packet. Then it is taken for one that waits for the server to speak first.
_HELLO_WITHIN: Final = 0.5


class Sessions(session.Sessions):
    """Everything that connections share.

    Args:
        config: what can be set.
        pod: what the directory says.
        plain: relays connections that are not wrapped.
        log: where refusals go, too.
    """

    def __init__(
        self,
        config: Config,
        pod: Pod,
        loop: EventLoop,
        relay: TLSRelay,
        plain: Relay,
        log: Log,
        limit: ConnectionLimit,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__(config, loop, relay, log, limit, nursery)
        self.config = config
        self.pod = pod
        self.plain = plain
        plain.last_words.is_place_wanted = limit.is_place_wanted
        self.log = log
        self.peers = Peers()
        self.resumption = resumption.Sessions()

    def accept_outward(self, client: socket, address: Address) -> None:
        """Begin the story of a program of the pod, which connects to somebody else."""
        self.begin(OutwardSession(self, client, address))

    def accept_inward(self, client: socket, address: Address) -> None:
        """Begin the story of somebody else, who connects to a program of the pod."""
        self.begin(InwardSession(self, client, address))

    def accept_question(self, client: socket, address: Address) -> None:
        """Begin the story of somebody who asks whether we are ready."""
        self.begin(Ready(self, client, address, pod=self.pod))

    def make_room(self) -> bool:
        """Let go who needs the place the least; return whether there was anybody."""
        return self.plain.last_words.make_room() or super().make_room()

    def cut(self) -> int:
        """End whoever is left; return how many."""
        left = super().cut()
        self.plain.abort_all()
        return left

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        """Yield the figures of each open connection's host, and its bytes there and back so far."""
        yield from super().moved()
        for on_end, up, down in self.plain.moved():
            session = getattr(on_end, "__self__", None)
            if isinstance(session, Session) and session.figures is not None:
                yield session.figures, up, down

    async def run(self) -> None:
        """Look at limits of time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run)
            nursery.start_soon(self.plain.run)


class Session(session.Session):
    """One connection, either way."""

    direction: Direction

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        super().__init__(shared, client, address)
        self.shared = shared
        self.destination: Endpoint | None = None
        self.peer: str | None = None  # what its certificate says of a client
        self.is_wrapped = True

    def join_plain(self) -> None:
        """Let the relay go on that knows no TLS."""
        assert self.far is not None
        self.is_wrapped = False
        self.hand_over()
        loop = self.shared.loop
        for sock in self.client, self.far:
            if loop.watcher(sock.fileno()) is not None:
                loop.unwatch(sock.fileno())
        self.shared.plain.join(self.client, self.far, self._left_plain)

    def _left_plain(self, up: int, down: int, ending: Ending) -> None:
        # The relay counts from the client; who speaks TLS as a client is counted the other way.
        if self.is_tls_client:
            up, down = down, up
        self.left(up, down, _ENDINGS.get(ending, ending))

    def give_way(self) -> None:
        """End this, since others wait for the place; by a reset, too."""
        self.reset()
        super().give_way()

    def report(self, refusal: Refusal) -> None:
        """Write the line of a refusal."""
        destination = str(self.destination) if self.destination else None
        self.shared.log.refusal(refusal, self.direction, self.show_client(), destination, self.peer)

    def host(self, refusal: Refusal | None = None) -> tuple[str, StrPath | None] | None:
        """Return which way and where it goes. The pod has one owner."""
        if self.destination is None:
            return None
        return f"{self.direction} {self.destination}", None

    def fields(self) -> dict[str, object]:
        """Return what the line of a connection says beside the client."""
        return {
            "direction": self.direction,
            "destination": self.destination,
            "peer": self.peer,
            "tls": "yes" if self.is_wrapped else "no",
        }


class OutwardSession(Session):
    """A program of the pod has connected to somebody else."""

    direction = Direction.OUT

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        super().__init__(shared, client, address)
        self._outward = Outward(self, shared.resumption)
        self._reached: TLSEnd | None = None
        self._timer: Timer | None = None

    async def tell(self) -> None:
        """Reach whom it has connected to."""
        host, port = self.client.getsockname()[:2]
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.is_loopback:
            detail = "the connection was made to the port that listens here"
            raise Refusal(PodReason.NOT_REDIRECTED, detail)
        self.destination = Endpoint(host, port)
        # It need not say anything: many a protocol has the server speak first. Nor does it matter
        # who is silent: the clients of one server that is down are not to keep all places from
        # those of others.
        self.blamed = PodReason.SERVER_SILENT
        self.has_begun()
        egress = self.shared.pod.egress(address)
        end = await self._reach(self.destination, egress)
        if end is not None:
            self._reached = end
            self.join(self.client, end, b"", b"")
        else:
            self.far = await dial(self.story, self.destination, options=(OPTION,))
            self.join_plain()

    async def _reach(self, server: Endpoint, egress: Egress) -> TLSEnd | None:
        """Reach the server; None if it is to be reached in plaintext.

        Raises:
            DialError, TLSError, Refusal: it can't be reached.
        """
        peers = self.shared.peers
        if egress.mode is Mode.PLAIN:
            return None
        if egress.mode is Mode.PERMISSIVE and peers.speaks_tls(server) is False:
            return None
        try:
            end = await self._outward.reach(
                Server(
                    server,
                    server.host,
                    self.shared.pod.identity(),
                    egress.rules,
                    options=(OPTION,),
                    before_tls=self._expect_answer,
                )
            )
        except (TLSError, Refusal) as error:
            may_be_plain = error.reason in _MAY_BE_PLAIN or error.reason is PodReason.NO_TLS_ANSWER
            if egress.mode is not Mode.PERMISSIVE or not may_be_plain or peers.speaks_tls(server):
                raise
            self._outward.close()
            peers.note(server, speaks_tls=False)
            return None
        finally:
            if self._timer is not None:
                self._timer.cancel()
        peers.note(server, speaks_tls=True)
        return end

    async def _expect_answer(self, story: Story, _: socket) -> None:
        """Have a server that may be a plain one answer soon."""
        if self._timer is not None:
            self._timer.cancel()
        seconds = self.shared.config.first_handshake_seconds
        self._timer = story.stories.after(seconds, self._look_for_answer)

    def _look_for_answer(self) -> None:
        assert self.destination is not None
        # Somebody else has had an answer meanwhile: it is busy, and the limit for all is enough.
        if not self.shared.peers.speaks_tls(self.destination):
            detail = "it has not answered, and is not known to speak TLS"
            self.story.throw(Refusal(PodReason.NO_TLS_ANSWER, detail))

    def has_ended(self, heard: int, ending: StrEnum) -> None:
        """Keep the session of TLS: only now it is sure that something has been read."""
        if self._reached is not None:
            self._outward.keep_session(self._reached)
            self._outward.report_failure(heard, ending)
            self._reached = None

    async def refuse(self, refusal: Refusal) -> None:
        """Reset the connection, so that the program fails at once, and not as if all was said."""
        self.reset()


class InwardSession(Session):
    """Somebody else has connected to a program of the pod."""

    direction = Direction.IN
    is_tls_client = True

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        super().__init__(shared, client, address)
        self.end: TLSEnd | None = None
        self._is_known = False  # whether the handshake is over

    async def tell(self) -> None:
        """Find out who it is, and reach the program."""
        try:
            self.destination = Endpoint(*original_destination(self.client))
        except NotRedirectedError as error:
            raise Refusal(PodReason.NOT_REDIRECTED, str(error)) from None
        ingress = self.shared.pod.ingress(self.destination.port)
        if ingress.mode is Mode.PLAIN or (
            ingress.mode is Mode.PERMISSIVE and not await self._says_hello()
        ):
            self.is_wrapped = False
            self.is_understood(PodReason.PROGRAM_SILENT)
            await self._reach(self.destination, ingress, None)
            self.join_plain()
        # One that leaves without a word has no story.
        elif said := await self.hear():
            end = await self._shake_hands(said, ingress)
            self.is_understood(PodReason.PROGRAM_SILENT)
            self.join(await self._reach(self.destination, ingress, end.ssl), end, b"", b"")

    async def _says_hello(self) -> bool:
        """Tell whether the client speaks TLS; what it says is still to be read."""
        first = b""
        with self.story.time_limit(_HELLO_WITHIN):
            while True:
                try:
                    first = self.client.recv(1, MSG_PEEK | MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    await self.story.readable(self.client)
        return first == _HANDSHAKE

    async def _shake_hands(self, said: bytes, ingress: Ingress) -> TLSEnd:
        """Do the handshake with a client who has said that, and may connect.

        Raises:
            TLSError, Refusal: it failed, or the client may not.
        """
        try:
            context = self.shared.pod.identity().server_context()
        except IdentityError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        shown: list[bytes] = []
        end = TLSEnd(self.story, self.client, context, server_side=True, check=shown.append)
        self.end = end
        end.incoming.write(said)
        await end.shake_hands()
        self._is_known = True
        try:
            certificate = Certificate.parse(shown[-1])
        except CertificateError as error:
            raise Refusal(PodReason.CLIENT_NOT_ALLOWED, str(error)) from None
        self.peer = certificate.show_names() or None
        if ingress.rules is not None and not matches(ingress.rules, certificate, is_server=False):
            assert self.destination is not None
            detail = f"clients of port {self.destination.port} are others"
            raise Refusal(PodReason.CLIENT_NOT_ALLOWED, detail)
        return end

    async def _reach(
        self, destination: Endpoint, ingress: Ingress, tls: ssl.SSLObject | None
    ) -> socket:
        """Connect to the program, and say what it wants to hear of the client.

        Raises:
            DialError, Refusal: it can't be reached.
        """
        self.far = await self._dial(destination, ingress)
        if ingress.proxy is not None:
            source = self.source[:2] if self.source else None
            header = proxy_header(ingress.proxy, source, destination, tls)
            try:
                await send_all(self.story, self.far, header)
            except OSError as error:
                raise Refusal(PodReason.PROGRAM_CLOSED, error.strerror or str(error)) from None
        return self.far

    async def _dial(self, destination: Endpoint, ingress: Ingress) -> socket:
        """Connect to the program, as the client if that is wanted."""
        upstream = ingress.upstream
        if isinstance(upstream, str):
            return await dial_unix(self.story, upstream)
        if isinstance(upstream, Endpoint):
            where = upstream
        else:
            where = Endpoint(destination.host, upstream or destination.port)
        if not ingress.keep_source or self.source is None:
            return await dial(self.story, where, options=(OPTION,))
        host, port = self.source[:2]
        try:
            return await self._dial_as(where, host, port)
        except DialError as error:
            # An earlier connection, with that port, to that program, is still remembered.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
        return await self._dial_as(where, host, 0)

    async def _dial_as(self, where: Endpoint, host: str, port: int) -> socket:
        def bind(sock: socket) -> None:
            try:
                bind_as(sock, host, port)
            except OSError as error:
                # Something here listens on that port; or it is one that takes another right to
                # have, ip(7): below net.ipv4.ip_unprivileged_port_start.
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                bind_as(sock, host, 0)

        try:
            return await dial(self.story, where, options=(OPTION_FOR_CLIENT,), bind=bind)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # It is link-local: answers to it would leave on its link, whatever their mark.
            detail = f"no connection from {host} can be made here: {error.strerror}"
            raise DialError(DialReason.UNREACHABLE, detail) from None

    async def refuse(self, refusal: Refusal) -> None:
        """Say so: by an alert while TLS begins, else by a reset."""
        if self.end is None or self._is_known or refusal.reason is TLSReason.NOT_TLS:
            self.reset()
        else:
            await self.end.end()
