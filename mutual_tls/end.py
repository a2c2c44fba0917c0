"""One end of a TLS connection: an `SSLObject` over two memory BIOs, and its socket.

This is how a connection begins: the handshake, and what is said before bytes are relayed. A story
waits for each step. When the tunnel stands, `relay` goes on with the same objects.

What we have to send is in `outgoing` until it is flushed, and the peer has seen nothing of it. So
the peer's certificate is checked in between: our own is not shown to a server whose certificate
does not please us, although OpenSSL has put it there already.
"""

import _ssl
import contextlib
import ssl
from _socket import MSG_DONTWAIT, SHUT_WR, socket
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from sniproxy.engine.story import Story

# Bytes received at a time: more than the flight of a handshake, and one whole record.
_CHUNK = 1 << 14

# Bytes that pass a BIO at a time: one record. It never shrinks again.
_SLICE = 1 << 14

# Bytes received that may bring no data while there is no tunnel: a record that comes in pieces, and
# what OpenSSL does by itself, such as tickets. But each KeyUpdate, of 27 bytes, takes 30 µs.
_MOST_WITHOUT_DATA = 1 << 15

# Seconds that a peer is listened to after our alert: to close with bytes unread would send a reset,
# which can overtake the alert. Three round trips around the world.
_ALERT_SECONDS = 1.0

# What OpenSSL says of a certificate, x509_vfy.h: X509_V_ERR_...
_EXPIRED = frozenset({9, 10})  # CERT_NOT_YET_VALID, CERT_HAS_EXPIRED
_WRONG_NAME = frozenset({62, 64})  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH

# What OpenSSL calls bytes that are no TLS record, or none of a version that we speak.
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"})


Data = bytes | memoryview


class TLSReason(StrEnum):
    """Why there is no TLS connection."""

    TLS_CLOSED = "tls_closed"  # the peer has ended without a close_notify
    TLS_RESET = "tls_reset"
    NOT_TLS = "not_tls"
    UNTRUSTED = "untrusted"  # the peer's certificate is of nobody whom we trust
    EXPIRED = "expired"  # it is not valid yet, or no more
    WRONG_NAME = "wrong_name"  # it is not for that name, or for nobody who is allowed
    REJECTED = "rejected"  # the peer has sent an alert; it may not like our certificate
    TLS_FAILED = "tls_failed"  # all else


