"""Being process 1, as in a container. To be imported before all else.

For process 1 a signal has no default action, pid_namespaces(7): a SIGTERM that comes before there
is a handler for it is lost, and loading the rest of the program takes a fifth of a second. So the
signals that will be wanted are blocked; a blocked signal is kept. What comes while Python itself
starts is lost all the same.

Who is orphaned in the container becomes a child of process 1. When it ends it stays as a zombie,
unless process 1 waits for it, or ignores SIGCHLD, wait(2).
"""

# Both are there when Python has started. To load signal or typing takes as long again as that.
import _signal  # type: ignore[import-not-found]  # what is inside of signal; typeshed has it not
import os

# What asks to drain or to end, and what asks for the status.
WANTED: tuple[int, ...] = (_signal.SIGHUP, _signal.SIGTERM, _signal.SIGINT, _signal.SIGUSR1)

if os.getpid() == 1:
    _signal.pthread_sigmask(_signal.SIG_BLOCK, WANTED)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
