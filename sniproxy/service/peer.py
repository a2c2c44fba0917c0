"""Who is at the other end of a Unix socket: SO_PEERCRED in unix(7)."""

import struct
from _socket import SO_PEERCRED, SOL_SOCKET, socket

# struct ucred: pid, uid, gid.
UCRED = struct.Struct("iII")


def credentials(sock: socket) -> tuple[int, int, int]:
    """Return the process, the user and the group: of who called connect(2), or listen(2)."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, UCRED.size))
    return pid, uid, gid