class TLSError(Exception):
    """There is no TLS connection, or no more; the message says what OpenSSL says."""

    def __init__(self, reason: TLSReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TLSEnd:
    """A TLS connection over a connected stream socket.

    Args:
        story: which waits for the socket.
        sock: a connected stream socket; owned by whoever made it.
        context: with the identity, and whom to trust.
        server_side: whether the peer is the client.
        server_name: for a client: the name that it sends, and that the context checks if it does.
        check: called with the certificate (DER) that the peer has shown, after its chain has been
            verified and before ours is sent. It raises an exception, of any kind, if that is not
            whom we want.
        session: of an earlier connection to the same peer, to be resumed.

    Attributes:
        incoming: Ciphertext that was received.
        outgoing: Ciphertext to be sent.
    """

    __slots__ = ("_check", "_checked", "_story", "incoming", "outgoing", "socket", "ssl")

    def __init__(
        self,
        story: Story,
        sock: socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_name: str | None = None,
        check: Callable[[bytes], None] | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._story = story
        self.socket = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, server_side, server_name, session)
        self._check = check
        self._checked: bytes | None = None

    async def shake_hands(self) -> None:
        """Do the handshake.

        After a failure a server's last word to its client, an alert, is left to `end`.

        What a client has to send at its end waits for the first bytes that it says: `flush`,
        `send` and `receive` send it, and `relay` does.

        Raises:
            TLSError: it failed; a server has been told.
            Whatever `check` raises.
        """
        if self.ssl.server_side and not self.incoming.pending:
            await self._feed()
        while True:
            try:
                self.ssl.do_handshake()
            except ssl.SSLWantReadError:
                is_done = False
            except ssl.SSLError as error:
                await self._tell()
                raise _error(error) from None
            else:
                is_done = True
            if self._check is not None:
                self._check_certificate(self._check, is_done=is_done)
            if is_done and not self.ssl.server_side:
                return
            await self.flush()
            if is_done:
                return
            await self._feed()

    def _check_certificate(self, check: Callable[[bytes], None], *, is_done: bool) -> None:
        # A server that resumes a session knows the certificate, and not the chain.
        shown = self.ssl.getpeercert(binary_form=True) if is_done else _certificate(self.ssl)
        # A session that is to be resumed shows the certificate of back then, and the server may
        # decline: then there is another one later.
        if shown is not None and shown != self._checked:
            self._checked = shown
            try:
                check(shown)
            except BaseException:
                # Our certificate may be among what has not been sent, and stays here.
                self.outgoing.read()
                raise

    async def receive(self) -> bytes:
        """Return the next bytes; none at the end of what the peer says.

        Raises:
            TLSError: the connection is broken.
        """
        room = _MOST_WITHOUT_DATA
        while True:
            if self.incoming.pending:
                try:
                    return self.ssl.read(_CHUNK)
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return b""
                except ssl.SSLError as error:
                    await self._tell()
                    raise _error(error) from None
            await self.flush()
            if room <= 0:
                raise TLSError(TLSReason.TLS_FAILED, "the peer sends much, and no data")
            room -= await self._feed()

    async def send(self, data: bytes) -> None:
        """Send `data`, and what was to be sent before.

        Raises:
            TLSError: the connection is broken.
        """
        for start in range(0, len(data), _SLICE):
            self.ssl.write(data[start : start + _SLICE])
            if self.outgoing.pending >= _SLICE:
                await self.flush()
        await self.flush()

    async def flush(self) -> None:
        """Send what is in `outgoing`.

        Raises:
            TLSError: the connection is broken.
        """
        while self.outgoing.pending:
            try:
                # A coroutine is not made before there is something to wait for.
                if rest := send_some(self.socket, self.outgoing.read()):
                    await send_all(self._story, self.socket, rest)
            except OSError as error:
                raise TLSError(TLSReason.TLS_RESET, error.strerror or str(error)) from None

    async def say_end(self) -> None:
        """Say close_notify, or the alert that OpenSSL has left, if the peer still hears it."""
        with contextlib.suppress(ssl.SSLError):  # WantRead, or there is no TLS
            self.ssl.unwrap()
        with contextlib.suppress(TLSError):
            await self.flush()

    async def end(self) -> None:
        """Say that, and listen for the end of the peer; the socket stays open."""
        await self.say_end()
        await listen_to_the_end(self._story, self.socket)

    async def _tell(self) -> None:
        """Send the alert that OpenSSL has left for a server, and let it arrive."""
        if self.ssl.server_side:
            return
        with contextlib.suppress(TLSError):
            await self.flush()
            await listen_to_the_end(self._story, self.socket)

    async def _feed(self) -> int:
        """Receive something; return how many bytes."""
        try:
            data = await receive_some(self._story, self.socket, _CHUNK)
        except OSError as error:
            raise TLSError(TLSReason.TLS_RESET, error.strerror or str(error)) from None
        if not data:
            # Python takes a TCP end for an end of TLS, so it is not told.
            raise TLSError(TLSReason.TLS_CLOSED, "the peer ended without a close_notify")
        self.incoming.write(data)
        return len(data)


async def receive_some(story: Story, sock: socket, most: int) -> bytes:
    """Return the next bytes of a socket, at most so many; none at its end.

    Raises:
        OSError: the connection is broken.
    """
    if story.has_had_its_turn():
        await story.give_turns()
    while True:
        try:
            return sock.recv(most, MSG_DONTWAIT)
        except BlockingIOError:
            await story.readable(sock)


def send_some(sock: socket, data: Data) -> Data:
    """Send what a socket takes at once; return the rest.

    Raises:
        OSError: the connection is broken.
    """
    try:
        sent = sock.send(data, MSG_DONTWAIT)
    except BlockingIOError:
        return data
    return data[sent:]


async def send_all(story: Story, sock: socket, data: Data) -> None:
    """Send all of `data` to a socket.

    Raises:
        OSError: the connection is broken.
    """
    rest: Data = memoryview(data)
    while rest and (rest := send_some(sock, rest)):
        await story.writable(sock)


async def listen_to_the_end(story: Story, sock: socket) -> None:
    """End what we say, and throw away what the peer still says, for a second at the most."""
    with contextlib.suppress(OSError), story.time_limit(_ALERT_SECONDS):
        sock.shutdown(SHUT_WR)
        while await receive_some(story, sock, _CHUNK):
            pass


def _certificate(connection: ssl.SSLObject) -> bytes | None:
    """Return the certificate that the peer has shown, as soon as it has; None before that.

    `getpeercert` waits for the end of the handshake, which for TLS 1.2 comes after our certificate
    was sent. The chain can be asked for at any time; that method is public since Python 3.13.
    """
    inner: Any = connection
    if not hasattr(connection, "get_unverified_chain"):
        inner = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001
    chain = inner.get_unverified_chain()
    if not chain:
        return None
    leaf = chain[0]
    der: bytes = leaf if isinstance(leaf, bytes) else leaf.public_bytes(_ssl.ENCODING_DER)
    return der


def _error(error: ssl.SSLError) -> TLSError:
    """Return what an exception of OpenSSL's means."""
    detail = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        detail = error.verify_message
        if error.verify_code in _EXPIRED:
            return TLSError(TLSReason.EXPIRED, detail)
        if error.verify_code in _WRONG_NAME:
            return TLSError(TLSReason.WRONG_NAME, detail)
        return TLSError(TLSReason.UNTRUSTED, detail)
    if "_ALERT_" in detail:
        return TLSError(TLSReason.REJECTED, detail)
    if detail in _NOT_TLS:
        return TLSError(TLSReason.NOT_TLS, detail)
    return TLSError(TLSReason.TLS_FAILED, detail)
