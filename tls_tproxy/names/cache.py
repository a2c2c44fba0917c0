"""The names that each address was looked up under, until they expire.

Law: a name is here only because `learn` was told it, for at most `LONGEST` seconds, and memory is
bounded. What had to go is unknown, so its client is refused; no name ever moves to another address.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

__all__ = ["LONGEST", "MOST_ENTRIES", "MOST_NAMES", "SHORTEST", "Cache"]

# Entries, each an address and a name: a resolver of a large site keeps about as many. An entry
# takes 0.4 kB where every address has a name of its own, so that is 0.4 GB, which nobody reaches
# who does not look up a hundred thousand names an hour.
MOST_ENTRIES: Final = 1_000_000

# Names of one address. Each may cost a handshake with the server, and all of them together have
# ten seconds: sixteen leave 0.6 s for each, two round trips around the world. On addresses that
# more names share, the last that were looked up are those that are connected to.
MOST_NAMES: Final = 16

# Seconds that a name is kept at least. The TTL says how long an address may be kept, not how long
# programs do keep it: TTL 0 has to serve the connect that follows, Java keeps an address for 30 s
# and Chromium for 60 s whatever the TTL, and a client may try another address of the same answer
# first. A name that is kept too long is not a danger: it was asked for, and the certificate is
# verified.
SHORTEST: Final = 60

# And at most, a day: resolvers don't keep an answer longer either, by default.
LONGEST: Final = 86_400

# Addresses that are looked at for having expired, whenever a name is learned. Two, so that the
# expired ones get fewer while one comes; not all of them, so that no call takes long.
_LOOKED_AT: Final = 2


class Cache:
    """Addresses, and their names.

    Args:
        clock: seconds that never go back.
        most: entries in all, an address and a name each. Beyond, the addresses that have gone
            longest without being learned are forgotten, with all of their names.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, most: int = MOST_ENTRIES
    ) -> None:
        self._clock = clock
        self._most = most
        self._count = 0
        # Names and when each expires, the newest first; the address learned last is the last one.
        # Plain tuples: a dict for each address takes twice the memory, and the garbage collector
        # would have to look at a million of them.
        self._known: OrderedDict[bytes, tuple[tuple[str, float], ...]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many entries there are, expired ones that are still in memory too."""
        return self._count

    def learn(self, address: bytes, name: str, ttl: float) -> None:
        """Note that `name` was looked up and led to `address`: it is the newest name there.

        Args:
            address: 4 or 16 bytes, as inet_pton(3) packs them.
            name: in canonical form.
            ttl: seconds for which the answer may be kept; raised to `SHORTEST`, cut to `LONGEST`.
        """
        now = self._clock()
        before = self._known.pop(address, ())
        others = [each for each in before if each[0] != name and each[1] > now]
        newest = (name, now + min(max(ttl, SHORTEST), LONGEST))
        names = (newest, *others[: MOST_NAMES - 1])
        self._known[address] = names
        self._count += len(names) - len(before)
        self._forget(now)

    def names(self, address: bytes) -> list[str]:
        """Return the names of `address`, the one that was looked up last first.

        At most `MOST_NAMES`.
        """
        now = self._clock()
        return [name for name, expires in self._known.get(address, ()) if expires > now]

    def _forget(self, now: float) -> None:
        known = self._known
        while self._count > self._most:
            self._count -= len(known.popitem(last=False)[1])
        for _ in range(_LOOKED_AT):
            address = next(iter(known), None)
            if address is None or any(expires > now for _, expires in known[address]):
                return
            self._count -= len(known.pop(address))
