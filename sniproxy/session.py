"""One connection's story: look at the hello, find the host, join the two; or refuse.

The story is told by methods that never wait, since the bytes of most hellos are there when we look.
Those of the others wake us through the loop, up to the deadline. Two things take a trio task,
because they take time and are rare: a backend whose backlog is full, and a refusal, which has to
reach the client.

Clients come in batches. First the hello of each is read, and then, in the session's next turn, each
is connected: one connect(2) right after the other. A backend that sleeps has to be woken, which
takes the kernel longer than all the rest of connecting; one that is still busy with the connection
before has not.
"""

import contextlib
from _socket import (
    MSG_DONTWAIT,
    MSG_PEEK,
    SHUT_WR,
    SO_LINGER,
    SO_RCVLOWAT,
    SOL_SOCKET,
    socket,
)
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import lru_cache, partial
from select import EPOLLERR, EPOLLHUP, EPOLLRDHUP

import trio

from sniproxy.config import Config
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.relay import LINGER_0, READ_EVENTS, Ending, Relay
from sniproxy.hosts import HostError, HostReason, HostsDirectory
from sniproxy.log import Log
from sniproxy.service.eventlog import show_address
from sniproxy.service.notify import Counts
from sniproxy.wire import (
    MAX_WIRE,
    Alert,
    ClientHello,
    HelloError,
    HelloReader,
    Reason,
    alert_record,
    proxy_v1_header,
    read_at_once,
)
from sniproxy_hostname import Hostname, InvalidHostname

# What SO_RCVLOWAT is on a new socket.
_ANY_BYTES = 1

# Nearly every hello has fewer bytes than these: post-quantum key shares make it 1.8 KB. A longer
# one is looked at a second time, with room for the longest.
_USUAL_WIRE = 4096

# Leave what is there in the socket, and never wait for more.
_LOOK = MSG_PEEK | MSG_DONTWAIT

# What was a name once is one for ever, and the same few are asked for all day; a refusal is not
# kept. Names of 253 bytes would take 0.8 MB.
_hostname = lru_cache(maxsize=1024)(Hostname)


class SessionReason(StrEnum):
    """Why a client was turned away, where neither the hello nor the host is to blame."""

    CLIENT_CLOSED = "client_closed"
    DEADLINE = "deadline"
    CAPACITY = "capacity"  # others wait for its place, and it has not said what it wants


# How a connection ended: words for the log. The client is the near end.
_ENDINGS = {
    Ending.FINISHED: "finished",
    Ending.NEAR_RESET: "client_reset",
    Ending.FAR_RESET: "backend_reset",
    Ending.CUT: "cut",
}


# The answer to every failure of the lookup. Failures of the hello carry their own answer.
ALERTS: dict[HostReason, Alert] = {
    # RFC 6066 §3: a server that "does not recognize the server name" may "abort the handshake by
    # sending a fatal-level unrecognized_name(112) alert". There is no such host, or what is in its
    # place is not fit to be one.
    HostReason.NO_SUCH_HOST: Alert.UNRECOGNIZED_NAME,
    HostReason.NO_SOCKET: Alert.UNRECOGNIZED_NAME,
    HostReason.NOT_LISTENING: Alert.UNRECOGNIZED_NAME,
    HostReason.NOT_A_STREAM_SOCKET: Alert.UNRECOGNIZED_NAME,
    HostReason.PERMISSION_DENIED: Alert.UNRECOGNIZED_NAME,
    HostReason.LINK_LOOP: Alert.UNRECOGNIZED_NAME,
    HostReason.NAME_TOO_LONG: Alert.UNRECOGNIZED_NAME,
    HostReason.WRONG_OWNER: Alert.UNRECOGNIZED_NAME,
    HostReason.WRITABLE_BY_OTHERS: Alert.UNRECOGNIZED_NAME,
    # It is a host of ours, and out of order.
    HostReason.BACKEND_BUSY: Alert.INTERNAL_ERROR,
    HostReason.BACKEND_FAILED: Alert.INTERNAL_ERROR,
}


