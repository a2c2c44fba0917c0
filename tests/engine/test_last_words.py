"""A far end that closes with bytes unread: what it has written before arrives, all of it."""

import _socket
import socket
import struct

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.engine import linger, sweep, tcp
from sniproxy.engine.ending import Ending
from sniproxy.engine.linger import Linger
from tests.support.relays import Bench, bench
from tests.support.sockets import Noise, plain, say, tcp_pair, unix_pair

UNREAD = b"seventeen bytes.."
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def clock() -> MockClock:
    # The threshold, in real seconds, is what sockets on this machine may need to answer.
    return MockClock(autojump_threshold=0.05)


async def say_and_close(backend: trio.SocketStream, size: int) -> None:
    """Wait for what the client has sent, do not read it, answer, and close."""
    await backend.socket.recv(1, socket.MSG_PEEK)
    for block in Noise().blocks(size):
        await backend.send_all(block)
    await backend.aclose()


async def read_slowly(client: trio.SocketStream, *, talks: bool) -> bytes:
    """Read to the end, with pauses; say something in each of them, if `talks`."""
    received = bytearray()
    while chunk := await client.receive_some(100_000):
        received += chunk
        await trio.sleep(0.002)
        if talks:
            await client.send_all(b"and one more thing" * 50)
    return bytes(received)


@pytest.mark.parametrize(("talks", "half_closed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", [0, 1000, 300_000, 8_000_000])
@trio_test
async def test_all_of_it_arrives_and_then_the_end(
    size: int, talks: bool, half_closed: bool
) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        if half_closed:
            await client.send_eof()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_and_close, backend, size)
            received = await read_slowly(client, talks=talks)
        assert received == b"".join(Noise().blocks(size))
        await client.aclose()
        await it.all_ended()
        [(up, down, ending)] = it.endings
        assert (down, ending) == (size, Ending.FAR_RESET)
        assert up >= len(UNREAD)


@pytest.mark.parametrize("half_closed", [False, True])
@trio_test
async def test_the_connection_counts_until_all_has_arrived(half_closed: bool) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        if half_closed:
            await client.send_eof()
        await say_and_close(backend, 2_000_000)  # all of it fits into the buffers on the way
        await trio.sleep(0.3)
        assert it.limit.open == 1
        await read_slowly(client, talks=False)
        await client.aclose()
        await it.all_ended()


@trio_test
async def test_the_connection_counts_until_all_has_arrived_at_who_ends_meanwhile() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 2_000_000)
        await trio.sleep(0.1)
        await client.send_eof()
        await trio.sleep(0.3)
        assert it.limit.open == 1
        assert len(await read_slowly(client, talks=False)) == 2_000_000
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.FAR_RESET]


@trio_test
async def test_a_fault_of_one_of_them_is_told_and_ends_that_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench() as it:
        client, backend = it.join()
        faulty = it.up().source
        other, other_backend = it.join()
        unacknowledged = tcp.unacknowledged

        def fail(sock: _socket.socket) -> int:
            if sock is faulty:
                raise ZeroDivisionError
            return unacknowledged(sock)

        monkeypatch.setattr(tcp, "unacknowledged", fail)
        for end, far_end in (client, backend), (other, other_backend):
            await end.send_all(UNREAD)
            await say_and_close(far_end, 1_000_000)
        with trio.fail_after(5):
            while it.limit.open == 2:  # noqa: ASYNC110 - nothing tells of it
                await trio.sleep(0.01)
        assert [type(fault) for fault in it.faults] == [ZeroDivisionError]
        it.faults.clear()
        with pytest.raises(trio.BrokenResourceError):
            await read_slowly(client, talks=False)
        assert len(await read_slowly(other, talks=False)) == 1_000_000
        await other.aclose()
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.CUT, Ending.FAR_RESET]


@trio_test
async def test_who_has_received_all_and_stays_is_let_go(clock: MockClock) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 100_000)
        began = trio.current_time()
        assert len(await read_slowly(client, talks=False)) == 100_000
        await it.limit.wait_until_empty()
        assert trio.current_time() - began == pytest.approx(linger._AFTER_END, abs=0.5)
        assert it.loop.watchers() == []


@trio_test
async def test_who_has_received_all_and_had_ended_before_is_let_go_at_once(
    clock: MockClock,
) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await client.send_eof()
        await say_and_close(backend, 1_000_000)
        await trio.sleep(1)
        assert it.limit.open == 1
        began = trio.current_time()
        assert len(await read_slowly(client, talks=False)) == 1_000_000
        await it.limit.wait_until_empty()
        assert trio.current_time() - began < linger._AFTER_END / 2


