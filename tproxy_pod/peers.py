"""What servers were found to speak: TLS, or not."""

import time
from collections.abc import Callable
from typing import Final

from mutual_tls.dial import Endpoint

# Seconds for which somebody who has shaken hands is taken for one who speaks TLS: longer than it
# takes to start a server anew, so that nobody talks us into plaintext meanwhile.
_TLS_FOR: Final = 600.0

# And seconds for which somebody who did not is taken for a plain one, and not asked again. A server
# that learns TLS is met by it soon.
_PLAIN_FOR: Final = 60.0

# Servers that are remembered; then the oldest is forgotten, which costs it a question.
_MOST: Final = 4096


class Peers:
    """What is known of servers, by their addresses and ports.

    Args:
        clock: the time in seconds, of any clock that does not jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Endpoint, tuple[bool, float]] = {}  # whether it is TLS, and until when

    def note(self, server: Endpoint, *, speaks_tls: bool) -> None:
        """Remember what a server speaks."""
        self._known.pop(server, None)
        if len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        seconds = _TLS_FOR if speaks_tls else _PLAIN_FOR
        self._known[server] = speaks_tls, self._clock() + seconds

    def speaks_tls(self, server: Endpoint) -> bool | None:
        """Return what a server speaks; None if that is not known, or not any more."""
        speaks_tls, until = self._known.get(server, (None, 0.0))
        return speaks_tls if self._clock() < until else None
