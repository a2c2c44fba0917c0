"""One connection's story: look at the hello, find the host, join the two; or refuse.

The story is told by methods that never wait: the bytes of most hellos are there when we look.
`HelloWait` waits for the rest of the others, `WaitingRoom` for a backend that is away or has no
room, `FirstFlight` for the first answer of one that may go, and `Linger` keeps a refused client
until the alert has arrived.

Clients come in batches. First the hello of each is read, and then, in the session's next turn, each
is connected: one connect(2) right after the other. A backend that sleeps has to be woken, which
takes the kernel longer than all the rest of connecting; one that is still busy with the connection
before need not be woken.
"""

import contextlib
import errno
import time
from _socket import SO_LINGER, socket
from collections.abc import Iterator
from enum import StrEnum
from functools import lru_cache
from typing import Final

import trio

from sniproxy.config import Config
from sniproxy.engine import tcp
from sniproxy.engine.deadlines import Deadlines
from sniproxy.engine.ending import Ending
from sniproxy.engine.kernel import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLPRI,
    EPOLLRDHUP,
    MSG_DONTWAIT,
    SHUT_WR,
    SOL_SOCKET,
)
from sniproxy.engine.limit import ConnectionLimit
from sniproxy.engine.linger import Linger
from sniproxy.engine.listener import Address
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.relay import READ_EVENTS, OnEnd, Relay
from sniproxy.engine.tcp import LINGER_0
from sniproxy.explain import explain
from sniproxy.first_flight import FirstFlight
from sniproxy.hand_over import HandOver
from sniproxy.hello_wait import HelloWait, peek, take
from sniproxy.hosts import HAND_OVER, Found, HostError, HostReason, HostsDirectory
from sniproxy.log import Log
from sniproxy.service.eventlog import Seconds, show_address
from sniproxy.service.figures import TIMED, Figures, HostFigures
from sniproxy.service.notify import Counts
from sniproxy.waiting_room import WaitingRoom
from sniproxy.wire import (
    MAX_WIRE,
    Alert,
    ClientHello,
    HelloError,
    HelloReader,
    Reason,
    alert_record,
    alpn_tlv,
    authority_tlv,
    proxy_v1_header,
    proxy_v2_header,
    read_at_once,
)
from sniproxy_hostname import Hostname, InvalidHostname

# What was a name once is one for ever, and the same are asked for all day; a refusal is not kept.
# Enough for all names of a large machine: usual ones take 5 MB, and if they have 253 bytes, 12 MB.
_hostname: Final = lru_cache(maxsize=16384)(Hostname)


class SessionReason(StrEnum):
    """Why a client was turned away, where neither the hello nor the host is to blame."""

    CLIENT_CLOSED = "client_closed"
    DEADLINE = "deadline"
    CAPACITY = "capacity"  # others wait for its place, and it has not said what it wants
    URGENT_DATA = "urgent_data"  # TLS has none: the hello would not be what it seems to be


class SessionWarning(StrEnum):
    """What may be wrong although a client was served."""

    PROXY_HEADER_UNANSWERED = "proxy_header_unanswered"


# How a connection ended: words for the log. The client is the near end.
_ENDINGS: Final = {
    Ending.FINISHED: "finished",
    Ending.NEAR_RESET: "client_reset",
    Ending.FAR_RESET: "backend_reset",
    Ending.IDLE: "idle",
    Ending.HALF_CLOSED: "half_closed",
    Ending.CUT: "cut",
}


# Of these, those where the backend has closed, or may have.
_BACKEND_CLOSED: Final = frozenset({Ending.FINISHED, Ending.FAR_RESET})

# And the word for one that went on without us.
_HANDED_OVER: Final = "handed_over"


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
    # It is a host of ours, and out of order; or all are.
    HostReason.HOSTS_NOT_SEARCHABLE: Alert.INTERNAL_ERROR,
    HostReason.BACKEND_BUSY: Alert.INTERNAL_ERROR,
    HostReason.BACKEND_FAILED: Alert.INTERNAL_ERROR,
}


