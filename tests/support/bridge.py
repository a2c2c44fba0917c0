"""An ingress, a peer and a service, as processes with directories of their own."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path

import trustme

from tests.support.daemon import PATIENCE, Daemon

INGRESS, PEER, SERVICE = "ingress.example", "peer.example", "web.internal"


@cache
def authority(name: str = "") -> trustme.CA:
    """Return an authority of this run; each name is another one."""
    return trustme.CA(organization_name=name or "tests")


def write_identity(
    directory: Path,
    name: str,
    ca: trustme.CA | None = None,
    *,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> None:
    """Make an identity for `name`, which trusts the authority of this run."""
    directory.mkdir(parents=True, exist_ok=True)
    issued = (ca or authority()).issue_cert(
        name, common_name=name, not_before=not_before, not_after=not_after
    )
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    authority().cert_pem.write_to_path(str(directory / "ca.pem"))


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Echo:
    """A service that says back what it hears, and ends when it has heard the end."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self.heard: list[bytes] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        heard = bytearray()
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    heard += data[:1000]
                    connection.sendall(data)
            except OSError:
                pass
        self.heard.append(bytes(heard))

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


class Bridge:
    """Both sides, and an echo behind them that is called web.internal:80."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.echo = Echo()
        stack.callback(self.echo.close)
        self.ingress_place = place / "ingress"
        self.peer_place = place / "peer"
        self.peer_socket = socket.create_server(("127.0.0.1", 0))
        stack.callback(self.peer_socket.close)
        port = self.peer_socket.getsockname()[1]
        # The ingress.
        write(self.ingress_place / "hosts" / SERVICE / "peer", "p\n")
        write(self.ingress_place / "peers/p/address", f"127.0.0.1:{port}\n")
        write(self.ingress_place / "peers/p/server-name", PEER)
        write_identity(self.ingress_place / "peers/p/identity", INGRESS)
        # The peer.
        write_identity(self.peer_place / "identity", PEER)
        write(self.peer_place / "clients" / INGRESS)
        write(self.peer_place / "allow" / SERVICE / "80", f"127.0.0.1:{self.echo.port}")

    def start_peer(self, *options: str, under: tuple[str, ...] = ()) -> Daemon:
        return self._stack.enter_context(
            start(self.peer_socket, self.peer_place, "tls_bridge.peer", *options, under=under)
        )

    def start_ingress(
        self, *options: str, unix: Path | None = None, under: tuple[str, ...] = ()
    ) -> Daemon:
        if unix is None:
            listening = socket.create_server(("127.0.0.1", 0))
        else:
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(unix))
            listening.listen()
        self._stack.enter_context(listening)
        return self._stack.enter_context(
            start(listening, self.ingress_place, "tls_bridge", *options, under=under)
        )


@contextmanager
def start(
    listening: socket.socket,
    place: Path,
    module: str,
    *options: str,
    under: tuple[str, ...] = (),
) -> Iterator[Daemon]:
    with Daemon(listening, place, options, module=module, under=under) as daemon:
        daemon.wait_for_log("listening")
        yield daemon


@contextmanager
def bridge(place: Path) -> Iterator[Bridge]:
    with ExitStack() as stack:
        yield Bridge(place, stack)


def ask(daemon: Daemon, request: bytes, timeout: float = PATIENCE) -> tuple[socket.socket, bytes]:
    """Send a request; return the connection, and the header of the answer."""
    client = daemon.connect(timeout)
    client.sendall(request)
    return client, read_header(client)


def read_header(client: socket.socket) -> bytes:
    header = bytearray()
    while not header.endswith(b"\r\n\r\n") and (byte := client.recv(1)):
        header += byte
    return bytes(header)


def connect(target: str = f"{SERVICE}:80", *fields: str) -> bytes:
    """Return the bytes of a CONNECT."""
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *fields, "", ""]
    return "\r\n".join(lines).encode()


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


__all__ = ["PATIENCE", "Bridge", "Daemon", "bridge"]
