"""What the SNI router logs: the lines of every service, and why a client was refused."""

import os
import syslog
from collections.abc import Mapping

from sniproxy.service.eventlog import EventLog
from sniproxy.service.syslogd import Syslog
from sniproxy.wire import Alert


class Log(EventLog):
    """Writes event lines, as an `EventLog`, and refusals."""

    def __init__(
        self, syslogd: Syslog | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        super().__init__("sniproxy", syslogd, environment)

    def refusal(
        self, reason: str, client: str, name: bytes | None, alert: Alert | None, detail: str | None
    ) -> None:
        """Say why a client was refused, and with which alert, if any.

        An alert that puts the blame on us is a warning: a host is out of order.
        """
        if self.admit(reason):
            priority = syslog.LOG_WARNING if alert is Alert.INTERNAL_ERROR else syslog.LOG_INFO
            number = None if alert is None else int(alert)
            fields = {"client": client, "name": name, "reason": reason, "alert": number}
            self.event("refused", priority, **fields, detail=detail)
