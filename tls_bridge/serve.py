"""Everything put together: sessions and relay."""

from _socket import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from mutual_tls.identity import Identities
from mutual_tls.relay import TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.service.descriptors import Share
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.status import StatusSocket
from sniproxy.service.workers import Worker
from sniproxy.serving import serve_until_drained
from tls_bridge.config import Config
from tls_bridge.log import Log
from tls_bridge.session import Session, Sessions

# Makes the story of an accepted client.
MakeStory = Callable[[Sessions, socket, Address], Session]


async def serve(
    program: str,
    listening: Sequence[tuple[socket, MakeStory]],
    identities: Identities,
    config: Config,
    share: Share,
    log: Log,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
    status: StatusSocket | None = None,
) -> None:
    """Serve as `program` what the sockets accept, until an order to end.

    Each socket comes with what makes the story of whoever connects there.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    relay = TLSRelay(loop, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)

    def make_sessions(nursery: trio.Nursery) -> Sessions:
        return Sessions(program, config, identities, loop, relay, log, limit, nursery)

    def begin(make: MakeStory, sessions: Sessions, client: socket, address: Address) -> None:
        sessions.begin(make(sessions, client, address))

    await serve_until_drained(
        [(sock, partial(begin, make)) for sock, make in listening],
        make_sessions,
        loop,
        limit,
        log,
        orders,
        notifier,
        config.drain_seconds,
        status=status,
    )
