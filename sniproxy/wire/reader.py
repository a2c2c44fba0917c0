"""Bounded reads: the one place that turns bytes into numbers, and the one that checks lengths.

Law: a `Reader` never looks outside its bounds, and `end()` never forgives what is left over.
Every failure is the same `HelloError`, because RFC 8446 section 6 has one answer: "Peers which
receive a message which cannot be parsed according to the syntax (e.g., have a length extending
beyond the message boundary or contain an out-of-range length) MUST terminate the connection with
a "decode_error" alert."

The names are those of the TLS presentation language (RFC 8446 section 3): uint8, and vectors, a
length and so many bytes, which are either opaque or have an inside to be read. Sub-readers share
the bytes of their parent and differ in their bounds; only `opaque` copies.
"""

import struct
from collections.abc import Mapping

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["Reader"]

_EXTENSION_HEADER = struct.Struct("!HH")  # extension_type, length of extension_data


class Reader:
    """A position that moves forward over bytes and stops at a bound.

    Every method that reads raises `HelloError` (decode_error, malformed_hello) where the bytes
    do not suffice or a length is outside its limits.

    Where a method is a little longer than it could be, it was measured: in CPython a call costs
    more than what these methods do, and every connection begins with some twenty of them.
    """

    __slots__ = ("_data", "_end", "_position", "_what")

    def __init__(self, data: bytes, what: str, start: int = 0, end: int | None = None) -> None:
        """Read `data[start:end]`; `what` is the RFC's name of it, for error messages."""
        self._data = data
        self._what = what
        self._position = start
        self._end = len(data) if end is None else end

    @property
    def left(self) -> int:
        """How many bytes have not been read."""
        return self._end - self._position

    def skip(self, count: int) -> int:
        """Step over `count` bytes and return where they begin."""
        start = self._position
        stop = start + count
        if stop > self._end:
            raise _malformed(f"{self._what} ends {stop - self._end} bytes too early")
        self._position = stop
        return start

    def u8(self) -> int:
        """Read a uint8."""
        return self._data[self.skip(1)]

    def opaque8(self, what: str, minimum: int = 0, maximum: int = 0xFF) -> bytes:
        """Read `opaque what<minimum..maximum>` whose length takes one byte."""
        start = self._position + 1
        if start > self._end:
            raise _malformed(f"{self._what} ends before {what}")
        length = self._data[start - 1]
        self._enter(what, start, length, minimum, maximum)
        return self._data[start : start + length]

    def opaque16(self, what: str, minimum: int = 0) -> bytes:
        """Read `opaque what<minimum..2^16-1>` whose length takes two bytes."""
        start = self._enter16(what, minimum)
        return self._data[start : self._position]

    def vector16(self, what: str, minimum: int = 0) -> "Reader":
        """Read a vector whose length takes two bytes, and return a reader of its inside."""
        start = self._enter16(what, minimum)
        return Reader(self._data, what, start, self._position)

    def extensions(self, wanted: Mapping[int, str]) -> dict[int, "Reader"]:
        """Walk over a list of `struct { uint16 type; opaque data<0..2^16-1>; }` up to the end.

        The loop does no more than it must for an extension that nobody wants, for it is most of
        the time that a hello takes. That the last extension ends where the list does is looked at
        once, after it: before that, nothing has been read from any of them.

        Args:
            wanted: Extension types, and the RFC's names of them.

        Returns:
            Readers of the data of the wanted extensions, by type.

        Raises:
            HelloError: malformed_hello, or duplicate_extension (illegal_parameter).
        """
        data, position, end = self._data, self._position, self._end
        unpack = _EXTENSION_HEADER.unpack_from
        found: dict[int, Reader] = {}
        try:
            while position < end:
                extension_type, length = unpack(data, position)
                start = position + 4
                position = start + length
                if extension_type in wanted:
                    # RFC 8446 section 4.2: "There MUST NOT be more than one extension of the same
                    # type in a given extension block." Which of two would the backend believe?
                    if extension_type in found:
                        raise _duplicate(wanted[extension_type])
                    found[extension_type] = Reader(data, wanted[extension_type], start, position)
        except struct.error:
            position = end + 1  # the header reaches beyond all the bytes there are
        if position != end:
            raise _malformed(f"{self._what} ends inside an extension")
        self._position = end
        return found

    def end(self) -> None:
        """Declare that everything has been read; raise if something is left."""
        if self._position != self._end:
            raise _malformed(f"{self.left} bytes left over in {self._what}")

    def _enter16(self, what: str, minimum: int) -> int:
        """Step over a vector whose length takes two bytes; return where its inside begins."""
        start = self._position + 2
        if start > self._end:
            raise _malformed(f"{self._what} ends before {what}")
        length = self._data[start - 2] << 8 | self._data[start - 1]
        self._enter(what, start, length, minimum, 0xFFFF)
        return start

    def _enter(self, what: str, start: int, length: int, minimum: int, maximum: int) -> None:
        """Step over the inside of a vector, if its length is right."""
        if not minimum <= length <= maximum:
            raise _malformed(f"{what} of {length} bytes, not {minimum} to {maximum}")
        stop = start + length
        if stop > self._end:
            raise _malformed(f"{self._what} ends {stop - self._end} bytes too early")
        self._position = stop


def _malformed(detail: str) -> HelloError:
    return HelloError(Alert.DECODE_ERROR, Reason.MALFORMED_HELLO, detail)


def _duplicate(what: str) -> HelloError:
    return HelloError(Alert.ILLEGAL_PARAMETER, Reason.DUPLICATE_EXTENSION, f"two extensions {what}")
