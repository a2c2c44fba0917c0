"""One line per event: a fixed first word, then key=value, or all as JSON. Supervisors add the time.

Lines go to standard error, or to syslog where standard error is no place for them (inetd makes it
the listening socket). A line that can't be written now is dropped: no full disk, and no reader that
has fallen behind, may stop the service. Nor does anybody fill the disk who provokes lines on
purpose, by a scan for names: of each kind the first lines are written, and the rest is counted.
"""

import contextlib
import json
import os
import select
import signal
import syslog
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Self

import trio

from sniproxy.service.linelimit import Burst
from sniproxy.service.notify import Counts
from sniproxy.service.syslogd import Syslog

# Characters of a value that are worth a line: any hostname, and what else a client may call one.
_LONGEST_VALUE = 300

# Bytes of a line of JSON, with what stands in front of it for the journal: PIPE_BUF.
_LONGEST_LINE = select.PIPE_BUF - 10

# Seconds between two counts of the lines that were not written.
_COUNT_EVERY = 10.0


class Seconds(float):
    """A time that is shown in milliseconds."""

    def __new__(cls, seconds: float) -> Self:
        """Round it: JSON shows all digits."""
        return super().__new__(cls, round(seconds, 3))

    def __str__(self) -> str:
        """Return it with three digits behind the point."""
        return f"{self:.3f}"


class EventLog:
    """Writes event lines of one program.

    Args:
        program: its name, the first word of each line.
        syslogd: where to write instead of standard error.
        environment: JOURNAL_STREAM is looked for, systemd.exec(5).
        clock: the time that limits go by, in seconds.

    Attributes:
        worker: The number of the process among several, for every line; None if it is alone.
        is_json: Whether each line is an object of JSON.
    """

    def __init__(
        self,
        program: str,
        syslogd: Syslog | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self.worker: int | None = None
        self.is_json = False
        self._syslogd = syslogd
        # The journal reads a priority in front of a line, sd-daemon(3); a file is to have none.
        self._to_journal = environment.get("JOURNAL_STREAM") == _device_and_inode(2)
        self._clock = clock
        self._bursts: defaultdict[str, Burst] = defaultdict(Burst)
        self._suppressed: Counter[str] = Counter()  # lines that were not written, of each kind
        # Not O_NONBLOCK: that would be shared with whoever else writes there.
        self._writable = select.poll()
        self._writable.register(2, select.POLLOUT)

    def event(self, word: str, priority: int = syslog.LOG_INFO, /, **fields: object) -> None:
        """Write one line. Fields that are None are left out."""
        fields = {"worker": self.worker} | fields
        known = {key: value for key, value in fields.items() if value is not None}
        if self.is_json:
            return self._write_json(priority, word, known)
        pairs = (f"{key}={_printable(value)}" for key, value in known.items())
        self._write(priority, " ".join((word, *pairs)))

    def exhausted(self, error: OSError) -> None:
        """Say that the machine has nothing left for one more connection."""
        if self.admit("exhausted"):
            self.event("exhausted", syslog.LOG_WARNING, reason=error.strerror)

    def worker_died(self, worker: int, pid: int, status: int) -> None:
        """Say that a worker has ended by itself; `status` is that of wait(2)."""
        code = os.waitstatus_to_exitcode(status)
        cause = f"exit code {code}" if code >= 0 else _signal_name(-code)
        self.event("worker_died", syslog.LOG_ERR, worker=worker, pid=pid, cause=cause)

    def status(self, counts: Counts) -> None:
        """Say how many connections there are, and were."""
        self.event("status", open=counts.open, served=counts.served, refused=counts.refused)

    def bug(self, error: BaseException) -> None:
        """Write the traceback of an exception that nobody expected."""
        if not self.admit("bug"):
            return
        lines = "".join(traceback.format_exception(error)).splitlines()
        for number, line in enumerate(lines, 1):
            if self.is_json:
                self._write_json(syslog.LOG_ERR, "bug", {"line": number, "detail": line})
            else:
                self._write(syslog.LOG_ERR, f"bug {line}")

    async def run(self) -> None:
        """Write the counts of what was not written, until cancelled, and then once more."""
        try:
            while True:
                await trio.sleep(_COUNT_EVERY)
                self._count()
        finally:
            self._count()

    def admit(self, kind: str, *, is_due: bool = False) -> bool:
        """Tell whether one more line of that kind may be written; count it if not.

        With `is_due` it may, whatever the limit of its kind says.
        """
        if self._bursts[kind].admit(self._clock()) or is_due:
            return True
        self._suppressed[kind] += 1
        return False

    def _count(self) -> None:
        for kind, count in self._suppressed.items():
            self.event("suppressed", reason=kind, count=count)
        self._suppressed.clear()

    def _write_json(self, priority: int, word: str, fields: dict[str, object]) -> None:
        """Write one object of JSON, with the program and the event in front."""
        most = _LONGEST_VALUE
        while True:
            shown = {key: _json_value(value, most) for key, value in fields.items()}
            line = json.dumps({"program": self._program, "event": word} | shown)
            if len(line) <= _LONGEST_LINE or not most:
                return self._write(priority, line)
            # A line that is cut off is no JSON any more, so values are.
            most //= 2

    def _write(self, priority: int, line: str) -> None:
        if self._syslogd is not None:
            self._syslogd.write(priority, line)
            return
        # A pipe that can be written to at all takes PIPE_BUF bytes without waiting, pipe(7).
        prefix = f"<{priority}>" if self._to_journal else ""
        program = "" if self.is_json else f"{self._program}: "
        data = f"{prefix}{program}{line}".encode("ascii", "backslashreplace")
        if self._writable.poll(0):
            with contextlib.suppress(OSError):
                # One write, so that lines of several processes do not mix.
                os.write(2, data[: select.PIPE_BUF - 1] + b"\n")


def _json_value(value: object, most: int) -> object:
    """Return what stands for `value` in JSON, of so many characters at the most."""
    if isinstance(value, (bool, int, float)):
        return value
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return text if len(text) <= most else text[:most] + "..."


def _device_and_inode(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals, of which few have names
        return f"signal {number}"


def _printable(value: object) -> str:
    """Return `value` as one word of printable ASCII, whatever a client sent."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    if len(text) > _LONGEST_VALUE:
        text = text[:_LONGEST_VALUE] + "..."
    if text and all("!" <= char <= "~" and char not in '"\\' for char in text):
        return text
    body = "".join(
        char if " " <= char <= "~" and char not in '"\\' else f"\\x{ord(char):02x}" for char in text
    )
    return f'"{body}"'


def show_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return `address` the way people write it: 192.0.2.1:443, [2001:db8::1]:443."""
    host, port = address[:2]
    if "." in host:
        # An IPv4 client of a dual-stack socket.
        host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
