"""Ours and the oracle: what the peers of either get to see, where the oracle can do it at all."""

import _socket
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from trio.testing import trio_test

from mutual_tls.end import TLSError
from tests.engine.test_relay_model import _SIDES
from tests.mutual_tls.test_relay_model import RunningTLS, TLSPeers
from tests.support.sockets import Noise
from tests.support.strategies import steady
from tests.support.tls import Peer, TLSBench
from tests.support.tls_oracle import relay_streams, shake_hands, stream

MUCH = b"".join(Noise(b"oracle").blocks(3_000_000))
RESET = struct.pack("ii", 1, 0)

# What a peer has heard, and how that ended.
Heard = tuple[bytes, str]
Conversation = Callable[[trio.SocketStream, Peer], Awaitable[tuple[Heard, Heard]]]


class OracleBench(TLSBench):
    """The same bench, with the oracle in it."""

    async def carry(
        self,
        inside: _socket.socket,
        near: _socket.socket,
        version: ssl.TLSVersion,
        *,
        server_side: bool,
    ) -> None:
        tls = await shake_hands(near, version, server_side=server_side)
        self.limit.add()
        self.nursery.start_soon(relay_streams, stream(inside), tls, self.limit.remove)


async def hear_plain(plain: trio.SocketStream) -> Heard:
    heard = bytearray()
    try:
        while chunk := await plain.receive_some():
            heard += chunk
    except trio.BrokenResourceError:
        return bytes(heard), "reset"
    return bytes(heard), "end"


async def hear_tls(peer: Peer) -> Heard:
    heard = bytearray()
    try:
        while chunk := await peer.receive():
            heard += chunk
    except TLSError:
        # By a reset, or without a close_notify: it depends on what was on the way.
        return bytes(heard), "broken off"
    return bytes(heard), "end"


async def the_tls_peer_ends_first(plain: trio.SocketStream, peer: Peer) -> tuple[Heard, Heard]:
    """And hears a late answer, which is long."""
    await peer.send(b"question")
    await peer.end_half()
    plain_heard = await hear_plain(plain)

    async def answer() -> None:
        await plain.send_all(MUCH)
        await plain.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        return plain_heard, await hear_tls(peer)


async def much_both_ways(plain: trio.SocketStream, peer: Peer) -> tuple[Heard, Heard]:
    """At the same time."""
    plain_heard: list[Heard] = []

    async def hear() -> None:
        plain_heard.append(await hear_plain(plain))
        await plain.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hear)
        nursery.start_soon(plain.send_all, MUCH[1:])
        # One after the other: its object has one state for both directions.
        await peer.send(MUCH)
        heard = bytearray()
        while len(heard) < len(MUCH) - 1:
            heard += await peer.receive()
        await peer.end_half()
        rest, end = await hear_tls(peer)
    return plain_heard[0], (bytes(heard) + rest, end)


async def the_tls_peer_is_cut_off(plain: trio.SocketStream, peer: Peer) -> tuple[Heard, Heard]:
    """It ends without a close_notify, in the middle of something."""
    await peer.send(b"half of")
    assert await plain.receive_some() == b"half of"
    peer.socket.shutdown(socket.SHUT_WR)
    return await hear_plain(plain), await hear_tls(peer)


async def the_tls_peer_resets(plain: trio.SocketStream, peer: Peer) -> tuple[Heard, Heard]:
    await plain.send_all(b"hello")
    assert await peer.receive() == b"hello"
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.socket.close()
    return await hear_plain(plain), (b"", "it has gone")


async def the_plain_end_resets(plain: trio.SocketStream, peer: Peer) -> tuple[Heard, Heard]:
    await plain.send_all(b"hello")
    assert await peer.receive() == b"hello"
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    plain.socket.close()
    return (b"", "it has gone"), await hear_tls(peer)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("early", [b"", MUCH[:40_000]], ids=["", "early"])
@pytest.mark.parametrize(
    "conversation",
    [
        *(the_tls_peer_ends_first, much_both_ways, the_tls_peer_is_cut_off),
        *(the_tls_peer_resets, the_plain_end_resets),
    ],
)
@trio_test
async def test_the_peers_of_both_see_the_same(
    conversation: Conversation, early: bytes, server_side: bool, version: ssl.TLSVersion
) -> None:
    seen = []
    for kind in TLSBench, OracleBench:
        async with kind().running() as it:
            plain, peer = await it.join(version, server_side=server_side, early=early)
            with trio.fail_after(10):
                for start in range(0, len(early), 10_000):
                    assert await receive_exactly(plain, 10_000) == early[start : start + 10_000]
                seen.append(await conversation(plain, peer))
            await it.all_ended()
    ours, oracles = seen
    assert ours == oracles


async def receive_exactly(plain: trio.SocketStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += await plain.receive_some(size - len(received))
    return bytes(received)


class OraclePeers(TLSPeers):
    """The model of our relay, with the oracle between the peers: is the model right?"""

    async def carry(self, version: ssl.TLSVersion, server_side: bool) -> None:
        near, inside = self.given
        tls = await shake_hands(near, version, server_side=server_side)
        running = self.running
        running.limit.add()

        async def relay() -> None:
            try:
                await relay_streams(stream(inside), tls, running.limit.remove)
            except Exception as error:  # noqa: BLE001 - the model looks at them
                running.faults.append(error)

        trio.lowlevel.spawn_system_task(relay)

    @precondition(lambda self: not self.is_broken)
    @rule(side=_SIDES)
    def end(self, side: str) -> None:
        """As the model has it, but the plain end has to have heard the end of the other first."""
        if side == "backend":
            if not self.has_ended["client"]:
                return
            while self.take(side):
                pass
        super().end(side)


def test_the_oracle_follows_the_model() -> None:
    OraclePeers.running = RunningTLS()
    try:
        run_state_machine_as_test(
            OraclePeers, settings=settings(steady, max_examples=40, stateful_step_count=25)
        )
    finally:
        OraclePeers.running.close()
