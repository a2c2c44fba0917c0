"""Accepting: when it stops for a while, and what it takes along at the end."""

import _socket
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Listener, NotListeningError, take_listening_socket
from sniproxy.engine.loop import EventLoop
from tests.support.faults import FlakyEpoll


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.01)


class Flaky:
    """A listening socket whose accept() fails when it is told to."""

    def __init__(self, listening: _socket.socket) -> None:
        self._listening = listening
        self.failures: list[int] = []
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._listening, name)

    def _accept(self) -> object:
        self.asked += 1
        if self.failures:
            number = self.failures.pop(0)
            raise OSError(number, os.strerror(number))
        return self._listening._accept()  # type: ignore[attr-defined]


class Bench:
    def __init__(self, loop: EventLoop | None = None, limit: ConnectionLimit | None = None) -> None:
        self.bound = socket.create_server(("127.0.0.1", 0))
        self.socket = Flaky(take_listening_socket(self.bound.fileno()))
        self.loop = loop or EventLoop(self.fail)
        self.limit = limit or ConnectionLimit()
        self.room: list[bool] = []  # what it is told when it asks for some; False after that
        self.accepted: list[_socket.socket] = []
        self.exhausted: list[int | None] = []
        self.listener = Listener(
            self.loop,
            self.socket,  # type: ignore[arg-type]
            self.limit,
            self.accept,
            lambda: self.room.pop(0) if self.room else False,
            lambda error: self.exhausted.append(error.errno),
        )

    def accept(self, accepted: _socket.socket, address: object) -> None:
        self.limit.add()
        self.accepted.append(accepted)

    def fail(self, error: Exception) -> None:
        raise error

    def connect(self, count: int = 1) -> None:
        for _ in range(count):
            socket.create_connection(self.bound.getsockname()).close()


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    it = Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.loop.run)
        nursery.start_soon(it.listener.run)
        yield it
        nursery.cancel_scope.cancel()
    it.listener.close()
    it.loop.shut()
    it.bound.close()
    for accepted in it.accepted:
        accepted.close()


def test_accepted_sockets_inherit_what_finds_out_vanished_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        listening = take_listening_socket(bound.fileno())
        with socket.create_connection(bound.getsockname()):
            fd, _ = listening._accept()  # type: ignore[attr-defined]
            with socket.socket(fileno=fd) as accepted:
                found = {
                    name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                    for name in ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
                }
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        listening.close()
    # Milliseconds: two minutes, whether bytes are under way or not.
    assert found.pop("TCP_USER_TIMEOUT") == 120_000
    assert found["TCP_KEEPIDLE"] + found["TCP_KEEPINTVL"] * found["TCP_KEEPCNT"] == 120


class OldMultipath:
    """A listening socket of Multipath TCP, as of a Linux that has few options for it."""

    def __init__(self, listening: _socket.socket) -> None:
        self._listening = listening

    def __getattr__(self, name: str) -> object:
        return getattr(self._listening, name)

    def getsockopt(self, level: int, option: int) -> int:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_PROTOCOL):
            return 262  # IPPROTO_MPTCP
        return self._listening.getsockopt(level, option)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if level == socket.IPPROTO_TCP and option != socket.TCP_NODELAY:
            number = errno.ENOPROTOOPT if option == socket.TCP_USER_TIMEOUT else errno.EOPNOTSUPP
            raise OSError(number, os.strerror(number))
        self._listening.setsockopt(level, option, value)


@trio_test
async def test_what_multipath_tcp_does_not_have_plain_clients_have_all_the_same(
    clock: MockClock,
) -> None:
    async with bench() as it:
        it.bound.setblocking(False)
        old = OldMultipath(_socket.socket(fileno=os.dup(it.bound.fileno())))
        for option in socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT:
            with pytest.raises(OSError, match="not"):
                old.setsockopt(socket.IPPROTO_TCP, option, 1)
        # What was set by the bench's own listener.
        it.bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7200)
        it.bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        it.listener.close()
        listener = Listener(
            it.loop,
            old,  # type: ignore[arg-type]
            it.limit,
            it.accept,
            lambda: False,
            lambda error: None,
        )
        it.connect()
        listener.on_event(0)
        [client] = it.accepted
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 6
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
        listener.close()


def test_a_unix_socket_that_may_be_and_does_not_listen() -> None:
    with (
        socket.socket(socket.AF_UNIX) as sock,
        pytest.raises(NotListeningError, match=r"^it is a Unix socket that does not listen$"),
    ):
        take_listening_socket(sock.fileno(), may_be_unix=True)


def test_an_option_that_plain_tcp_does_not_have_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_such_option = (socket.IPPROTO_TCP, 9999, 1)
    monkeypatch.setattr("sniproxy.engine.listener.CLIENT_OPTIONS", (no_such_option,))
    with (
        socket.create_server(("127.0.0.1", 0)) as bound,
        pytest.raises(OSError, match="Protocol not available"),
    ):
        take_listening_socket(bound.fileno())


@trio_test
async def test_it_accepts_all_who_come(clock: MockClock) -> None:
    async with bench() as it:
        it.connect(100)  # more than a batch
        await trio.sleep(1)
        assert len(it.accepted) == 100


