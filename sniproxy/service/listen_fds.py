"""Sockets that a supervisor has opened, from descriptor 3 on: sd_listen_fds(3)."""

import os
import re
from collections.abc import MutableMapping
from typing import Final

# SD_LISTEN_FDS_START: the first behind standard input, output and error.
_FIRST: Final = 3

_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take(environment: MutableMapping[str, str] = os.environ) -> range:
    """Return the descriptors that were passed to this process; none if there are none.

    The variables are removed, so that no child takes them for its own. Without LISTEN_PID, or with
    that of another process, they are somebody else's.
    """
    pid, count, _ = (environment.pop(name, "") for name in _VARIABLES)
    # No more digits than a descriptor can have.
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,7}", count):
        return range(0)
    return range(_FIRST, _FIRST + int(count))
