"""What tproxy-pod logs: the lines of every service, and refusals."""

from collections.abc import Iterable
from enum import StrEnum
from syslog import LOG_INFO, LOG_WARNING

from mutual_tls import log
from mutual_tls.refusal import Refusal
from sniproxy.service.syslogd import Syslog
from tproxy_pod.pod import Overview
from tproxy_pod.refusal import EXPECTED


class Direction(StrEnum):
    """Which way a connection goes."""

    OUT = "out"
    IN = "in"


class Log(log.Log):
    """Writes event lines, and refusals."""

    def __init__(self, syslogd: Syslog | None = None) -> None:
        super().__init__("tproxy-pod", syslogd)

    def refusal(
        self,
        refusal: Refusal,
        direction: Direction,
        client: str,
        destination: str | None,
        peer: str | None,
    ) -> None:
        """Say why a connection was refused.

        Args:
            refusal: why.
            direction: which way it went.
            client: its address and port, as `show_address` writes it.
            destination: where it was to go.
            peer: the names in the client's certificate, if it has shown one.
        """
        reason = refusal.reason
        priority = LOG_INFO if reason in EXPECTED else LOG_WARNING
        if self.admits(reason, client, destination):
            self.event(
                "refused",
                priority,
                direction=direction,
                client=client,
                destination=destination,
                peer=peer,
                reason=reason,
                detail=str(refusal),
            )

    def problem(self, detail: str) -> None:
        """Say what can't be read, or done, and refuses nobody by itself."""
        self.event("unreadable", LOG_WARNING, detail=detail)

    def taken(self, overview: Overview) -> None:
        """Say which connections are taken from now on, and which are left alone of those."""
        egress = overview.egress
        ports = _show(sorted(overview.taken_ports)) if overview.is_default_plain else "all"
        self.event(
            "intercepting",
            LOG_INFO,
            out=_show(network for network, is_taken in egress if is_taken) or "none",
            out_except=_show(network for network, is_taken in egress if not is_taken),
            ports=ports or "none",
            ports_except=_show(sorted(overview.plain_ports)),
            probes=_show(overview.probes),
        )


def _show(values: Iterable[object]) -> str | None:
    return ",".join(map(str, values)) or None
