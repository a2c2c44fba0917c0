"""A copy that has given all, and stays: for a supervisor that knows only what it has started.

s6 and its like supervise a process id. When that ends they start the program anew, which finds the
port taken by the copy that has taken over. So the first one stays in its place, passes signals on,
and ends with the one that serves. Copies between these two end as usual.
"""

import os
import signal
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from sniproxy.service.process1 import WANTED
from sniproxy.service.signals import do_nothing
from sniproxy.upgrade.letters import ORDER, UpgradeError, Way

# Seconds between two looks whether the other one has ended.
_LOOK_EVERY: Final = 0.5


def stay(way: Way) -> None:
    """Stay until the copy at the other end has ended, and pass signals on to it."""
    wanted: Collection[int] = WANTED
    for number in wanted:
        signal.signal(number, do_nothing)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    while _is_there(way):
        received = signal.sigtimedwait(wanted, _LOOK_EVERY)
        if received is not None:
            with suppress(OSError):  # it has just ended
                way.send(ORDER, signal=received.si_signo)
    way.close()


def _is_there(way: Way) -> bool:
    try:
        message = way.receive()
    except BlockingIOError:
        return True
    except (UpgradeError, OSError):
        return False
    message.close()
    return bool(message.letter)


def heed(way: Way) -> bool:
    """Do what one that stays has been told, if anything; return whether it is still there."""
    try:
        while True:
            message = way.receive()
            message.close()
            if message.letter != ORDER:
                break
            os.kill(os.getpid(), message.content["signal"])
    except BlockingIOError:
        return True
    except (UpgradeError, OSError):
        pass
    # Nobody looks after us any more, and its supervisor starts another one.
    os.kill(os.getpid(), signal.SIGTERM)
    return False
