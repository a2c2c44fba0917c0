"""The relay between real sockets: a near end over TCP, a far end over a Unix socket."""

import _socket
import contextlib
import errno
import os
import select
import socket
import struct

import pytest
import trio
from trio.testing import check_half_closeable_stream, trio_test

from sniproxy.engine import linger, relay, sweep
from sniproxy.engine.ending import Ending
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import READ_EVENTS
from sniproxy.engine.stream import relay_streams
from tests.support.faults import FlakyEpoll
from tests.support.relays import bench, stream
from tests.support.sockets import Noise, plain, reset, say, tcp_pair, unix_pair

# More than all buffers between two ends can hold.
MUCH = 16 << 20

# struct linger {1, 0}: closing sends a reset.
RESET = struct.pack("ii", 1, 0)


def shut(client: socket.socket, near: socket.socket) -> None:
    """Send the end, and wait until it is at the other end."""
    client.shutdown(socket.SHUT_WR)
    wait_for(near, select.POLLRDHUP)


def wait_for(sock: _socket.socket, events: int) -> None:
    poll = select.poll()
    poll.register(sock, events)
    assert poll.poll(5000)


def received_already(sock: socket.socket) -> bytes:
    """Return what there is to receive at this very moment."""
    received = bytearray()
    with contextlib.suppress(BlockingIOError):
        while chunk := sock.recv(1 << 16, socket.MSG_DONTWAIT):
            received += chunk
    return bytes(received)


async def send_noise(end: trio.SocketStream, size: int, seed: bytes) -> None:
    for block in Noise(seed).blocks(size):
        await end.send_all(block)
    await end.send_eof()


async def expect_noise(end: trio.SocketStream, size: int, seed: bytes) -> None:
    buffered = bytearray()
    for block in Noise(seed).blocks(size):
        while len(buffered) < len(block):
            chunk = await end.receive_some()
            assert chunk, "the end came too early"
            buffered += chunk
        assert buffered[: len(block)] == block
        del buffered[: len(block)]
    assert not buffered
    assert await end.receive_some() == b""


async def check_both_ways(
    client: trio.SocketStream, backend: trio.SocketStream, size: int = MUCH
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_noise, client, size, b"up")
        nursery.start_soon(expect_noise, backend, size, b"up")
        nursery.start_soon(send_noise, backend, size, b"down")
        nursery.start_soon(expect_noise, client, size, b"down")


async def send_much(client: trio.SocketStream, backend: trio.SocketStream) -> None:
    """Send from one end to the other, and end nothing."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, bytes(MUCH))
        received = 0
        while received < MUCH:
            received += len(await backend.receive_some())


class Splices:
    """Counts what goes through os.splice, or fails instead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at: int | None = None
        self.failure = 0
        self._splice = os.splice
        patch.setattr(os, "splice", self._counted)

    def _counted(self, source: int, sink: int, size: int, *, flags: int) -> int:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.failure, os.strerror(self.failure))
        return self._splice(source, sink, size, flags=flags)


@pytest.fixture
def splices(monkeypatch: pytest.MonkeyPatch) -> Splices:
    return Splices(monkeypatch)


@trio_test
async def test_it_is_a_half_closeable_stream() -> None:
    async with bench() as it:

        async def make() -> tuple[trio.SocketStream, trio.SocketStream]:
            return it.join()

        # No clogged maker: between two ends there are buffers of the kernel's that no test can fill
        # with a single byte.
        await check_half_closeable_stream(make, None)


@trio_test
async def test_much_goes_both_ways_at_once_and_arrives_whole(splices: Splices) -> None:
    async with bench() as it:
        await check_both_ways(*it.join())
        await it.all_ended()
        assert splices.count


