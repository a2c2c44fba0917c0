"""The shortest conversation that tells which backend a client has reached, or why none.

with Greeter(host_directory(hosts, "a.example") / "tls-socket", b"a"):
    assert ask(daemon, "a.example") == b"a"
assert ask(daemon, "a.example") == UNRECOGNIZED_NAME
"""

import contextlib
import socket
from pathlib import Path

from sniproxy.wire import Alert, alert_record
from tests.support import hellos
from tests.support.backends import UnixServer
from tests.support.daemon import Daemon
from tests.support.sockets import receive_all

UNRECOGNIZED_NAME = alert_record(Alert.UNRECOGNIZED_NAME)

_MOST = 1 << 16


class Greeter(UnixServer):
    """A backend that answers a hello with a word, and closes.

    Attributes:
        heard: What came first, of each connection; b"" of those that ended without a word.
    """

    def __init__(self, path: Path, word: bytes, uid: int | None = None) -> None:
        super().__init__(path, uid)
        self.heard: list[bytes] = []
        self._word = word

    def serve(self, connection: socket.socket) -> None:
        # A client may go at any time.
        with contextlib.suppress(OSError), connection:
            self.heard.append(hear(connection))
            connection.sendall(self._word)


def hear(connection: socket.socket) -> bytes:
    """Return a hello of one record, with the PROXY header in front of it, if there is one."""
    heard = b""
    while data := connection.recv(_MOST):
        heard += data
        record = heard[heard.find(b"\n") + 1 :] if heard.startswith(b"PROXY ") else heard
        if len(record) >= 5 and len(record) >= 5 + int.from_bytes(record[3:5]):
            break
    return heard


def ask(daemon: Daemon, name: str) -> bytes:
    """Return all that a client of `name` gets: a backend's word, or an alert."""
    with daemon.connect() as client:
        client.sendall(hellos.hello_bytes(name))
        return receive_all(client)
