"""What stands behind the daemon: a few blocking servers on Unix sockets.

with RawBackend(host_directory(hosts, "a.example") / "tls-socket") as backend:
    ...  # a client connects
    with backend.accept() as connection: ...

with TlsBackend(socket_path, context) as backend:
    ...  # a client comes, talks and goes
    assert backend.connection().server_name == "a.example"
"""

import contextlib
import http.client
import io
import os
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from tests.support.daemon import PATIENCE, Daemon
from tests.support.sockets import receive_exactly

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")
_CHUNK = 1 << 16


def host_directory(hosts: Path, name: str) -> Path:
    """Return the directory of the host `name`, made now if need be."""
    directory = hosts / name
    directory.mkdir(exist_ok=True)
    # Whatever the umask: root's directories are no good to the daemon if others may write there.
    directory.chmod(0o755)
    return directory


def listen_unix(
    path: Path, backlog: int = socket.SOMAXCONN, uid: int | None = None
) -> socket.socket:
    """Return a socket that listens at `path`, of any length: `sun_path` has 108 bytes.

    If `uid` is given it is that user's, which only root can arrange: the listener belongs to
    whoever calls listen(2), as SO_PEERCRED in unix(7) says.
    """
    directory = os.open(path.parent, os.O_PATH)
    try:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.settimeout(PATIENCE)
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        if uid is not None:
            os.seteuid(uid)
        try:
            listening.listen(backlog)
        finally:
            if uid is not None:
                os.seteuid(0)
    finally:
        os.close(directory)
    return listening