@trio_test
async def test_much_goes_through_small_buffers() -> None:
    # On the Unix side: so small ones over TCP, less than a segment, make it wait for its timers.
    async with bench() as it:
        await check_both_ways(*it.join(unix_buffers=4096), MUCH // 16)
        await it.all_ended()


@trio_test
async def test_without_pipes_it_copies(splices: Splices) -> None:
    async with bench() as it:
        it.relay.pipes = PipePool(limit=0)
        await check_both_ways(*it.join())
        await it.all_ended()
        assert not splices.count


# The first splice fills a pipe, the second empties it. Twice, for either way to start with.
@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
@trio_test
async def test_where_there_is_no_splice_it_copies(splices: Splices, number: int, call: int) -> None:
    splices.fail_at, splices.failure = call, number
    async with bench() as it:
        await check_both_ways(*it.join())
        assert call <= splices.count <= call + 1  # the other way may be at it already


@trio_test
async def test_small_messages_are_not_spliced(splices: Splices) -> None:
    async with bench() as it:
        client, backend = it.join()
        for _ in range(100):
            await client.send_all(b"ping")
            assert await backend.receive_some() == b"ping"
            await backend.send_all(b"pong")
            assert await client.receive_some() == b"pong"
        assert not splices.count


@trio_test
async def test_a_large_message_now_and_then_is_not_spliced(splices: Splices) -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, bytes(40_000))  # more than half of what the buffer takes
        it.join_these(near, far)
        up = it.up()
        for size in 1, 40_000, 1, 40_000:
            say(client, up.source, bytes(size))
            up.pump()
        assert len(received_already(backend)) == 120_002
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert splices.count == 0
        client.close()
        backend.close()
        await it.all_ended()


@pytest.mark.parametrize("is_much", [True, False])
@trio_test
async def test_half_of_what_the_buffer_takes_is_much(splices: Splices, is_much: bool) -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        it.join_these(near, far)
        up = it.up()
        size = relay._CHUNK // 2 - (0 if is_much else 1)
        for _ in range(3):
            say(client, up.source, bytes(size))
            up.pump()
            assert len(received_already(backend)) == size
        assert (splices.count > 0) == is_much
        client.close()
        backend.close()
        await it.all_ended()


@trio_test
async def test_who_chats_after_much_is_no_longer_spliced(splices: Splices) -> None:
    async with bench() as it:
        client, backend = it.join()
        await send_much(client, backend)
        # More than enough for all credit to be used up.
        for _ in range(20):
            await client.send_all(b"ping")
            assert await backend.receive_some() == b"ping"
        spliced = splices.count
        await client.send_all(b"ping")
        assert await backend.receive_some() == b"ping"
        assert splices.count == spliced


@trio_test
async def test_an_idle_connection_holds_no_pipe() -> None:
    async with bench() as it:
        it.relay.pipes = PipePool(limit=1)
        for _ in range(3):
            await send_much(*it.join())
            # Both ends stay open, and idle.
            pipe = it.relay.pipes.take()
            assert pipe is not None
            it.relay.pipes.give(pipe)


@trio_test
async def test_a_direction_that_has_ended_holds_no_pipe() -> None:
    async with bench() as it:
        it.relay.pipes = PipePool(limit=1)
        client, backend = it.join()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_noise, client, MUCH, b"up")
            await expect_noise(backend, MUCH, b"up")
        assert it.limit.open == 1
        pipe = it.relay.pipes.take()
        assert pipe is not None
        it.relay.pipes.give(pipe)


@trio_test
async def test_a_stalled_connection_holds_back_the_sender_and_no_other() -> None:
    async with bench() as it:
        client, _ = it.join()
        with trio.move_on_after(0.1) as gave_up:
            await client.send_all(bytes(256 << 20))
        assert gave_up.cancelled_caught
        await check_both_ways(*it.join())


@trio_test
async def test_the_end_comes_after_the_last_byte_and_the_other_way_lives_on() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(b"question")
        await client.send_eof()
        assert await backend.receive_some() == b"question"
        assert await backend.receive_some() == b""
        for _ in range(3):
            await backend.send_all(b"answer")
            assert await client.receive_some() == b"answer"
        assert it.limit.open
        await backend.send_eof()
        assert await client.receive_some() == b""
        await it.all_ended()


@trio_test
async def test_the_backend_may_end_first() -> None:
    async with bench() as it:
        client, backend = it.join()
        await backend.send_eof()
        assert await client.receive_some() == b""
        await client.send_all(b"late")
        assert await backend.receive_some() == b"late"
        await client.send_eof()
        assert await backend.receive_some() == b""
        await it.all_ended()


