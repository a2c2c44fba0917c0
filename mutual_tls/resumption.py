"""Sessions that were made with servers, to be resumed: less than two thirds of a full handshake.

A session counts for the context and the name that it was made with, and no other: whoever is
resumed is not verified again.
"""

import ssl
import time
from collections.abc import Callable
from typing import Final, NamedTuple

# Seconds in which one session is enough. To copy it takes 150 µs; what a server hands out is good
# for hours.
_RENEW_AFTER: Final = 60.0

# Seconds until one is looked for again where there was none: to look costs as much.
_LOOK_AGAIN_AFTER: Final = 1.0


# Names that are kept; then the oldest is forgotten. Where names are addresses of others there is no
# end to them, and a session holds a certificate.
_MOST_KEPT: Final = 4096


class _Kept(NamedTuple):
    context: ssl.SSLContext
    session: ssl.SSLSession | None
    renew_at: float


class Sessions:
    """The last session for each server name.

    Args:
        clock: the time in seconds, of any clock that does not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, _Kept] = {}

    def find(self, context: ssl.SSLContext, server_name: str) -> ssl.SSLSession | None:
        """Return a session to be resumed with that context and name; None if there is none."""
        kept = self._kept.get(server_name)
        return kept.session if kept is not None and kept.context is context else None

    def keep(self, context: ssl.SSLContext, server_name: str, connection: ssl.SSLObject) -> None:
        """Keep the session of a connection, if it is time for a new one.

        With TLS 1.3 there is none before something has been read (RFC 8446 §4.6.1: "At any time
        after the server has received the client Finished message, it MAY send a NewSessionTicket").
        """
        kept = self._kept.get(server_name)
        now = self._clock()
        if kept is not None and kept.context is context and now < kept.renew_at:
            return
        session = connection.session
        # Out of its place, and to the end of the line.
        self._kept.pop(server_name, None)
        if len(self._kept) >= _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        if session is None or not session.has_ticket:
            self._kept[server_name] = _Kept(context, None, now + _LOOK_AGAIN_AFTER)
        else:
            self._kept[server_name] = _Kept(context, session, now + _RENEW_AFTER)

    def forget(self, server_name: str) -> None:
        """Throw the session for that name away."""
        self._kept.pop(server_name, None)
