"""The stories of a client that is to be carried to a peer.

- `Ingress`: it says CONNECT, which goes on to the peer, inside mutual TLS.
- `ServerNameIngress`: it says a ClientHello, whose server name becomes the CONNECT.
"""

import contextlib
import socket as std
from _socket import socket
from functools import partial

import trio

from mutual_tls.dial import DialError, Endpoint
from mutual_tls.end import TLSEnd, TLSError, TLSReason, listen_to_the_end, receive_some, send_all
from mutual_tls.outward import Outward, Server
from mutual_tls.refusal import Refusal
from mutual_tls.session import CHUNK
from sniproxy.engine.listener import Address
from sniproxy.wire import Alert, HelloError, HelloReader, alert_record
from sniproxy_hostname import Hostname, InvalidHostname
from tls_bridge.forwarded import read_proxy_v1, show_forwarded
from tls_bridge.http_connect import (
    Asked,
    Headers,
    PeerRefusal,
    Response,
    check_loop,
    read_response,
    request_bytes,
)
from tls_bridge.refusal import ANSWERS, BridgeReason
from tls_bridge.routes import Peer, Routes
from tls_bridge.session import Session, Sessions


class ToPeer(Session):
    """A story that leads to a peer."""

    directories = "hosts"

    def __init__(
        self, shared: Sessions, client: socket, address: Address, *, routes: Routes
    ) -> None:
        super().__init__(shared, client, address)
        self.routes = routes
        self._outward = Outward(self, shared.resumption)

    async def ask_peer(self, headers: Headers) -> tuple[TLSEnd, Response]:
        """Reach the peer for the target, and pass the CONNECT on to it.

        Raises:
            Refusal, DialError, TLSError: that can't be done, or the peer refuses.
        """
        assert self.target is not None
        peer = self.routes.find(self.target.host, self.target.port)
        self.peer = peer.name
        end = await self._reach(peer)
        forwarded = [show_forwarded(self.source)] if self.source else []
        kept = [(name, value) for name, value in headers if name != b"forwarded"]
        await end.send(request_bytes(self.target, [*kept, self.shared.via, *forwarded]))
        most = self.shared.config.most_body
        try:
            response = await read_response(end.receive, most)
        except TLSError as error:
            if error.reason is TLSReason.TLS_CLOSED:
                # With TLS 1.3 it is only now that we hear what it says of our certificate.
                raise Refusal(BridgeReason.PEER_CLOSED, str(error)) from None
            raise
        self._outward.keep_session(end)
        if not response.opens_tunnel:
            await end.say_end()
            raise PeerRefusal(response)
        return end, response

    async def _reach(self, peer: Peer) -> TLSEnd:
        """Connect to the first address of a peer that answers, and do the handshake there."""
        servers = [
            Server(address, peer.server_name, peer.identity, peer.rules)
            for address in peer.addresses
        ]
        deadline = self.began + self.shared.config.setup_seconds
        for number, server in enumerate(servers[:-1]):
            # What is left of the time is for those who are left of them.
            share = (deadline - trio.current_time()) / (len(servers) - number)
            with contextlib.suppress(DialError, TLSError), self.story.time_limit(share):
                return await self._outward.reach(server)
            self._outward.close()
        return await self._outward.reach(servers[-1])


class Ingress(ToPeer):
    """A client says CONNECT."""

    def __init__(
        self, shared: Sessions, client: socket, address: Address, *, routes: Routes
    ) -> None:
        super().__init__(shared, client, address, routes=routes)
        self.asked = Asked(partial(receive_some, self.story, client, CHUNK))

    async def serve(self, said: bytes) -> None:
        """Pass the CONNECT on."""
        request = await self.asked.read(said)
        self.wants(request.target)
        check_loop(request, self.shared.pseudonym)
        end, response = await self.ask_peer(request.headers)
        await send_all(self.story, self.client, self.asked.accept(response.headers))
        self.join(self.client, end, response.body, request.early)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a status; with the answer of the peer, if there is one."""
        if isinstance(refusal, PeerRefusal):
            answer = self.asked.pass_back(refusal.response)
        else:
            answer = self.asked.refuse(refusal.reason, str(refusal), self.shared.program)
        await send_all(self.story, self.client, answer)
        await listen_to_the_end(self.story, self.client)


class ServerNameIngress(ToPeer):
    """A client says a ClientHello, which is passed on with all that follows, undecrypted."""

    alert: Alert | None = None  # that a hello deserves which can't be read

    async def serve(self, said: bytes) -> None:
        """Make a CONNECT of the server name."""
        received, header = await self._read_hello(said)
        if not received:
            return
        end, response = await self.ask_peer(header)
        self.join(self.client, end, response.body, received)

    async def _read_hello(self, received: bytes) -> tuple[bytes, Headers]:
        """Return what the client has sent so far, its hello in front; nothing if it has gone."""
        if self.client.family == std.AF_UNIX:
            # Whoever may connect to the Unix socket is trusted with this, too.
            while (rest := read_proxy_v1(received)) is None:
                if not (more := await receive_some(self.story, self.client, CHUNK)):
                    return b"", []
                received += more
            self.source, received = rest
        reader = HelloReader()
        data = received
        try:
            while (hello := reader.feed(data) if data else None) is None:
                if not (data := await receive_some(self.story, self.client, CHUNK)):
                    return b"", []
                received += data
            host = Hostname(hello.required_server_name())
        except HelloError as error:
            self.alert = error.alert
            raise Refusal(BridgeReason.BAD_HELLO, f"{error.reason}: {error}") from None
        except InvalidHostname as error:
            raise Refusal(BridgeReason.NO_ROUTE, str(error)) from None
        self.wants(Endpoint(host, self.routes.port(host)))
        return received, []

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an alert."""
        alert = self.alert or ANSWERS[refusal.reason].alert
        await send_all(self.story, self.client, alert_record(alert))
        await listen_to_the_end(self.story, self.client)
