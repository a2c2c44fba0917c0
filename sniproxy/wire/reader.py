"""Bounded reads: lists of entries, and the errors for what is not in order.

Law: nothing is read outside the bytes that were given, and nothing left over is forgiven. Every
failure is the same `HelloError`, because RFC 8446 section 6 has one answer: "Peers which receive a
message which cannot be parsed according to the syntax (e.g., have a length extending beyond the
message boundary or contain an out-of-range length) MUST terminate the connection with a
"decode_error" alert."

Every connection begins with this, and in CPython a call costs more than what it does here. So there
are few of them, and what is wrong is found out only where something is.
"""

from collections.abc import Mapping
from struct import Struct, error

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["entries", "malformed", "not_one_vector", "wrong_size"]


def entries(
    data: bytes,
    position: int,
    what: str,
    header: Struct,
    wanted: Mapping[int, str],
    duplicate: Reason,
) -> dict[int, bytes]:
    """Walk over a list of `struct { type; opaque data<0..2^16-1>; }` up to its end.

    The loop does no more than it must for an entry that nobody wants: a hello has some twenty
    extensions, and this is most of the time that it takes. That the last entry ends where the list
    does is looked at once, after it: before that, nothing in any of them has been looked at.

    Args:
        data: Bytes with the list at their end.
        position: Where it begins.
        what: The RFC's name of it.
        header: Unpacks a type and a length.
        wanted: Types, and the RFC's names of what they mark.
        duplicate: The reason to give where one of them comes twice.

    Returns:
        The data of the wanted entries, by type.

    Raises:
        HelloError: malformed_hello, or `duplicate` (illegal_parameter).
    """
    end = len(data)
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


def not_one_vector(data: bytes, prefix: int, what: str, inside: str, minimum: int) -> HelloError:
    """Return the error for `data`, which should be one vector and nothing more, and is not.

    Args:
        data: All of it.
        prefix: Bytes that the length of the vector takes.
        what: The RFC's name of `data`.
        inside: That of the vector.
        minimum: The fewest bytes that it may have.
    """
    if len(data) < prefix:
        return malformed(f"{what} ends before {inside}")
    length = int.from_bytes(data[:prefix])
    if length < minimum:
        return malformed(f"{inside} of {length} bytes, not {minimum} or more")
    return wrong_size(what, prefix + length, len(data))


def wrong_size(what: str, announced: int, there: int) -> HelloError:
    """Return the error for `what`, whose lengths add up to other than the bytes there are."""
    if announced > there:
        return malformed(f"{what} ends {announced - there} bytes too early")
    return malformed(f"{there - announced} bytes left over in {what}")
