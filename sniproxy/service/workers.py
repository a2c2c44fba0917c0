"""Several processes that share a listening socket, and the one that looks after them.

A worker is a copy of the first process, made by fork(2) when everything is loaded and opened, so
that it shares the memory of all that. Each waits for the same socket; EPOLLEXCLUSIVE lets the
kernel wake one of them for a connection and not all. One that dies is replaced.

Only the first process is meant by signals, and only it speaks to the supervisor. It tells the
workers what to do through a pair of sockets each: a signal could come before a worker can take it,
and twice where a supervisor signals the whole group. The end of that says that the first process is
gone, and that is an order to drain, too: nobody would look after the worker any more. What workers
count they write into memory that all share.

Where another copy of the program takes over, each worker gives that what it has, and ends.
"""

import contextlib
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

import trio

from sniproxy.service.fatal import FatalError
from sniproxy.service.notify import Counts, Notifier
from sniproxy.service.signals import do_nothing

_DRAIN: Final = b"d"
_END: Final = b"e"
_GIVE: Final = b"g"  # with a socket, to who takes over, and the process id of that

# A letter and a number.
_LONGEST_ORDER: Final = 32

# What a worker says, with the process id of who was to take over and does not: that it goes on.
_GOES_ON: Final = b"o"

_ORDERS: Final = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)

# Seconds between two looks at what workers have counted, and at who is to be replaced.
_CHECK_EVERY: Final = 1.0

# The same, until all have begun to serve, or another copy has all; that takes milliseconds.
_FIRST_CHECK_EVERY: Final = 0.02

# Seconds between two of a worker's entries; several within a usual watchdog's time, and at least
# `_REPORTS_IN_WATCHDOG` within any.
_REPORT_EVERY: Final = 0.5
_REPORTS_IN_WATCHDOG: Final = 4

# A worker that ended within as many seconds would, if replaced at once, keep a processor busy.
_SHORT_LIFE: Final = 1.0


class SharedCounts:
    """Memory that processes share, with an entry for each worker: its counts, and the time."""

    _FIELDS: Final = 4  # of eight bytes: open, served, refused, nanoseconds of CLOCK_MONOTONIC

    def __init__(self, workers: int) -> None:
        self._fields = memoryview(mmap.mmap(-1, workers * self._FIELDS * 8)).cast("q")

    def write(self, index: int, counts: Counts) -> None:
        """Write a worker's entry."""
        first = index * self._FIELDS
        values = counts.open, counts.served, counts.refused, time.monotonic_ns()
        for number, value in enumerate(values):
            self._fields[first + number] = value

    def read(self, index: int) -> tuple[Counts, float]:
        """Return a worker's counts, and the seconds since it wrote them."""
        first = index * self._FIELDS
        *counts, written = self._fields[first : first + self._FIELDS]
        return Counts(*counts), (time.monotonic_ns() - written) / 1e9

    def has_entry(self, index: int) -> bool:
        """Tell whether the worker has written anything yet."""
        return self._fields[(index + 1) * self._FIELDS - 1] != 0

    def clear(self, index: int) -> None:
        """Wipe out the entry of a worker that has ended."""
        for number in range(self._FIELDS):
            self._fields[index * self._FIELDS + number] = 0


