"""Descriptors 0, 1 and 2, as they are found and as they are left.

A super-server such as inetd makes all three the listening socket. While one of them is open the
port stays open, and what is written there goes nowhere.
"""

import os
import stat

_STANDARD = (0, 1, 2)


def open_missing(besides: int | None = None) -> None:
    """Open /dev/null as those of the three that are closed, except for `besides`.

    Else what is opened next would be taken for them. `besides` is where the listening socket should
    be, if one should; that it is closed is a mistake to be told.
    """
    for fd in _STANDARD:
        if fd != besides and not _is_open(fd):
            _put_null(fd)


def copies_of_input() -> list[int]:
    """Return which of the three are the socket on standard input; none if there is no socket."""
    if not _is_open(0):
        return []
    status = os.fstat(0)
    if not stat.S_ISSOCK(status.st_mode):
        return []
    return [fd for fd in _STANDARD if _is_open(fd) and os.path.samestat(os.fstat(fd), status)]


def replace_copies_of_input() -> None:
    """Put /dev/null in place of `copies_of_input`.

    Raises:
        OSError: there is no /dev/null to be opened.
    """
    for fd in copies_of_input():
        _put_null(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # EBADF
        return False
    return True


def _put_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if null == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(null, fd)
        os.close(null)
