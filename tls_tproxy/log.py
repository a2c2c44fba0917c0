"""What tls-tproxy logs: the lines of every service, and refusals."""

from syslog import LOG_INFO, LOG_WARNING

from mutual_tls import log
from mutual_tls.refusal import Refusal
from sniproxy.service.syslogd import Syslog
from tls_tproxy.refusal import EXPECTED


class Log(log.Log):
    """Writes event lines, and refusals."""

    def __init__(self, syslogd: Syslog | None = None) -> None:
        super().__init__("tls-tproxy", syslogd)

    def refusal(
        self, refusal: Refusal, client: str, destination: str | None, name: str | None
    ) -> None:
        """Say why a connection was refused.

        Args:
            refusal: why.
            client: its address and port, as `show_address` writes it.
            destination: where it was to go.
            name: what that address is called, if it is known.
        """
        reason = refusal.reason
        priority = LOG_INFO if reason in EXPECTED else LOG_WARNING
        if self.admits(reason, client, name or destination):
            fields = {"client": client, "destination": destination, "name": name, "reason": reason}
            self.event("refused", priority, **fields, detail=str(refusal))

    def problem(self, detail: str) -> None:
        """Say what can't be read, and refuses nobody by itself."""
        self.event("unreadable", LOG_WARNING, detail=detail)

    def ports(self, ports: str) -> None:
        """Say which ports are redirected from now on."""
        self.event("redirecting", LOG_INFO, ports=ports)
