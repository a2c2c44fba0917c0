"""Connecting to a server over mutual TLS: we show our certificate, and only to whom we want."""

import ssl
from _socket import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import Final, NamedTuple

from mutual_tls.dial import Endpoint, dial
from mutual_tls.end import TLSEnd, TLSError, TLSReason
from mutual_tls.identity import Identity, IdentityError
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.relay import Ending
from mutual_tls.resumption import Sessions
from mutual_tls.rules import check_server
from mutual_tls.session import Session
from mutual_tls.verify import Rule
from sniproxy.engine.story import Story

# How a connection ends whose server did not want it, and what that is called before it is relayed.
_FAILURES: Final[Mapping[StrEnum, TLSReason]] = {
    Ending.TLS_FAILED: TLSReason.REJECTED,
    Ending.TLS_RESET: TLSReason.TLS_RESET,
    Ending.TRUNCATED: TLSReason.TLS_CLOSED,
}


class Server(NamedTuple):
    """Whom to connect to.

    Attributes:
        address: Where it is.
        name: Sent as SNI; and the certificate has to be for it, if there are no rules.
        identity: What we show.
        rules: Who it may be instead.
        options: Of the socket, set before it connects, beside those that every socket has.
        check: Called with its certificate (DER) as well, when all else is verified; it raises what
            the connection is to end with.
        before_tls: Says what is to be said on the socket before the handshake.
    """

    address: Endpoint
    name: str
    identity: Identity
    rules: Sequence[Rule] | None = None
    options: Sequence[tuple[int, int, int]] = ()
    check: Callable[[bytes], None] | None = None
    before_tls: Callable[[Story, socket], Awaitable[None]] | None = None


class Outward:
    """The way of one connection to a server.

    Args:
        session: whose it is. It closes the socket, unless the two ends are joined.
        resumable: sessions of TLS that may be resumed.
    """

    def __init__(self, session: Session, resumable: Sessions) -> None:
        self._session = session
        self._resumable = resumable
        self._key: tuple[ssl.SSLContext, str] | None = None  # of whom we have reached

    async def reach(self, server: Server) -> TLSEnd:
        """Connect, and do the handshake.

        Raises:
            DialError, TLSError: it failed.
            Refusal: we have no identity; or what is said before TLS led to nothing.
        """
        try:
            context = server.identity.client_context(check_hostname=server.rules is None)
        except IdentityError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        self._key = context, server.name
        known = self._resumable.find(context, server.name)
        if known is not None:
            try:
                return await self._try(server, context, known)
            except TLSError:
                # A server may hand out sessions, and fail when one is resumed: OpenSSL's does if
                # certificates are demanded and the program has set no session_id_context.
                self._resumable.forget(server.name)
                self.close()
        return await self._try(server, context, None)

    def keep_session(self, end: TLSEnd) -> None:
        """Keep the session of TLS, to be resumed; to be called when something has been read."""
        assert self._key is not None
        self._resumable.keep(*self._key, end.ssl)

    def report_failure(self, heard: int, ending: StrEnum) -> None:
        """Write the line of a refusal, if a relayed connection has ended like one.

        With TLS 1.3 our handshake is over before the server has seen our certificate.

        Args:
            heard: bytes that the server has said.
            ending: how it has ended.
        """
        if not heard and (reason := _FAILURES.get(ending)):
            detail = "it has said nothing; it may not want our certificate"
            refusal = Refusal(reason, detail)
            self._session.report(refusal)
            self._session.note(refusal)

    def close(self) -> None:
        """Close the socket, so that another one may take its place."""
        session = self._session
        if session.far is not None:
            session.story.loop.close(session.far)
            session.far = None

    async def _try(
        self, server: Server, context: ssl.SSLContext, known: ssl.SSLSession | None
    ) -> TLSEnd:
        story = self._session.story
        self._session.far = far = await dial(story, server.address, options=server.options)
        if server.before_tls is not None:
            await server.before_tls(story, far)
        check = partial(_check, server) if server.check or server.rules is not None else None
        end = TLSEnd(story, far, context, server_name=server.name, check=check, session=known)
        await end.shake_hands()
        return end


def _check(server: Server, der: bytes) -> None:
    if server.rules is not None:
        check_server(server.rules, der)
    if server.check is not None:
        server.check(der)