@trio_test
async def test_a_backend_that_closes_ends_both_ways_after_its_last_byte() -> None:
    async with bench() as it:
        client, backend = it.join()
        size = 1 << 20  # more than a Unix socket holds
        async with trio.open_nursery() as nursery:

            async def send_and_close() -> None:
                await send_noise(backend, size, b"x")
                await backend.aclose()

            nursery.start_soon(send_and_close)
            await expect_noise(client, size, b"x")
        # Nobody reads what is sent now; but no reset is to overtake the last bytes.
        await client.send_all(b"too late")
        assert it.limit.open == 1
        await client.aclose()
        await it.all_ended()
        assert it.endings == [(0, size, Ending.FINISHED)]


@trio_test
async def test_a_reset_by_the_client_ends_the_backend() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(b"hello")
        assert await backend.receive_some() == b"hello"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await client.aclose()
        assert await backend.receive_some() == b""
        await it.all_ended()


@pytest.mark.parametrize("has_ended", [False, True])
@trio_test
async def test_a_client_that_hangs_up_without_an_error_ends_the_backend(has_ended: bool) -> None:
    """As Unix sockets do: of TCP nearly always an error tells that nobody reads any more."""
    async with bench() as it:
        client, near = unix_pair()
        backend, far = unix_pair()
        it.join_these(near, far)
        end = it.stream(backend)
        client.sendall(b"hello")
        assert await end.receive_some() == b"hello"
        if has_ended:
            client.shutdown(socket.SHUT_WR)
            assert await end.receive_some() == b""
            assert it.limit.open == 1
        client.close()
        await it.all_ended()
        assert it.endings == [(5, 0, Ending.FINISHED)]
        assert await end.receive_some() == b""


@trio_test
async def test_a_backend_that_closes_with_bytes_unread_is_an_end_for_the_client() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(b"unread")
        await backend.socket.recv(1, socket.MSG_PEEK)
        await backend.aclose()
        assert await client.receive_some() == b""
        await client.aclose()
        await it.all_ended()
        assert it.endings == [(len(b"unread"), 0, Ending.FAR_RESET)]


@trio_test
async def test_a_reset_in_mid_stream_takes_the_stalled_other_way_along() -> None:
    async with bench() as it:
        client, backend = it.join()
        with trio.move_on_after(0.05):
            await client.send_all(bytes(256 << 20))
        with trio.move_on_after(0.05):
            await backend.send_all(bytes(256 << 20))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await client.aclose()
        await it.all_ended()
        with pytest.raises(trio.BrokenResourceError):
            await backend.send_all(b"x")