class Sessions:
    """Everything that sessions share, and how many there are.

    Args:
        nursery: where the few sessions that take time have their tasks.
    """

    def __init__(
        self,
        config: Config,
        loop: EventLoop,
        relay: Relay,
        hosts: HostsDirectory,
        log: Log,
        limit: ConnectionLimit,
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.loop = loop
        self.relay = relay
        self.hosts = hosts
        self.log = log
        self.limit = limit
        self.nursery = nursery
        # For what is read only to be thrown away.
        self.buffer = bytearray(MAX_WIRE)
        # Those who wait for the rest of their hello, the oldest first: a dict keeps the order.
        self.waiting: dict[Session, None] = {}
        self.served = self.refused = 0
        self.is_cut = False  # whoever is still to be connected comes too late
        self.refusing = 0  # of the open ones, those who have only to hear an alert

    def begin(self, client: socket, address: Address) -> None:
        """Begin the story of an accepted client."""
        self.limit.add()
        session = Session(self, client, address)
        try:
            session.look()
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            self.log.bug(error)
            session.abort()

    def make_room(self) -> bool:
        """Turn away the client that has kept us waiting for its hello the longest, if any does.

        So those who connect and say nothing can't lock out those who do.
        """
        while (oldest := next(iter(self.waiting), None)) is not None:
            # Its hello may have come by now, and be one of the next events.
            oldest.look()
            if oldest in self.waiting:
                oldest.give_way()
            if self.limit.open < self.limit.capacity:
                return True
        return False

    def left(self, up: int, down: int, ending: Ending) -> None:
        """Count out one that was relayed."""
        self.limit.remove()

    def cut(self) -> int:
        """End whoever is left; return how many were served, or waiting for it."""
        self.is_cut = True
        left = self.limit.open - self.refusing
        self.nursery.cancel_scope.cancel()
        for session in list(self.waiting):
            session.abort()
        self.relay.abort_all()
        return left

    def counts(self) -> Counts:
        """Return how many there are, and were."""
        return Counts(self.limit.open, self.served, self.refused)

    async def expire(self) -> None:
        """Turn away, until cancelled, whoever has not sent a hello by the deadline."""
        while True:
            now = trio.current_time()
            # If nobody waits: no deadline of those who come while we sleep is nearer than this.
            next_deadline = now + self.config.hello_seconds
            while (oldest := next(iter(self.waiting), None)) is not None:
                if oldest.deadline > now:
                    next_deadline = oldest.deadline
                    break
                try:
                    oldest.expire()
                except Exception as error:  # noqa: BLE001 - as in `begin`
                    self.log.bug(error)
                    oldest.abort()
            await trio.sleep_until(next_deadline)


class Session:
    """One client, from accept until it is joined to its backend, or refused."""

    __slots__ = (
        "address",
        "began",
        "client",
        "deadline",
        "events",
        "hello",
        "host",
        "mark",
        "name",
        "over",
        "refused",
        "shared",
        "size",
        "watched",
    )

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        self.shared = shared
        self.client = client
        self.address = address
        self.began = trio.current_time() if shared.config.log_connections else 0.0
        self.deadline = 0.0  # known as soon as the session has to wait for anything
        self.size = 0  # bytes of the stream that have been looked at
        self.hello: HelloReader | None = None  # of a hello that did not come all at once
        self.name: bytes | None = None
        self.host: Hostname | None = None
        self.mark = _ANY_BYTES
        self.watched = False
        self.events = 0  # what the loop has told of the client so far
        self.refused = False
        self.over = False

    def on_event(self, events: int) -> None:
        """Look again, for more of the hello is there, or its end; or, in a turn, connect."""
        if not events:
            assert self.host is not None
            if self.shared.is_cut:
                self.abort()
            elif not (self.over or self._connect(self.host)):
                self._take_time(partial(self._connect_later, self.host))
            return
        self.events |= events
        if self in self.shared.waiting:
            self.look()

    def look(self) -> None:
        """Look at what the client has sent so far."""
        try:
            hello = self._peek()
            if hello is None:
                return
            if self.watched:
                self._stop_waiting()
            self.name = hello.required_server_name()
            self.host = _hostname(self.name)
        except HelloError as error:
            self._refuse(error.reason, error.alert, str(error))
        except InvalidHostname as error:
            # Not a name at all, so nobody here has it.
            self._refuse(Reason.INVALID_NAME, Alert.UNRECOGNIZED_NAME, str(error))
        else:
            self.shared.loop.call_soon(self)

    def _peek(self) -> ClientHello | None:
        """Read what is new without taking it from the socket; return the hello if it is whole.

        If it is not, the session waits for more, or is over.
        """
        try:
            data = self.client.recv(_USUAL_WIRE, _LOOK)
            if len(data) == _USUAL_WIRE:
                data = self.client.recv(MAX_WIRE, _LOOK)
        except BlockingIOError:
            pass
        except OSError:
            # ECONNRESET
            self.events |= EPOLLERR
        else:
            if not data:
                self._leave()
                return None
            if len(data) > self.size:
                new = data[self.size :] if self.size else data
                self.size = len(data)
                if self.hello is None:
                    if (hello := read_at_once(new)) is not None:
                        return hello
                    self.hello = HelloReader()
                if (hello := self.hello.feed(new)) is not None:
                    return hello
        if self.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._leave()
        elif self.events and self.size < self.mark and self._is_too_small():
            raise HelloError(
                Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE, "the receive buffer is full"
            )
        else:
            self._wait()
        return None

    def _is_too_small(self) -> bool:
        """Tell whether the receive buffer is one that the rest of the hello will not fit into.

        A full buffer makes a socket readable below its mark, but so does a shortage of memory
        anywhere in the machine, which passes. Setting the mark makes the buffer grow; where it may
        not, since somebody has fixed its size on the listener, the kernel lowers the mark to half
        of it (tcp_set_rcvlowat in net/ipv4/tcp.c). Then there is no use in waiting.
        """
        return self.client.getsockopt(SOL_SOCKET, SO_RCVLOWAT) < self.mark

    def _wait(self) -> None:
        """Have the loop tell when the next verdict is possible, or the client has gone."""
        shared = self.shared
        if not self.watched:
            self._set_deadline()
            shared.waiting[self] = None
            shared.loop.watch(self.client.fileno(), self, READ_EVENTS)
            self.watched = True
        self._set_mark(self.size + (self.hello.missing if self.hello else 1))

    def _stop_waiting(self) -> None:
        self.shared.waiting.pop(self, None)
        self._set_mark(_ANY_BYTES)

    def _set_mark(self, mark: int) -> None:
        if mark != self.mark:
            self.client.setsockopt(SOL_SOCKET, SO_RCVLOWAT, mark)
            self.mark = mark

    def _set_deadline(self) -> None:
        if not self.deadline:
            self.deadline = trio.current_time() + self.shared.config.hello_seconds

    def _connect(self, host: Hostname) -> bool:
        """Join the client to the backend of `host`, or refuse it; False if that must wait."""
        shared = self.shared
        try:
            backend, send_proxy_v1 = shared.hosts.connect(host)
        except HostError as error:
            if error.reason is HostReason.BACKEND_BUSY:
                return False
            self._refuse(error.reason, ALERTS[error.reason], str(error))
            return True
        header = self._proxy_header() if send_proxy_v1 else b""
        events = self.events if self.watched else None
        on_end = self._log_end if shared.config.log_connections else shared.left
        self.over = True
        shared.served += 1
        shared.relay.join(self.client, backend, on_end, events, header)
        return True

    def _log_end(self, up: int, down: int, ending: Ending) -> None:
        """Write the line of a connection that has ended, and count it out."""
        shared = self.shared
        shared.log.event(
            "connection",
            client=show_address(self.address),
            name=self.name,
            up=up,
            down=down,
            seconds=f"{trio.current_time() - self.began:.3f}",
            ending=_ENDINGS[ending],
        )
        shared.left(up, down, ending)

    def _proxy_header(self) -> bytes:
        try:
            destination = self.client.getsockname()[:2]
        except OSError:
            destination = None
        return proxy_v1_header(self.address[:2], destination)

    async def _connect_later(self, host: Hostname) -> None:
        """Try again until the backend's backlog has room, or the deadline has passed."""
        self._set_deadline()
        config = self.shared.config
        pause = config.first_retry
        while trio.current_time() + pause < self.deadline:
            await trio.sleep(pause)
            if self._connect(host):
                return
            pause = min(2 * pause, config.last_retry)
        busy = HostReason.BACKEND_BUSY
        self._refuse(busy, ALERTS[busy], "its backlog was full until the deadline")

    def _refuse(self, reason: str, alert: Alert, detail: str) -> None:
        """Send `alert` and see to it that it arrives."""
        self._stop_waiting()
        self._report(reason, alert, detail)
        if self.watched:
            self.shared.loop.unwatch(self.client.fileno())
        self.shared.refusing += 1
        self.refused = True
        self._take_time(partial(self._deliver, alert))

    async def _deliver(self, alert: Alert) -> None:
        config = self.shared.config
        left = self.size + config.alert_bytes
        with trio.move_on_after(config.alert_seconds), contextlib.suppress(OSError):
            # RFC 8446 §6.2: "Upon transmission or receipt of a fatal alert message, both parties
            # MUST immediately close the connection." Our half, that is; the client's is read to its
            # end, as closing a socket with unread bytes would reset it and take the alert along.
            self.client.send(alert_record(alert), MSG_DONTWAIT)
            self.client.shutdown(SHUT_WR)
            while left > 0:
                try:
                    size = self.client.recv_into(self.shared.buffer, 0, MSG_DONTWAIT)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self.client.fileno())
                else:
                    if not size:
                        break
                    left -= size
        self.close()

    def expire(self) -> None:
        """End the session: its deadline has passed."""
        self._give_up(SessionReason.DEADLINE)

    def give_way(self) -> None:
        """End the session: there is no room for those who say nothing."""
        self._give_up(SessionReason.CAPACITY)

    def _leave(self) -> None:
        """End the session: the client has gone."""
        if self.size:
            self._give_up(SessionReason.CLIENT_CLOSED)
        else:
            # Not a word, as of a monitor that asks whether we are there: nothing to report.
            self.close()

    def _give_up(self, reason: str) -> None:
        """Close without an alert."""
        self._report(reason, None)
        with contextlib.suppress(OSError):
            # What is there is thrown away, so that the client sees an end and no reset.
            self.client.recv_into(self.shared.buffer, 0, MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """End the session, if it has not ended; the client's bytes and ours are let through."""
        if not self.over:
            self.over = True
            self.shared.waiting.pop(self, None)
            self.shared.refusing -= self.refused
            self.shared.loop.close(self.client)
            self.shared.limit.remove()

    def abort(self) -> None:
        """End the session, if it has not ended, with a reset."""
        if not self.over:
            self.client.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            self.close()

    def _report(self, reason: str, alert: Alert | None, detail: str | None = None) -> None:
        self.shared.refused += 1
        self.shared.log.refusal(
            reason,
            client=show_address(self.address),
            name=self.name,
            alert=alert,
            detail=detail,
        )

    def _take_time(self, story: Callable[[], Awaitable[None]]) -> None:
        """Go on in a task of its own."""
        self.shared.nursery.start_soon(self._guard, story)

    async def _guard(self, story: Callable[[], Awaitable[None]]) -> None:
        try:
            await story()
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            self.shared.log.bug(error)
            self.abort()
        except trio.Cancelled:
            self.abort()
            raise
