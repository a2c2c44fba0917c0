"""What is asked of the kernel for every connection, and its words for that.

The names are those of the manual pages: epoll(7), socket(7) and so on. They are constants here for
the sake of the compiled build, which has such at hand, and looks up what belongs to one of Python's
modules each time that it is used.
"""

import _socket
import os
import select
from typing import Final

EPOLLERR: Final = select.EPOLLERR
EPOLLET: Final = select.EPOLLET
EPOLLHUP: Final = select.EPOLLHUP
EPOLLIN: Final = select.EPOLLIN
EPOLLOUT: Final = select.EPOLLOUT
EPOLLPRI: Final = select.EPOLLPRI
EPOLLRDHUP: Final = select.EPOLLRDHUP

AF_UNIX: Final = _socket.AF_UNIX
MSG_DONTWAIT: Final = _socket.MSG_DONTWAIT
MSG_PEEK: Final = _socket.MSG_PEEK
SHUT_WR: Final = _socket.SHUT_WR
SO_PEERCRED: Final = _socket.SO_PEERCRED
SOCK_NONBLOCK: Final = _socket.SOCK_NONBLOCK
SOCK_STREAM: Final = _socket.SOCK_STREAM
SOL_SOCKET: Final = _socket.SOL_SOCKET

access: Final = os.access
chdir: Final = os.chdir
fchdir: Final = os.fchdir
