"""Messages between two copies of the program, and how they find each other."""

import array
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import Any, Final

from sniproxy.service import peer
from sniproxy.service.bind import listen_unix
from sniproxy.service.fatal import FatalError

# Of the format of all messages, and of what is in them. Who speaks another one is refused, and
# replaced as before: by a restart.
VERSION: Final = 2

# SCM_MAX_FD in net/scm.h.
MOST_DESCRIPTORS: Final = 253

# Bytes of a message. What is long is in a memory file.
_LONGEST: Final = 1 << 16

# The length of the JSON in a memory file; bytes that it refers to are behind it.
_HEADER: Final = struct.Struct("@Q")

# Seconds that the old copy may take to answer before it serves on; it does so in its loop.
_PATIENCE: Final = 10.0


class UpgradeError(Exception):
    """The other copy will not, or can't; the message says why."""


class Letter(str):
    """What a message is: see `sniproxy.upgrade`."""

    __slots__ = ()


HELLO: Final = Letter("H")
LISTEN: Final = Letter("L")
READY: Final = Letter("R")
START: Final = Letter("S")
YES: Final = Letter("Y")
BATCH: Final = Letter("B")
TAKEN: Final = Letter("T")
GIVEN: Final = Letter("G")
DONE: Final = Letter("D")
NEVER_MIND: Final = Letter("X")
ORDER: Final = Letter("O")
END: Final = Letter("")  # the other one has gone


@dataclass
class Message:
    """What was received.

    Attributes:
        letter: What it is.
        content: What it says.
        fds: The descriptors in it. They belong to whoever has received them.
    """

    letter: Letter
    content: dict[str, Any] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            os.close(self.fds.pop())


class Way:
    """A connection to the other copy.

    Args:
        sock: of the type SOCK_SEQPACKET, connected; owned from now on.

    Attributes:
        pid, uid, gid: Of the other copy.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self.pid, self.uid, self.gid = peer.credentials(sock)

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._sock.fileno()

    def is_ours(self) -> bool:
        """Tell whether the other one is the same user, or root."""
        return self.uid in (0, os.geteuid())

    def send(self, letter: Letter, fds: list[int] | None = None, **content: Any) -> None:
        """Send a message.

        Raises:
            OSError: the other one has gone, or does not read (EAGAIN).
        """
        data = letter.encode() + json.dumps(content).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            BlockingIOError: there is none yet.
            TimeoutError: likewise, of a way that waits.
            UpgradeError: it can't be understood; or no descriptors are left for those in it.
        """
        while True:
            try:
                data, rights, flags, _ = self._sock.recvmsg(
                    _LONGEST,
                    socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize),
                    socket.MSG_CMSG_CLOEXEC,
                )
                break
            except ConnectionResetError:
                # It has closed with a message of ours unread. That is told once, and first; what it
                # has said before is still to come, and its last word matters.
                continue
        fds = array.array("i")
        for level, kind, content in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        message = Message(Letter(data[:1].decode(errors="replace")), fds=list(fds))
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            message.close()
            raise UpgradeError("not all of a message, or of its descriptors, could be received")
        if data:
            if (understood := _understood(data[1:])) is None:
                message.close()
                raise UpgradeError("a message can't be understood")
            message.content = understood
        return message

    def wait(self, seconds: float) -> None:
        """Let `receive` wait so long from now on; 0 is not at all."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def keep_open(self) -> None:
        """Let nobody close it before this process ends."""
        _kept_open.append(self._sock)
        self._sock = self._sock.dup()


_kept_open: list[socket.socket] = []


def _understood(data: bytes) -> dict[str, Any] | None:
    """Return the object of JSON that `data` is; None if it is none."""
    try:
        content = json.loads(data)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def write_memory(content: Any, blob: bytes | bytearray = b"") -> int:
    """Return the descriptor of a memory file with that in it, as JSON, and bytes behind it.

    Raises:
        OSError: memfd_create(2) or write(2) failed.
    """
    header = json.dumps(content).encode()
    memory = os.memfd_create("sniproxy-upgrade", os.MFD_CLOEXEC)
    try:
        left = memoryview(_HEADER.pack(len(header)) + header + blob)
        while left:
            left = left[os.write(memory, left) :]
    except OSError:
        os.close(memory)
        raise
    return memory


def read_memory(memory: int) -> tuple[Any, memoryview]:
    """Return what `write_memory` has written; close the file."""
    try:
        data = memoryview(os.pread(memory, os.fstat(memory).st_size, 0))
    finally:
        os.close(memory)
    (size,) = _HEADER.unpack_from(data)
    end = _HEADER.size + size
    return json.loads(bytes(data[_HEADER.size : end])), data[end:]


def listen(path: str) -> socket.socket:
    """Return the socket at which a new copy can ask to take over.

    Raises:
        FatalError: it can't be made.
    """
    # Nobody else could do anything: whoever connects is asked who it is, too.
    listening = listen_unix(path, socket.SOCK_SEQPACKET, 0o600)
    listening.setblocking(False)
    return listening


def accept(listening: socket.socket) -> Way | None:
    """Return the way to a copy that has connected; None if there is none."""
    try:
        sock, _ = listening.accept()
    except OSError:  # EAGAIN: it has gone; EMFILE
        return None
    way = Way(sock)
    if way.is_ours():
        return way
    way.close()
    return None


def check_hello(message: Message) -> None:
    """Make sure that a message is the first one of a copy that speaks as we do.

    Raises:
        UpgradeError: it is not.
    """
    version = message.content.get("version")
    if message.letter != HELLO or version != VERSION:
        raise UpgradeError(f"version {version} of the protocol is not {VERSION}, ours")


def meet(path: str, *, of_anybody: bool = False) -> tuple[Way, Message] | None:
    """Return the way to the copy that serves now, and what it says to begin with.

    Args:
        path: where it listens.
        of_anybody: whether it may be another user than we.

    Returns:
        None if there is none.

    Raises:
        FatalError: there is one, and it can't be replaced in this way.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # It may be busy with another copy.
    sock.settimeout(_PATIENCE)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise FatalError.of(f"take over from the copy at {path}", error) from None
    way = Way(sock)
    way.wait(_PATIENCE)
    try:
        if not (of_anybody or way.is_ours()):
            raise UpgradeError("it belongs to somebody else")
        way.send(HELLO, version=VERSION)
        message = way.receive()
        if message.letter != LISTEN:
            message.close()
            why = message.content.get("why", "it has ended, or knows another protocol")
            raise UpgradeError(why)
    except (UpgradeError, OSError) as error:
        way.close()
        raise FatalError(f"unable to take over from the copy at {path}: {error}") from None
    way.wait(0)
    return way, message
