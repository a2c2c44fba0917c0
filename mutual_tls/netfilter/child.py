"""Children that keep the right to change the network when we have given it up.

Each does one thing, in a program of others, and ends when the socket that it was given ends: when
we are gone, however that was.
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import Final

# The child is to outlive us by a moment, not the other way round: a terminal and a supervisor send
# these to whole groups of processes, and we may want to drain. A blocked signal stays so across
# execve(2).
_NOT_FOR_THE_CHILD: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

# Where the programs are, if the PATH is that of an ordinary user.
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


class MissingProgramError(Exception):
    """A program is not installed; the message says which, and where it is to be had."""


def find(program: str, package: str) -> str:
    """Return the path of a program.

    Args:
        program: its name.
        package: Debian's package that has it.

    Raises:
        MissingProgramError: it is not there.
    """
    path = os.pathsep.join((*os.get_exec_path(), _SYSTEM_PATH))
    if (found := shutil.which(program, path=path)) is None:
        raise MissingProgramError(f"{program} is not installed (Debian package {package})")
    return found


def start(
    command: Sequence[str],
    *,
    user: tuple[int, int] | None = None,
    pass_fds: Sequence[int] = (),
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a child; return it, and our end of the socket that it reads from and writes to.

    In copies of this process that fork(2) makes, that end is closed at once: a worker that outlives
    the first process does not keep what the child holds.

    Args:
        command: what to run, by its path.
        user: the user id and group id to run it as, with CAP_NET_ADMIN as its only right; those
            that this process will have, so that no other user may kill it. It takes root, and
            setpriv(1). None: it is run as we are.
        pass_fds: descriptors that it keeps open.

    Raises:
        MissingProgramError: setpriv is not there.
        OSError: it can't be started.
    """
    if user is not None:
        uid, gid = user
        command = [
            find("setpriv", "util-linux"),
            f"--reuid={uid:d}",
            f"--regid={gid:d}",
            "--clear-groups",
            "--inh-caps=-all,+net_admin",
            "--ambient-caps=-all,+net_admin",
            "--bounding-set=-all,+net_admin",
            "--no-new-privs",
            *command,
        ]
    ours, theirs = socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_CHILD)
    try:
        process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=theirs.fileno(),
            # No other descriptor of ours, no terminal, nothing of our environment. Where its home
            # can't be it writes no history of commands.
            close_fds=True,
            pass_fds=pass_fds,
            start_new_session=True,
            cwd="/",
            env={"HOME": "/dev/null", "LC_ALL": "C"},
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.register_at_fork(after_in_child=ours.close)
    return process, ours
