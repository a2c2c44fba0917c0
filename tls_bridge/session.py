"""A connection's story, until its tunnel stands: three beginnings, of which each is a screen long.

- `Ingress`: a client says CONNECT; it goes on to a peer, inside mutual TLS.
- `ServerNameIngress`: a client says a ClientHello; its server name becomes the CONNECT.
- `PeerSide`: an ingress has connected, says CONNECT inside mutual TLS; the service is dialled.

Each is a task, which waits for every step. When the tunnel stands the relay goes on without one.
All that can go wrong is a `Refusal`, and what the client is told of it stands in one table.
"""

import contextlib
import errno
import hashlib
import os
import socket as std
import ssl
from _socket import SO_LINGER, SOL_SOCKET, socket
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import h11
import trio

from mutual_tls import resumption
from mutual_tls.dial import DialError, DialReason, Endpoint, connect, dial, is_local
from mutual_tls.end import TLSEnd, TLSError, TLSReason, listen_to_the_end, receive_some, send_all
from mutual_tls.identity import Identities, IdentityError
from mutual_tls.relay import Ending, TLSRelay
from mutual_tls.verify import Certificate, CertificateError, Rule, matches
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.tcp import LINGER_0
from sniproxy.service.eventlog import show_address
from sniproxy.service.notify import Counts
from sniproxy.wire import Alert, HelloError, HelloReader, alert_record, proxy_v1_header
from sniproxy_hostname import Hostname, InvalidHostname
from tls_bridge.allowed import check_client, find_service
from tls_bridge.config import Config
from tls_bridge.forwarded import forwarded_for, read_proxy_v1, show_forwarded
from tls_bridge.http_connect import (
    Asked,
    Headers,
    Request,
    Response,
    has_been_here,
    read_response,
    request_bytes,
)
from tls_bridge.log import Log
from tls_bridge.refusal import ANSWERS, BridgeReason, Reason, Refusal
from tls_bridge.routes import Peer, Routes

# Bytes received at a time while the tunnel does not stand.
_CHUNK = 1 << 14

# Seconds in which a refusal has to be delivered; half of them are for the client to end, too.
_ANSWER_SECONDS = 2.0

# Seconds between two attempts at a Unix socket whose backlog is full.
_RETRY = 0.02

# Statuses below it open the tunnel; RFC 9110 §9.3.6: "Any 2xx (Successful) response".
_NOT_SUCCESSFUL = 300


class Sessions:
    """Everything that connections share, and how many there are.

    Args:
        program: its name, for Via and Proxy-Status.
        directory: the working directory.
        nursery: where connections have their tasks until their tunnel stands.
    """

    def __init__(
        self,
        program: str,
        config: Config,
        directory: Path,
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
        self.directory = directory
        self.identities = identities
        self.loop = loop
        self.relay = relay
        self.log = log
        self.limit = limit
        self.nursery = nursery
        relay.last_words.is_place_wanted = limit.is_place_wanted
        self.resumption = resumption.Sessions()
        self.served = self.refused = 0
        # Clients who have not said yet what they want, the oldest first.
        self.silent: dict[Session, trio.CancelScope] = {}

    def begin(
        self, make: Callable[["Sessions", socket, Address], "Session"], client: socket, to: Address
    ) -> None:
        """Begin the story of an accepted client."""
        self.limit.add()
        session = make(self, client, to)
        # At once, and not when its task begins: the next client may be at the door.
        self.silent[session] = session.scope
        self.nursery.start_soon(session.run)
        self.loop.let_tasks_run()

    def make_room(self) -> bool:
        """Let go who needs the place the least; return whether there was anybody.

        First one who has received all that there was for it; then who has been silent the longest.
        """
        if self.relay.last_words.make_room():
            return True
        for scope in self.silent.values():
            if not scope.cancel_called:
                scope.cancel()
                return True
        return False

    def cut(self) -> int:
        """End whoever is left; return how many."""
        left = self.limit.open
        self.nursery.cancel_scope.cancel()
        self.relay.abort_all()
        return left

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
        self.scope = trio.CancelScope(deadline=self.began + shared.config.setup_seconds)
        self.target: Endpoint | None = None
        self.peer: str | None = None
        self.silent = BridgeReason.CLIENT_SILENT  # who is to blame if the time is over
        self.far: socket | None = None  # what is to be closed, if the tunnel does not stand
        self.is_joined = False

    async def run(self) -> None:
        """Tell the story; see to it that nothing is left of it."""
        self.client.setblocking(False)
        try:
            try:
                with self.scope:
                    await self.tell()
                if self.scope.cancelled_caught:
                    has_time = trio.current_time() < self.scope.deadline
                    reason = BridgeReason.CAPACITY if has_time else self.silent
                    raise Refusal(reason, "the time was over" if not has_time else "")
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
        with trio.move_on_after(_ANSWER_SECONDS):
            await self.refuse(refusal)

    def _fail(self, error: OSError) -> None:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
            self.shared.log.exhausted(error)
        # Else the client has gone.
        with contextlib.suppress(OSError):
            self.client.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)

    def _close(self) -> None:
        for sock in self.client, self.far:
            if sock is not None:
                sock.close()
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


