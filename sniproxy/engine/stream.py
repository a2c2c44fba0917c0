"""The relay once more, over trio streams: for ends that are not plain sockets, such as TLS.

Two tasks for each connection, an allocation for each message: ten times the cost of `relay`, and
plain enough to be read at a glance. So it is also the oracle for it: the tests ask both to do the
same.
"""

import trio
from trio.abc import HalfCloseableStream

# Bytes asked for at a time; as in `relay`.
_CHUNK = 1 << 16


async def relay_streams(near: HalfCloseableStream, far: HalfCloseableStream) -> None:
    """Relay between two streams until both directions have ended, then close both.

    Raises:
        trio.BrokenResourceError: a peer was reset, or went away with bytes still to come; both
            streams are closed by then.
    """
    async with near, far:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, near, far)
                nursery.start_soon(_pump, far, near)
        except* trio.BrokenResourceError as group:
            broken = group.exceptions[0]
        else:
            return
        raise trio.BrokenResourceError("a peer was reset") from broken


async def _pump(source: HalfCloseableStream, sink: HalfCloseableStream) -> None:
    while chunk := await source.receive_some(_CHUNK):
        await sink.send_all(chunk)
    await sink.send_eof()
