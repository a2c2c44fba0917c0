"""A bounded pool of pipes for splice(2).

A pipe is lent to a direction only while bytes are in it or about to be, so that a connection
that is idle owns none, and a machine full of them needs no more than a few. Where no pipe is to
be had the relay copies instead: slower, never wrong.
"""

import contextlib
import fcntl
import os
from typing import Final

# Bytes that a pipe holds: what an unprivileged process may ask for (fs.pipe-max-size in pipe(7)),
# and so the fewest system calls for each byte.
_SIZE: Final = 1 << 20

# Pipes lent at a time, two descriptors each. Those in motion at one moment are few: a pipe comes
# back as soon as it is empty. An unprivileged user may hold 64 MiB in pipes (pipe-user-pages-soft),
# which would be 64; half of it leaves room for a second copy that takes over while we drain.
MOST_PIPES: Final = 32


class Pipe:
    """An open pipe, whose two ends are owned by whoever took it from the pool."""

    __slots__ = ("read_end", "write_end")

    def __init__(self, read_end: int, write_end: int) -> None:
        self.read_end = read_end
        self.write_end = write_end

    def close(self) -> None:
        """Close both ends; bytes still inside are lost."""
        os.close(self.read_end)
        os.close(self.write_end)


def open_pipe() -> Pipe:
    """Open a pipe.

    Raises:
        OSError: EMFILE, ENFILE: there are no descriptors left.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    # EPERM: the user's limit is used up. The usual 64 KiB, or less, will do.
    with contextlib.suppress(OSError):
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _SIZE)
    return Pipe(read_end, write_end)


class PipePool:
    """Pipes to lend, `limit` at the most; opened when first needed, kept for the next."""

    def __init__(self, limit: int = MOST_PIPES) -> None:
        self._spare: list[Pipe] = []
        self._left = limit

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None when none is to be had now."""
        if self._spare:
            return self._spare.pop()
        if self._left <= 0:
            return None
        try:
            pipe = open_pipe()
        except OSError:
            return None
        self._left -= 1
        return pipe

    def adopt(self, read_end: int, write_end: int) -> Pipe:
        """Lend a pipe that another process has made, beyond the limit if need be."""
        self._left -= 1
        return Pipe(read_end, write_end)

    def give(self, pipe: Pipe) -> None:
        """Take back `pipe`, which is empty."""
        if self._left < 0:  # those that were adopted are too many
            return self.scrap(pipe)
        self._spare.append(pipe)

    def scrap(self, pipe: Pipe) -> None:
        """Take back `pipe` with bytes in it that nobody will read."""
        pipe.close()
        self._left += 1

    def close(self) -> None:
        """Close the pipes that are not lent."""
        while self._spare:
            self.scrap(self._spare.pop())
