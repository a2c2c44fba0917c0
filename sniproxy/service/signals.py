"""Signals become events.

SIGHUP and SIGTERM ask to drain; SIGINT, or a second signal, to end now. SIGUSR1 asks how it goes.
SIGUSR2 and SIGALRM are ignored: they mean something to other servers, and must not end this one.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

import trio

from sniproxy.service.process1 import WANTED

_IGNORED: Final = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


def ignore_habits() -> None:
    """Ignore what is no reason to end. SIGUSR1 is, until there is something to tell."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """What the administrator has asked for so far.

    Attributes:
        drain, end: Set when that is asked for.
        on_status: Called when the status is asked for.
    """

    def __init__(self) -> None:
        self.drain = trio.Event()
        self.end = trio.Event()
        self.on_status: Callable[[], None] = lambda: None

    async def receive(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive until cancelled; once started, no signal is lost or kills the process."""
        for each in WANTED:
            # What they are set back to in the end. Not SIG_IGN: to set that throws away what
            # process 1 has blocked so far, sigaction(2).
            signal.signal(each, do_nothing)
        try:
            with trio.open_signal_receiver(*WANTED) as received:
                # Process 1 has blocked them.
                signal.pthread_sigmask(signal.SIG_UNBLOCK, WANTED)
                task_status.started()
                async for number in received:
                    if number == signal.SIGUSR1:
                        self.on_status()
                        continue
                    if number == signal.SIGINT or self.drain.is_set():
                        self.end.set()
                    self.drain.set()
        finally:
            # One more signal while the process exits is too late to mean anything, and not to be
            # taken for what it died of.
            for each in WANTED:
                signal.signal(each, signal.SIG_IGN)


def do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal: do not end, and do not throw away others of its kind that are blocked."""
