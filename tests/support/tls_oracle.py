"""The relay that anybody would write, two tasks and trio's SSLStream: the oracle for ours.

It is right in what it does, but there are things that it can't do:

- To end our half of TLS and go on listening. Where the plain end has ended the peer hears of it
  only when it has ended, too.
- To tell the peer, by an alert, that TLS has failed.
"""

import _socket
import socket
import ssl
import struct
from collections.abc import Callable

import trio

from tests.support.tls import NAME, context

_CHUNK = 1 << 16


async def shake_hands(
    near: _socket.socket, version: ssl.TLSVersion, *, server_side: bool
) -> "trio.SSLStream[trio.SocketStream]":
    """Return the TLS end; it takes the socket over."""
    own = context.__wrapped__(version, server_side=server_side)
    # An end without a close_notify is to be told.
    own.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    tls = trio.SSLStream(
        stream(near), own, server_side=server_side, server_hostname=None if server_side else NAME
    )
    await tls.do_handshake()
    return tls


def stream(sock: _socket.socket) -> trio.SocketStream:
    """Return the stream of a socket; it takes that over."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=sock.detach())))


async def relay_streams(
    plain: trio.SocketStream,
    tls: "trio.SSLStream[trio.SocketStream]",
    on_end: Callable[[], None],
) -> None:
    """Relay until both have ended; what is broken off on one side is a reset for both."""

    async def up() -> None:
        while chunk := await plain.receive_some(_CHUNK):
            await tls.send_all(chunk)

    async def down() -> None:
        while chunk := await tls.receive_some(_CHUNK):
            await plain.send_all(chunk)
        await plain.send_eof()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(up)
            nursery.start_soon(down)
        await tls.aclose()
    except* trio.BrokenResourceError:
        for end in plain, tls.transport_stream:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        for end in plain, tls.transport_stream:
            await trio.aclose_forcefully(end)
        on_end()