class Outward(Session):
    """A story that leads to a peer."""

    def __init__(
        self, shared: Sessions, client: socket, address: Address, *, routes: Routes
    ) -> None:
        super().__init__(shared, client, address)
        self.routes = routes

    async def ask_peer(self, headers: Headers) -> tuple[TLSEnd, Response]:
        """Reach the peer for the target, and pass the CONNECT on to it."""
        assert self.target is not None
        peer = self.routes.find(self.target.host, self.target.port)
        self.peer = peer.name
        end, context = await self._reach(peer)
        connection = h11.Connection(h11.CLIENT)
        via = (b"Via", f"1.1 {self.shared.pseudonym}".encode())
        forwarded = [show_forwarded(self.source)] if self.source else []
        kept = [(name, value) for name, value in headers if name != b"forwarded"]
        await end.send(request_bytes(connection, self.target, [*kept, via, *forwarded]))
        most = self.shared.config.most_body
        try:
            response = await read_response(connection, end.receive, most)
        except TLSError as error:
            if error.reason is TLSReason.TLS_CLOSED:
                # With TLS 1.3 it is only now that we hear what it says of our certificate.
                raise Refusal(BridgeReason.PEER_CLOSED, str(error)) from None
            raise
        self.shared.resumption.keep(context, peer.server_name, end.ssl)
        if response.status >= _NOT_SUCCESSFUL:
            await end.end()
        return end, response

    async def _reach(self, peer: Peer) -> tuple[TLSEnd, ssl.SSLContext]:
        """Connect to the first address of a peer that answers, and do the handshake there."""
        last: DialError | TLSError | Refusal | None = None
        deadline = self.began + self.shared.config.setup_seconds
        for number, address in enumerate(peer.addresses):
            # What is left of the time is for those who are left of them.
            share = (deadline - trio.current_time()) / (len(peer.addresses) - number)
            with trio.move_on_after(share) as scope:
                try:
                    return await self._shake_hands(peer, address)
                except (DialError, TLSError) as error:
                    last = error
            if scope.cancelled_caught:
                last = Refusal(BridgeReason.PEER_SILENT, f"{address} did not answer in time")
            if self.far is not None:
                self.far.close()
                self.far = None
        assert last is not None
        raise last

    async def _shake_hands(self, peer: Peer, address: Endpoint) -> tuple[TLSEnd, ssl.SSLContext]:
        try:
            context = peer.identity.client_context(check_hostname=peer.rules is None)
        except IdentityError as error:
            raise Refusal(BridgeReason.MISCONFIGURED, str(error)) from None
        self.far = await dial(self.shared.loop, address)
        check = None if peer.rules is None else partial(check_server, peer.rules)
        end = TLSEnd(
            self.shared.loop,
            self.far,
            context,
            server_name=peer.server_name,
            check=check,
            session=self.shared.resumption.find(context, peer.server_name),
        )
        await end.shake_hands()
        return end, context


