"""Which lines of a log are worth writing, when somebody can provoke as many as they like.

Both classes take the time as an argument, in seconds of any clock that does not jump.
"""

from collections.abc import Hashable

# Lines of one kind that are written at once: what goes wrong once is all there.
_BURST = 20

# Seconds of silence after which a kind is new again; and seconds between two lines of one key.
INTERVAL = 10.0


class Burst:
    """The first lines of a kind, until the kind has been quiet for `INTERVAL`."""

    __slots__ = ("_last", "_left")

    def __init__(self) -> None:
        self._left = _BURST
        self._last = 0.0

    def admit(self, now: float) -> bool:
        """Tell whether a line may be written."""
        if now - self._last >= INTERVAL:
            self._left = _BURST
        self._last = now
        if self._left:
            self._left -= 1
            return True
        return False


class PerKey:
    """One line for each key in `INTERVAL`, the first one at once.

    No more than `most` keys are remembered, each for `INTERVAL`. While that many are, no other key
    has a line: so there are no more than `most` lines in `INTERVAL`, however many keys a stranger
    makes up.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # When each key had its last line, the longest ago first: a dict keeps the order.
        self._last: dict[Hashable, float] = {}

    def admit(self, key: Hashable, now: float) -> bool:
        """Tell whether a line for `key` may be written."""
        last = self._last
        if key in last:
            if now - last[key] < INTERVAL:
                return False
            del last[key]
        elif len(last) >= self._most:
            oldest = next(iter(last))
            if now - last[oldest] < INTERVAL:
                return False
            del last[oldest]
        last[key] = now
        return True
