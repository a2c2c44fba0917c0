"""One line per event: a fixed first word, then key=value. Supervisors add the time.

Lines go to standard error, or to syslog where standard error is no place for them (inetd makes it
the listening socket). A line that can't be written now is dropped: no full disk, and no reader that
has fallen behind, may stop the service.
"""

import contextlib
import os
import select
import signal
import syslog
import traceback

from sniproxy.engine.listener import Address

# Characters of a value that are worth a line: any hostname, and what else a client may call one.
_LONGEST_VALUE = 300


class Log:
    """Writes event lines.

    Args:
        to_syslog: write to syslog(3), facility daemon. It is opened now: a chroot may come.

    Attributes:
        worker: The number of the process among several, for every line; None if it is alone.
    """

    def __init__(self, *, to_syslog: bool = False) -> None:
        self.worker: int | None = None
        self._to_syslog = to_syslog
        # Not O_NONBLOCK: that would be shared with whoever else writes there.
        self._writable = select.poll()
        self._writable.register(2, select.POLLOUT)
        if to_syslog:
            syslog.openlog("sniproxy", syslog.LOG_PID | syslog.LOG_NDELAY, syslog.LOG_DAEMON)

    def event(self, word: str, priority: int = syslog.LOG_INFO, /, **fields: object) -> None:
        """Write one line. Fields that are None are left out."""
        fields = {"worker": self.worker} | fields
        pairs = (f"{key}={_printable(value)}" for key, value in fields.items() if value is not None)
        self._write(priority, " ".join((word, *pairs)))

    def worker_died(self, worker: int, pid: int, status: int) -> None:
        """Say that a worker has ended by itself; `status` is that of wait(2)."""
        code = os.waitstatus_to_exitcode(status)
        cause = f"exit code {code}" if code >= 0 else _signal_name(-code)
        self.event("worker_died", syslog.LOG_ERR, worker=worker, pid=pid, cause=cause)

    def bug(self, error: BaseException) -> None:
        """Write the traceback of an exception that nobody expected."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(syslog.LOG_ERR, f"bug {line}")

    def _write(self, priority: int, line: str) -> None:
        if self._to_syslog:
            syslog.syslog(priority, line)
            return
        # A pipe that can be written to at all takes PIPE_BUF bytes without waiting, pipe(7).
        data = f"sniproxy: {line}".encode("ascii", "backslashreplace")[: select.PIPE_BUF - 1]
        if self._writable.poll(0):
            with contextlib.suppress(OSError):
                # One write, so that lines of several processes do not mix.
                os.write(2, data + b"\n")


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


def show_address(address: Address) -> str:
    """Return `address` the way people write it: 192.0.2.1:443, [2001:db8::1]:443."""
    host, port = address[:2]
    if "." in host:
        # An IPv4 client of a dual-stack socket.
        host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
