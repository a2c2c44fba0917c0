"""Lines for syslogd, where standard error is no place for them."""

import contextlib
import os
import syslog
import time
from socket import AF_UNIX, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_STREAM, socket
from typing import Final

# Where syslogd receives.
_DEV_LOG: Final = "/dev/log"

# The kinds of socket that it may be, each with what ends a message there: what syslog(3) tries.
_KINDS: Final = ((SOCK_DGRAM, b""), (SOCK_STREAM, b"\0"))


class Syslog:
    """Writes to syslogd, facility daemon, as syslog(3) does, but does not wait for it.

    The C library's waits until there is room. So a syslogd that hangs would stop the service.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._socket: socket | None = None
        self._ending = b""
        self._stays = False
        self._connect()

    def stay(self) -> None:
        """From now on, be content with the syslogd that is connected.

        After a change of the root directory there may be somebody else at that path.
        """
        self._stays = True

    def write(self, priority: int, line: str) -> None:
        """Write a line, or drop it."""
        now = time.strftime("%b %e %H:%M:%S")
        text = f"<{syslog.LOG_DAEMON | priority}>{now} {self._name}[{os.getpid()}]: {line}"
        data = text.encode("ascii", "backslashreplace")
        # Once more where syslogd was not there, or is another one now.
        if not self._send(data) and not self._stays:
            self._connect()
            self._send(data)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, data: bytes) -> bool:
        """Send a message, or drop it; return whether there is somebody who could receive it."""
        if self._socket is None:
            return False
        data += self._ending
        try:
            # Half of a message would spoil the next one.
            return self._socket.send(data) == len(data)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _connect(self) -> None:
        self.close()
        for kind, ending in _KINDS:
            with contextlib.suppress(OSError):
                self._socket = socket(AF_UNIX, kind | SOCK_NONBLOCK)
                self._socket.connect(_DEV_LOG)
                self._ending = ending
                return
            self.close()