# What accept(2) says under "Error handling" and "ERRORS" of the one connection that was next.
@pytest.mark.parametrize(
    "number",
    [
        *(errno.ECONNABORTED, errno.EPERM, errno.ETIMEDOUT, errno.ENETDOWN, errno.EPROTO),
        *(errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH),
        *(errno.EOPNOTSUPP, errno.ENETUNREACH),
    ],
)
@trio_test
async def test_the_loss_of_one_connection_is_nothing(clock: MockClock, number: int) -> None:
    async with bench() as it:
        it.socket.failures = [number, number]
        it.connect()
        await trio.sleep(0.01)
        assert len(it.accepted) == 1
        assert not it.exhausted


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL]
)
@trio_test
async def test_when_nothing_is_left_it_pauses_and_says_so_once(
    clock: MockClock, number: int
) -> None:
    async with bench() as it:
        it.socket.failures = [number] * 5
        it.connect(3)
        await trio.sleep(0.35)
        assert it.exhausted == [number]
        # Once in a tenth of a second, and not as fast as it can.
        assert it.socket.asked == 4
        await trio.sleep(0.3)
        assert len(it.accepted) == 3
        it.socket.failures = [number]
        it.connect()
        await trio.sleep(0.3)
        assert it.exhausted == [number, number]
        assert len(it.accepted) == 4


@trio_test
async def test_when_it_cannot_be_watched_it_is_tried_again(clock: MockClock) -> None:
    async with bench() as it:
        FlakyEpoll(it.loop).failures = [errno.ENOSPC, errno.ENOMEM]
        it.connect()
        await trio.sleep(1)
        assert it.exhausted == [errno.ENOSPC]
        assert len(it.accepted) == 1


@trio_test
async def test_closing_takes_along_who_is_in_the_queue(clock: MockClock) -> None:
    async with bench() as it:
        it.connect(100)
        it.listener.close()
        assert len(it.accepted) == 100
        it.listener.close()  # as often as one likes


@trio_test
async def test_closing_takes_along_who_is_behind_a_lost_connection(clock: MockClock) -> None:
    async with bench() as it:
        it.socket.failures = [errno.ECONNABORTED]
        it.connect(3)
        it.listener.close()
        assert len(it.accepted) == 3


@trio_test
async def test_closing_in_a_pause(clock: MockClock) -> None:
    async with bench() as it:
        it.socket.failures = [errno.EMFILE] * 3
        it.connect()
        await trio.sleep(0.05)
        it.listener.close()
        await trio.sleep(1)
        assert not it.accepted


def test_accepted_sockets_inherit_their_options() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as bound,
        closing(take_listening_socket(bound.fileno())) as listening,
        socket.create_connection(bound.getsockname()),
    ):
        fd, _ = listening._accept()  # type: ignore[attr-defined]
        with socket.socket(fileno=fd) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_the_descriptor_taken_over_is_not_inherited() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as bound,
        closing(take_listening_socket(bound.fileno())) as listening,
    ):
        assert not os.get_inheritable(listening.fileno())


@trio_test
async def test_where_there_is_no_room_it_asks_for_some_and_then_waits(clock: MockClock) -> None:
    async with bench() as it:
        it.limit.capacity = 2
        it.room = [True]
        it.connect(4)
        await trio.sleep(0.01)
        # Two are in. Room was promised once and not made; the second time it gave up.
        assert (len(it.accepted), it.room) == (2, [])
        asked = it.socket.asked
        await trio.sleep(100)
        assert (len(it.accepted), it.socket.asked) == (2, asked)
        it.limit.remove()
        await trio.sleep(0.01)
        assert len(it.accepted) == 3
        it.limit.remove()
        await trio.sleep(0.01)
        assert (len(it.accepted), it.exhausted) == (4, [])


@trio_test
async def test_all_who_listen_hear_of_a_place(clock: MockClock) -> None:
    async with bench() as it:
        other = Bench(it.loop, it.limit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.listener.run)
            it.limit.capacity = 0
            for each in it, other:
                each.connect()
            await trio.sleep(0.01)
            it.limit.capacity = 3
            it.limit.add()
            it.limit.remove()
            await trio.sleep(0.01)
            assert (len(it.accepted), len(other.accepted)) == (1, 1)
            nursery.cancel_scope.cancel()
        other.listener.close()
        other.bound.close()
        for accepted in other.accepted:
            accepted.close()


@trio_test
async def test_when_the_machine_is_exhausted_room_may_be_made(clock: MockClock) -> None:
    async with bench() as it:
        it.socket.failures = [errno.EMFILE]
        it.room = [True]
        it.connect()
        await trio.sleep(0.01)
        # At once, without the pause.
        assert (len(it.accepted), it.exhausted, it.room) == (1, [errno.EMFILE], [])


@trio_test
async def test_who_leaves_after_the_end_opens_nothing(clock: MockClock) -> None:
    async with bench() as it:
        it.limit.capacity = 1
        it.connect(2)
        await trio.sleep(0.01)
        it.listener.close()
        it.limit.remove()
        await trio.sleep(0.01)
        assert len(it.accepted) == 1
