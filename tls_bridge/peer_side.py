"""The story of an ingress that has connected: it says CONNECT, and the service is dialled."""

import contextlib
import ssl
from _socket import AF_UNIX, socket

from mutual_tls.dial import (
    Endpoint,
    address_family,
    dial,
    dial_unix,
    is_local,
)
from mutual_tls.end import TLSEnd, TLSError, send_all
from mutual_tls.identity import IdentityError
from mutual_tls.proxy import destination_for, proxy_header
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.verify import Certificate, CertificateError
from tls_bridge.allowed import check_client, find_service
from tls_bridge.forwarded import forwarded_for
from tls_bridge.http_connect import (
    Asked,
    Headers,
    check_loop,
)
from tls_bridge.refusal import BridgeReason
from tls_bridge.session import Session


class PeerSide(Session):
    """An ingress has connected; it says CONNECT inside mutual TLS."""

    is_tls_client = True
    directories = "allow"
    end: TLSEnd | None = None
    asked: Asked | None = None

    async def serve(self, said: bytes) -> None:
        """Dial the service; only then say that the tunnel stands."""
        shared = self.shared
        shown: list[bytes] = []
        try:
            context = shared.identities("identity").server_context()
        except IdentityError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        end = TLSEnd(self.story, self.client, context, server_side=True, check=shown.append)
        self.end = end
        end.incoming.write(said)
        await end.shake_hands()
        self.asked = Asked(end.receive)
        if not (said := await end.receive()):
            return
        request = await self.asked.read(said)
        self.wants(request.target)
        certificate = read_certificate(shown[-1])
        check_client(certificate)
        check_loop(request, shared.pseudonym)
        service = find_service(request.target, certificate)
        self.far = await self._dial(service.where)
        if service.proxy is not None:
            header = self._proxy_header(service.proxy, request.headers)
            try:
                await send_all(self.story, self.far, header)
            except OSError as error:
                # Of the service; of the client it would be a TLSError.
                detail = f"{service.where}: {error.strerror}"
                raise Refusal(BridgeReason.PEER_CLOSED, detail) from None
        await end.send(self.asked.accept([shared.via]))
        self.join(self.far, end, request.early, b"")

    async def _dial(self, where: Endpoint | str) -> socket:
        if isinstance(where, str):
            return await dial_unix(self.story, where)
        # A name may lead anywhere; to this machine only if that is what was written.
        is_name = address_family(where.host.partition("%")[0]) is None  # it may have a scope
        return await dial(self.story, where, is_local if is_name else None)

    def _proxy_header(self, version: int, headers: Headers) -> bytes:
        """Return a PROXY header with the client's address: the ingress says it, in Forwarded."""
        assert self.target is not None
        assert self.end is not None
        source = forwarded_for(headers) or (self.source[:2] if self.source else None)
        if source is None:
            return proxy_header(version, None, None, self.end.ssl)
        is_unix = self.client.family == AF_UNIX
        reached = None if is_unix else self.client.getsockname()[:2]
        destination = destination_for(source, reached, self.target.port)
        return proxy_header(version, source, destination, self.end.ssl)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a status, inside TLS, if there is TLS; else with an alert."""
        if self.end is None:
            return
        if self.asked is not None:
            answer = self.asked.refuse(refusal.reason, str(refusal), self.shared.program)
            with contextlib.suppress(TLSError, ssl.SSLError):  # TLS may be what has failed
                await self.end.send(answer)
        await self.end.end()


def read_certificate(der: bytes) -> Certificate:
    """Read the certificate of a client.

    Raises:
        Refusal: it can't be read.
    """
    try:
        return Certificate.parse(der)
    except CertificateError as error:
        raise Refusal(BridgeReason.CLIENT_NOT_ALLOWED, str(error)) from None
