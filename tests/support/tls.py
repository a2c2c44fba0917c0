"""Both ends of TLS, for tests: contexts of an authority, and a relay in a running loop."""

import _socket
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

import trio
import trustme

from mutual_tls.end import TLSEnd
from mutual_tls.relay import Ending, TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
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


class TLSBench:
    """A relay in a running loop, and what became of its connections."""

    def __init__(self, idle_seconds: float = 0.0, half_closed_seconds: float = 0.0) -> None:
        self.faults: list[Exception] = []
        self.loop = EventLoop(self.faults.append)
        self.relay = TLSRelay(self.loop, self.faults.append, idle_seconds, half_closed_seconds)
        self.limit = ConnectionLimit()
        self.endings: list[tuple[int, int, Ending]] = []
        self._ends: list[_socket.socket | trio.socket.SocketType] = []

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
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(outside))
        self._ends += [stream.socket, far_plain]
        return stream, peer

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

    def left(self, up: int, down: int, ending: Ending) -> None:
        self.endings.append((up, down, ending))
        self.limit.remove()

    async def all_ended(self) -> None:
        with trio.fail_after(10):
            await self.limit.wait_until_empty()

    def close(self) -> None:
        self.relay.abort_all()
        self.loop.shut()
        for end in self._ends:
            end.close()
        assert self.faults == []


@asynccontextmanager
async def tls_bench(
    idle_seconds: float = 0.0, half_closed_seconds: float = 0.0
) -> AsyncIterator[TLSBench]:
    it = TLSBench(idle_seconds, half_closed_seconds)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.loop.run)
            nursery.start_soon(it.relay.run)
            yield it
            nursery.cancel_scope.cancel()
    finally:
        it.close()
