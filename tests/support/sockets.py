"""Pairs of connected sockets, and what a test wants to do with them."""

import _socket
import array
import fcntl
import hashlib
import socket
import struct
import termios
import time
from collections.abc import Iterator


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return a client and its accepted peer, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    return client, accepted


def unix_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected Unix stream sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def plain(sock: socket.socket) -> _socket.socket:
    """Return the plain socket object that the engine works with; it takes the descriptor over."""
    family, kind, proto = sock.family, sock.type, sock.proto
    return _socket.socket(family, kind, proto, sock.detach())


def reset(sock: socket.socket) -> None:
    """Close a TCP socket with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def say(client: socket.socket, near: _socket.socket, data: bytes) -> None:
    """Send, and wait until all of it is at the other end."""
    client.sendall(data)
    deadline = time.monotonic() + 5
    there = array.array("i", [0])
    while there[0] < len(data):
        assert time.monotonic() < deadline
        fcntl.ioctl(near, termios.FIONREAD, there)


def receive_all(sock: socket.socket) -> bytes:
    """Receive until the end."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive `size` bytes, or fewer if the end comes first."""
    received = bytearray()
    while len(received) < size and (chunk := sock.recv(size - len(received))):
        received += chunk
    return bytes(received)


class Noise:
    """Bytes that never repeat and can be told by position; the same for every seed."""

    def __init__(self, seed: bytes = b"") -> None:
        self._stream = hashlib.shake_128(seed).digest(1 << 16)

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yield `size` bytes in blocks, each with its number in front."""
        number = 0
        while size > 0:
            block = (number.to_bytes(8, "big") + self._stream)[:size]
            yield block
            size -= len(block)
            number += 1
