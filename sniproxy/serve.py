"""Everything put together: listener, sessions, relay, drain."""

from _socket import socket
from syslog import LOG_INFO, LOG_WARNING

import trio

from sniproxy.config import Config
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Listener
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay
from sniproxy.hosts import HostsDirectory, HostsState
from sniproxy.log import Log
from sniproxy.service.descriptors import Share
from sniproxy.service.drain import drain
from sniproxy.service.eventlog import show_address
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.workers import Worker
from sniproxy.session import Sessions

# Seconds between two looks at the hosts directory: an administrator who has moved it is to hear of
# that within ten.
_WATCH_EVERY = 5.0


async def serve(
    listening: socket,
    hosts: HostsDirectory,
    config: Config,
    share: Share,
    log: Log,
    orders: Signals | Worker,
    notifier: Notifier | Worker,
) -> None:
    """Serve what `listening` accepts, from `hosts`, until an order to end.

    There are no more connections and pipes at a time than `share` says.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    pipes = PipePool(share.pipes)
    relay = Relay(loop, pipes, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)
    # Two lifetimes. What serves must outlive those who are served.
    async with trio.open_nursery() as service:
        await service.start(orders.receive)
        service.start_soon(loop.run)
        async with trio.open_nursery() as conversations:
            sessions = Sessions(config, loop, relay, hosts, log, limit, conversations)
            listener = Listener(
                loop,
                listening,
                limit,
                on_accept=sessions.begin,
                on_full=sessions.make_room,
                on_exhausted=log.exhausted,
            )
            service.start_soon(listener.run)
            service.start_soon(sessions.run)
            service.start_soon(relay.run)
            service.start_soon(notifier.run, sessions.counts)
            service.start_soon(log.run)
            notifier.ready()
            if log.worker in (None, 1):  # one line for all workers
                service.start_soon(watch_hosts, hosts, log)
            orders.on_status = lambda: log.status(sessions.counts())
            address = show_address(listening.getsockname())
            log.event("listening", address=address, capacity=limit.capacity, hosts=hosts.path)

            await orders.drain.wait()
            listener.close()
            notifier.stopping()
            log.event("draining", open=limit.open)
            await drain(limit.wait_until_empty, orders.end, config.drain_seconds)
            cut = sessions.cut()
        service.cancel_scope.cancel()
    log.event("drained", served=sessions.served, refused=sessions.refused, cut=cut)
    loop.shut()
    pipes.close()


async def watch_hosts(hosts: HostsDirectory, log: Log) -> None:
    """Say, until cancelled, when the hosts directory is no longer where it was, or is again.

    Connections find their hosts in the directory that is open, wherever it is. While its path can't
    be looked at there is nothing to say.
    """
    known = HostsState.IN_PLACE
    while True:
        await trio.sleep(_WATCH_EVERY)
        state = hosts.state()
        if state is not None and state is not known:
            known = state
            priority = LOG_INFO if state is HostsState.IN_PLACE else LOG_WARNING
            log.event("hosts_directory", priority, path=hosts.path, state=state)
