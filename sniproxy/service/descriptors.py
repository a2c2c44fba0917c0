"""Descriptors: how many there may be, and what they suffice for."""

import contextlib
import resource
from typing import NamedTuple

# What is open beside connections and pipes: the listening socket twice, standard output and error,
# the hosts directory, three epoll sets and what wakes them, the supervisor's and syslog's sockets.
# That is some fifteen; the rest is for what comes and goes: a source file for a traceback, one
# client more than there is room for, whatever a supervisor has left open.
_RESERVE = 24

# Of the descriptors for connections and pipes, one in eight goes to pipes.
_PIPES_SHARE = 8

# A client and a backend; two ends.
_PER_CONNECTION = _PER_PIPE = 2

# Where there is no limit: what Linux allows a process unless told otherwise, fs.nr_open in proc(5).
_UNLIMITED = 1 << 20


class Share(NamedTuple):
    """What a number of descriptors suffices for."""

    connections: int
    pipes: int


def raise_limit() -> int:
    """Raise the soft RLIMIT_NOFILE to the hard one; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Refused where fs.nr_open has been lowered below the hard limit meanwhile.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def share(limit: int, most_pipes: int) -> Share:
    """Share out `limit` descriptors; at least one connection comes out, and perhaps no pipe.

    Raises:
        ValueError: they do not suffice for one connection.
    """
    least = _RESERVE + _PER_CONNECTION
    if limit < least:
        raise ValueError(f"RLIMIT_NOFILE allows {limit} descriptors, and it takes {least}")
    free = limit - _RESERVE
    pipes = min(most_pipes, free // (_PIPES_SHARE * _PER_PIPE))
    return Share((free - pipes * _PER_PIPE) // _PER_CONNECTION, pipes)
