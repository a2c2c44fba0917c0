"""Sockets that a supervisor has opened, from descriptor 3 on: sd_listen_fds(3)."""

import os
import re
from collections.abc import MutableMapping
from itertools import chain, repeat
from typing import Final

# SD_LISTEN_FDS_START: the first behind standard input, output and error.
_FIRST: Final = 3

_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def take(environment: MutableMapping[str, str] = os.environ) -> dict[int, str]:
    """Return the descriptors that were passed to this process, each with its name, or none.

    The variables are removed, so that no child takes them for its own. Without LISTEN_PID, or with
    that of another process, they are somebody else's.
    """
    pid, count, names = (environment.pop(name, "") for name in _VARIABLES)
    # No more digits than a descriptor can have.
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,7}", count):
        return {}
    descriptors = range(_FIRST, _FIRST + int(count))
    # There need not be a name for each.
    every_name = chain(names.split(":"), repeat(""))
    return dict(zip(descriptors, every_name, strict=False))
