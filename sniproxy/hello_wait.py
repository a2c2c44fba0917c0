"""A client whose hello has not come whole, and when to look again."""

from _socket import SO_RCVLOWAT, socket
from typing import Final, Protocol

from sniproxy.engine.kernel import (
    EPOLLERR,
    EPOLLHUP,
    EPOLLPRI,
    EPOLLRDHUP,
    MSG_DONTWAIT,
    MSG_PEEK,
    SOL_SOCKET,
)
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.relay import READ_EVENTS
from sniproxy.wire import MAX_WIRE, Alert, ClientHello, HelloError, HelloReader, Reason

# What SO_RCVLOWAT is on a new socket.
_ANY_BYTES: Final = 1

# Nearly every hello has fewer bytes than these: post-quantum key shares make it 1.8 KB. A longer
# one is looked at a second time, with room for the longest.
_USUAL_WIRE: Final = 4096

# Leave what is there in the socket, and never wait for more.
_LOOK: Final = MSG_PEEK | MSG_DONTWAIT


class Waiter(Protocol):
    """The client's session, which is told what came of the waiting."""

    def on_hello(self, hello: ClientHello) -> None:
        """Go on: the hello is whole."""

    def on_hello_error(self, error: HelloError) -> None:
        """Refuse the client: its bytes are no hello that can be read."""

    def on_urgent_data(self) -> None:
        """Refuse the client: it has sent urgent data."""

    def on_client_gone(self) -> None:
        """End: the client has gone."""

    def expire(self) -> None:
        """End: the client has taken too long."""

    def give_way(self) -> None:
        """End: there is no room for the client."""

    def abort(self) -> None:
        """End with a reset."""


def peek(client: socket) -> bytes | None:
    """Return what is in the socket of a client, and leave it there.

    Returns:
        The bytes, at most `MAX_WIRE`; none if the client has ended before the first; None if
        there is nothing yet.

    Raises:
        OSError: ECONNRESET: the client has broken off.
    """
    try:
        data = client.recv(_USUAL_WIRE, _LOOK)
        return client.recv(MAX_WIRE, _LOOK) if len(data) == _USUAL_WIRE else data
    except BlockingIOError:
        return None


def take(client: socket) -> bytes | None:
    """Return what `peek` would, and take it out of the socket, if it is no more than is usual.

    Of more than that the rest stays.

    Raises:
        OSError: as above.
    """
    try:
        return client.recv(_USUAL_WIRE, MSG_DONTWAIT)
    except BlockingIOError:
        return None


class HelloWait:
    """Waits for the rest of a hello, under a low-water mark.

    What comes stays in the socket, so it is readable all the time; a wait for that would spin.
    SO_RCVLOWAT, socket(7), says from how many bytes on the loop is to tell: as many as can bring a
    verdict, or tell what to wait for next.

    The loop tells this object of the client until the relay takes over.

    Args:
        reader: has been fed with what the client has said so far, and found no whole hello.
        taken: how many bytes of that are not in the socket any more.

    Attributes:
        events: What the loop has told of the client so far.
        session: The client's, which is told what came of it.

    Raises:
        OSError: the kernel can't watch the client (ENOMEM, ENOSPC).
    """

    __slots__ = ("_client", "_is_over", "_mark", "_reader", "_taken", "events", "session")

    def __init__(
        self, session: Waiter, client: socket, loop: EventLoop, reader: HelloReader, taken: int
    ) -> None:
        self.session = session
        self._client = client
        self._reader = reader
        self._taken = taken
        self._mark = _ANY_BYTES
        self.events = 0
        self._is_over = False
        # Before it is watched, or the loop would tell at once of what is there already.
        self._set_mark(reader.size - taken + reader.missing)
        loop.watch(client.fileno(), self, READ_EVENTS)

    @property
    def size(self) -> int:
        """How many bytes have been looked at."""
        return self._reader.size

    def on_event(self, events: int) -> None:
        """Look again, for there is more of the hello, or its end."""
        self.events |= events
        if not self._is_over:
            self.look()

    def look(self) -> None:
        """Look at what the client has sent so far, and tell the session if that decides."""
        if self.events & EPOLLPRI:
            self.stop()
            return self.session.on_urgent_data()
        try:
            hello = self._read()
        except HelloError as error:
            self.stop()
            return self.session.on_hello_error(error)
        if hello is not None:
            self.stop()
            self.session.on_hello(hello)
        elif self.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.stop()
            self.session.on_client_gone()

    def _read(self) -> ClientHello | None:
        """Read what is new; return the hello if it is whole."""
        try:
            data = peek(self._client)
        except OSError:  # ECONNRESET
            self.events |= EPOLLERR
            return None
        size = self._reader.size - self._taken
        if data is not None and len(data) > size:
            if (hello := self._reader.feed(data[size:])) is not None:
                return hello
        elif data == b"":
            self.events |= EPOLLRDHUP
        elif self.events and size < self._mark and self._is_too_small():
            raise HelloError(
                Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE, "the receive buffer is full"
            )
        self._set_mark(self._reader.size - self._taken + self._reader.missing)
        return None

    def _is_too_small(self) -> bool:
        """Tell whether the receive buffer is one that the rest of the hello will not fit into.

        A full buffer makes a socket readable below its mark, but so does a shortage of memory
        anywhere in the machine, which passes. Setting the mark makes the buffer grow; where it may
        not, since somebody has fixed its size on the listener, the kernel lowers the mark to half
        of it (tcp_set_rcvlowat in net/ipv4/tcp.c). Then there is no use in waiting.
        """
        return self._client.getsockopt(SOL_SOCKET, SO_RCVLOWAT) < self._mark

    def expire(self) -> None:
        """End: the client has taken too long."""
        self.session.expire()

    def give_way(self) -> None:
        """End: there is no room for a client who says nothing."""
        self.session.give_way()

    def abort(self) -> None:
        """End with a reset: something went wrong that nobody expected."""
        self.session.abort()

    def stop(self) -> None:
        """Wait no more; the socket is as it was."""
        self._is_over = True
        self._set_mark(_ANY_BYTES)

    def _set_mark(self, mark: int) -> None:
        if mark != self._mark:
            self._client.setsockopt(SOL_SOCKET, SO_RCVLOWAT, mark)
            self._mark = mark
