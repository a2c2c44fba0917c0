"""The daemon's part of handing a client over, for tests of those who take it.

client, near = tcp_pair()
hand_over(path, near)

with HandsOver(path) as door:
    client = socket.create_connection(door.address)
"""

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.support.backends import Server
from tests.support.daemon import PATIENCE


def connect(path: Path) -> socket.socket:
    """Return a connection to a backend, on which nothing has been sent."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, *clients: socket.socket | int) -> None:
    """Send the message, and close all; descriptors that are given as numbers stay open."""
    descriptors = [client if isinstance(client, int) else client.fileno() for client in clients]
    socket.send_fds(connection, [b"\0"], descriptors)
    connection.close()
    for client in clients:
        if not isinstance(client, int):
            client.close()


def hand_over(path: Path, *clients: socket.socket | int) -> None:
    """Do what the daemon does with a client; or with more than one, which it does not."""
    send(connect(path), *clients)


class HandsOver(Server):
    """A door that hands every client over as it comes.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, path: Path) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        super().__init__(listening)
        self._path = path
        self.address: tuple[str, int] = listening.getsockname()

    def serve(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        with contextlib.suppress(OSError):  # nobody is there
            hand_over(self._path, connection)
        connection.close()


@contextlib.contextmanager
def places_left(number: int) -> Iterator[None]:
    """Have this process able to open so many descriptors more, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        highest = max(int(entry) for entry in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 + number, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(number):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
