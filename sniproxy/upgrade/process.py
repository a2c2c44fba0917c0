"""What a process does: it may take over from one before it, and it gives to one after it.

Among several processes the first one meets the other copy, and each worker gives, or takes, by a
way of its own. There may be other numbers of workers before and after.
"""

import os
import socket as std
from collections.abc import Callable, Mapping, Sequence
from select import EPOLLIN
from typing import Any

import trio

from sniproxy.engine.listener import Listener
from sniproxy.engine.loop import EventLoop
from sniproxy.service.fatal import FatalError
from sniproxy.service.workers import Worker, Workers
from sniproxy.session import Sessions
from sniproxy.upgrade import letters
from sniproxy.upgrade.first_process import FirstProcess
from sniproxy.upgrade.giving import Door
from sniproxy.upgrade.staying import heed, stay
from sniproxy.upgrade.taking import Taking

# What a supervisor has told a process that one in its place has to know.
_FROM_SUPERVISOR = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "JOURNAL_STREAM")

# Where the log goes.
_STANDARD_ERROR = 2


class Upgrade:
    """Upgrades, to and from this process; to be made before privileges are dropped.

    Args:
        path: of the socket at which copies find each other.
        on_taken: called when this is the only copy that serves, if one has served before.
        has_to_be_there: whether there is one.
        stays: whether this process stays when another has taken over, if it is the first one.

    Attributes:
        listening: The listening socket that the copy before us has given; None if there is none.
        hosts, standard_error: The descriptors of its hosts directory, and of where its log goes.
        status: Its status socket, and the path of that; None if it has none.
        owner: Whom it was when it began to listen for us: uid and gid.
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
        stays: bool = False,
    ) -> None:
        self.listening: std.socket | None = None
        self.hosts: int | None = None
        self.standard_error: int | None = None
        self.status: tuple[str, std.socket] | None = None
        self.owner = 0, 0
        self.arguments: list[str] = []
        self.environment: Mapping[str, str] = os.environ
        self._on_taken = on_taken
        self._stays = stays
        self._guardian: letters.Way | None = None
        self._facts: dict[str, Any] = {}
        self._fds: list[int] = []
        self._door: Door | None = None
        self._worker: Worker | None = None
        self._first: FirstProcess | None = None
        # To the copy before us: from its first process, and from each that serves.
        self._way: letters.Way | None = None
        self._ways: list[letters.Way] = []
        self._taking: list[Taking] = []
        self._is_over = trio.Event()
        # Root becomes that user before anything is done with what it says.
        met = letters.meet(path, of_anybody=has_to_be_there and os.geteuid() == 0)
        if met is None:
            if has_to_be_there:
                raise FatalError(f"unable to upgrade: nobody listens at {path!a}")
            self._listening = letters.listen(path)
            return
        self._way, message = met
        facts = message.content["facts"]
        listening, door, self.hosts, self.standard_error, *others = message.fds
        self.listening = std.socket(fileno=listening)
        self._listening = std.socket(fileno=door)
        if facts["status"] is not None:
            self.status = facts["status"], std.socket(fileno=others.pop(0))
        if facts["guardian"]:
            self._guardian = letters.Way(std.socket(fileno=others.pop(0)))
        self.owner = self._way.uid, self._way.gid
        self.arguments = facts["arguments"]
        self.environment = {**os.environ, **facts["environment"]}
        # The other end of the way may have been made by a copy before that one.
        self._way.pid = facts["pid"]
        if message.content["workers"]:
            self._ways = [letters.Way(std.socket(fileno=fd)) for fd in others]
        else:
            self._ways, self._way = [self._way], None

    @property
    def is_taking(self) -> bool:
        """Whether there is a copy before us that has not given all yet."""
        return self._first.is_taking if self._first is not None else bool(self._way or self._ways)

    def introduce(
        self,
        arguments: Sequence[str],
        listening: int,
        hosts: int,
        status: tuple[str, int] | None,
        log_failure: Callable[[str, int], None],
    ) -> None:
        """Take note of what the next copy is to know.

        Args:
            arguments: our command line.
            listening: the descriptor of the listening socket.
            hosts: the descriptor of the hosts directory.
            status: the path of our status socket, and its descriptor.
            log_failure: called, in the first process among several, with why an upgrade has failed,
                and the process id of the new copy.
        """
        environment = self.environment
        self._facts = {
            "pid": os.getpid(),
            "arguments": list(arguments),
            "environment": {
                name: environment[name] for name in _FROM_SUPERVISOR if name in environment
            },
            "status": status and status[0],
            "guardian": self._guardian is not None,
        }
        self._fds = [hosts, _STANDARD_ERROR]
        if status is not None:
            self._fds.append(status[1])
        if self._guardian is not None:
            self._fds.append(self._guardian.fileno())
        self._first = FirstProcess(
            self._listening,
            self._way,
            self._facts,
            [listening, *self._fds],
            self._on_taken,
            log_failure,
            self._guardian,
            stays=self._stays,
        )

    # --- A process that serves

    async def begin(self, sessions: Sessions) -> None:
        """Wait until clients may be accepted; what the copy before us has comes by and by.

        Raises:
            FatalError: that goes on, and we are to end.
        """
        ways, self._ways = self._ways, []
        self._taking = [Taking(way, sessions, self._on_over) for way in ways]
        for taking in self._taking:
            await taking.wait_for_start()
        if not ways:
            self._is_over.set()

    def _on_over(self) -> None:
        if all(taking.is_over for taking in self._taking):
            self._is_over.set()

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
        if not all(taking.is_whole for taking in self._taking):
            listener.leave()
            await sessions.limit.wait_until_empty()
            return on_given(None)
        self._door = Door(listener, sessions, on_given)
        if self._worker is None:
            for taking in self._taking:
                self._on_taken()
                if taking.guardian is not None:
                    self._guardian = taking.guardian
                    self._facts["guardian"] = True
                    self._fds.append(taking.guardian.fileno())
            if self._guardian is not None:
                sessions.loop.watch(
                    self._guardian.fileno(), _Heeding(self._guardian, sessions.loop), EPOLLIN
                )
            self._door.stays = self._stays and self._guardian is None
            self._door.open(self._listening, self._facts, self._fds)
        else:
            self._door.on_failure = self._worker.goes_on
            self._worker.on_give = self._door.give
        await self._door.run()

    def refuse(self) -> None:
        """Let no copy in any more, and take no more from one."""
        for taking in self._taking:
            taking.refuse("the new copy was asked to end")
        if self._door is not None:
            self._door.close()
        self._listening.close()

    def continue_log(self) -> None:
        """Write, from now on, where the copy before us has written; read from nowhere."""
        assert self.standard_error is not None
        os.dup2(self.standard_error, _STANDARD_ERROR)
        with open(os.devnull, "r+b") as null:
            for fd in range(_STANDARD_ERROR):
                os.dup2(null.fileno(), fd)

    def stay(self) -> None:
        """If another copy has taken over, and this process is to stay, return when that ends."""
        successor = None
        if self._first is not None:
            successor = self._first.successor
        if self._door is not None and self._door.stays:
            successor = self._door.successor
        if successor is not None:
            stay(successor)

    def close(self) -> None:
        """Close what is left."""
        self._listening.close()
        for way in (self._way, self._guardian, *self._ways):
            if way is not None:
                way.close()
        if self._first is not None:
            self._first.end()

    # --- Several processes

    def become(self, worker: Worker, workers: int) -> None:
        """Take note that this process is that worker, of so many, from now on."""
        self._worker = worker
        self._listening.close()
        for way in self._way, self._guardian:
            if way is not None:
                way.close()
        mine = self._ways[worker.number - 1 :: workers]
        for way in self._ways:
            if way not in mine:
                way.close()
        self._ways = mine

    def on_started(self) -> None:
        """Forget what is meant for workers: all of them have been started."""
        for way in self._ways:
            way.close()
        self._ways = []

    def look(self, workers: Workers) -> None:
        """Look, in the first process, whether there is something to be done."""
        assert self._first is not None
        self._first.look(workers)


class _Heeding:
    """Does what the process says that stays in the supervisor's sight."""

    def __init__(self, way: letters.Way, loop: EventLoop) -> None:
        self._way = way
        self._loop = loop

    def on_event(self, events: int) -> None:
        if not heed(self._way):
            self._loop.unwatch(self._way.fileno())

    def abort(self) -> None:
        """Nothing: it is no connection."""
