"""TLS records → handshake bytes.

Law: knows the five bytes in front of a fragment and nothing of what is inside. Bytes in, fragments
out, in any segmentation; what cannot be the start of a handshake is refused at the first byte that
shows it.
"""

from collections.abc import Iterator
from typing import Final

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["HANDSHAKE", "HEADER", "MAX_RECORD", "Records"]

# struct { ContentType type; ProtocolVersion legacy_record_version; uint16 length; } TLSPlaintext;
HEADER: Final = 5

# RFC 8446 section 5.1: "The length MUST NOT exceed 2^14 bytes."
MAX_RECORD: Final = 2**14

HANDSHAKE: Final = 22  # ContentType, RFC 8446 section 5.1


class Records:
    """The record layer of a client that has not yet finished its first message.

    Attributes:
        count: Records whose header has been read.
        announced: Bytes of fragments, in all, that those headers announced.
        left: Bytes of the current record's fragment that have not come yet; 0 between records.
    """

    __slots__ = ("_header", "announced", "count", "left")

    def __init__(self) -> None:
        self.count = 0
        self.announced = 0
        self.left = 0
        self._header = b""

    @property
    def header_missing(self) -> int:
        """Between records: bytes until this layer can say more, the type first, then the rest."""
        return HEADER - len(self._header) if self._header else 1

    def fragments(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes of the stream, whatever their number, and strip the headers.

        A generator: a record is looked at only when the fragment before it did not suffice, so
        that nothing behind a complete message can spoil it.

        Args:
            data: New bytes of the stream.

        Yields:
            The handshake bytes in `data`, in pieces. At the end of a header the piece may be
            empty: `count` and `announced` have news even if the fragment has not begun.

        Raises:
            HelloError: not_handshake (unexpected_message), record_overflow (record_overflow) or
                empty_record (decode_error).
        """
        position = 0
        while position < len(data):
            if not self.left:
                start = position
                position += HEADER - len(self._header)
                self._header += data[start:position]
                if not self._read_header():
                    return
            fragment = data[position : position + self.left]
            position += len(fragment)
            self.left -= len(fragment)
            yield fragment

    def _read_header(self) -> bool:
        """Judge what there is of a header; say whether it was whole."""
        header = self._header
        # RFC 8446 section 5.1: "Handshake messages MUST NOT be interleaved with other record
        # types. That is, if a handshake message is split over two or more records, there MUST NOT
        # be any other records between them."
        if header[0] != HANDSHAKE:
            raise HelloError(
                Alert.UNEXPECTED_MESSAGE,
                Reason.NOT_HANDSHAKE,
                f"record of content type {header[0]}, not handshake",
            )
        if len(header) < HEADER:
            return False
        # legacy_record_version, bytes 1 and 2: "This field is deprecated and MUST be ignored for
        # all purposes." (RFC 8446 section 5.1)
        length = header[3] << 8 | header[4]
        # "An endpoint that receives a record that exceeds this length MUST terminate the
        # connection with a "record_overflow" alert." (RFC 8446 section 5.1)
        if length > MAX_RECORD:
            raise HelloError(
                Alert.RECORD_OVERFLOW,
                Reason.RECORD_OVERFLOW,
                f"record of {length} bytes, more than {MAX_RECORD}",
            )
        # "Implementations MUST NOT send zero-length fragments of Handshake types" (RFC 8446
        # section 5.1). They would also let a client send headers for ever and say nothing.
        if length == 0:
            raise HelloError(
                Alert.DECODE_ERROR, Reason.EMPTY_RECORD, "handshake record with nothing in it"
            )
        self._header = b""
        self.count += 1
        self.announced += length
        self.left = length
        return True
