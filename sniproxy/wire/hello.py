"""A stream of bytes → one ClientHello.

Law: bytes in, a verdict out; no socket, no clock, no waiting. The verdict depends on the bytes and
never on how they were cut, into segments by the network or into records by the client, and it falls
at the first byte that decides it. What comes after the message is not looked at.

The three layers of the stream are one file each: `records` takes off the record headers, this one
puts the handshake message together, `client_hello` reads it.
"""

from typing import Final

from .alert import Alert
from .client_hello import ClientHello, parse_client_hello
from .errors import HelloError, Reason
from .records import HANDSHAKE, HEADER, MAX_RECORD, Records

__all__ = ["MAX_HANDSHAKE", "MAX_WIRE", "HelloReader", "read_at_once"]

# The longest body of a ClientHello that is read. With post-quantum key shares a hello has 1.8 KB,
# but one extension alone, with a session ticket, may have 64 KB (RFC 8446 section 4.6.1). The
# length field could announce 16 MB.
MAX_HANDSHAKE: Final = 65_536

# Where the last byte of the hello may stand on the wire. One third of it is for record headers: the
# largest message fits in records of eleven bytes. The caller may peek, so what is here and what the
# kernel adds for itself must fit the receive buffer of a socket, 128 KiB by default.
MAX_WIRE: Final = 98_304

# struct { HandshakeType msg_type; uint24 length; ...body } Handshake;  RFC 8446 section 4
_HANDSHAKE_HEADER: Final = 4
_CLIENT_HELLO: Final = 1  # HandshakeType

_BOTH_HEADERS: Final = HEADER + _HANDSHAKE_HEADER


def read_at_once(data: bytes) -> ClientHello | None:
    """Read a hello that is all there, and alone in its first record, as nearly every one is.

    A `HelloReader` says the same of it, but takes half as much time again.

    Args:
        data: The stream from its first byte, as far as it is there.

    Returns:
        The hello; None if only a `HelloReader` can tell.

    Raises:
        HelloError: As `HelloReader.feed`.
    """
    if len(data) >= _BOTH_HEADERS:
        length = data[3] << 8 | data[4]
        end = HEADER + length
        if (
            data[0] == HANDSHAKE
            and length <= MAX_RECORD
            and data[5] == _CLIENT_HELLO
            and data[6] << 16 | data[7] << 8 | data[8] == length - _HANDSHAKE_HEADER
            and end <= len(data)
        ):
            # Nothing of what comes after the message is looked at. Most often nothing does.
            message = data if end == len(data) else data[:end]
            return parse_client_hello(message, _BOTH_HEADERS)
    return None


class HelloReader:
    """Reads a ClientHello from the beginning of a TLS stream.

    Attributes:
        size: Bytes fed so far.
        missing: No fewer bytes than these, whatever they are, can bring a verdict or tell the
            reader what to wait for next, so there is no use in waking up for fewer; 0 after the
            verdict. `size + missing` is the mark to set with SO_RCVLOWAT while peeking.
    """

    __slots__ = ("_message", "_records", "missing", "size")

    def __init__(self) -> None:
        self.size = 0
        self.missing = 1
        self._records = Records()
        self._message = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> ClientHello | None:
        """Take the next bytes of the stream.

        Args:
            data: The bytes after the first `size` ones, any number of them. They are copied; the
                buffer may be reused at once.

        Returns:
            The hello, once its message is complete; None while it is not.

        Raises:
            HelloError: As soon as the bytes so far cannot become a hello that can be read.
            RuntimeError: The verdict has fallen already. A bug of the caller's.
        """
        if not self.missing:
            raise RuntimeError("feed() after the verdict")
        self.missing = 0  # whatever raises below is a verdict
        data = bytes(data)
        at_once = None if self.size else read_at_once(data)
        self.size += len(data)
        if at_once is not None:
            return at_once
        for fragment in self._records.fragments(data):
            self._message += fragment
            if len(self._message) >= (end := self._message_end()):
                return parse_client_hello(bytes(self._message[_HANDSHAKE_HEADER:end]))
        self.missing = self._wait_for(self._message_end() - len(self._message))
        return None

    def _message_end(self) -> int:
        """Judge what there is of the message; say how long it must be before there is more to say.

        That is its type, then the rest of its header, then, and from then on, all of it.
        """
        message = self._message
        if not message:
            return 1
        if message[0] != _CLIENT_HELLO:
            raise HelloError(
                Alert.UNEXPECTED_MESSAGE,
                Reason.NOT_CLIENT_HELLO,
                f"handshake message of type {message[0]}, not client_hello",
            )
        if len(message) < _HANDSHAKE_HEADER:
            return _HANDSHAKE_HEADER
        length = message[1] << 16 | message[2] << 8 | message[3]
        if length > MAX_HANDSHAKE:
            raise _too_large(f"message of {length} bytes, more than {MAX_HANDSHAKE}")
        end = _HANDSHAKE_HEADER + length
        # Each record costs a header, and what the records so far do not hold needs at least so
        # many full ones more: never too high an estimate, and exact at the last record.
        records = self._records
        headers = records.count
        if end > records.announced:
            headers += -(-(end - records.announced) // MAX_RECORD)  # rounded up
        wire = end + HEADER * headers
        if wire > MAX_WIRE:
            raise _too_large(f"hello of {wire} bytes on the wire or more, not {MAX_WIRE}")
        return end

    def _wait_for(self, handshake_bytes: int) -> int:
        """Convert bytes of the message, none of them useful without the last, to bytes to wait for.

        Within a record they come one for one. If the record ends before, the type of the next one
        is news first: it may be an alert.
        """
        left = self._records.left
        if not left:
            return self._records.header_missing
        return min(handshake_bytes, left + 1)


def _too_large(detail: str) -> HelloError:
    # RFC 8446 section 6.2, internal_error: an error "unrelated to the peer or the correctness of
    # the protocol". The hello may be right; it is this program that has no room for it.
    return HelloError(Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE, detail)
