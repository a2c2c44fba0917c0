"""The alerts a router sends, by their RFC names, and the record that carries one.

Law: numbers in, seven bytes out. Which failure earns which alert is decided where it is noticed.
"""

from enum import IntEnum

__all__ = ["Alert", "alert_record"]


class Alert(IntEnum):
    """AlertDescription, RFC 8446 section 6: those that this program sends and no others."""

    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    MISSING_EXTENSION = 109
    UNRECOGNIZED_NAME = 112


# A record header: content type alert(21), version, length 2. TLS 1.3 fixes the version of every
# record but an initial ClientHello's at 0x0303 (RFC 8446 section 5.1), and older clients ignore
# it on an alert that ends the connection. Then AlertLevel fatal(2): RFC 8446 section 6.2 has no
# error alert of a lesser level.
_FATAL = bytes([21, 0x03, 0x03, 0x00, 0x02, 2])


def alert_record(alert: Alert) -> bytes:
    """Return the TLS record of a fatal alert.

    Args:
        alert: The AlertDescription.

    Returns:
        Seven bytes, ready to be sent in the clear before any handshake (RFC 8446 section 6).
    """
    return _FATAL + bytes([alert])
