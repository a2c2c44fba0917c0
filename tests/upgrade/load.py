"""Clients of all kinds, and the backend behind them, while copies of the daemon take turns.

Both ends are in one asyncio loop. Every byte is compared.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import hellos
from tests.support.backends import host_directory
from tests.support.sockets import Noise

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)

# What a client asks for, behind its hello.
ECHO, DOWN, UP = b"e", b"d", b"u"

# Bytes of a download or an upload; so many that it lasts for several upgrades.
BULK = 24 << 20
_PIECE = 1 << 16


def noise() -> bytes:
    return b"".join(Noise(b"upgrade").blocks(BULK))


@dataclass
class Load:
    """What goes on.

    Attributes:
        address: Where the daemon listens.
        longest: The longest time that an echo took, in seconds.
        echoes, fresh: How many there were, and how many new connections.
        is_over: Whether to come to an end.
        served: The backend's side of each connection.
    """

    address: tuple[str, int]
    longest: float = 0.0
    echoes: int = 0
    fresh: int = 0
    is_over: bool = False
    served: set[asyncio.Task[None]] = field(default_factory=set)
    bulk: bytes = field(default_factory=noise)

    async def connect(self, word: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(HELLO + word)
        return reader, writer

    async def echo(self, seed: int) -> None:
        """Send, and receive the same, again and again; be silent now and then."""
        chance = random.Random(seed)
        reader, writer = await self.connect(ECHO)
        while not self.is_over:
            data = chance.randbytes(chance.choice([1, 100, 5000, 100_000]))
            began = time.monotonic()
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            self.longest = max(self.longest, time.monotonic() - began)
            self.echoes += 1
            await asyncio.sleep(chance.choice([0, 0, 0.01, 0.2]))
        writer.write_eof()
        assert await reader.read() == b""
        await close(writer)

    async def down(self, pause: float) -> None:
        """Receive all, more or less slowly; our own direction has ended before."""
        reader, writer = await self.connect(DOWN)
        writer.write_eof()
        received = 0
        while data := await reader.read(_PIECE):
            assert data == self.bulk[received : received + len(data)]
            received += len(data)
            if pause and not self.is_over:
                await asyncio.sleep(pause)
        assert received == len(self.bulk)
        await close(writer)

    async def up(self, pause: float) -> None:
        """Send all, and hear that it has arrived."""
        reader, writer = await self.connect(UP)
        for begin in range(0, len(self.bulk), _PIECE):
            writer.write(self.bulk[begin : begin + _PIECE])
            await writer.drain()
            if pause and not self.is_over:
                await asyncio.sleep(pause)
        writer.write_eof()
        assert await reader.read() == b"all"
        await close(writer)

    async def hesitate(self) -> None:
        """Say half of the hello, and the rest much later, again and again."""
        while not self.is_over:
            reader, writer = await asyncio.open_connection(*self.address)
            writer.write(HELLO[:40])
            await asyncio.sleep(0.7)
            writer.write(HELLO[40:] + ECHO + b"word")
            assert await reader.readexactly(4) == b"word"
            await close(writer)

    async def come(self) -> None:
        """Connect anew, all the time."""
        while not self.is_over:
            reader, writer = await self.connect(ECHO + b"word")
            assert await reader.readexactly(4) == b"word"
            await close(writer)
            self.fresh += 1
            await asyncio.sleep(0.002)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Be the backend."""
        task = asyncio.current_task()
        assert task is not None
        self.served.add(task)
        task.add_done_callback(self.served.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(len(HELLO))
            word = await reader.readexactly(1)
            if word == ECHO:
                while data := await reader.read(_PIECE):
                    writer.write(data)
                    await writer.drain()
            elif word == DOWN:
                for begin in range(0, len(self.bulk), _PIECE):
                    writer.write(self.bulk[begin : begin + _PIECE])
                    await writer.drain()
            else:
                received = 0
                while data := await reader.read(_PIECE):
                    assert data == self.bulk[received : received + len(data)]
                    received += len(data)
                assert received == len(self.bulk)
                writer.write(b"all")
        with contextlib.suppress(ConnectionError):
            await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(load: Load, hosts: Path, echoes: int) -> AsyncIterator[None]:
    """Have it go on while the block lasts, and come to its end after that."""
    path = host_directory(hosts, NAME) / "tls-socket"
    kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
        lambda: load.down(0), lambda: load.down(0.005), lambda: load.down(0.02),
        lambda: load.up(0), lambda: load.up(0.01),
        load.hesitate, load.come,
    ]  # fmt: skip
    async with await asyncio.start_unix_server(load.serve, path, backlog=4096):
        path.chmod(0o666)
        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                group.create_task(kind())
            for seed in range(echoes):
                group.create_task(load.echo(seed))
            yield
            load.is_over = True
        # All clients have gone; who has served them is to notice.
        await asyncio.gather(*load.served)
    path.unlink(missing_ok=True)  # from Python 3.13 on the server does that
