"""Signals become events.

SIGHUP and SIGTERM ask to drain; SIGINT, or a second signal, to end now.
"""

import signal

import trio


class Signals:
    """What the administrator has asked for so far."""

    def __init__(self) -> None:
        self.drain = trio.Event()
        self.end = trio.Event()

    async def receive(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive until cancelled; once started, no signal is lost or kills the process."""
        wanted = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
        for each in wanted:
            # What they are set back to in the end: one more signal while the process exits is too
            # late to mean anything, and not to be taken for what it died of.
            signal.signal(each, signal.SIG_IGN)
        with trio.open_signal_receiver(*wanted) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGINT or self.drain.is_set():
                    self.end.set()
                self.drain.set()