def accepted(listening: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections to `listening` until that is shut down.

    To close it would not do: a thread that waits in accept() goes on waiting.
    """
    listening.settimeout(None)
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            connection.settimeout(PATIENCE)
            yield connection


class RawBackend:
    """Hands the connections to the test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listening = listen_unix(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listening.close()
        self._path.unlink()

    def accept(self) -> socket.socket:
        """Return the next connection."""
        connection, _ = self._listening.accept()
        connection.settimeout(PATIENCE)
        return connection


def joined(
    daemon: Daemon, backend: RawBackend, hello: bytes
) -> tuple[socket.socket, socket.socket]:
    """Return a client and the backend it has reached, when the hello is behind them."""
    client = daemon.connect()
    client.sendall(hello)
    connection = backend.accept()
    assert receive_exactly(connection, len(hello)) == hello
    return client, connection


class TlsConnection(io.RawIOBase):
    """The server's end of a TLS connection, and what went over the wire.

    Attributes:
        received: Every byte that came, from the ClientHello on.
        sent: Every byte that went.
        proxy_line: The PROXY header before that, if one was to come.
        server_name: What the client asked for.
        client_certificate: What the client showed, in DER.
        alpn, version, resumed: What was agreed upon.
        requests: The request lines that were answered.
        error: What ended it, if that was not the client.
    """

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain
        self.received = bytearray()
        self.sent = bytearray()
        self.proxy_line: bytes | None = None
        self.server_name: str | None = None
        self.client_certificate: bytes | None = None
        self.alpn: str | None = None
        self.version: str | None = None
        self.resumed: bool | None = None
        self.requests: list[str] = []
        self.error: OSError | None = None

    def read_proxy_line(self) -> None:
        # Not one byte more: what follows is TLS.
        line = b""
        while not line.endswith(b"\r\n") and (byte := self._plain.recv(1)):
            line += byte
        self.proxy_line = line

    def handshake(self, context: ssl.SSLContext) -> None:
        # By hand and not with wrap_socket(), for then we see the bytes.
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context.sni_callback = self._note_server_name
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._drive(self._tls.do_handshake)
        self.client_certificate = self._tls.getpeercert(binary_form=True)
        self.alpn = self._tls.selected_alpn_protocol()
        self.version = self._tls.version()
        self.resumed = self._tls.session_reused

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        try:
            data = self._drive(lambda: self._tls.read(len(view)))
        except ssl.SSLEOFError:  # not every client says goodbye
            data = b""
        view[: len(data)] = data
        return len(data)

    def send(self, data: bytes) -> None:
        self._drive(lambda: self._tls.write(data))

    def say_goodbye(self) -> None:
        """Close our direction, and wait until the client has closed its own."""
        # Some clients do not say goodbye, and some do not stay for ours.
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            self._drive(self._tls.unwrap)

    def _note_server_name(self, _tls: object, name: str | None, _context: object) -> None:
        self.server_name = name

    def _drive(self, step: Callable[[], T]) -> T:
        """Do `step`, and move bytes until it needs no more of them."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:
                self._flush()
            data = self._plain.recv(_CHUNK)
            self.received += data
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._plain.sendall(data)
            self.sent += data


class Server:
    """Serves in a thread of its own, one connection after the other, while the block lasts."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        for connection in accepted(self._listening):
            self.serve(connection)

    def serve(self, connection: socket.socket) -> None:
        """Serve a connection, and close it."""
        raise NotImplementedError


class UnixServer(Server):
    """Serves on a Unix socket, which is there as long as it does; `uid` as in `listen_unix`."""

    def __init__(self, path: Path, uid: int | None = None) -> None:
        super().__init__(listen_unix(path, uid=uid))
        self._path = path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._path.unlink()


class TlsBackend(UnixServer):
    """Serves HTTP over TLS, one connection after the other, and remembers them.

    Args:
        path: Where to listen.
        context: The key, and what is asked of clients.
        proxy: Whether every connection begins with a PROXY header.
    """

    def __init__(self, path: Path, context: ssl.SSLContext, *, proxy: bool = False) -> None:
        super().__init__(path)
        self._context = context
        self._proxy = proxy
        self._connections: queue.Queue[TlsConnection] = queue.Queue()

    def connection(self) -> TlsConnection:
        """Return the next connection, once it has ended."""
        return self._connections.get(timeout=PATIENCE)

    def serve(self, connection: socket.socket) -> None:
        with connection:
            tls = TlsConnection(connection)
            try:
                if self._proxy:
                    tls.read_proxy_line()
                tls.handshake(self._context)
                serve_http(tls)
                tls.say_goodbye()
            except OSError as error:  # ssl.SSLError is one
                tls.error = error
        self._connections.put(tls)


def serve_http(connection: TlsConnection) -> None:
    """Answer each request with its own body."""
    with io.BufferedReader(connection, _CHUNK) as reader:
        while line := reader.readline():
            # RFC 9113 section 3.4 chose the preface so that it looks like a request nobody makes.
            if line == b"PRI * HTTP/2.0\r\n":
                return _serve_http2(reader, connection)
            connection.requests.append(line.decode().strip())
            headers = http.client.parse_headers(reader)
            body = reader.read(int(headers.get("Content-Length", "0")))
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            if headers.get("Connection") == "close":
                break


# RFC 9113: the few frames that a request without a body and an answer without one are made of.
_HEADERS, _SETTINGS = 1, 4
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_STATUS_200 = b"\x88"  # index 8 of the static table, RFC 7541 appendix A


def _serve_http2(reader: io.BufferedIOBase, connection: TlsConnection) -> None:
    assert reader.read(8) == b"\r\nSM\r\n\r\n"
    connection.send(_frame(_SETTINGS))
    while header := reader.read(9):
        kind, flags, stream = header[3], header[4], int.from_bytes(header[5:], "big")
        reader.read(int.from_bytes(header[:3], "big"))
        if kind == _SETTINGS and not flags & _ACK:
            connection.send(_frame(_SETTINGS, _ACK))
        elif kind == _HEADERS:
            connection.requests.append(f"HTTP/2 stream {stream}")
            connection.send(_frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, _STATUS_200))


def _frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    header = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return header + payload