class Worker:
    """What a worker is told, as by `Signals`, and what it tells, as to a `Notifier`.

    Attributes:
        number: Which one it is, from 1.
        drain, end: Set when it is told to.
        on_give: Called with a socket, and who is at the other end, when it is told to give all that
            it has.
    """

    def __init__(
        self, shared: SharedCounts, index: int, orders: socket.socket, report_every: float
    ) -> None:
        self.number = index + 1
        self.drain = trio.Event()
        self.end = trio.Event()
        self.on_status: Callable[[], None] = lambda: None  # the first process is asked
        self.on_give: Callable[[socket.socket, int], None] = lambda way, pid: way.close()
        self._shared = shared
        self._orders = orders
        self._report_every = report_every

    async def receive(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive orders until cancelled, or until there is nobody who could give any."""
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._orders)
                order, fds, _, _ = socket.recv_fds(self._orders, _LONGEST_ORDER, 1)
                if order.startswith(_GIVE):
                    for fd in fds:  # none if there was no descriptor left for it
                        self.on_give(socket.socket(fileno=fd), int(order.removeprefix(_GIVE)))
                    continue
                if order == _END:
                    self.end.set()
                self.drain.set()
                if not order:
                    return
        finally:
            self._orders.close()

    def goes_on(self, successor: int) -> None:
        """Say that the process that was to take over does not."""
        with contextlib.suppress(OSError):  # the first process is gone
            self._orders.send(_GOES_ON + str(successor).encode())

    def ready(self) -> None:
        """Nothing: the first entry says so."""

    def stopping(self) -> None:
        """Nothing: it was told to."""

    def succeeded_by(self, pid: int) -> None:
        """Nothing: likewise."""

    async def run(self, counts: Callable[[], Counts]) -> None:
        """Until cancelled, keep the entry up to date, from inside the loop that serves."""
        try:
            while True:
                self._shared.write(self.number - 1, counts())
                await trio.sleep(self._report_every)
        finally:
            self._shared.write(self.number - 1, counts())


class Upgrading(Protocol):
    """Upgrades, as far as they concern the first process among several."""

    @property
    def is_taking(self) -> bool:
        """Whether there is a copy before us that has not given all yet."""

    def on_started(self) -> None:
        """Forget what is meant for workers: all of them have been started."""

    def look(self, workers: "Workers") -> None:
        """Look whether there is something to be done."""


class Workers:
    """The workers, seen from the first process.

    Attributes:
        is_giving: Whether they give all to another copy. Who has done that ends, and is not
            replaced as long as this is so.

    Args:
        count: how many there are to be.
        notifier: how to speak to the supervisor; owned from now on.
        on_death: called with the number, the process id and the wait status of a worker that ended
            without having been told to.
        on_status: called with what all have counted, when SIGUSR1 asks for it.
    """

    def __init__(
        self,
        count: int,
        notifier: Notifier,
        on_death: Callable[[int, int, int], None],
        on_status: Callable[[Counts], None],
    ) -> None:
        self._count = count
        self._notifier = notifier
        self._on_death = on_death
        self._on_status = on_status
        self._shared = SharedCounts(count)
        seconds = notifier.watchdog or _REPORT_EVERY * _REPORTS_IN_WATCHDOG
        self._report_every = min(_REPORT_EVERY, seconds / _REPORTS_IN_WATCHDOG)
        self._check_every = min(_CHECK_EVERY, seconds / 2)
        self.is_giving = False
        self._has_to_take = False
        self._given: list[int] = []  # indices of those who have ended meanwhile
        # pid: index, way, birth
        self._alive: dict[int, tuple[int, socket.socket, float]] = {}
        self._start_at = dict.fromkeys(range(count), 0.0)  # index: when it is to be started
        self._counts_of_ended = Counts()  # of those who have ended
        self._ordered = b""

    def run(
        self,
        on_drain: Callable[[], None],
        on_check: Callable[[], None] = lambda: None,
        upgrade: Upgrading | None = None,
    ) -> Worker | None:
        """Start the workers, and look after them until a signal has asked for the end.

        Args:
            on_drain: called when that signal has come.
            on_check: called every now and then, at least once a second.
            upgrade: looks as often.

        Returns:
            In a new process what it needs to be a worker; in the first one None, at the end, when
            all have ended.

        Raises:
            OSError: the first workers can't be started (EAGAIN, ENOMEM).
            FatalError: those that were to take over have ended instead, and said why; or what
                `on_check` raises.
        """
        try:
            return self._run(on_drain, on_check, upgrade)
        except FatalError:
            # The workers drain: that is what the end of their orders means.
            for _, way, _ in self._alive.values():
                way.close()
            raise

    def _run(
        self,
        on_drain: Callable[[], None],
        on_check: Callable[[], None],
        upgrade: Upgrading | None,
    ) -> Worker | None:
        # Blocked, so that none is lost between two looks. Not ignored: SIGCHLD would not be sent at
        # all, and of the others those would be thrown away that have come before.
        wanted = {*_ORDERS, signal.SIGCHLD, signal.SIGUSR1}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
        for order in _ORDERS:
            signal.signal(order, do_nothing)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        is_ready = False
        self._has_to_take = upgrade is not None and upgrade.is_taking
        while self._alive or not self._ordered:
            now = time.monotonic()
            # Nobody new while others give all that they have; for who would ask the new one?
            due = [] if self.is_giving else [i for i, at in self._start_at.items() if at <= now]
            for index in due:
                try:
                    worker = self._start(index)
                except OSError:
                    if not is_ready:
                        raise
                    self._start_at[index] = now + _SHORT_LIFE
                    continue
                if worker is not None:
                    # The signals are for the first process, even if they are sent to all.
                    for order in _ORDERS:
                        signal.signal(order, signal.SIG_IGN)
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                    return worker
            if not is_ready and all(map(self._shared.has_entry, range(self._count))):
                is_ready = True
                self._has_to_take = False
                self._notifier.ready()
            self._notify()
            on_check()
            if upgrade is not None:
                upgrade.on_started()
                upgrade.look(self)
                if self._ordered == _GIVE:
                    on_drain()
                    break
            is_quiet = is_ready and not self.is_giving
            if upgrade is not None and upgrade.is_taking:
                is_quiet = False
            received = signal.sigtimedwait(
                wanted, self._check_every if is_quiet else _FIRST_CHECK_EVERY
            )
            if received is None:
                continue
            if received.si_signo == signal.SIGCHLD:
                self._reap()
                continue
            if received.si_signo == signal.SIGUSR1:
                self._on_status(self._counts())
                continue
            if not self._ordered:
                self._notifier.stopping()
                self._start_at.clear()
                on_drain()
            is_last = self._ordered or received.si_signo == signal.SIGINT
            self._order(_END if is_last else _DRAIN)
        return None

    def _start(self, index: int) -> Worker | None:
        """Start a worker; return what it needs to be one in its process, None in this one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            # Whoever holds our end keeps a worker waiting for orders.
            for _, other, _ in self._alive.values():
                other.close()
            ours.close()
            self._notifier.close()
            return Worker(self._shared, index, theirs, self._report_every)
        theirs.close()
        ours.setblocking(False)
        self._alive[pid] = index, ours, time.monotonic()
        del self._start_at[index]
        return None

    def _order(self, order: bytes) -> None:
        self._ordered = order
        for _, way, _ in self._alive.values():
            with contextlib.suppress(OSError):  # it has just ended
                way.send(order)

    @property
    def alive(self) -> int:
        """How many there are."""
        return len(self._alive)

    def give(self, ways: Sequence[socket.socket], successor: int) -> None:
        """Have each worker give all that it has to that process, by a way of its own."""
        self.is_giving = True
        for (_, orders, _), way in zip(list(self._alive.values()), ways, strict=True):
            with contextlib.suppress(OSError):  # it has just ended
                socket.send_fds(orders, [_GIVE + str(successor).encode()], [way.fileno()])

    def go_on(self) -> None:
        """Let nobody give any more, and replace those who have ended."""
        self.is_giving = False
        now = time.monotonic()
        while self._given:
            self._start_at[self._given.pop()] = now

    def somebody_goes_on(self, successor: int) -> bool:
        """Tell whether a worker has said that the process that is to take over does not.

        It may still say so of one before that.
        """
        wanted = _GOES_ON + str(successor).encode()
        said = False
        for _, way, _ in self._alive.values():
            with contextlib.suppress(OSError):
                while word := way.recv(_LONGEST_ORDER):
                    said |= word == wanted
        return said

    def end(self, successor: int) -> None:
        """End: another process has what they had, and all of them have ended."""
        self._notifier.succeeded_by(successor)
        self._ordered = _GIVE

    def add_counts(self, counts: Counts) -> None:
        """Add what was counted before us."""
        self._counts_of_ended = self._counts_of_ended.plus(counts)

    @property
    def counts_of_ended(self) -> Counts:
        """What those have counted who have ended, but for those who have given all."""
        return self._counts_of_ended

    def _reap(self) -> None:
        """Take note of workers that have ended, and have them replaced."""
        while self._alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid not in self._alive:
                continue  # a child of the program that has become this one by exec
            index, way, born = self._alive.pop(pid)
            way.close()
            counts, _ = self._shared.read(index)
            if self.is_giving and status == 0:
                # Who goes on counts what it has counted.
                self._shared.clear(index)
                self._given.append(index)
                continue
            if self._has_to_take:
                raise FatalError("unable to start: a worker has ended")
            self._counts_of_ended = self._counts_of_ended.plus(replace(counts, open=0))
            self._shared.clear(index)
            if not self._ordered:
                self._on_death(index + 1, pid, status)
                now = time.monotonic()
                self._start_at[index] = now + (_SHORT_LIFE if now - born < _SHORT_LIFE else 0)

    def _notify(self) -> None:
        self._notifier.status(self._counts())
        # A worker that is stuck is the supervisor's business, as one process alone would be.
        watchdog = self._notifier.watchdog
        ages = (self._shared.read(index)[1] for index, _, _ in self._alive.values())
        if watchdog and all(age < watchdog / 2 for age in ages):
            self._notifier.keep_alive()

    def _counts(self) -> Counts:
        """Return what all workers have counted, those that have ended included."""
        total = self._counts_of_ended
        for index, _, _ in self._alive.values():
            total = total.plus(self._shared.read(index)[0])
        return total
