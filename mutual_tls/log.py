"""What the programs that speak TLS log beside the lines of every service: refusals, identities.

As in the SNI router, the noise of one client or of one name must not hide another: beside the first
of each reason, each client and each name is told of once in ten seconds for each reason.
"""

import os
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from syslog import LOG_INFO, LOG_WARNING

from sniproxy.service.eventlog import EventLog
from sniproxy.service.linelimit import PerKey
from sniproxy.service.syslogd import Syslog

# Clients, and names, that are told of in ten seconds. A client can make up any name.
_MOST_KEYS = 256


class Log(EventLog):
    """Writes event lines, as an `EventLog`; and says which refusals are to be written."""

    def __init__(
        self,
        program: str,
        syslogd: Syslog | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(program, syslogd, environment, clock)
        self._clients = PerKey(_MOST_KEYS)
        self._names = PerKey(_MOST_KEYS)

    def admits(self, reason: StrEnum, client: str, name: str | None) -> bool:
        """Tell whether the line of a refusal may be written; count it if not.

        Args:
            reason: of the refusal.
            client: its address and port, as `show_address` writes it.
            name: what it asked for, if that is known.
        """
        now = self._clock()
        is_due = self._clients.admit((client.rpartition(":")[0], reason), now)
        if name is not None:
            is_due |= self._names.admit((name, reason), now)
        return self.admit(reason, is_due=is_due)

    def identity(self, word: str, detail: str) -> None:
        """Say what became of an identity."""
        self.event(word, LOG_INFO if word == "identity_loaded" else LOG_WARNING, detail=detail)