class Ingress(Outward):
    """A client says CONNECT."""

    def __init__(
        self, shared: Sessions, client: socket, address: Address, *, routes: Routes
    ) -> None:
        super().__init__(shared, client, address, routes=routes)
        self.asked = Asked(partial(receive_some, shared.loop, client, _CHUNK))

    async def tell(self) -> None:
        """Pass the CONNECT on, and its answer back."""
        request = await self.asked.read()
        if request is None:
            return
        self.is_understood(request.target)
        check_loop(request, self.shared.pseudonym)
        end, response = await self.ask_peer(request.headers)
        if response.status >= _NOT_SUCCESSFUL:
            reason = response.reason.decode("ascii", "backslashreplace")
            self.report(BridgeReason.PEER_REFUSED, f"{response.status} {reason}")
            await send_all(self.shared.loop, self.client, self.asked.pass_back(response))
            return await listen_to_the_end(self.shared.loop, self.client)
        await send_all(self.shared.loop, self.client, self.asked.accept(response.headers))
        self.join(self.client, end, response.body, request.early)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a status."""
        answer = self.asked.refuse(refusal.reason, str(refusal), self.shared.program)
        await send_all(self.shared.loop, self.client, answer)
        await listen_to_the_end(self.shared.loop, self.client)


class ServerNameIngress(Outward):
    """A client says a ClientHello, which is passed on with all that follows, undecrypted."""

    alert: Alert | None = None  # that a hello deserves which can't be read

    async def tell(self) -> None:
        """Make a CONNECT of the server name."""
        received, header = await self._read_hello()
        if not received:
            return
        end, response = await self.ask_peer(header)
        if response.status >= _NOT_SUCCESSFUL:
            reason = response.reason.decode("ascii", "backslashreplace")
            raise Refusal(BridgeReason.PEER_REFUSED, f"{response.status} {reason}")
        self.join(self.client, end, response.body, received)

    async def _read_hello(self) -> tuple[bytes, Headers]:
        """Return what the client has sent so far, its hello in front; nothing if it has gone."""
        received = await receive_some(self.shared.loop, self.client, _CHUNK)
        if self.client.family == std.AF_UNIX:
            # Whoever may connect to the Unix socket is trusted with this, too.
            while (rest := read_proxy_v1(received)) is None:
                if not (more := await receive_some(self.shared.loop, self.client, _CHUNK)):
                    return b"", []
                received += more
            self.source, received = rest
        reader = HelloReader()
        data = received
        try:
            while (hello := reader.feed(data) if data else None) is None:
                if not (data := await receive_some(self.shared.loop, self.client, _CHUNK)):
                    return b"", []
                received += data
            host = Hostname(hello.required_server_name())
        except HelloError as error:
            self.alert = error.alert
            raise Refusal(BridgeReason.BAD_HELLO, f"{error.reason}: {error}") from None
        except InvalidHostname as error:
            raise Refusal(BridgeReason.NO_ROUTE, str(error)) from None
        self.is_understood(Endpoint(host, self.routes.port(host)))
        return received, []

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an alert."""
        alert = self.alert or ANSWERS[refusal.reason].alert
        await send_all(self.shared.loop, self.client, alert_record(alert))
        await listen_to_the_end(self.shared.loop, self.client)


