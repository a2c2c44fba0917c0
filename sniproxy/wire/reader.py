"""Bounded reads: the one place that turns bytes into numbers, and the one that checks lengths.

Law: a `Reader` never looks outside its bounds, and `end()` never forgives what is left over.
Every failure is the same `HelloError`, because RFC 8446 section 6 has one answer: "Peers which
receive a message which cannot be parsed according to the syntax (e.g., have a length extending
beyond the message boundary or contain an out-of-range length) MUST terminate the connection with
a "decode_error" alert."

The names are those of the TLS presentation language (RFC 8446 section 3): uint8, uint16, uint24,
and vectors, a length and so many bytes, which are either opaque or have an inside to be read.
Sub-readers share the bytes of their parent and differ in their bounds; only `opaque` copies.
"""

from collections.abc import Iterator, Mapping
from struct import Struct

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["Reader"]

_EXTENSION_HEADER = Struct("!HH")  # extension_type, length of extension_data


class Reader:
    """A position that moves forward over bytes and stops at a bound.

    Every method that reads raises `HelloError` (decode_error, malformed_hello) where the bytes
    do not suffice or a length is outside its limits.

    Where a method is a little longer than it could be, it was measured: in CPython a call costs
    more than what these methods do, and every connection begins with some forty of them.
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
        """Step over `count` bytes and return where they begin. All other reads go through here."""
        start = self._position
        stop = start + count
        if stop > self._end:
            raise _malformed(f"{self._what} ends {stop - self._end} bytes too early")
        self._position = stop
        return start

    def u8(self) -> int:
        """Read a uint8."""
        return self._data[self.skip(1)]

    def u16(self) -> int:
        """Read a uint16."""
        at = self.skip(2)
        return self._data[at] << 8 | self._data[at + 1]

    def u24(self) -> int:
        """Read a uint24."""
        at = self.skip(3)
        return self._data[at] << 16 | self._data[at + 1] << 8 | self._data[at + 2]

    def opaque8(self, what: str, minimum: int = 0, maximum: int = 0xFF) -> bytes:
        """Read `opaque what<minimum..maximum>` whose length takes one byte."""
        length = self.u8()
        if not minimum <= length <= maximum:
            raise _out_of_range(what, length, minimum, maximum)
        start = self.skip(length)
        return self._data[start : start + length]

    def opaque16(self, what: str, minimum: int = 0, maximum: int = 0xFFFF) -> bytes:
        """Read `opaque what<minimum..maximum>` whose length takes two bytes."""
        length = self.u16()
        if not minimum <= length <= maximum:
            raise _out_of_range(what, length, minimum, maximum)
        start = self.skip(length)
        return self._data[start : start + length]

    def vector16(self, what: str, minimum: int = 0, maximum: int = 0xFFFF) -> "Reader":
        """Read a vector whose length takes two bytes, and return a reader of its inside."""
        length = self.u16()
        if not minimum <= length <= maximum:
            raise _out_of_range(what, length, minimum, maximum)
        start = self.skip(length)
        return Reader(self._data, what, start, start + length)

    def extensions(self, wanted: Mapping[int, str]) -> Iterator[tuple[int, "Reader"]]:
        """Walk over a list of `struct { uint16 type; opaque data<0..2^16-1>; }` up to the end.

        A loop over `u16` and `vector16` would say the same. This one takes a third of the time
        for what is most of a hello, and makes nothing for an extension that nobody wants.

        Args:
            wanted: Extension types, and the RFC's names of them.

        Yields:
            The type of each wanted extension, in the order of the wire, and a reader of its data.
        """
        data, position, end = self._data, self._position, self._end
        self._position = end
        while position < end:
            start = position + 4
            if start > end:
                raise _malformed(f"{self._what} ends inside the header of an extension")
            extension_type, length = _EXTENSION_HEADER.unpack_from(data, position)
            position = start + length
            if position > end:
                raise _malformed(f"extension {extension_type} ends after {self._what}")
            if extension_type in wanted:
                yield extension_type, Reader(data, wanted[extension_type], start, position)

    def end(self) -> None:
        """Declare that everything has been read; raise if something is left."""
        if self._position != self._end:
            raise _malformed(f"{self.left} bytes left over in {self._what}")


def _out_of_range(what: str, length: int, minimum: int, maximum: int) -> HelloError:
    return _malformed(f"{what} of {length} bytes, not {minimum} to {maximum}")


def _malformed(detail: str) -> HelloError:
    return HelloError(Alert.DECODE_ERROR, Reason.MALFORMED_HELLO, detail)