@trio_test
async def test_a_reset_behind_bytes_that_nobody_takes_is_passed_on_at_once() -> None:
    async with bench() as it:
        client, backend = it.join()
        with trio.move_on_after(0.05):
            await client.send_all(bytes(64 << 20))
        # The relay is busy, and sees the last bytes and the reset together.
        await backend.receive_some(1 << 20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await client.aclose()
        await it.all_ended()


@trio_test
async def test_urgent_data_is_answered_with_a_reset(splices: Splices) -> None:
    # It has no place in a stream of bytes, and nothing behind it may be lost in silence.
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(b"before")
        assert await backend.receive_some() == b"before"
        await client.socket.send(b"!", socket.MSG_OOB)
        await it.all_ended()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        assert await backend.receive_some() == b""


@trio_test
async def test_abort_all_resets_the_clients() -> None:
    async with bench() as it:
        pairs = [it.join() for _ in range(3)]
        it.relay.abort_all()
        await it.all_ended()
        for client, backend in pairs:
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()
            assert await backend.receive_some() == b""


@trio_test
async def test_descriptors_come_back() -> None:
    async with bench() as it:
        await check_both_ways(*it.join())
        await it.all_ended()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            client, backend = it.join()
            await client.send_all(b"x")
            await backend.receive_some()
            await client.aclose()
            await backend.aclose()
        await it.all_ended()
        await trio.lowlevel.checkpoint()
        assert len(os.listdir("/proc/self/fd")) == before


@trio_test
async def test_a_pipe_with_stalled_bytes_is_given_back_when_the_client_resets() -> None:
    async with bench() as it:
        it.pipes = it.relay.pipes = PipePool(limit=1)
        for _ in range(3):
            client, backend = it.join()
            with trio.move_on_after(0.3):
                await client.send_all(bytes(64 << 20))  # the backend reads nothing
            [flow] = [each for each in it.loop.watchers() if getattr(each, "piped", 0)]
            assert flow.pipe is not None  # type: ignore[attr-defined]
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await client.aclose()
            await it.all_ended()
            # Else there would be none for the next.
            pipe = it.pipes.take()
            assert pipe is not None
            it.pipes.give(pipe)
            await backend.aclose()


@trio_test
async def test_bytes_are_counted_once_whatever_stalls() -> None:
    size = 8 << 20
    async with bench() as it:
        client, backend = it.join(unix_buffers=8192)
        async with trio.open_nursery() as nursery:

            async def send(end: trio.SocketStream) -> None:
                await end.send_all(bytes(size))
                await end.send_eof()

            nursery.start_soon(send, client)
            nursery.start_soon(send, backend)
            received = dict.fromkeys((client, backend), 0)
            await trio.sleep(0.1)  # by now all is full
            for end in received:

                async def receive(end: trio.SocketStream) -> None:
                    while chunk := await end.receive_some(10_000):
                        received[end] += len(chunk)

                nursery.start_soon(receive, end)
        await it.all_ended()
        assert list(received.values()) == [size, size]
        assert it.endings == [(size, size, Ending.FINISHED)]


@trio_test
async def test_an_idle_client_of_a_backend_that_half_closed_and_then_closed_is_let_go() -> None:
    async with bench() as it:
        client, backend = it.join()
        await backend.send_eof()
        assert await client.receive_some() == b""
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert it.limit.open == 1
        await backend.aclose()
        with trio.fail_after(linger._AFTER_END + 5):
            await it.limit.wait_until_empty()
        assert it.endings == [(0, 0, Ending.FINISHED)]


@pytest.mark.parametrize("near_first", [False, True])
@trio_test
async def test_both_ends_stalled_and_both_gone(near_first: bool) -> None:
    async with bench() as it:
        client, backend = it.join()
        for end in client, backend:
            with trio.move_on_after(0.1):
                await end.send_all(bytes(64 << 20))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        # Before the loop can look: it finds both gone at once.
        for end in (client, backend) if near_first else (backend, client):
            end.socket.close()
        await it.all_ended()
        [(_, _, ending)] = it.endings
        assert ending in (Ending.NEAR_RESET, Ending.FAR_RESET)
        assert it.loop.watchers() == []


@trio_test
async def test_a_client_that_is_found_gone_by_what_is_sent_to_it_takes_the_backend_along() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        it.join_these(near, far)
        with trio.move_on_after(0.1):
            await it.stream(client).send_all(bytes(64 << 20))
        it.stream(backend)  # it is closed at the end
        up = it.up()
        assert up.stalled
        assert up.back is not None
        reset(client)
        wait_for(up.source, select.POLLERR)
        # In a turn, before the loop has told of it: the kernel tells of an error only once.
        assert backend.send(b"x") == 1
        up.back.pump()
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.NEAR_RESET]


@trio_test
async def test_what_is_said_to_a_client_that_has_reset_is_answered_with_a_reset() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        it.join_these(near, far)
        end = it.stream(backend)
        up = it.up()
        reset(client)
        wait_for(up.source, select.POLLERR)
        backend.send(b"to nobody")
        up.pump()
        await it.all_ended()
        assert it.endings == [(0, 0, Ending.NEAR_RESET)]
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await end.receive_some()


@trio_test
async def test_both_are_found_gone_by_one_read() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, b"unread")
        it.join_these(near, far)
        up = it.up()
        assert up.back is not None
        backend.close()
        reset(client)
        wait_for(up.source, select.POLLERR)
        up.back.pump()
        assert it.endings == [(6, 0, Ending.NEAR_RESET)]


@trio_test
async def test_how_it_ends_is_what_was_known_first() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(b"unread")
        with trio.move_on_after(0.1):
            await backend.send_all(bytes(64 << 20))
        up = it.up()
        backend.socket.shutdown(socket.SHUT_RDWR)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert up.pending is Ending.FINISHED
        # With bytes unread.
        await backend.aclose()
        while await client.receive_some():
            pass
        await client.aclose()
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.FINISHED]


