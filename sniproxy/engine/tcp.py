"""What Linux tells of a TCP connection, and what it does with a peer that does not answer."""

import array
import contextlib
import fcntl
import struct
import termios
from _socket import IPPROTO_TCP, TCP_INFO, TCP_USER_TIMEOUT, socket

# Milliseconds that bytes may stay unacknowledged before the connection is reset (tcp(7)): a client
# that vanished amid a download is gone then. The same two minutes after which keep-alive notices a
# silent one. Without it the kernel goes on for a quarter of an hour.
USER_TIMEOUT = 120_000

# Seconds without progress after which it is asked why. Well below USER_TIMEOUT.
_ASK_AFTER = 20.0

# struct linger {1, 0}: close(2) sends a reset and drops what was not sent, socket(7).
LINGER_0 = struct.pack("ii", 1, 0)

# struct tcp_info in linux/tcp.h: eight bytes, then words of 32 bits, of which this is the fifth.
_UNACKED = struct.Struct("@24xI")


def set_user_timeout(sock: socket) -> None:
    """Set `USER_TIMEOUT` again, where `spare_slow_reader` has taken it back.

    Accepted sockets have it from the beginning: they inherit it from the listening one.

    Raises:
        OSError: setsockopt(2) failed; Multipath TCP does not have the option.
    """
    sock.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT)


def unacknowledged(sock: socket) -> int:
    """Return how many bytes, sent or still to be sent, the peer has not acknowledged.

    The end that `shutdown` sends counts as one. This is SIOCOUTQ, tcp(7).
    """
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return count[0]


def spare_slow_reader(sock: socket, seconds: float) -> None:
    """Keep the kernel from resetting a peer that lives but does not read, a film that is paused.

    RFC 9293 §3.8.6.1: the sender must probe "even if the send window is zero", and RFC 1122
    §4.2.2.17 wants the connection kept open while the answers come. Linux does that, but not
    under TCP_USER_TIMEOUT, which counts from the moment when the window was closed. So that is
    taken back where bytes wait and none is on its way. A peer that vanishes after that has the
    quarter of an hour.

    Args:
        sock: a TCP socket with `USER_TIMEOUT`.
        seconds: how long nothing has been moved to it.
    """
    if _ASK_AFTER <= seconds < USER_TIMEOUT / 1000:
        with contextlib.suppress(OSError):
            if unacknowledged(sock) and not _in_flight(sock):
                sock.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, 0)


def expect_answers(sock: socket, seconds: float) -> None:
    """Undo `spare_slow_reader`: there is progress again, after that many seconds without."""
    if seconds >= _ASK_AFTER:
        with contextlib.suppress(OSError):
            set_user_timeout(sock)


def _in_flight(sock: socket) -> int:
    """Return how many segments have been sent and not been acknowledged."""
    (unacked,) = _UNACKED.unpack(sock.getsockopt(IPPROTO_TCP, TCP_INFO, _UNACKED.size))
    return int(unacked)
