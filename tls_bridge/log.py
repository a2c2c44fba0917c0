"""What tls-bridge and tls-bridge-peer log: the lines of every service, and refusals.

As in the SNI router, the noise of one client or of one host must not hide another: beside the first
of each reason, each client and each host is told of once in ten seconds for each reason.
"""

import os
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from syslog import LOG_INFO, LOG_WARNING

from sniproxy.service.eventlog import EventLog
from sniproxy.service.linelimit import PerKey
from sniproxy.service.syslogd import Syslog
from tls_bridge.refusal import ANSWERS

# Clients, and hosts, that are told of in ten seconds. A client can make up any host.
_MOST_KEYS = 256

# Statuses from here on put the blame on us, or on what is behind us.
_OURS = 500


class Log(EventLog):
    """Writes event lines, as an `EventLog`, and refusals."""

    def __init__(
        self,
        program: str,
        syslogd: Syslog | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(program, syslogd, environment, clock)
        self._clients = PerKey(_MOST_KEYS)
        self._hosts = PerKey(_MOST_KEYS)

    def refusal(
        self, reason: StrEnum, client: str, name: str | None, peer: str | None, detail: str
    ) -> None:
        """Say why a client was refused.

        Args:
            reason: a word.
            client: its address, as `show_address` writes it.
            name: what it asked for, if that is known.
            peer: who was to carry it, or has.
            detail: the reason in more words.
        """
        now = self._clock()
        is_due = self._clients.admit((client.rpartition(":")[0], reason), now)
        if name is not None:
            is_due |= self._hosts.admit((name, reason), now)
        if self.admit(reason, is_due=is_due):
            status = ANSWERS[reason].status
            priority = LOG_WARNING if status >= _OURS else LOG_INFO
            fields = {"client": client, "name": name, "peer": peer, "reason": reason}
            self.event("refused", priority, **fields, status=status, detail=detail)

    def identity(self, word: str, detail: str) -> None:
        """Say what became of an identity."""
        self.event(word, LOG_INFO if word == "identity_loaded" else LOG_WARNING, detail=detail)

    def bad_line(self, path: Path, number: int, why: str) -> None:
        """Say that a line of a file was skipped."""
        self.event("bad_line", LOG_WARNING, file=path, line=number, detail=why)
