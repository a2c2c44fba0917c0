"""What is wrong with bytes that should be a vector.

Law: every failure is the same `HelloError`, because RFC 8446 section 6 has one answer: "Peers which
receive a message which cannot be parsed according to the syntax (e.g., have a length extending
beyond the message boundary or contain an out-of-range length) MUST terminate the connection with a
"decode_error" alert."

Every connection begins with a hello, and in CPython a call costs more than what it does there. So
vectors are read where they stand, and what is wrong is found out here, only where something is.
"""

from .alert import Alert
from .errors import HelloError, Reason

__all__ = ["malformed", "not_one_vector", "wrong_size"]


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