@trio_test
async def test_others_have_their_turn_while_connections_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "_BATCH", 2)
    async with bench() as it:
        for _ in range(10):
            it.join()
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await it.relay.sweep.look(1.0)
            assert turns >= 5  # twenty directions, two at a time, and some for the start
            nursery.cancel_scope.cancel()


# What happened before the two were joined


@trio_test
async def test_what_was_said_before_is_passed_on_at_once() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, b"hello")
        it.join_these(near, far)
        # Before the loop, which is a task, could have had a turn.
        assert received_already(backend) == b"hello"
        await check_both_ways(it.stream(client), it.stream(backend))
        await it.all_ended()


# The last of them is more than one read takes, and the loop will not tell of the rest.
@pytest.mark.parametrize(
    ("first", "said"), [(b"", b"hello"), (b"first, ", b"hello"), (b"first, ", bytes(100_000))]
)
@trio_test
async def test_what_was_said_to_a_watcher_before_is_passed_on_at_once(
    first: bytes, said: bytes
) -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        told: list[int] = []

        class Before:
            def on_event(self, events: int) -> None:
                told.append(events)

            def abort(self) -> None:
                raise AssertionError

        say(client, near, said)
        plain_near, plain_far = plain(near), plain(far)
        it.loop.watch(plain_near.fileno(), Before(), READ_EVENTS)
        with trio.fail_after(5):
            while not told:
                await trio.lowlevel.checkpoint()
        it.limit.add()
        it.relay.join(plain_near, plain_far, it.left, told[0], first)
        assert received_already(backend) == first + said
        await check_both_ways(it.stream(client), it.stream(backend))
        await it.all_ended()
        assert len(told) == 1


@trio_test
async def test_what_is_first_comes_with_what_was_said_and_is_not_counted() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, b"hello")
        it.join_these(near, far, b"first, ")
        assert received_already(backend) == b"first, hello"
        client.close()
        with trio.fail_after(5):
            assert await it.stream(backend).receive_some() == b""
        backend.close()
        await it.all_ended()
        assert it.endings == [(5, 0, Ending.FINISHED)]


@trio_test
async def test_what_is_first_does_not_wait_for_what_is_said() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        it.join_these(near, far, b"first, ")
        assert received_already(backend) == b"first, "
        await check_both_ways(it.stream(client), it.stream(backend))
        await it.all_ended()
        assert it.endings == [(MUCH, MUCH, Ending.FINISHED)]


@trio_test
async def test_what_is_first_is_for_nobody_if_the_near_end_has_reset() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        reset(client)
        wait_for(near, select.POLLERR)
        it.join_these(near, far, b"first, ")
        assert it.endings == [(0, 0, Ending.NEAR_RESET)]
        with trio.fail_after(5):
            assert await it.stream(backend).receive_some() == b""


@pytest.mark.parametrize("first", [b"", b"first, "])
@pytest.mark.parametrize("size", [10_000, 90_000])
@trio_test
async def test_of_what_was_said_before_nothing_is_lost_in_a_small_buffer(
    size: int, first: bytes
) -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        said = b"".join(Noise().blocks(size))
        say(client, near, said)
        it.join_these(near, far, first)
        client_end, backend_end = it.stream(client), it.stream(backend)
        # It stalls, and stays so until somebody reads.
        await trio.testing.wait_all_tasks_blocked(0.01)
        received = received_already(backend)
        assert len(first) < len(received) < size
        with trio.fail_after(5):
            while len(received) < len(first) + size:
                received += await backend_end.receive_some()
        assert received == first + said
        await check_both_ways(client_end, backend_end, 1 << 17)
        await it.all_ended()


@trio_test
async def test_an_end_before_comes_after_what_was_said_and_the_other_way_lives_on() -> None:
    for said in b"", b"question", b"".join(Noise().blocks(90_000)):
        async with bench() as it:
            client, near = tcp_pair()
            backend, far = unix_pair()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            say(client, near, said)
            shut(client, near)
            it.join_these(near, far)
            client_end, backend_end = it.stream(client), it.stream(backend)
            with trio.fail_after(5):
                assert b"".join([chunk async for chunk in backend_end]) == said
            for _ in range(3):
                await backend_end.send_all(b"answer")
                assert await client_end.receive_some() == b"answer"
            assert it.limit.open
            await backend_end.send_eof()
            assert await client_end.receive_some() == b""
            await it.all_ended()


