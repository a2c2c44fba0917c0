"""What a client has said first, lent to a backend that may go before it answers.

A server that is stopped leaves connections in the queue of its listening socket that it has never
accepted. They end with it, and so would their clients. But a server of TLS says something to any
hello. So, where a host is held, the hello is sent, and kept as well until the first byte comes
back: in the client's socket, but for what was taken out of that at the first look. If there is an
end instead, the next backend gets the same hello.
"""

import contextlib
from _socket import MSG_DONTWAIT, MSG_PEEK, socket
from typing import Protocol

from sniproxy.engine.loop import EventLoop
from sniproxy.engine.relay import READ_EVENTS


class Lender(Protocol):
    """The client's session, which is told what came of it."""

    def on_answer(self) -> None:
        """Go on: the backend has answered."""

    def on_no_answer(self) -> None:
        """Look for another backend: this one has ended without a word."""

    def abort(self) -> None:
        """End with a reset."""


class FirstFlight:
    """One such loan. The backend belongs to whoever has made this.

    Args:
        client: has sent a whole hello.
        backend: just connected, and not watched.
        header: what the backend is to hear before it.
        head: how the hello begins, if that has been taken out of the client's socket.

    Attributes:
        backend: As above.
        is_whole: Whether all of it has been sent.
    """

    __slots__ = (
        "_client",
        "_head",
        "_header",
        "_is_alone",
        "_lender",
        "_loop",
        "_sent",
        "backend",
        "is_whole",
    )

    def __init__(
        self,
        lender: Lender,
        client: socket,
        backend: socket,
        loop: EventLoop,
        header: bytes,
        head: bytes,
    ) -> None:
        self._lender = lender
        self._client = client
        self.backend = backend
        self._loop = loop
        self._header = header
        self._head = head
        self._sent = 0
        self._is_alone = self.is_whole = False

    def send(self, rest: bytes) -> bool:
        """Send it, and have the loop tell of the answer.

        Args:
            rest: what is in the client's socket.

        Returns:
            Whether the backend is still there.

        Raises:
            OSError: the kernel can't watch the backend (ENOMEM, ENOSPC).
        """
        hello = self._head + rest
        # A hello in one record, RFC 8446 §5.1, and nothing behind it, such as early data.
        self._is_alone = len(hello) == 5 + int.from_bytes(hello[3:5])
        try:
            # As much as the buffer takes: all of it, most probably.
            self._sent = self.backend.send(self._header + hello, MSG_DONTWAIT)
        except OSError:  # EPIPE, ECONNRESET
            return False
        self.is_whole = self._sent == len(self._header) + len(hello)
        if not self.is_whole and self._is_reset():
            return False
        self._loop.watch(self.backend.fileno(), self, READ_EVENTS)
        return True

    def _is_reset(self) -> bool:
        """Tell whether the backend has closed with bytes unread: that cuts a send(2) short, too."""
        try:
            self.backend.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # ECONNRESET
            return True
        return False

    def on_event(self, events: int) -> None:
        """Find out whether that is an answer, or the end."""
        try:
            answer = self.backend.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET: it has not read all that was sent
            return self._lender.on_no_answer()
        # Who has read all and ends may have done what early data asks for. RFC 8446 §8 leaves it to
        # servers to notice data that comes twice; no proxy should make it so.
        if answer or not self._is_alone:
            self._lender.on_answer()
        else:
            self._lender.on_no_answer()

    def abort(self) -> None:
        """End with a reset: something went wrong that nobody expected."""
        self._lender.abort()

    def settle(self) -> tuple[int, bytes]:
        """Take from the client what the backend has had, and watch the backend no more.

        Returns:
            How many bytes that were, and what is left of the header and of the head; that of the
            latter has been counted, too.
        """
        self._loop.unwatch(self.backend.fileno())
        before = self._header + self._head
        size = max(self._sent - len(before), 0)
        if size:
            # They are there, for nobody else reads; or the client has broken off.
            with contextlib.suppress(OSError):
                self._client.recv(size, MSG_DONTWAIT)
        return len(self._head) + size, before[self._sent :]
