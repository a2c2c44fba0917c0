"""What every program does to serve: it accepts until it is told to drain, and waits for the end."""

from _socket import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import trio

from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address, Listener
from sniproxy.engine.loop import EventLoop
from sniproxy.service.drain import drain
from sniproxy.service.eventlog import EventLog, show_address
from sniproxy.service.fatal import FatalError
from sniproxy.service.figures import Figures, HostFigures
from sniproxy.service.notify import Counts, Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.status import StatusSocket
from sniproxy.service.workers import Worker


class Sessions(Protocol):
    """All connections of a program.

    Attributes:
        served, refused: How many there were.
    """

    served: int
    refused: int

    def make_room(self) -> bool:
        """Let a client go for the sake of the next one; return whether there was anybody."""

    def counts(self) -> Counts:
        """Return how many there are, and were."""

    def count_in(self, figures: Figures) -> None:
        """Count there, from now on, what happens to the connections of each host."""

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        """Yield the figures of each open connection's host, and its bytes there and back so far."""

    def cut(self) -> int:
        """End whoever is left; return how many."""

    async def run(self) -> None:
        """Do what all connections need, until cancelled."""


Some = TypeVar("Some", bound=Sessions)
Taken = TypeVar("Taken", bound=Sessions, contravariant=True)


class Upgrading(Protocol[Taken]):
    """Upgrades without a cut, from a copy of the program before us and to one after us."""

    async def begin(self, sessions: Taken) -> None:
        """Wait until clients may be accepted.

        Raises:
            FatalError: we are to end.
        """

    async def run(
        self, sessions: Taken, listener: Listener, on_given: Callable[[int | None], None]
    ) -> None:
        """Call `on_given` when it is time to end: with the process id of the copy that has all."""

    def refuse(self) -> None:
        """Let no copy in any more."""


# Begins the story of an accepted client.
Begin = Callable[[Some, socket, Address], None]


async def serve_until_drained(
    listening: Sequence[tuple[socket, Begin[Some]]],
    make_sessions: Callable[[trio.Nursery], Some],
    loop: EventLoop,
    limit: ConnectionLimit,
    log: EventLog,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
    drain_seconds: float,
    *,
    tasks: Sequence[Callable[[], Awaitable[None]]] = (),
    on_drain: Callable[[], None] = lambda: None,
    hosts: bytes | None = None,
    status: StatusSocket | None = None,
    upgrade: Upgrading[Some] | None = None,
    has_timeouts: bool = True,
) -> None:
    """Serve what the sockets accept, until an order to end.

    Args:
        listening: each socket with what begins the story of whoever connects there.
        make_sessions: called with the nursery for the tasks of connections.
        loop: serves the connections; shut at the end.
        limit: counts them.
        log: where the lines go that every program has.
        orders: says when to drain, and when to end.
        notifier: told how we fare.
        drain_seconds: how long a drain waits for the last connection.
        tasks: what else runs meanwhile.
        on_drain: called when nobody is accepted any more.
        hosts: the directory that is served, for the line `listening`.
        status: where it is told what was counted; closed when the drain begins.
        upgrade: of a program with one listening socket.
        has_timeouts: whether that has timeouts that clients inherit.

    Returns when the last connection has ended, by itself or at the end of the drain.

    Raises:
        FatalError: the copy that was to give us everything goes on.
    """
    is_main = True  # for the supervisor

    def on_given(pid: int | None) -> None:
        nonlocal is_main
        is_main = False
        if pid is not None:
            notifier.succeeded_by(pid)
        orders.drain.set()

    failure: FatalError | None = None
    # Two lifetimes. What serves must outlive those who are served.
    async with trio.open_nursery() as service:
        await service.start(orders.receive)
        service.start_soon(loop.run)
        async with trio.open_nursery() as conversations:
            sessions = make_sessions(conversations)
            listeners = [
                Listener(
                    loop,
                    sock,
                    limit,
                    on_accept=partial(begin, sessions),
                    on_full=sessions.make_room,
                    on_exhausted=log.exhausted,
                    has_timeouts=has_timeouts,
                )
                for sock, begin in listening
            ]
            service.start_soon(sessions.run)
            if status is not None:
                sessions.count_in(status.figures)
            if upgrade is not None:
                try:
                    await upgrade.begin(sessions)
                except FatalError as error:
                    failure = error
                    listeners[0].leave()
                    service.cancel_scope.cancel()
                    await trio.sleep_forever()
                service.start_soon(upgrade.run, sessions, listeners[0], on_given)
            for listener in listeners:
                service.start_soon(listener.run)
            service.start_soon(notifier.run, sessions.counts)
            service.start_soon(log.run)
            for task in tasks:
                service.start_soon(task)
            if status is not None:
                service.start_soon(status.run, sessions, log.bug, log.worker)
            notifier.ready()
            orders.on_status = lambda: log.status(sessions.counts())
            for sock, _ in listening:
                name = sock.getsockname()
                address = show_address(name) if isinstance(name, tuple) else name or "unix"
                log.event("listening", address=address, capacity=limit.capacity, hosts=hosts)

            await orders.drain.wait()
            if upgrade is not None:
                upgrade.refuse()
            for listener in listeners:
                listener.close()
            if status is not None:
                status.close()
            on_drain()
            if is_main:
                notifier.stopping()
            log.event("draining", open=limit.open)
            await drain(limit.wait_until_empty, orders.end, drain_seconds)
            cut = sessions.cut()
        service.cancel_scope.cancel()
    if failure is not None:
        loop.shut()
        raise failure
    log.event("drained", served=sessions.served, refused=sessions.refused, cut=cut)
    loop.shut()
