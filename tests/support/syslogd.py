"""Who listens at /dev/log: syslog(3).

with Syslog(inside / "/dev/log") as syslog:
    ...
    assert syslog.wait_for("sniproxy", "listening").severity == LOG_INFO
"""

import re
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.daemon import eventually

# More than any message of ours.
_LONGEST = 1 << 16

# What glibc sends: priority, time, name, process id, text.
_MESSAGE = re.compile(r"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d (\S+?)\[(\d+)\]: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One that was logged.

    Attributes:
        name: Who the program says it is.
        pid: Its process id.
        facility: As in syslog(3): LOG_DAEMON.
        severity: As in syslog(3): LOG_INFO.
        text: What it said.
    """

    name: str
    pid: int
    facility: int
    severity: int
    text: str


class Syslog:
    """Receives at `path`, in a thread of its own, while the block lasts.

    Attributes:
        messages: What was received so far.
    """

    def __init__(self, path: Path) -> None:
        self.messages: list[Message] = []
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._path.unlink()
        # pytest shows it if the test fails.
        sys.stdout.write("".join(f"{each}\n" for each in self.messages))

    def _run(self) -> None:
        # Nobody sends an empty message; it is the end.
        while data := self._socket.recv(_LONGEST):
            found = _MESSAGE.fullmatch(data.decode().rstrip("\0"))
            assert found is not None, data
            priority, name, pid, text = found.groups()
            facility, severity = int(priority) & ~7, int(priority) & 7
            self.messages.append(Message(name, int(pid), facility, severity, text))

    def wait_for(self, name: str, word: str, count: int = 1) -> Message:
        """Return the message number `count` of those that the program `name` sent with `word`."""

        def found() -> list[Message]:
            return [each for each in list(self.messages) if each.name == name and word in each.text]

        eventually(lambda: len(found()) >= count)
        return found()[count - 1]
