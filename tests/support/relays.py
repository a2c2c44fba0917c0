"""A relay in a running loop, in this very process.

async with bench() as it:
    client, backend = it.join()
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sniproxy.engine.ending import Ending
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay, _Flow
from tests.support.sockets import plain, tcp_pair, unix_pair


class Bench:
    """A relay in a running loop, and what became of its connections."""

    def __init__(self, idle_seconds: float = 0.0, half_closed_seconds: float = 0.0) -> None:
        self.faults: list[Exception] = []
        self.loop = EventLoop(self.faults.append)
        self.pipes = PipePool()
        self.relay = Relay(
            self.loop, self.pipes, self.faults.append, idle_seconds, half_closed_seconds
        )
        self.limit = ConnectionLimit()
        self.endings: list[tuple[int, int, Ending]] = []
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

    def left(self, up: int, down: int, ending: Ending) -> None:
        self.endings.append((up, down, ending))
        self.limit.remove()

    def stream(self, end: socket.socket) -> trio.SocketStream:
        self._ends.append(stream(end))
        return self._ends[-1]

    async def close(self) -> None:
        self.relay.abort_all()
        self.loop.shut()
        self.pipes.close()
        for end in self._ends:
            await end.aclose()
        assert self.faults == []

    async def all_ended(self) -> None:
        with trio.fail_after(5):
            await self.limit.wait_until_empty()


@asynccontextmanager
async def bench(
    idle_seconds: float = 0.0, half_closed_seconds: float = 0.0
) -> AsyncIterator[Bench]:
    it = Bench(idle_seconds, half_closed_seconds)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.loop.run)
            nursery.start_soon(it.relay.run)
            yield it
            nursery.cancel_scope.cancel()
    finally:
        await it.close()


def stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
