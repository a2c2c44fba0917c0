"""Faults of the kernel, made where the compiled build meets them, too.

A method of a compiled class can't be replaced, and a function that one compiled room takes from
another is called without a look at its name. So what fails here is what these rooms are given: a
descriptor, an epoll set, a callback.
"""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

from sniproxy.engine.loop import EventLoop
from sniproxy.hosts import HostsDirectory


class FlakyEpoll:
    """The epoll set of a loop, whose epoll_ctl(2) fails when it is told to.

    Attributes:
        failures: Error numbers for the next calls to register a descriptor; None for one that
            works. Those after that work.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._epoll: select.epoll = loop._epoll
        self.failures: list[int | None] = []
        loop._epoll = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)

    def register(self, fd: int, events: int) -> None:
        number = self.failures.pop(0) if self.failures else None
        if number is not None:
            raise OSError(number, os.strerror(number))
        self._epoll.register(fd, events)


@contextmanager
def no_way_back(hosts: HostsDirectory) -> Iterator[None]:
    """Let nobody come back to the directory of hosts: fchdir(2) fails."""
    kept = os.dup(hosts.fileno())
    nowhere = os.open("/dev/null", os.O_RDONLY)
    try:
        os.dup2(nowhere, hosts.fileno(), inheritable=False)
        yield
    finally:
        os.dup2(kept, hosts.fileno(), inheritable=False)
        os.close(kept)
        os.close(nowhere)
