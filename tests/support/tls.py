"""Both ends of TLS, for tests: contexts of an authority, and a relay in a running loop."""

import _socket
import contextlib
import ssl
from contextlib import AbstractAsyncContextManager
from functools import cache

import trio
import trustme

from mutual_tls.end import TLSEnd
from mutual_tls.relay import Ending, TLSRelay
from tests.support.relays import RelayBench, stream
from tests.support.sockets import plain, tcp_pair, unix_pair
from tests.support.story import TrioStory

NAME = "peer.example"


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@cache
def context(version: ssl.TLSVersion, *, server_side: bool) -> ssl.SSLContext:
    """Return what one end of mutual TLS needs."""
    side = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
    made = ssl.SSLContext(side)
    made.minimum_version = made.maximum_version = version
    made.verify_mode = ssl.CERT_REQUIRED
    authority().configure_trust(made)
    authority().issue_cert(NAME if server_side else "client.example").configure_cert(made)
    return made


class Peer(TLSEnd):
    """The other end of a TLS connection, as a test wants it."""

    async def end_half(self) -> None:
        """Say close_notify, and go on listening."""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            self.ssl.unwrap()
        await self.flush()

    async def receive_all(self) -> bytes:
        received = bytearray()
        while chunk := await self.receive():
            received += chunk
        return bytes(received)


class TLSBench(RelayBench[TLSRelay, Ending]):
    """With the relay that has TLS on one side."""

    def __init__(self, idle_seconds: float = 0.0, half_closed_seconds: float = 0.0) -> None:
        super().__init__(
            lambda loop, report: TLSRelay(loop, report, idle_seconds, half_closed_seconds)
        )

    async def join(
        self, version: ssl.TLSVersion, *, server_side: bool, unix: bool = False, early: bytes = b""
    ) -> tuple[trio.SocketStream, Peer]:
        """Return the plain end and the TLS peer of a new connection.

        With `early` the peer's first bytes come together with the end of its handshake.
        """
        outside, inside = unix_pair() if unix else tcp_pair()
        far, near = tcp_pair()
        for sock in inside, far, near:
            sock.setblocking(False)
        far_plain, near_plain = plain(far), plain(near)
        peer = Peer(
            TrioStory(self.loop),
            far_plain,
            context(version, server_side=not server_side),
            server_side=not server_side,
            server_name=NAME if server_side else None,
        )

        async def greet() -> None:
            await peer.shake_hands()
            await peer.send(early) if early else await peer.flush()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(greet)
                await self.carry(plain(inside), near_plain, version, server_side=server_side)
        client = stream(outside)
        self.held.callback(client.socket.close)
        self.held.callback(far_plain.close)
        return client, peer

    async def carry(
        self,
        inside: _socket.socket,
        near: _socket.socket,
        version: ssl.TLSVersion,
        *,
        server_side: bool,
    ) -> None:
        """Do the handshake, and join the two."""
        end = TLSEnd(
            TrioStory(self.loop),
            near,
            context(version, server_side=server_side),
            server_side=server_side,
            server_name=None if server_side else NAME,
        )
        await end.shake_hands()
        self.limit.add()
        self.relay.join(inside, end, self.left)


def tls_bench(
    idle_seconds: float = 0.0, half_closed_seconds: float = 0.0
) -> AbstractAsyncContextManager[TLSBench]:
    return TLSBench(idle_seconds, half_closed_seconds).running()
