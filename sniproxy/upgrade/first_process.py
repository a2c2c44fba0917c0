"""The first process among several, which serves nobody, when another copy takes over."""

import contextlib
import os
import socket as std
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from sniproxy.service.notify import Counts
from sniproxy.service.workers import Workers
from sniproxy.upgrade.letters import (
    DONE,
    LISTEN,
    NEVER_MIND,
    VERSION,
    UpgradeError,
    Way,
    accept,
    check_hello,
    read_memory,
    write_memory,
)
from sniproxy.upgrade.staying import heed

# Seconds that a copy which has connected may take to say who it is; it does so at once.
_PATIENCE: Final = 1.0


class FirstProcess:
    """Looks, now and then, whether another copy wants something, or has ended.

    Args:
        listening: where the next copy connects.
        before: the way to the first process of the copy before us, until that has ended.
        facts: what the next copy is told to begin with.
        fds: descriptors that it gets besides `listening`: the listening socket of clients, and what
            belongs to the facts.
        on_taken: called when the copy before us has given all.
        log_failure: called with why an upgrade has failed, and the process id of the new copy.
        guardian: the way to a copy that stays, if there is one.
        stays: whether this one does, if there is none.

    Attributes:
        successor: The way to the copy that has all, if this one stays.
    """

    def __init__(
        self,
        listening: std.socket,
        before: Way | None,
        facts: dict[str, Any],
        fds: list[int],
        on_taken: Callable[[], object],
        log_failure: Callable[[str, int], None],
        guardian: Way | None = None,
        *,
        stays: bool = False,
    ) -> None:
        self._listening = listening
        self._before = before
        self._facts = facts
        self._fds = fds
        self._on_taken = on_taken
        self._log_failure = log_failure
        self._after: Way | None = None
        self._guardian = guardian
        self._stays = stays
        self.successor: Way | None = None

    @property
    def is_taking(self) -> bool:
        """Whether the copy before us has not given all yet."""
        return self._before is not None

    def look(self, workers: Workers) -> None:
        """Do what there is to do, and wait for nothing."""
        if self._guardian is not None and not heed(self._guardian):
            self._guardian = None
            self._stays = False
        if self._before is not None:
            self._look_before(self._before, workers)
        elif self._after is not None:
            self._look_after(self._after, workers)
        else:
            self._let_in(workers)

    def end(self) -> None:
        """Close what is left."""
        for way in self._after, self._guardian:
            if way is not None:
                way.close()

    def _look_before(self, way: Way, workers: Workers) -> None:
        """Hear whether the copy before us has ended."""
        try:
            message = way.receive()
        except BlockingIOError:
            return
        except (UpgradeError, OSError):
            message = None
        if message is not None and message.letter == DONE:
            counted, _ = read_memory(message.fds.pop(0))
            workers.add_counts(Counts(**counted["counts"]))
            if message.content.get("stays"):
                self._guardian = way
                self._facts["guardian"] = True
                self._fds.append(way.fileno())
        if message is not None and message.letter == NEVER_MIND:
            # It goes on beside us, and is the one that the next copy is to meet.
            self._listening.close()
        else:
            self._on_taken()
        if way is not self._guardian:
            way.close()
        self._before = None

    def _let_in(self, workers: Workers) -> None:
        """Let a new copy in, and have all workers give it what they have."""
        if self._listening.fileno() == -1 or (way := accept(self._listening)) is None:
            return
        ways: list[std.socket] = []
        theirs: list[std.socket] = []
        try:
            way.wait(_PATIENCE)
            message = way.receive()
            message.close()
            check_hello(message)
            for _ in range(workers.alive):
                ours, other = std.socketpair(std.AF_UNIX, std.SOCK_SEQPACKET)
                ways.append(ours)
                theirs.append(other)
            client, *others = self._fds
            fds = [client, self._listening.fileno(), *others, *(each.fileno() for each in theirs)]
            way.send(LISTEN, fds, version=VERSION, facts=self._facts, workers=len(theirs))
            way.wait(0)
        except (UpgradeError, OSError) as error:
            self._give_up(way, str(error))
        else:
            workers.give(ways, way.pid)
            self._after = way
        finally:
            for each in ways + theirs:
                each.close()

    def _look_after(self, way: Way, workers: Workers) -> None:
        """Hear whether the new copy goes on, and end when it has all."""
        why = ""
        with contextlib.suppress(BlockingIOError):
            try:
                message = way.receive()
                message.close()
                why = str(message.content.get("why", "the new copy has ended"))
            except (UpgradeError, ConnectionError) as error:
                why = str(error)
        if workers.somebody_goes_on(way.pid):
            why = why or "a worker of it does not take all"
        if why:
            workers.go_on()
            self._give_up(way, why)
            self._after = None
        elif not workers.alive:
            memory = write_memory({"counts": asdict(workers.counts_of_ended), "figures": None})
            workers.end(way.pid)
            stays = self._stays and self._guardian is None
            with contextlib.suppress(OSError):
                way.send(DONE, [memory], stays=stays)
            os.close(memory)
            if stays:
                self.successor = way

    def _give_up(self, way: Way, why: str) -> None:
        self._log_failure(why, way.pid)
        with contextlib.suppress(OSError):
            way.send(NEVER_MIND, why=why)
        way.close()