async def hear_all_and_stay(it: Bench) -> None:
    client, backend = it.join()
    await client.send_all(UNREAD)
    await say_and_close(backend, 100)
    assert len(await client.receive_some(1000)) == 100


@trio_test
async def test_who_has_received_all_gives_way_to_who_needs_the_place() -> None:
    async with bench() as it:
        last_words = it.relay.last_words
        last_words.is_place_wanted = it.limit.is_place_wanted
        with trio.fail_after(2):  # not the five seconds of those for whom there is room
            await hear_all_and_stay(it)
            while not last_words.make_room():  # noqa: ASYNC110 - nothing tells of it
                await trio.sleep(0.01)
            assert it.limit.open == 0
            it.limit.wait_for_room(lambda: None)  # somebody waits
            await hear_all_and_stay(it)
            await it.limit.wait_until_empty()
        assert [ending for _, _, ending in it.endings] == [Ending.FAR_RESET] * 2
        assert not last_words.make_room()


@trio_test
async def test_who_has_received_all_and_talks_on_is_let_go(clock: MockClock) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 0)
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await client.send_all(b"and one more thing")
                await trio.sleep(0.5)
        assert trio.current_time() - began == pytest.approx(linger._AFTER_END, abs=1.5)
        await it.all_ended()


@trio_test
async def test_who_breaks_off_meanwhile_is_gone_at_once() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 1_000_000)
        await trio.sleep(0.1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await client.aclose()
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.NEAR_RESET]


@trio_test
async def test_those_on_their_way_are_cut_with_the_others() -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 1_000_000)
        await trio.sleep(0.1)
        it.relay.abort_all()
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.CUT]
        with pytest.raises(trio.BrokenResourceError):
            await read_slowly(client, talks=False)


@trio_test
async def test_others_have_their_turn_while_much_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linger, "_TURN", linger._CHUNK)
    async with bench() as it:
        client, near = tcp_pair()
        say(client, near, bytes(100_000))
        sock = plain(near)
        ended = trio.Event()
        thrown_away = Linger(it.loop, sock, lambda _: ended.set())
        thrown_away.start(is_watched=False)
        thrown_away.on_event(0)
        assert sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        client.close()
        with trio.fail_after(5):
            await ended.wait()


@trio_test
async def test_an_upload_that_nobody_reads_is_thrown_away() -> None:
    async with bench() as it:
        client, backend = it.join()
        async with trio.open_nursery() as nursery:

            async def upload() -> None:
                await client.send_all(bytes(64 << 20))
                await client.aclose()

            nursery.start_soon(upload)
            await backend.receive_some()
            await backend.send_all(b"too large")
            await backend.aclose()
            assert await client.receive_some() == b"too large"
            assert await client.receive_some() == b""
        await it.all_ended()
        assert [ending for _, _, ending in it.endings] == [Ending.FAR_RESET]


@trio_test
async def test_a_backend_that_reads_no_more_may_go_on_talking() -> None:
    async with bench() as it:
        client, backend = it.join()
        backend.socket.shutdown(socket.SHUT_RD)
        for _ in range(3):
            await client.send_all(b"nobody reads this")
            await backend.send_all(b"news")
            assert await client.receive_some() == b"news"
        await backend.send_eof()
        assert await client.receive_some() == b""
        await client.aclose()
        await it.all_ended()


@trio_test
async def test_pipes_are_given_back() -> None:
    async with bench() as it:
        it.pipes._left = 2
        for _ in range(5):
            client, backend = it.join()
            async with trio.open_nursery() as nursery:

                async def upload(client: trio.SocketStream = client) -> None:
                    await client.send_all(bytes(4 << 20))

                nursery.start_soon(upload)
                await backend.receive_some()
                await trio.sleep(0.02)  # by now the pipe is full
                await say_and_close(backend, 1_000_000)
                await read_slowly(client, talks=False)
            await client.aclose()
            await it.all_ended()
        assert it.pipes._left + len(it.pipes._spare) == 2


# --- clients that live, and do not read


async def fill(it: Bench) -> tuple[trio.SocketStream, bytes]:
    """Return a client with a short TCP_USER_TIMEOUT that has not read what there is for it."""
    client, near = tcp_pair()
    backend, far = unix_pair()
    # tcp(7): milliseconds.
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
    far.setblocking(False)
    it.join_these(near, far)
    sent = 0
    end = it.stream(backend)
    with trio.move_on_after(0.2):
        while True:
            sent += await end.socket.send(bytes(10_000))
    return it.stream(client), bytes(sent)