# What is timed for the status socket: the way to a socket, and connect(2).
LATENCIES: Final = ("lookup", "connect")

# Backends that one client's hello is lent to. The first may have been stopped with the client in
# its queue, and so may its successor be, by somebody who is in a hurry; a third that ends without a
# word means it.
_MOST_LOANS: Final = 2

# What the loop tells of a client who is not there any more, or is not to be.
_GONE: Final = EPOLLPRI | EPOLLHUP | EPOLLERR

_UNANSWERED_DETAIL: Final = (
    "the backend has closed without a byte; it may not expect the PROXY header that it gets"
)


class Sessions:
    """Everything that sessions share, and how many there are."""

    def __init__(
        self,
        config: Config,
        loop: EventLoop,
        relay: Relay,
        hosts: HostsDirectory,
        log: Log,
        limit: ConnectionLimit,
        hand_over: HandOver | None = None,
    ) -> None:
        self.config = config
        self.loop = loop
        self.relay = relay
        self.hosts = hosts
        self.log = log
        self.limit = limit
        self.hand_over = hand_over
        self.figures: Figures | None = None
        self.logs_connections = config.log_connections  # at hand where this is compiled
        # Clients whose hello has not come whole, and those who are hearing an alert.
        self.waiting: Deadlines[HelloWait] = Deadlines(config.hello_seconds, log.bug)
        self.alerted: Deadlines[Linger] = Deadlines(config.alert_seconds, log.bug)
        # Clients for whom there is no backend yet, and those whose backend has said nothing yet.
        self.room = WaitingRoom(config.first_retry, config.last_retry, log.bug)
        self.lent: Deadlines[Held] = Deadlines(config.hello_seconds, log.bug)
        relay.last_words.is_place_wanted = limit.is_place_wanted
        self.served = self.refused = 0
        self.is_cut = False  # whoever is still to be connected comes too late

    def begin(self, client: socket, address: Address) -> None:
        """Begin the story of an accepted client."""
        self.limit.add()
        self.begin_session(Session(self, client, address))

    def begin_session(self, session: "Session") -> None:
        """Begin the story of a client who has been counted."""
        try:
            session.begin()
        except Exception as error:  # noqa: BLE001 - a bug met by one connection ends it alone
            self.log.bug(error)
            session.abort()

    def make_room(self) -> bool:
        """Let a client go for the sake of the next, if there is one who is not served.

        So those who connect and say nothing, and those who are refused and stay, can't lock out
        others. First the refused one who has had the most time to hear the alert goes; then one who
        has received all that its backend had to say before that closed; then the one who has waited
        the longest: who has kept us waiting for the hello, or for whom there is no backend.
        """
        if (refused := self.alerted.oldest()) is not None:
            refused.expire()
            return True
        if self.relay.last_words.make_room():
            return True
        while (silent := self.waiting.oldest()) is not None:
            held = self.room.oldest()
            if held is not None and held.since <= self.waiting.since(silent):
                break
            # Its hello may have come by now, and be one of the next events.
            silent.look()
            if silent in self.waiting:
                silent.give_way()
            if self.limit.open < self.limit.capacity:
                return True
        if (held := self.room.oldest()) is not None:
            held.give_way()
            return True
        return False

    def left(self, up: int, down: int, ending: Ending) -> None:
        """Count out one that was relayed."""
        self.limit.remove()

    def heard(self, linger: Linger) -> None:
        """Count out one that was refused."""
        self.alerted.discard(linger)
        self.limit.remove()

    def cut(self) -> int:
        """End whoever is left; return how many were served, or waiting for it."""
        self.is_cut = True
        left = self.limit.open - len(self.alerted)
        for guest in self.room.guests():
            guest.abort()
        for session in self.waiting.items() + self.alerted.items() + self.lent.items():
            session.abort()
        self.relay.abort_all()
        return left

    def counts(self) -> Counts:
        """Return how many there are, and were."""
        return Counts(self.limit.open, self.served, self.refused)

    def count_in(self, figures: Figures) -> None:
        """Count there, from now on, what happens to the connections of each host."""
        figures.on_left = self.limit.remove
        if self.hand_over is not None:
            figures.handed_over = 0
        self.figures = figures

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        """Yield the figures of each open connection's host, and its bytes there and back so far."""
        for on_end, up, down in self.relay.moved():
            known = getattr(on_end, "__self__", None)
            if isinstance(known, Session):
                known = known.figures
            if isinstance(known, HostFigures):
                yield known, up, down

    async def run(self) -> None:
        """Look after all who wait for something, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.room.run)
            nursery.start_soon(self.lent.run)
            nursery.start_soon(self.waiting.run)
            nursery.start_soon(self.alerted.run)
            nursery.start_soon(self.relay.run)


class Session:
    """One client, from accept until it is joined to its backend, or refused."""

    __slots__ = (
        "address",
        "began",
        "client",
        "deadline",
        "entry",
        "figures",
        "head",
        "held",
        "host",
        "is_over",
        "name",
        "nameless",
        "protocols",
        "shared",
        "size",
        "wait",
    )

    def __init__(self, shared: Sessions, client: socket, address: Address) -> None:
        self.shared = shared
        self.client = client
        self.address = address
        self.began = trio.current_time() if shared.logs_connections else 0.0
        self.deadline = 0.0  # known as soon as the session has to wait for the hello
        self.head = b""  # of what the client has said, and is not in its socket any more
        self.size = 0  # bytes that there were at the first look
        self.wait: HelloWait | None = None  # for the rest of a hello that did not come all at once
        self.name: bytes | None = None
        self.host: Hostname | None = None
        self.entry = ""  # of the hosts directory, if the backend gets a PROXY header
        self.held: Held | None = None  # if there is no backend yet, or it may go
        self.nameless: HelloError | None = None  # the client has asked for no host
        self.protocols = b""  # what it offers by ALPN
        self.figures: HostFigures | None = None  # of the host, when it is served and counted
        self.is_over = False

    def age(self) -> float | None:
        """Return for how many seconds it has been connected; None if nobody is to be told."""
        return trio.current_time() - self.began if self.began else None

    def begin(self) -> None:
        """Look at what the client has sent; wait for the rest if that is no whole hello."""
        try:
            data = self._look()
        except OSError:  # ECONNRESET
            self.size = len(self.head)
            return self.on_client_gone()
        reader = None
        if data:
            self.size = len(data)
            try:
                if (hello := read_at_once(data)) is None:
                    reader = HelloReader()
                    hello = reader.feed(data)
            except HelloError as error:
                return self.on_hello_error(error)
            if hello is not None:
                return self.on_hello(hello)
        elif data is not None:
            return self.close()  # not a word, as of a monitor that asks whether we are there
        shared, taken = self.shared, len(self.head)
        self.wait = HelloWait(self, self.client, shared.loop, reader or HelloReader(), taken)
        self.deadline = shared.waiting.add(self.wait)

    def _look(self) -> bytes | None:
        """Return what the client has said so far, as `peek` does.

        Raises:
            OSError: ECONNRESET: the client has broken off.
        """
        if self.head:
            # Another copy has begun, and has found no whole hello. To take more would be to step
            # over urgent data.
            return self.head + (peek(self.client) or b"")
        if self.shared.hand_over is not None:
            # The backend that gets the socket is to find the hello in it.
            return peek(self.client)
        # Else it is taken at once, which is a call less than to look and to take it later.
        data = take(self.client)
        if data:
            self.head = data
        return data

    def on_hello(self, hello: ClientHello) -> None:
        """Find out whom the client wants; connect in the next turn."""
        if self.wait is not None:
            self.shared.waiting.discard(self.wait)
        self.protocols = hello.protocol_name_list
        try:
            self.name = hello.required_server_name()
            self.host = _hostname(self.name)
        except HelloError as error:
            self.nameless = error
        except InvalidHostname as invalid:
            # Not a name at all, so nobody here has it.
            return self._refuse(Reason.INVALID_NAME, Alert.UNRECOGNIZED_NAME, str(invalid))
        self.shared.loop.call_soon(self)

    def on_event(self, events: int) -> None:
        """Connect: those of this batch come one after the other."""
        if self.shared.is_cut:
            self.abort()
        elif not self.is_over and (entry := self.connect()) is not None:
            self.shared.room.add(self.hold(), entry)

    def connect(self) -> str | None:
        """Join the client to its backend, or refuse it; return what to wait for, if that is it."""
        shared = self.shared
        figures = shared.figures
        is_timed = figures is not None and shared.served % TIMED == 0
        began = time.perf_counter() if is_timed else 0.0
        try:
            found = shared.hosts.connect(self.host)
            if found[1] == HAND_OVER:
                relayed = self._hand_over(found)
                if relayed is None:
                    return None
                found = relayed
        except HostError as error:
            return self._fail(error)
        backend, proxy, holds, owner, entry = found
        if figures is not None and is_timed:
            connecting_at = shared.hosts.connecting_at
            figures.latencies["lookup"].add(connecting_at - began)
            figures.latencies["connect"].add(time.perf_counter() - connecting_at)
        header = self._proxy_header(proxy) if proxy else b""
        if holds:
            return self.hold().lend(backend, header, owner, entry)
        first, moved = header + self.head, len(self.head)
        self.join(backend, first, owner, entry, is_proxied=bool(header), moved=moved)
        return None

    def _hand_over(self, found: Found) -> Found | None:
        """Give the backend the client itself; return whom it is relayed to if that can't be done.

        Raises:
            HostError: it can't be relayed either.
        """
        backend, _, _, owner, entry = found
        client, shared = self.client, self.shared
        assert shared.hand_over is not None
        if self.head:
            # A copy without --handoff has begun to read it, and handed it on to us.
            error: OSError | None = OSError(errno.EPERM, "its hello has begun elsewhere")
        else:
            error = shared.hand_over.give(client, backend, owner)
        backend.close()
        if error is not None:
            return shared.hosts.connect_relayed(self.host, error)
        # From here on nothing may be asked of the socket that waits for its lock. And where another
        # process has a descriptor, too, closing ours does not take it out of the epoll set: what
        # happens to it would be told to whoever gets the number next.
        if self.wait is not None or self.held is not None:
            shared.loop.unwatch(client.fileno())
        shared.served += 1
        if shared.figures is not None:
            self.figures = shared.figures.hand_over(self._host_name(entry), owner)
        self.is_over = True
        shared.loop.close(shared.hand_over.kept(client, owner))
        self._log_end(0, 0, _HANDED_OVER)
        self._count_out(0, 0, Ending.FINISHED)
        return None

    def join(
        self,
        backend: socket,
        first: bytes,
        owner: int,
        entry: str,
        *,
        is_proxied: bool,
        moved: int = 0,
    ) -> None:
        """Have the relay join the client to a backend.

        Args:
            backend: connected.
            first: what it is to hear before what is in the client's socket.
            owner: the uid of the host's directory.
            entry: the name of that.
            is_proxied: whether it gets a PROXY header.
            moved: bytes of the client that it has had, or that are in `first`.
        """
        shared = self.shared
        figures = shared.figures
        on_end: OnEnd = shared.left
        if figures is not None:
            name = self._host_name(entry)
            # As `served` does, which is called for those that are new.
            counted = figures.hosts.get(name)
            if counted is None or counted.owner != owner:
                counted = figures.served(name, owner)
            else:
                counted.served += 1
            self.figures = counted
            on_end = counted.left
        if is_proxied:
            self.entry = entry
            on_end = self.on_end_after_header
        elif shared.logs_connections:
            on_end = self.on_end
        wait = self.held or self.wait
        if shared.hand_over is not None:
            # The listening socket does not have it then.
            with contextlib.suppress(OSError):  # it has gone, and the relay will find out
                tcp.set_user_timeout(self.client)
        self.is_over = True
        self.head = b""  # the session may be there for as long as the connection
        shared.served += 1
        events = None if wait is None else wait.events
        shared.relay.join(self.client, backend, on_end, events, first, moved)

    def _fail(self, error: HostError) -> str | None:
        """Refuse the client, unless there may be a backend soon; return what to wait for then."""
        reason = error.reason
        is_busy = reason is HostReason.BACKEND_BUSY
        if is_busy or error.hold:
            held = self.hold()
            if is_busy:
                held.is_away = False
            elif not held.is_away:
                held.is_away = True
                self.shared.room.tell_away(held)
            until = held.since + error.hold
            if is_busy:
                deadline = self.deadline or held.since + self.shared.config.hello_seconds
                until = max(until, deadline)
            if trio.current_time() < until:
                return error.entry
            if is_busy:
                error.args = ("its backlog was full until the deadline",)
        nameless = self.nameless
        if nameless is not None and reason is HostReason.NO_SUCH_HOST:
            self._refuse(nameless.reason, nameless.alert, str(nameless))
        else:
            self._refuse(reason, ALERTS[reason], error)
        return None

    def hold(self) -> "Held":
        """Return what holds the client while there is no backend that is sure to stay."""
        if self.held is None:
            self.held = Held(self)
        return self.held

    def _proxy_header(self, version: int) -> bytes:
        try:
            destination = self.client.getsockname()[:2]
        except OSError:
            destination = None
        if version == 1:
            return proxy_v1_header(self.address[:2], destination)
        tlvs = []
        if self.name is not None:
            tlvs.append(authority_tlv(self.name))
        if self.protocols:
            tlvs.append(alpn_tlv(self.protocols))
        return proxy_v2_header(self.address[:2], destination, tlvs, is_checked=True)

    def _host_name(self, entry: str) -> str:
        """Return what the host is called that has that directory, which may be named by a hash."""
        return entry if self.host is None or entry.startswith("_") else self.host

    def _known_as(self, entry: str) -> bytes | None:
        """Return what the log counts a host by: clients make up names for those that serve any."""
        return entry.encode() if entry.startswith("_") else self.name

    def on_end_after_header(self, up: int, down: int, ending: Ending) -> None:
        """Say so if the backend seems to have disliked the header; end as all do."""
        # A server of TLS says something to any hello, if only an alert. One that has closed for the
        # client's sake has said something before.
        if not down and ending in _BACKEND_CLOSED:
            client = show_address(self.address)
            host = self._known_as(self.entry)
            self.shared.log.proxy_header_unanswered(client, self.name, host, _UNANSWERED_DETAIL)
            if self.shared.figures is not None and self.figures is not None:
                word = SessionWarning.PROXY_HEADER_UNANSWERED
                self.shared.figures.note(self.figures, client, word, _UNANSWERED_DETAIL)
        self.on_end(up, down, ending)

    def on_end(self, up: int, down: int, ending: Ending) -> None:
        """Write the line of a connection that has ended, if that is wanted, and count it out."""
        self._log_end(up, down, _ENDINGS[ending])
        self._count_out(up, down, ending)

    def _count_out(self, up: int, down: int, ending: Ending) -> None:
        left = self.shared.left if self.figures is None else self.figures.left
        left(up, down, ending)

    def _log_end(self, up: int, down: int, ending: str) -> None:
        shared = self.shared
        if shared.config.log_connections:
            shared.log.event(
                "connection",
                client=show_address(self.address),
                name=self.name,
                up=up,
                down=down,
                seconds=Seconds(trio.current_time() - self.began),
                ending=ending,
            )

    # How it ends without a backend.

    def on_hello_error(self, error: HelloError) -> None:
        """Refuse the client: its bytes are no hello that can be read."""
        self._refuse(error.reason, error.alert, str(error))

    def _refuse(self, reason: str, alert: Alert, detail: str | HostError) -> None:
        """Send `alert` and see to it that it arrives."""
        client, shared = self.client, self.shared
        if self.wait is not None:
            shared.waiting.discard(self.wait)
        # First, so that whoever has heard the alert finds the line.
        self._report(reason, alert, detail)
        self.is_over = True
        try:
            # RFC 8446 §6.2: "Upon transmission or receipt of a fatal alert message, both parties
            # MUST immediately close the connection." Our half, that is; what the client still says
            # is read to its end.
            client.send(alert_record(alert), MSG_DONTWAIT)
            client.shutdown(SHUT_WR)
        except OSError:  # it has gone
            shared.loop.close(client)
            return shared.limit.remove()
        most = self._size() - len(self.head) + shared.config.alert_bytes
        linger = Linger(shared.loop, client, shared.heard, most=most)
        shared.alerted.add(linger)
        linger.start(is_watched=self.wait is not None or self.held is not None)

    def on_urgent_data(self) -> None:
        """Refuse the client: it has sent urgent data."""
        self._report(SessionReason.URGENT_DATA, None)
        self.abort()

    def on_client_gone(self) -> None:
        """End the session: the client has gone amid its hello, or before it."""
        if self._size():
            self._give_up(SessionReason.CLIENT_CLOSED)
        else:
            self.close()

    def expire(self) -> None:
        """End the session: its deadline has passed."""
        self._give_up(SessionReason.DEADLINE)

    def give_way(self) -> None:
        """End the session: there is no room for those who say nothing."""
        self._give_up(SessionReason.CAPACITY)

    def _give_up(self, reason: str) -> None:
        """Close without an alert."""
        self._report(reason, None)
        with contextlib.suppress(OSError):
            # What is there is thrown away, so that the client sees an end and no reset.
            self.client.recv(MAX_WIRE, MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """End the session, if it has not ended; the client's bytes and ours are let through."""
        if not self.is_over:
            self.is_over = True
            if self.wait is not None:
                self.shared.waiting.discard(self.wait)
            if self.held is not None:
                self.held.stop()
            self.shared.loop.close(self.client)
            self.shared.limit.remove()

    def abort(self) -> None:
        """End the session, if it has not ended, with a reset."""
        if not self.is_over:
            self.client.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            self.close()

    def _report(
        self,
        reason: str,
        alert: Alert | None,
        detail: str | HostError | None = None,
    ) -> None:
        """Count a refusal, and write its line.

        What stood in the way of a lookup is only looked at if there is somebody to be told.
        """
        shared = self.shared
        shared.refused += 1
        client = show_address(self.address)
        is_host = isinstance(detail, HostError) and detail.exists
        entry = detail.entry if isinstance(detail, HostError) else ""
        is_admitted = shared.log.admits(reason, client, self._known_as(entry), is_host=is_host)
        if shared.figures is not None:
            shared.figures.refused(reason)
        if isinstance(detail, HostError):
            if not is_admitted and (shared.figures is None or not is_host):
                return
            host = self._host_name(detail.entry)
            fault = explain(shared.hosts, detail)
            detail = fault.detail
            if shared.figures is not None and is_host:
                shared.figures.refused_at(
                    host,
                    fault.owner,
                    fault.reason_for_owner,
                    client,
                    fault.detail_for_owner,
                )
        if is_admitted:
            shared.log.refusal(reason, client, self.name, alert, detail)

    def _size(self) -> int:
        """Return how many bytes of the client have been looked at."""
        return self.size if self.wait is None else self.wait.size


