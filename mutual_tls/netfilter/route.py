"""A route by which packets stay on this machine, whatever their addresses: those with a mark.

The kernel hands a packet to a socket here only if its route says that it is for this machine. For
packets that carry `mark.STAYS_HERE` a rule leads to a routing table of its own, ip-rule(8), which
says so of every address. That of IPv6 is made where the loopback device has IPv6.

Rules of routing have no owner who takes them along. So a child, a few lines of shell around ip(8),
makes them, waits for our end, and removes them. It holds nft's socket until then, too: whoever
starts next, and finds no table of ours, finds no rules of ours either.
"""

import contextlib
import subprocess
from typing import Final

from mutual_tls.netfilter import child
from mutual_tls.netfilter.mark import MASK, STAYS_HERE
from mutual_tls.netfilter.table import Nft

# The routing table, and where its rule stands among others: before the table main, 32766, and
# behind what others do first, Cilium's and Calico's below 200.
_TABLE: Final = 1443
_PREFERENCE: Final = 1443

# Seconds for the child to make its rules, and for its end: a few runs of ip(8), 2 ms each.
_PATIENCE: Final = 10.0

# What the child says when its rules are made, for IPv4 alone or for both.
_READY: Final = {b"ready -4\n": False, b"ready -4 -6\n": True}

# All of it is text of ours. Rules that a killed one has left, of whose child nobody knows, are
# removed first; so there is one, however often it was started.
_SCRIPT: Final = f"""
ip=$1
rule='fwmark {STAYS_HERE:#x}/{MASK:#x} iif lo lookup {_TABLE} pref {_PREFERENCE}'
remove() {{
    for family in -4 -6; do
        while "$ip" $family rule delete $rule; do :; done
        "$ip" $family route flush table {_TABLE}
    done 2>/dev/null
}}
add_route() {{
    "$ip" $1 route add local default dev lo table {_TABLE}
}}
fail() {{
    remove
    exit 1
}}
remove
families=-4
add_route -4 || fail
# Where the loopback device has none, it is refused.
! add_route -6 2>/dev/null || families='-4 -6'
for family in $families; do
    "$ip" $family rule add $rule || fail
done
echo "ready $families"
read -r _
remove
"""


class RouteError(Exception):
    """There is no such route; the message says why."""


class LocalRoute:
    """The route, as long as this lasts. To be made with CAP_NET_ADMIN.

    Args:
        nft: whose session lasts longer; by its table, we are the only one here.
        user: as for `Nft`.

    Attributes:
        has_ipv6: Whether it is there for IPv6, too.

    Raises:
        RouteError: it can't be made.
    """

    def __init__(self, nft: Nft, user: tuple[int, int] | None = None) -> None:
        try:
            command = [child.find("sh", "dash"), "-uc", _SCRIPT, "sh", child.find("ip", "iproute2")]
            fds = [nft.fileno()]
            self._process, self._socket = child.start(command, user=user, pass_fds=fds)
        except child.MissingProgramError as error:
            raise RouteError(f"unable to make a route: {error}") from None
        except OSError as error:
            raise RouteError(f"unable to make a route: {error.strerror}") from error
        try:
            self.has_ipv6 = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> bool:
        self._socket.settimeout(_PATIENCE)
        heard = b""
        try:
            while heard not in _READY:
                if not (data := self._socket.recv(1 << 12)):
                    detail = " ".join(heard.decode(errors="replace").split())
                    raise RouteError(f"unable to make a route: ip: {detail or 'it has ended'}")
                heard += data
        except TimeoutError:
            detail = f"it took more than {_PATIENCE:.0f} seconds"
            raise RouteError(f"unable to make a route: {detail}") from None
        return _READY[heard]

    def has_ended(self) -> bool:
        """Tell whether the child has ended, unasked; then its rules are still there."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Remove the route; when this returns it is gone."""
        self._socket.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):  # ours is another user now
                self._process.kill()
                self._process.wait(_PATIENCE)