@pytest.mark.parametrize("has_closed", [False, True])
@trio_test
async def test_a_client_that_pauses_is_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch, has_closed: bool
) -> None:
    monkeypatch.setattr(sweep, "_EVERY", 0.1)
    monkeypatch.setattr(tcp, "_ASK_AFTER", 0.3)
    async with bench() as it:
        client, sent = await fill(it)
        if has_closed:
            await it._ends[0].aclose()
        await trio.sleep(2)
        received = bytearray()
        with trio.move_on_after(0.5):
            while chunk := await client.receive_some():
                received += chunk
        assert received == sent


@trio_test
async def test_the_timeout_is_back_when_the_client_reads_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "_EVERY", 0.1)
    monkeypatch.setattr(tcp, "_ASK_AFTER", 0.3)
    async with bench() as it:
        client, sent = await fill(it)
        near = it.up().source
        await trio.sleep(0.7)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        received = 0
        while received < len(sent):
            received += len(await client.receive_some())
        await it._ends[0].send_all(b"x")
        await trio.sleep(0.3)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == tcp.USER_TIMEOUT


def test_the_timeout_stays_where_nothing_waits_for_the_client() -> None:
    """It may have vanished: then what is sent next is not to wait for a quarter of an hour."""
    client, near = tcp_pair()
    with client, near:
        tcp.set_user_timeout(near)
        tcp.spare_slow_reader(near, 30)
        found = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert found == tcp.USER_TIMEOUT


def test_where_the_timeout_can_not_be_changed_it_stays() -> None:
    sock, other = unix_pair()
    with sock, other:
        sock.send(b"not acknowledged")
        tcp.spare_slow_reader(sock, 30)
        tcp.expect_answers(sock, 30)


# --- time limits


@trio_test
async def test_an_idle_connection_is_reset(clock: MockClock) -> None:
    async with bench(idle_seconds=60) as it:
        client, backend = it.join()
        began = trio.current_time()
        for _ in range(5):
            await trio.sleep(50)
            await client.send_all(b"x")
            assert await backend.receive_some() == b"x"
        await it.limit.wait_until_empty()
        assert 250 + 60 <= trio.current_time() - began <= 250 + 60 * 5 / 4
        assert it.endings == [(5, 0, Ending.IDLE)]
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()


@trio_test
async def test_bytes_in_either_direction_are_no_idleness(clock: MockClock) -> None:
    async with bench(idle_seconds=60) as it:
        client, backend = it.join()
        for _ in range(5):
            await trio.sleep(50)
            await backend.send_all(b"x")
            assert await client.receive_some() == b"x"
        assert it.endings == []


@pytest.mark.parametrize("near_first", [False, True])
@trio_test
async def test_a_half_closed_connection_has_a_limit_of_its_own(
    clock: MockClock, near_first: bool
) -> None:
    async with bench(half_closed_seconds=100) as it:
        client, backend = it.join()
        ended, going_on = (client, backend) if near_first else (backend, client)
        await trio.sleep(200)
        assert it.limit.open == 1
        await ended.send_eof()
        assert await going_on.receive_some() == b""
        for _ in range(5):
            await trio.sleep(90)
            await going_on.send_all(b"x")
            assert await ended.receive_some() == b"x"
        began = trio.current_time()
        await it.limit.wait_until_empty()
        assert 100 <= trio.current_time() - began <= 100 * 5 / 4
        assert [ending for _, _, ending in it.endings] == [Ending.HALF_CLOSED]


@trio_test
async def test_a_backend_that_reads_no_more_has_the_same_limit(clock: MockClock) -> None:
    """Though neither has said its end."""
    async with bench(half_closed_seconds=10) as it:
        client, backend = it.join()
        await trio.sleep(20)
        backend.socket.shutdown(socket.SHUT_RD)
        await client.send_all(b"nobody reads this")
        await trio.sleep(0.1)
        assert it.up().pending is Ending.FAR_RESET
        with trio.fail_after(10 * 5 / 4):
            await it.limit.wait_until_empty()
        assert [ending for _, _, ending in it.endings] == [Ending.HALF_CLOSED]


@trio_test
async def test_last_words_that_nobody_reads_have_the_same_limit(clock: MockClock) -> None:
    async with bench(half_closed_seconds=10) as it:
        client, backend = it.join()
        await client.send_all(UNREAD)
        await say_and_close(backend, 1_000_000)
        began = trio.current_time()
        await it.limit.wait_until_empty()
        assert 10 <= trio.current_time() - began <= 10 * 5 / 4
        assert [ending for _, _, ending in it.endings] == [Ending.HALF_CLOSED]


@trio_test
async def test_without_limits_nothing_ends(clock: MockClock) -> None:
    async with bench() as it:
        client, backend = it.join()
        await client.send_eof()
        assert await backend.receive_some() == b""
        await trio.sleep(500)
        assert it.limit.open == 1
