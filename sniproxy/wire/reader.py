"""Bounded reads: the one place that turns bytes into numbers, and the one that checks lengths.

Law: nothing is read outside the bytes that were given, and nothing left over is forgiven. Every
failure is the same `HelloError`, because RFC 8446 section 6 has one answer: "Peers which receive a
message which cannot be parsed according to the syntax (e.g., have a length extending beyond the
message boundary or contain an out-of-range length) MUST terminate the connection with a
"decode_error" alert."

The names are those of the TLS presentation language (RFC 8446 section 3): `opaque` is a vector, a
length and so many bytes; the 8 or 16 behind it are the bits of its length. What is inside a vector
is cut out and read by itself, so the end of the bytes is the only bound there is.

Every connection begins with this, and in CPython a call costs more than what it does here. So there
are few of them, and what is wrong is found out only where something is.
"""

from collections.abc import Mapping
from struct import Struct, error

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["Reader", "entries", "malformed", "opaque8", "opaque16"]


class Reader:
    """A position that moves forward over bytes.

    Every method that reads raises `HelloError` (decode_error, malformed_hello) where the bytes
    do not suffice or a length is outside its limits.
    """

    __slots__ = ("_data", "_position", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        """Read `data`; `what` is the RFC's name of it, for error messages."""
        self._data = data
        self._what = what
        self._position = 0

    def skip(self, count: int) -> None:
        """Step over `count` bytes."""
        self._position += count
        if self._position > len(self._data):
            raise malformed(f"{self._what} ends {self._position - len(self._data)} bytes too early")

    def rest(self) -> bytes:
        """Read all that is left."""
        start = self._position
        self._position = len(self._data)
        return self._data[start:]

    def opaque8(self, what: str, minimum: int = 0, maximum: int = 0xFF) -> bytes:
        """Read `opaque what<minimum..maximum>` whose length takes one byte."""
        data = self._data
        start = self._position + 1
        if start <= len(data):
            stop = start + data[start - 1]
            if start + minimum <= stop <= start + maximum and stop <= len(data):
                self._position = stop
                return data[start:stop]
        raise self._no_vector(what, start, minimum, maximum)

    def opaque16(self, what: str, minimum: int = 0) -> bytes:
        """Read `opaque what<minimum..2^16-1>` whose length takes two bytes."""
        data = self._data
        start = self._position + 2
        if start <= len(data):
            stop = start + (data[start - 2] << 8 | data[start - 1])
            if start + minimum <= stop <= len(data):
                self._position = stop
                return data[start:stop]
        raise self._no_vector(what, start, minimum, 0xFFFF)

    def left_over(self) -> HelloError:
        """Return what is to be raised where this should have been the end."""
        return malformed(f"{len(self._data) - self._position} bytes left over in {self._what}")

    def _no_vector(self, what: str, start: int, minimum: int, maximum: int) -> HelloError:
        """Say what is wrong with the vector whose inside would begin at `start`."""
        if start > len(self._data):
            return malformed(f"{self._what} ends before {what}")
        length = int.from_bytes(self._data[self._position : start])
        if not minimum <= length <= maximum:
            return malformed(f"{what} of {length} bytes, not {minimum} to {maximum}")
        return malformed(f"{self._what} ends {start + length - len(self._data)} bytes too early")


def opaque8(data: bytes, what: str, inside: str, minimum: int) -> bytes:
    """Read what is one `opaque inside<minimum..2^8-1>` and nothing more.

    Args:
        data: All of it.
        what: The RFC's name of `data`.
        inside: That of the vector.
        minimum: The fewest bytes that it may have.

    Raises:
        HelloError: malformed_hello.
    """
    if data and data[0] == len(data) - 1 >= minimum:
        return data[1:]
    reader = Reader(data, what)
    reader.opaque8(inside, minimum)
    raise reader.left_over()


def opaque16(data: bytes, what: str, inside: str, minimum: int) -> bytes:
    """Read what is one `opaque inside<minimum..2^16-1>` and nothing more; else as `opaque8`."""
    if len(data) > 1 and data[0] << 8 | data[1] == len(data) - 2 >= minimum:
        return data[2:]
    reader = Reader(data, what)
    reader.opaque16(inside, minimum)
    raise reader.left_over()


def entries(
    data: bytes, what: str, header: Struct, wanted: Mapping[int, str], duplicate: Reason
) -> dict[int, bytes]:
    """Walk over a list of `struct { type; opaque data<0..2^16-1>; }` up to its end.

    The loop does no more than it must for an entry that nobody wants: a hello has some twenty
    extensions, and this is most of the time that it takes. That the last entry ends where the list
    does is looked at once, after it: before that, nothing in any of them has been looked at.

    Args:
        data: The list.
        what: The RFC's name of it.
        header: Unpacks a type and a length.
        wanted: Types, and the RFC's names of what they mark.
        duplicate: The reason to give where one of them comes twice.

    Returns:
        The data of the wanted entries, by type.

    Raises:
        HelloError: malformed_hello, or `duplicate` (illegal_parameter).
    """
    position, end = 0, len(data)
    unpack, size = header.unpack_from, header.size
    found: dict[int, bytes] = {}
    try:
        while position < end:
            kind, length = unpack(data, position)
            position += size + length
            if kind in wanted:
                if kind in found:
                    detail = f"two entries {wanted[kind]} in {what}"
                    raise HelloError(Alert.ILLEGAL_PARAMETER, duplicate, detail)
                found[kind] = data[position - length : position]
    except error:
        position = end + 1  # the header reaches beyond all the bytes there are
    if position != end:
        raise malformed(f"{what} ends inside an entry")
    return found


def malformed(detail: str) -> HelloError:
    """Return the error for bytes that break the syntax."""
    return HelloError(Alert.DECODE_ERROR, Reason.MALFORMED_HELLO, detail)
