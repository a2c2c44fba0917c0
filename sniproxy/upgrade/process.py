"""A process's part: it may take over from one before it, and gives to one that comes after it."""

import os
import socket as std
from collections.abc import Mapping

import trio

from sniproxy.upgrade import letters
from sniproxy.upgrade.giving import Door

# What the supervisor tells a process, that one that takes its place has to know.
_FROM_SUPERVISOR = ("NOTIFY_SOCKET", "WATCHDOG_USEC")


class Upgrade:
    """What is known of upgrades before there is a loop.

    Args:
        path: of the socket at which copies find each other.
        status_socket: the path of the status socket, if there is one.

    Attributes:
        listening: The listening socket that the copy before us has given; None if there is none.
        arguments: The command line of that copy.
        environment: What its supervisor had told it.
        status: The listening status socket that it has given, if it was asked for at that path.

    Raises:
        FatalError: there is a copy that can't be replaced, or we can't listen there.
    """

    def __init__(self, path: str) -> None:
        self.listening: std.socket | None = None
        self.arguments: list[str] = []
        self.environment: Mapping[str, str] = os.environ
        self._way: letters.Way | None = None
        self._door: Door | None = None
        self._ended = trio.Event()
        met = letters.meet(path)
        if met is None:
            self._listening = letters.listen(path)
            return
        self._way, message = met
        listening, door, *others = message.fds
        facts = message.content["facts"]
        self.listening = std.socket(fileno=listening)
        self._listening = std.socket(fileno=door)
        self._given = dict(zip(facts["others"], others, strict=True))
        self.arguments = facts["arguments"]
        self.environment = {**os.environ, **facts["environment"]}
