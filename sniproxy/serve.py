"""Everything put together: the hosts directory, sessions, relay."""

from _socket import socket
from functools import partial
from syslog import LOG_INFO, LOG_WARNING

import trio

from sniproxy.config import Config
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.relay import Relay
from sniproxy.hand_over import HandOver
from sniproxy.hosts import HostsDirectory, HostsState
from sniproxy.log import Log
from sniproxy.service.descriptors import Share
from sniproxy.service.notify import Notifier
from sniproxy.service.signals import Signals
from sniproxy.service.status import StatusSocket
from sniproxy.service.workers import Worker
from sniproxy.serving import serve_until_drained
from sniproxy.session import Sessions
from sniproxy.upgrade.process import Upgrade

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
    status: StatusSocket | None = None,
    hand_over: HandOver | None = None,
    upgrade: Upgrade | None = None,
) -> None:
    """Serve what `listening` accepts, from `hosts`, until an order to end.

    There are no more connections and pipes at a time than `share` says. With `status`, what happens
    is counted for each host, and told there. With `hand_over` backends may have clients themselves.
    With `upgrade` another copy may take over.

    Returns when the last connection has ended, by itself or at the end of the drain.
    """
    loop = EventLoop(on_fault=log.bug)
    if hand_over is not None:
        loop.close_each = hand_over.close_each
    pipes = PipePool(share.pipes)
    relay = Relay(loop, pipes, log.bug, config.idle_seconds, config.half_closed_seconds)
    limit = ConnectionLimit(share.connections)

    def make_sessions(nursery: trio.Nursery) -> Sessions:
        return Sessions(config, loop, relay, hosts, log, limit, hand_over)

    # One line for all workers.
    tasks = [partial(watch_hosts, hosts, log)] if log.worker in (None, 1) else []
    await serve_until_drained(
        [(listening, Sessions.begin)],
        make_sessions,
        loop,
        limit,
        log,
        orders,
        notifier,
        config.drain_seconds,
        tasks=tasks,
        hosts=hosts.path,
        status=status,
        upgrade=upgrade,
        has_timeouts=hand_over is None,
    )
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
