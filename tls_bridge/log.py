"""What tls-bridge and tls-bridge-peer log beside the lines of all programs: refusals, bad lines."""

from pathlib import Path
from syslog import LOG_INFO, LOG_WARNING

from mutual_tls import log
from mutual_tls.refusal import Refusal

# Statuses from here on put the blame on us, or on what is behind us.
_OURS = 500


class Log(log.Log):
    """Writes event lines, and refusals."""

    def refusal(
        self,
        refusal: Refusal,
        status: int,
        client: str,
        name: str | None = None,
        peer: str | None = None,
    ) -> None:
        """Say why a client was refused.

        Args:
            refusal: why.
            status: HTTP's, that the client is given.
            client: its address, as `show_address` writes it.
            name: what it asked for, if that is known.
            peer: who was to carry it, or has.
        """
        if self.admits(refusal.reason, client, name):
            priority = LOG_WARNING if status >= _OURS else LOG_INFO
            fields = {"client": client, "name": name, "peer": peer, "reason": refusal.reason}
            self.event("refused", priority, **fields, status=status, detail=str(refusal))

    def bad_line(self, path: Path, number: int, why: str) -> None:
        """Say that a line of a file was skipped."""
        self.event("bad_line", LOG_WARNING, file=path, line=number, detail=why)
