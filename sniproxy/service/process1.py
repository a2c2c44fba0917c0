"""Being process 1, as in a container. To be imported before all else.

For process 1 a signal has no default action, pid_namespaces(7): a SIGTERM that comes before there
is a handler for it is lost, and loading the rest of the program takes a fifth of a second. So the
signals that will be wanted are blocked; a blocked signal is kept.

Who is orphaned in the container becomes a child of process 1. When it ends it stays as a zombie,
unless process 1 waits for it, or ignores SIGCHLD, wait(2).
"""

import os
import signal
from typing import Final

# What asks to drain or to end, and what asks for the status.
WANTED: Final = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

if os.getpid() == 1:
    signal.pthread_sigmask(signal.SIG_BLOCK, WANTED)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
