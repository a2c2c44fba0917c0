"""Everything put together: names, sessions, relay; and what is looked at meanwhile."""

from _socket import socket
from collections.abc import Callable, Iterable, Sequence

import trio

from mutual_tls import redirected
from mutual_tls.netfilter.table import Nft
from mutual_tls.relay import TLSRelay
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.service.descriptors import Share
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.status import StatusSocket
from sniproxy.service.workers import Worker
from sniproxy.serving import serve_until_drained
from tls_tproxy.config import Config
from tls_tproxy.log import Log
from tls_tproxy.names import Names
from tls_tproxy.redirect import Redirection
from tls_tproxy.session import Sessions
from tls_tproxy.wrap import Wrap


async def serve(
    listening: Sequence[socket],
    wrap: Wrap,
    names: Sequence[Names],
    stop_redirecting: Callable[[], None],
    config: Config,
    share: Share,
    log: Log,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
    status: StatusSocket | None = None,
) -> None:
    """Serve what is redirected to the sockets, until an order to end.

    There is one of `names` for each process. Among several, the first one stops redirecting.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    relay = TLSRelay(loop, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)
    # Each process has a packet socket of its own: what one has read is gone for the others.
    own = names[(log.worker or 1) - 1]
    for other in names:
        if other is not own:
            other.close()
    own.start(loop)

    def make_sessions(nursery: trio.Nursery) -> Sessions:
        return Sessions(config, wrap, own, loop, relay, log, limit, nursery)

    await serve_until_drained(
        [(sock, Sessions.accept) for sock in listening],
        make_sessions,
        loop,
        limit,
        log,
        orders,
        notifier,
        config.drain_seconds,
        status=status,
        on_drain=stop_redirecting if log.worker is None else lambda: None,
    )
    own.close()


class Watch(redirected.Watch):
    """What is looked at once a second: that nft and its tables are there, and the ports to take.

    Args:
        wrap: what the directory says.
        nft: holds the redirection.
        redirection: of the ports that it has now.
        log: where changes go.
    """

    def __init__(self, wrap: Wrap, nft: Nft, redirection: Redirection, log: Log) -> None:
        super().__init__(nft, log.problem)
        self._wrap = wrap
        self._redirection = redirection
        self._log = log
        self._ports = redirection.ports

    def take_nothing(self) -> None:
        """Redirect no new connection."""
        self._redirection.stop()

    def look_after(self) -> None:
        """Redirect the ports that are to be taken now."""
        self._redirection.look_after()
        ports = self._wrap.ports()
        if ports == self._ports:
            return
        own = self._redirection.listening_port
        # The others are to be redirected all the same: they would leave in plaintext.
        self._redirection.replace_ports(ports - {own})
        self._ports = ports
        if own in ports:
            self._log.problem(f"port {own} is the one that listens here")
        self._log.ports(show_ports(ports - {own}))


def show_ports(ports: Iterable[int]) -> str:
    """Return ports as people write them."""
    return ",".join(map(str, sorted(ports))) or "none"