class PeerSide(Session):
    """An ingress has connected; it says CONNECT inside mutual TLS."""

    is_tls_client = True
    end: TLSEnd | None = None
    asked: Asked | None = None

    async def tell(self) -> None:
        """Dial the service; only then say that the tunnel stands."""
        shared = self.shared
        shown: list[bytes] = []
        try:
            context = shared.identities(shared.directory / "identity").server_context()
        except IdentityError as error:
            raise Refusal(BridgeReason.MISCONFIGURED, str(error)) from None
        end = TLSEnd(self.shared.loop, self.client, context, server_side=True, check=shown.append)
        await end.shake_hands()
        self.end, self.asked = end, Asked(end.receive)
        request = await self.asked.read()
        if request is None:
            return
        self.is_understood(request.target)
        certificate = read_certificate(shown[-1])
        check_client(shared.directory, certificate)
        check_loop(request, shared.pseudonym)
        service = find_service(shared.directory, request.target, certificate)
        self.far = await self._dial(service.where)
        if service.send_proxy_v1:
            await send_all(self.shared.loop, self.far, self._proxy_header(request.headers))
        via = (b"Via", f"1.1 {shared.pseudonym}".encode())
        await end.send(self.asked.accept([via]))
        self.join(self.far, end, request.early, b"")

    async def _dial(self, where: Endpoint | str) -> socket:
        if isinstance(where, str):
            return await dial_unix(self.shared.loop, where)
        try:
            ip_address(where.host)
        except ValueError:
            # A name may lead anywhere; to this machine only if that is what was written.
            return await dial(self.shared.loop, where, is_local)
        return await dial(self.shared.loop, where)

    def _proxy_header(self, headers: Headers) -> bytes:
        """Return a PROXY header with the client's address: the ingress says it, in Forwarded."""
        assert self.target is not None
        source = forwarded_for(headers) or (self.source[:2] if self.source else None)
        if source is None:
            return proxy_v1_header(None, None)
        try:
            destination = self.client.getsockname()[:2]
            header = proxy_v1_header(source, destination)
        except (OSError, ValueError):
            header = proxy_v1_header(None, None)
        if header != proxy_v1_header(None, None):
            return header
        # The client did not come to an address of ours that is of its kind; the header wants one.
        any_address = "::" if ":" in source[0] else "0.0.0.0"
        return proxy_v1_header(source, (any_address, self.target.port))

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a status, inside TLS, if there is TLS."""
        if self.end is None or self.asked is None:
            return
        with contextlib.suppress(TLSError):
            answer = self.asked.refuse(refusal.reason, str(refusal), self.shared.program)
            await self.end.send(answer)
            await self.end.end()


def check_loop(request: Request, pseudonym: str) -> None:
    """Check that the request has not come by here before.

    Raises:
        Refusal: it has.
    """
    if has_been_here(request.headers, pseudonym):
        raise Refusal(BridgeReason.LOOP, "it has come by here before, Via says")


def check_server(rules: Sequence[Rule], der: bytes) -> None:
    """Check that a server is somebody whom the rules allow.

    Raises:
        TLSError: it is not.
    """
    try:
        certificate = Certificate.parse(der)
    except CertificateError as error:
        raise TLSError(TLSReason.UNTRUSTED, str(error)) from None
    if not matches(rules, certificate, is_server=True):
        names = ", ".join((*certificate.dns, *certificate.uris, *certificate.common_names))
        raise TLSError(TLSReason.WRONG_NAME, f"its certificate is for {names or 'nobody'}")


def read_certificate(der: bytes) -> Certificate:
    """Read the certificate of a client.

    Raises:
        Refusal: it can't be read.
    """
    try:
        return Certificate.parse(der)
    except CertificateError as error:
        raise Refusal(BridgeReason.CLIENT_NOT_ALLOWED, str(error)) from None


async def dial_unix(loop: EventLoop, path: str) -> socket:
    """Return a non-blocking socket that is connected to a Unix socket.

    Raises:
        DialError: nobody listens there.
    """
    sock = socket(std.AF_UNIX, std.SOCK_STREAM | std.SOCK_NONBLOCK | std.SOCK_CLOEXEC)
    try:
        # While its backlog is full; nothing tells when that has changed.
        while (number := await connect(loop, sock, path)) == errno.EAGAIN:  # noqa: ASYNC110
            await trio.sleep(_RETRY)
        if number:
            raise DialError(DialReason.REFUSED, f"{path}: {os.strerror(number)}")
    except OSError as error:  # the path is too long
        sock.close()
        raise DialError(DialReason.REFUSED, f"{path}: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def show_client(source: Address | None) -> str:
    """Return an address the way people write it; whoever comes by a Unix socket has none."""
    return show_address(source) if source else "unix"