@trio_test
async def test_both_may_have_ended_before() -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        for end, other, said in (client, near, b"question"), (backend, far, b"answer"):
            say(end, other, said)
            shut(end, other)
        it.join_these(near, far)
        await it.all_ended()
        for end, expected in (client, b"answer"), (backend, b"question"):
            assert b"".join([chunk async for chunk in it.stream(end)]) == expected


@pytest.mark.parametrize("first", [b"", b"first, "])
@pytest.mark.parametrize("said", [b"", b"question"])
@pytest.mark.parametrize("last_words", [b"", b"no room"])
@trio_test
async def test_a_backend_that_has_gone_before_has_its_last_words(
    said: bytes, last_words: bytes, first: bytes
) -> None:
    async with bench() as it:
        for _ in range(3):
            before = len(os.listdir("/proc/self/fd"))
            client, near = tcp_pair()
            backend, far = unix_pair()
            say(client, near, said)
            say(backend, far, last_words)
            backend.close()
            it.join_these(near, far, first)
            async with stream(client) as client_end:
                assert b"".join([chunk async for chunk in client_end]) == last_words
            await it.all_ended()
            await trio.testing.wait_all_tasks_blocked()
            assert it.endings.pop()[:2] == (0, len(last_words))
            assert it.loop.watchers() == []
            assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("said", [b"", b"question"])
@trio_test
async def test_a_client_that_was_reset_before_is_an_end_for_the_backend(said: bytes) -> None:
    async with bench() as it:
        before = len(os.listdir("/proc/self/fd"))
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, said)
        reset(client)
        wait_for(near, select.POLLERR)
        it.join_these(near, far)
        await it.all_ended()
        assert it.loop.watchers() == []
        with trio.fail_after(5):
            async with stream(backend) as end:
                assert b"".join([chunk async for chunk in end]) == said
        assert len(os.listdir("/proc/self/fd")) == before


# The first to be watched is the far end.
@pytest.mark.parametrize("call", [1, 2])
@trio_test
async def test_both_are_reset_where_they_can_not_be_watched(call: int) -> None:
    async with bench() as it:
        client, near = tcp_pair()
        backend, far = unix_pair()
        say(client, near, b"hello")
        FlakyEpoll(it.loop).failures = [*[None] * (call - 1), errno.ENOSPC]
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            it.join_these(near, far)
        assert not it.limit.open
        assert it.loop.watchers() == []
        with pytest.raises(trio.BrokenResourceError):
            await it.stream(client).receive_some()
        assert b"".join([chunk async for chunk in it.stream(backend)]) == b"hello"


@trio_test
async def test_the_oracle_is_a_half_closeable_stream_too() -> None:
    async with trio.open_nursery() as nursery:

        async def make() -> tuple[trio.SocketStream, trio.SocketStream]:
            client, near = tcp_pair()
            backend, far = unix_pair()

            async def relay() -> None:
                # A broken end is what the oracle reports, and what some of the checks are about.
                with contextlib.suppress(trio.BrokenResourceError):
                    await relay_streams(stream(near), stream(far))

            nursery.start_soon(relay)
            return stream(client), stream(backend)

        await check_half_closeable_stream(make, None)
        nursery.cancel_scope.cancel()


@trio_test
async def test_the_oracle_agrees_on_much() -> None:
    client, near = tcp_pair()
    backend, far = unix_pair()
    async with (
        stream(client) as client_end,
        stream(backend) as backend_end,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(relay_streams, stream(near), stream(far))
        await check_both_ways(client_end, backend_end)


@trio_test
async def test_the_oracle_reports_a_reset() -> None:
    client, near = tcp_pair()
    backend, far = unix_pair()
    reset(client)
    with pytest.raises(trio.BrokenResourceError):
        await relay_streams(stream(near), stream(far))
    with backend:
        assert backend.recv(1) == b""
