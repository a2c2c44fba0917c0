"""What the SNI router logs: the lines of every service, and why a client was refused.

The noise of one client or of one host must not hide another. So a refusal is written if it is one
of the first of its reason, or if this client, or this host, has not been named for that reason in
the last ten seconds. Only a host that exists counts: a client can make up any other name.
"""

import os
import socket
import syslog
import time
from collections.abc import Callable, Mapping

from sniproxy.service.eventlog import EventLog
from sniproxy.service.linelimit import PerKey
from sniproxy.service.syslogd import Syslog
from sniproxy.wire import Alert

# Hosts, and clients, that are told of in ten seconds, each once for each reason. Of hosts there are
# as many as the administrator has made, of clients as many as a botnet has: 26 lines a second.
_MOST_HOSTS = 1024
_MOST_CLIENTS = 256

# Of an IPv6 address, the network that one customer has at the least: RFC 4291 §2.5.4.
_IPV6_NETWORK = 8


class Log(EventLog):
    """Writes event lines, as an `EventLog`, and refusals."""

    def __init__(
        self,
        syslogd: Syslog | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("sniproxy", syslogd, environment, clock)
        self._hosts = PerKey(_MOST_HOSTS)
        self._clients = PerKey(_MOST_CLIENTS)

    def admits(self, reason: str, client: str, name: bytes | None, *, is_host: bool) -> bool:
        """Tell whether the line of what went wrong may be written; count it if not.

        Args:
            reason: a word.
            client: its address and port, as `show_address` writes it.
            name: the name that it asked for, if that is known; or what stands for many of them.
            is_host: whether there is a host of that name.
        """
        now = self._clock()
        # Each of them has to know what is written.
        is_due = self._clients.admit((_network(client), reason), now)
        if is_host and name is not None:
            # As it is looked up: each way of writing it would be a host of its own otherwise.
            is_due |= self._hosts.admit((name.lower().removesuffix(b"."), reason), now)
        return self.admit(reason, is_due=is_due)

    def refusal(
        self, reason: str, client: str, name: bytes | None, alert: Alert | None, detail: str | None
    ) -> None:
        """Say why a client was refused, and with which alert, if any.

        An alert that puts the blame on us is a warning: a host is out of order.

        Args:
            reason: a word; `admits` has allowed it.
            client: its address and port, as `show_address` writes it.
            name: the name that it asked for, if that is known.
            alert: what the client was told.
            detail: the reason in more words.
        """
        priority = syslog.LOG_WARNING if alert is Alert.INTERNAL_ERROR else syslog.LOG_INFO
        number = None if alert is None else int(alert)
        fields = {"client": client, "name": name, "reason": reason, "alert": number}
        self.event("refused", priority, **fields, detail=detail)

    def upgrade_failed(self, why: str, pid: int, given: int | None = None) -> None:
        """Say that a new copy, process `pid`, does not take over all; it has got `given`."""
        self.event("upgrade_failed", syslog.LOG_WARNING, pid=pid, given=given, detail=why)

    def proxy_header_unanswered(
        self, client: str, name: bytes | None, host: bytes | None, detail: str
    ) -> None:
        """Say that a backend has closed without a byte, after a PROXY header.

        Args:
            client: its address and port, as `show_address` writes it.
            name: the name that it asked for, if that is known.
            host: what the host is counted by, as `admits` does.
            detail: more words.
        """
        if self.admits("proxy_header_unanswered", client, host, is_host=True):
            self.event(
                "proxy_header_unanswered",
                syslog.LOG_WARNING,
                client=client,
                name=name,
                detail=detail,
            )


def _network(client: str) -> bytes | str:
    """Return what stands for the client: its IPv4 address, or its IPv6 network."""
    host = client.rpartition(":")[0]
    if not host.startswith("["):
        return host
    try:
        return socket.inet_pton(socket.AF_INET6, host[1:-1].partition("%")[0])[:_IPV6_NETWORK]
    except OSError:
        return host
