"""What a process does: it may take over from one before it, and it gives to one after it."""

import os
import socket as std
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from sniproxy.engine.listener import Listener
from sniproxy.service.fatal import FatalError
from sniproxy.session import Sessions
from sniproxy.upgrade import letters
from sniproxy.upgrade.giving import Door
from sniproxy.upgrade.taking import Taking

# What a supervisor has told a process that one in its place has to know.
_FROM_SUPERVISOR = ("NOTIFY_SOCKET", "WATCHDOG_USEC")


class Upgrade:
    """Upgrades, to and from this process; to be made before privileges are dropped.

    Args:
        path: of the socket at which copies find each other.
        on_taken: called when this is the only copy that serves, if one has served before.
        has_to_be_there: whether there is one.

    Attributes:
        listening: The listening socket that the copy before us has given; None if there is none.
        hosts: The descriptor of its hosts directory.
        status: Its status socket, and the path of that; None if it has none.
        arguments: Its command line.
        environment: Ours, with what its supervisor had told it.

    Raises:
        FatalError: there is a copy that can't be replaced, or none; or we can't listen there.
    """

    def __init__(
        self,
        path: str,
        on_taken: Callable[[], object] = lambda: None,
        *,
        has_to_be_there: bool = False,
    ) -> None:
        self.listening: std.socket | None = None
        self.status: tuple[str, std.socket] | None = None
        self.arguments: list[str] = []
        self.environment: Mapping[str, str] = os.environ
        self._way: letters.Way | None = None
        self._door: Door | None = None
        self._facts: dict[str, Any] = {}
        self._fds: list[int] = []
        self.hosts: int | None = None
        self._on_taken = on_taken
        self._is_alone = True
        self._is_over = trio.Event()
        met = letters.meet(path)
        if met is None:
            if has_to_be_there:
                raise FatalError(f"unable to upgrade: nobody listens at {path!a}")
            self._listening = letters.listen(path)
            return
        self._way, message = met
        listening, door, *others = message.fds
        facts = message.content["facts"]
        # The other end of the way may have been made by a copy before that.
        self._way.pid = facts["pid"]
        self.listening = std.socket(fileno=listening)
        self._listening = std.socket(fileno=door)
        self.hosts, *others = others
        for fd in others:
            self.status = facts["status"], std.socket(fileno=fd)
        self.arguments = facts["arguments"]
        self.environment = {**os.environ, **facts["environment"]}

    def introduce(
        self, arguments: Sequence[str], hosts: int, status: tuple[str, int] | None
    ) -> None:
        """Take note of what the next copy is to know.

        Args:
            arguments: our command line.
            hosts: the descriptor of the hosts directory.
            status: the path of our status socket, and its descriptor.
        """
        environment = self.environment
        self._facts = {
            "pid": os.getpid(),
            "arguments": list(arguments),
            "environment": {
                name: environment[name] for name in _FROM_SUPERVISOR if name in environment
            },
            "status": status and status[0],
        }
        self._fds = [hosts] if status is None else [hosts, status[1]]

    async def begin(self, sessions: Sessions) -> None:
        """Wait until clients may be accepted; what the copy before us has comes by and by.

        Raises:
            FatalError: that goes on, and we are to end.
        """
        if self._way is None:
            self._is_over.set()
            return
        taking = Taking(self._way, sessions, self._on_over)
        await taking.wait_for_start()

    async def run(
        self, sessions: Sessions, listener: Listener, on_given: Callable[[int | None], None]
    ) -> None:
        """When all has been taken, wait for a copy that comes after us, until cancelled.

        Args:
            sessions: what it is given.
            listener: of clients, likewise.
            on_given: called with its process id when it has all; or with None if the copy before us
                goes on, and what it has given us has ended.
        """
        await self._is_over.wait()
        if not self._is_alone:
            listener.leave()
            self._listening.close()
            await sessions.limit.wait_until_empty()
            return on_given(None)
        known = self._facts, self._fds
        self._door = Door(self._listening, listener, *known, sessions, on_given)
        await self._door.run()

    def _on_over(self, is_alone: bool) -> None:
        self._is_alone = is_alone
        self._is_over.set()
        if is_alone:
            self._on_taken()

    def close(self) -> None:
        """Let no copy in any more."""
        if self._door is not None:
            self._door.close()
        self._listening.close()
