"""Telling the supervisor: sd_notify(3). Without NOTIFY_SOCKET every method does nothing."""

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sdnotify
import trio

# Seconds between two looks at the status: it is read by people.
_STATUS_EVERY = 1.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Connections that are open, and those that were served and refused so far."""

    open: int = 0
    served: int = 0
    refused: int = 0

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.open} open, {self.served} served, {self.refused} refused"

    def plus(self, other: "Counts") -> "Counts":
        """Return the sum."""
        return Counts(
            self.open + other.open, self.served + other.served, self.refused + other.refused
        )


class Notifier:
    """Speaks to the supervisor that `environment` names, if it names one.

    The socket is opened now: later there may be no way to it, in a chroot.

    Attributes:
        watchdog: Seconds after which the supervisor takes silence for death; None if it doesn't.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._systemd = None
        if environment.get("NOTIFY_SOCKET"):
            # It reads NOTIFY_SOCKET by itself; made without it, it would leak a socket. Where there
            # is nobody at the other end it has none, and leaves the one it tried with to be found.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                systemd = sdnotify.SystemdNotifier()
            if systemd.socket is not None:
                # A supervisor that does not listen must not stop us.
                systemd.socket.setblocking(False)
                self._systemd = systemd
        self.watchdog = self._systemd and _watchdog_seconds(environment)
        self._said = ""
        self._status_due = 0.0

    def close(self) -> None:
        """Close the socket; nothing more can be said."""
        if self._systemd is not None:
            self._systemd.socket.close()
            self._systemd = None

    def ready(self) -> None:
        """Say that connections are accepted from now on."""
        self._say("READY=1")

    def stopping(self) -> None:
        """Say that the drain has begun."""
        self._say("STOPPING=1")

    def succeeded_by(self, pid: int) -> None:
        """Say that another process serves from now on in the place of this one."""
        self._say(f"MAINPID={pid}")

    def failed(self, message: str) -> None:
        """Say why the service ends; systemctl status shows it until the next start."""
        self._say(f"STATUS={message}")

    def status(self, counts: Counts) -> None:
        """Say what goes on: once in a second at the most, and only what is new."""
        now = time.monotonic()
        if now >= self._status_due and (status := f"STATUS={counts}") != self._said:
            self._say(status)
            self._said = status
            self._status_due = now + _STATUS_EVERY

    def keep_alive(self) -> None:
        """Keep the watchdog quiet."""
        self._say("WATCHDOG=1")

    async def run(self, counts: Callable[[], Counts]) -> None:
        """Until cancelled, keep the status up to date and the watchdog quiet.

        This runs in the thread that serves: a loop that is stuck says nothing, and is noticed.
        """
        if self._systemd is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_status, counts)
            if self.watchdog:
                nursery.start_soon(self._keep_watchdog, self.watchdog)

    async def _keep_status(self, counts: Callable[[], Counts]) -> None:
        while True:
            self.status(counts())
            await trio.sleep(_STATUS_EVERY)

    async def _keep_watchdog(self, seconds: float) -> None:
        while True:
            self.keep_alive()
            # sd_watchdog_enabled(3) recommends half of the time.
            await trio.sleep(seconds / 2)

    def _say(self, state: str) -> None:
        if self._systemd is not None:
            self._systemd.notify(state)


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """Return WATCHDOG_USEC in seconds, if it is there and meant for this process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        seconds = int(environment["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
    return seconds if seconds > 0 else None
