"""Who starts the daemon and wants to hear how it is: sd_notify(3)."""

import socket
from pathlib import Path


class Supervisor:
    """The end of NOTIFY_SOCKET that a supervisor holds."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(10)

    def hear(self, wanted: str) -> str:
        """Return the next message that begins like this."""
        while not (said := self.socket.recv(4096).decode()).startswith(wanted):
            pass
        return said
