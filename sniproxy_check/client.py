"""A client of our own, over loopback, whose connection a backend is given as by the daemon."""

import select
import socket
from contextlib import closing
from typing import Final

from sniproxy.hand_over import HandOver

# Where both ends are. The kernel chooses the port.
_HERE: Final = ("127.0.0.1", 0)


class Clients:
    """Clients, one after the other, and the socket that they connect to.

    Args:
        seconds: how long anything of theirs may take.

    Raises:
        OSError: there is no TCP over loopback here.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._accepted: socket.socket | None = None
        self._listening = socket.create_server(_HERE)
        try:
            self._listening.settimeout(seconds)
            self._hand_over = HandOver(self._listening)
            self.connect().close()  # a loopback that is down says so here, and not at its address
        except BaseException:
            self._listening.close()
            raise

    def connect(self) -> socket.socket:
        """Return the client's end of a new connection; the caller closes it.

        Raises:
            OSError: it could not be made.
        """
        client = socket.create_connection(self._listening.getsockname(), self._seconds)
        try:
            self._forget()
            self._accepted = self._accept(client.getsockname())
        except BaseException:
            client.close()
            raise
        return client

    def _accept(self, address: object) -> socket.socket:
        while True:
            accepted, whose = self._listening.accept()
            if whose == address:
                return accepted
            accepted.close()  # of somebody else: anybody here can connect

    def give(self, backend: socket.socket, owner: int) -> None:
        """Give a backend the daemon's end of the last connection, as soon as a hello is there.

        Args:
            backend: connected; it is closed.
            owner: the uid of the backend's directory.

        Raises:
            OSError: it could not be given.
        """
        assert self._accepted is not None
        accepted, self._accepted = self._accepted, None
        # The backend is not to hold us up, either.
        with backend, closing(self._hand_over.kept(accepted, owner)):
            waiting = select.poll()
            waiting.register(accepted, select.POLLIN)
            if not waiting.poll(self._seconds * 1000):
                raise TimeoutError
            if (error := self._hand_over.give(accepted, backend, owner)) is not None:
                raise error

    def _forget(self) -> None:
        if self._accepted is not None:
            self._accepted.close()
            self._accepted = None

    def close(self) -> None:
        """Close all that is left."""
        self._forget()
        self._listening.close()
