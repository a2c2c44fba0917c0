"""Bytes between a plain and a TLS end: what either peer gets to see."""

import socket
import ssl
import struct

import pytest
import trio
from trio.testing import trio_test

from mutual_tls.end import TLSError, TLSReason
from mutual_tls.relay import Ending
from tests.support.sockets import Noise
from tests.support.tls import Peer, tls_bench

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
MEGABYTE = b"".join(Noise().blocks(1_000_000))
MUCH = b"".join(Noise(b"much").blocks(20_000_000))
RESET = struct.pack("ii", 1, 0)

kinds = pytest.mark.parametrize(
    ("version", "server_side"),
    [(TLS12, False), (TLS12, True), (TLS13, False), (TLS13, True)],
    ids=["1.2-client", "1.2-server", "1.3-client", "1.3-server"],
)


async def read_all(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    async for chunk in stream:
        received += chunk
    return bytes(received)


async def expect_truncation(peer: Peer) -> None:
    with pytest.raises(TLSError) as caught:
        await peer.receive_all()
    assert caught.value.reason in {TLSReason.TLS_RESET, TLSReason.TLS_CLOSED}


@kinds
@trio_test
async def test_small_messages_there_and_back(version: ssl.TLSVersion, server_side: bool) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(5):
            for number in range(20):
                message = b"%d" % number
                await plain.send_all(message)
                assert await peer.receive() == message
                await peer.send(message * 2)
                assert await plain.receive_some() == message * 2
            await plain.send_eof()
            assert await peer.receive() == b""
            await peer.end_half()
            assert await plain.receive_some() == b""
        await it.all_ended()
        assert it.endings == [(30, 60, Ending.FINISHED)]


@kinds
@trio_test
async def test_the_plain_end_ends_first_and_hears_a_late_answer(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(10):
            await plain.send_all(b"question")
            await plain.send_eof()
            assert await peer.receive_all() == b"question"
            await trio.sleep(0.05)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.send, MEGABYTE)
                received = bytearray()
                while len(received) < len(MEGABYTE):
                    received += await plain.receive_some()
            assert received == MEGABYTE
            await peer.end_half()
            assert await plain.receive_some() == b""
        await it.all_ended()
        assert it.endings == [(8, len(MEGABYTE), Ending.FINISHED)]


@kinds
@trio_test
async def test_the_tls_peer_ends_first_and_hears_a_late_answer(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(10):
            await peer.send(b"question")
            await peer.end_half()
            assert await read_all(plain) == b"question"
            await trio.sleep(0.05)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(plain.send_all, MEGABYTE)
                received = bytearray()
                while len(received) < len(MEGABYTE):
                    # After its own close_notify OpenSSL says ZeroReturn where it said b"" before.
                    received += await peer.receive()
            assert received == MEGABYTE
            await plain.send_eof()
        await it.all_ended()
        assert it.endings == [(len(MEGABYTE), 8, Ending.FINISHED)]


@kinds
@trio_test
async def test_much_both_ways_at_once_at_different_paces(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        heard: list[bytes] = []

        async def say() -> None:
            await plain.send_all(MUCH)
            await plain.send_eof()

        async def answer() -> None:
            await peer.send(MUCH)

        async def hear_slowly() -> None:
            received = bytearray()
            while len(received) < len(MUCH):
                received += await plain.receive_some(1 << 20)
                await trio.sleep(0.001)
            heard.append(bytes(received))

        async def hear() -> None:
            heard.append(await peer.receive_all())

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for task in say, hear_slowly:
                    nursery.start_soon(task)
                # One after the other on the peer's side: its object has one state for both.
                await answer()
                await hear()
            await peer.end_half()
        await it.all_ended()
        assert heard == [MUCH, MUCH]
        assert it.endings == [(len(MUCH), len(MUCH), Ending.FINISHED)]


@kinds
@trio_test
async def test_an_end_behind_bytes_that_nobody_reads_yet(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    """20 MB are stalled towards TLS, and the other direction ends meanwhile."""
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)

        async def say() -> None:
            await plain.send_all(MUCH)
            await plain.send_eof()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(say)
                await trio.sleep(0.1)
                await peer.send(b"the end")
                await peer.end_half()
                assert await read_all(plain) == b"the end"
                received = bytearray()
                while len(received) < len(MUCH):
                    received += await peer.receive()
        assert received == MUCH
        await it.all_ended()
        assert it.endings == [(len(MUCH), 7, Ending.FINISHED)]


@kinds
@trio_test
async def test_a_tcp_end_without_close_notify_is_a_reset(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(5):
            await peer.send(b"half of it")
            assert await plain.receive_some() == b"half of it"
            peer.socket.shutdown(socket.SHUT_WR)
            with pytest.raises(trio.BrokenResourceError):
                await plain.receive_some()
        await it.all_ended()
        assert it.endings == [(0, 10, Ending.TRUNCATED)]


@kinds
@trio_test
async def test_a_reset_of_the_peer_is_a_reset(version: ssl.TLSVersion, server_side: bool) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(5):
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            peer.socket.close()
            with pytest.raises(trio.BrokenResourceError):
                await plain.receive_some()
        await it.all_ended()
        assert it.endings == [(0, 0, Ending.TLS_RESET)]


@kinds
@trio_test
async def test_a_reset_of_the_plain_end_is_no_clean_end(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(5):
            plain.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            plain.socket.close()
            await expect_truncation(peer)
        await it.all_ended()
        assert it.endings == [(0, 0, Ending.PLAIN_RESET)]


@kinds
@trio_test
async def test_what_comes_with_the_end_of_the_handshake(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side, early=MEGABYTE[:40_000])
        with trio.fail_after(5):
            await peer.end_half()
            assert await read_all(plain) == MEGABYTE[:40_000]
            await plain.send_eof()
        await it.all_ended()
        assert it.endings == [(0, 40_000, Ending.FINISHED)]


@kinds
@trio_test
async def test_what_is_no_tls_gets_an_alert(version: ssl.TLSVersion, server_side: bool) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        with trio.fail_after(5):
            await peer.send(b"good")
            peer.socket.send(b"GET / HTTP/1.1\r\n\r\n")
            assert await plain.receive_some() == b"good"
            with pytest.raises(trio.BrokenResourceError):
                await plain.receive_some()
            with pytest.raises(TLSError) as caught:
                await peer.receive_all()
            assert caught.value.reason is TLSReason.REJECTED
        await it.all_ended()
        assert it.endings == [(0, 4, Ending.TLS_FAILED)]


@kinds
@trio_test
async def test_last_words_of_a_unix_backend_that_does_not_read(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side, unix=True)
        with trio.fail_after(10):
            await peer.send(b"unread")
            await trio.sleep(0.05)
            await plain.send_all(MEGABYTE[:100_000])
            plain.socket.close()
            assert await peer.receive_all() == MEGABYTE[:100_000]
            peer.socket.shutdown(socket.SHUT_WR)
        await it.all_ended()
        assert [(up, ending) for up, _, ending in it.endings] == [(100_000, Ending.PLAIN_RESET)]


@trio_test
async def test_who_is_left_is_cut_with_a_reset() -> None:
    async with tls_bench() as it:
        plain, peer = await it.join(TLS13, server_side=False)
        it.relay.abort_all()
        with trio.fail_after(5):
            with pytest.raises(trio.BrokenResourceError):
                await plain.receive_some()
            await expect_truncation(peer)
        assert it.endings == [(0, 0, Ending.CUT)]


@pytest.mark.parametrize("half_closed", [False, True])
@trio_test
async def test_what_does_not_move_has_a_limit(half_closed: bool) -> None:
    limits = (0.0, 0.4) if half_closed else (0.4, 0.0)
    async with tls_bench(*limits) as it:
        plain, _peer = await it.join(TLS13, server_side=False)
        if half_closed:
            await plain.send_eof()
        with trio.fail_after(5):
            await it.all_ended()
        ending = Ending.HALF_CLOSED if half_closed else Ending.IDLE
        assert it.endings == [(0, 0, ending)]


@kinds
@trio_test
async def test_who_sends_little_data_for_many_bytes_is_given_small_helpings(
    version: ssl.TLSVersion, server_side: bool
) -> None:
    """Records of one byte; KeyUpdates have none, but Python can't send them."""
    async with tls_bench() as it:
        plain, peer = await it.join(version, server_side=server_side)
        [pair] = {each for each in it.loop.watchers() if hasattr(each, "helping")}
        with trio.fail_after(10):
            for _ in range(20_000):
                peer.ssl.write(b"x")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.flush)
                received = 0
                while received < 20_000:
                    received += len(await plain.receive_some())
            assert pair.helping == 1 << 14
            await peer.send(bytes(1000))
            await plain.receive_some()
            assert pair.helping == 1 << 17
