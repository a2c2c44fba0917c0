"""A relay in a running loop, in this very process.

async with bench() as it:
    client, backend = it.join()
"""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Generic, Protocol, Self, TypeVar

import trio

from sniproxy.engine.ending import Ending
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay, _Flow
from tests.support.daemon import PATIENCE
from tests.support.sockets import plain, tcp_pair, unix_pair


class AnyRelay(Protocol):
    async def run(self) -> None: ...
    def abort_all(self) -> None: ...


RelayT = TypeVar("RelayT", bound=AnyRelay)
EndingT = TypeVar("EndingT")


class RelayBench(Generic[RelayT, EndingT]):
    """A relay in a running loop, and what became of its connections.

    Args:
        make: Makes the relay, for a loop, and for whoever is told of faults.
    """

    nursery: trio.Nursery

    def __init__(self, make: Callable[[EventLoop, Callable[[Exception], None]], RelayT]) -> None:
        self.faults: list[Exception] = []
        self.loop = EventLoop(self.faults.append)
        self.relay = make(self.loop, self.faults.append)
        self.limit = ConnectionLimit()
        self.endings: list[tuple[int, int, EndingT]] = []
        # What is closed in the end.
        self.held = ExitStack()

    def left(self, up: int, down: int, ending: EndingT) -> None:
        self.endings.append((up, down, ending))
        self.limit.remove()

    async def all_ended(self) -> None:
        with trio.fail_after(PATIENCE):
            await self.limit.wait_until_empty()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Run the loop and the relay; no fault may be left at the end."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.loop.run)
                self.nursery.start_soon(self.relay.run)
                yield self
                self.nursery.cancel_scope.cancel()
        finally:
            self.relay.abort_all()
            self.loop.shut()
            self.held.close()
            assert self.faults == []


class Bench(RelayBench[Relay, Ending]):
    """With the relay that splices."""

    def __init__(self, idle_seconds: float, half_closed_seconds: float) -> None:
        self.pipes = PipePool()
        super().__init__(
            lambda loop, report: Relay(loop, self.pipes, report, idle_seconds, half_closed_seconds)
        )
        self.held.callback(self.pipes.close)
        self._ends: list[trio.SocketStream] = []

    def join(self, unix_buffers: int | None = None) -> tuple[trio.SocketStream, trio.SocketStream]:
        """Return the two ends of a new connection: the client's, and the backend's."""
        client, near = tcp_pair()
        backend, far = unix_pair()
        if unix_buffers is not None:
            for end in (backend, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unix_buffers)
        far.setblocking(False)
        self.join_these(near, far)
        return self.stream(client), self.stream(backend)

    def join_these(self, near: socket.socket, far: socket.socket, first: bytes = b"") -> None:
        self.limit.add()
        self.relay.join(plain(near), plain(far), self.left, first=first)

    def up(self) -> _Flow:
        """Return the direction from the near end, of the first connection that there is."""
        flows = [each for each in self.loop.watchers() if isinstance(each, _Flow)]
        return next(flow for flow in flows if flow.on_end is not None)

    def stream(self, end: socket.socket) -> trio.SocketStream:
        self._ends.append(stream(end))
        self.held.callback(self._ends[-1].socket.close)
        return self._ends[-1]


def bench(
    idle_seconds: float = 0.0, half_closed_seconds: float = 0.0
) -> AbstractAsyncContextManager[Bench]:
    return Bench(idle_seconds, half_closed_seconds).running()


def stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