class Held:
    """Holds a client for whom there is no backend yet, or one that may go before it answers.

    The loop tells this object of the client until the relay takes over.

    Attributes:
        events: What the loop has told of the client so far.
        is_away: Whether it is known that the backend is not there. It may be minutes until it is,
            and a client who has ended meanwhile, which no handshake survives, is let go.
        session: The client's.
        since: When it was first seen that there is no backend, or none any more, by trio's clock.

    Raises:
        OSError: the kernel can't watch the client (ENOMEM, ENOSPC).
    """

    __slots__ = ("_loan", "_loans", "events", "is_away", "session", "since")

    def __init__(self, session: Session) -> None:
        self.session = session
        self._loan: tuple[FirstFlight, bool, int, str] | None = None
        self._loans = 0
        self.events = 0
        self.is_away = False
        self.since = trio.current_time()
        loop, fd = session.shared.loop, session.client.fileno()
        if session.wait is None:
            loop.watch(fd, self, READ_EVENTS)
        else:
            self.events = session.wait.events
            loop.set_watcher(fd, self)

    def lend(self, backend: socket, header: bytes, owner: int, entry: str) -> str | None:
        """Lend the client's first flight to a backend; return what to wait for if that is gone."""
        session = self.session
        if self._loans == _MOST_LOANS:
            first, moved = header + session.head, len(session.head)
            session.join(backend, first, owner, entry, is_proxied=bool(header), moved=moved)
            return None
        self._loans += 1
        try:
            rest = peek(session.client) or b""
        except OSError:  # ECONNRESET: the client has gone
            backend.close()
            session.close()
            return None
        fixed = self, session.client, backend, session.shared.loop
        flight = FirstFlight(*fixed, header, session.head)
        try:
            is_sent = flight.send(rest)
        except OSError:
            backend.close()
            raise
        if not is_sent:
            backend.close()
            return entry
        self._loan = flight, bool(header), owner, entry
        session.shared.lent.add(self)
        if not flight.is_whole:
            self.on_answer()  # there is none before the rest has come
        return None

    def on_answer(self) -> None:
        """Join the client to the backend: it has answered, or need not."""
        assert self._loan is not None
        flight, is_proxied, owner, entry = self._loan
        self._end_loan()
        moved, first = flight.settle()
        self.session.join(flight.backend, first, owner, entry, is_proxied=is_proxied, moved=moved)

    def expire(self) -> None:
        """Go on: what has taken so long is an answer to wait for as long as the client likes."""
        self.on_answer()

    def on_no_answer(self) -> None:
        """Look for another backend."""
        assert self._loan is not None
        flight, _, _, entry = self._loan
        self._end_loan()
        self.is_away, self.since = True, trio.current_time()
        self.session.shared.loop.close(flight.backend)
        self.session.shared.room.add(self, entry)

    def _end_loan(self) -> None:
        self.session.shared.lent.discard(self)
        self._loan = None

    def on_away(self) -> None:
        """Let the client go if it has ended: now it is known that the backend is not there."""
        self.is_away = True
        self.on_event(0)

    def on_event(self, events: int) -> None:
        """Take note of what happens to the client; let it go if it leaves before it is served."""
        self.events |= events
        if self.session.is_over:
            return
        if self._loan is not None:
            if events & (_GONE | EPOLLRDHUP):
                self.on_answer()  # the relay knows what to do
        elif self.events & EPOLLPRI:
            self.session.on_urgent_data()
        elif self.events & (_GONE | EPOLLRDHUP if self.is_away else _GONE):
            self.session.on_client_gone()

    def try_again(self) -> str | None:
        """Look for the backend once more; return what is waited for, None if it is over."""
        self.on_event(0)  # it may have left before it was held
        return None if self.session.is_over else self.session.connect()

    def give_way(self) -> None:
        """End: there is no room for a client who is not served."""
        self.session.give_way()

    def stop(self) -> None:
        """Hold the client no longer, for it is given up."""
        self.session.shared.room.discard(self)
        if self._loan is not None:
            flight = self._loan[0]
            self._end_loan()
            self.session.shared.loop.close(flight.backend)

    def abort(self) -> None:
        """End with a reset."""
        self.session.abort()
