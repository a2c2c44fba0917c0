"""Everything put together: the directory, sessions, relays; and what is looked at meanwhile."""

from _socket import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio

from mutual_tls import redirected
from mutual_tls.netfilter.route import LocalRoute
from mutual_tls.netfilter.table import Nft
from mutual_tls.relay import TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay
from sniproxy.service.descriptors import Share
from sniproxy.service.fatal import FatalError
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.status import StatusSocket
from sniproxy.service.workers import Worker
from sniproxy.serving import serve_until_drained
from tproxy_pod.config import Config
from tproxy_pod.intercept import Interception
from tproxy_pod.log import Log
from tproxy_pod.pod import Pod
from tproxy_pod.session import Sessions


class Listening(NamedTuple):
    """The sockets that listen: where what leaves arrives, what comes, and who asks."""

    outward: Sequence[socket]
    inward: Sequence[socket]
    ready: Sequence[socket]

    def close(self) -> None:
        """Close all of them."""
        for sock in (*self.outward, *self.inward, *self.ready):
            sock.close()


async def serve(
    listening: Listening,
    pod: Pod,
    config: Config,
    share: Share,
    log: Log,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
    status: StatusSocket | None = None,
) -> None:
    """Serve what is led to the sockets, until an order to end.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    relay = TLSRelay(loop, log.bug, config.idle_seconds, config.half_closed_seconds)
    pipes = PipePool(share.pipes)
    plain = Relay(loop, pipes, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)

    def make_sessions(nursery: trio.Nursery) -> Sessions:
        return Sessions(config, pod, loop, relay, plain, log, limit, nursery)

    await serve_until_drained(
        [
            *((sock, Sessions.accept_outward) for sock in listening.outward),
            *((sock, Sessions.accept_inward) for sock in listening.inward),
            *((sock, Sessions.accept_question) for sock in listening.ready),
        ],
        make_sessions,
        loop,
        limit,
        log,
        orders,
        notifier,
        config.drain_seconds,
        status=status,
    )
    pipes.close()


class Watch(redirected.Watch):
    """What is looked at once a second: that nft and its tables are there, and what to take.

    Args:
        pod: what the directory says.
        nft: holds the tables.
        route: by which what leaves comes to us.
        interception: of what is taken now.
        log: where changes go.
    """

    def __init__(
        self, pod: Pod, nft: Nft, route: LocalRoute, interception: Interception, log: Log
    ) -> None:
        super().__init__(nft, log.problem)
        self._log = log
        self._route = route
        self._pod = pod
        self._interception = interception

    def look(self) -> None:
        """Look.

        Raises:
            FatalError: what holds the tables, or the route, has ended.
        """
        super().look()
        if self._route.has_ended():
            raise FatalError("unable to redirect connections: the shell has ended that runs ip")

    def take_nothing(self) -> None:
        """Nothing: while we drain, nobody listens, and new connections are refused."""

    def look_after(self) -> None:
        """Take what is to be taken now."""
        self._interception.look_after()
        overview = self._pod.overview()
        if overview != self._interception.overview:
            self._interception.take(overview)
            self._log.taken(overview)
