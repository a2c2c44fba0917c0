"""Everything put together: listeners, sessions, relay, drain."""

from _socket import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from mutual_tls.identity import Identities
from mutual_tls.relay import TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address, Listener
from sniproxy.engine.loop import EventLoop
from sniproxy.service.descriptors import Share
from sniproxy.service.drain import drain
from sniproxy.service.eventlog import show_address
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.workers import Worker
from tls_bridge.config import Config
from tls_bridge.log import Log
from tls_bridge.session import Session, Sessions

# Makes the story of an accepted client.
Begin = Callable[[Sessions, socket, Address], Session]


async def serve(
    program: str,
    listening: Sequence[tuple[socket, Begin]],
    identities: Identities,
    config: Config,
    share: Share,
    log: Log,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
) -> None:
    """Serve as `program` what the sockets accept, until an order to end.

    Each socket comes with what makes the story of whoever connects there.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    relay = TLSRelay(loop, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)
    # Two lifetimes. What serves must outlive those who are served.
    async with trio.open_nursery() as service:
        await service.start(orders.receive)
        service.start_soon(loop.run)
        async with trio.open_nursery() as conversations:
            sessions = Sessions(program, config, identities, loop, relay, log, limit, conversations)
            listeners = [
                Listener(
                    loop,
                    sock,
                    limit,
                    on_accept=partial(sessions.begin, begin),
                    on_full=sessions.make_room,
                    on_exhausted=log.exhausted,
                )
                for sock, begin in listening
            ]
            for listener in listeners:
                service.start_soon(listener.run)
            service.start_soon(relay.run)
            service.start_soon(sessions.stories.run)
            service.start_soon(notifier.run, sessions.counts)
            service.start_soon(log.run)
            notifier.ready()
            orders.on_status = lambda: log.status(sessions.counts())
            for sock, _ in listening:
                name = sock.getsockname()
                address = show_address(name) if isinstance(name, tuple) else name or "unix"
                log.event("listening", address=address, capacity=limit.capacity)

            await orders.drain.wait()
            for listener in listeners:
                listener.close()
            notifier.stopping()
            log.event("draining", open=limit.open)
            await drain(limit.wait_until_empty, orders.end, config.drain_seconds)
            cut = sessions.cut()
        service.cancel_scope.cancel()
    log.event("drained", served=sessions.served, refused=sessions.refused, cut=cut)
    loop.shut()
