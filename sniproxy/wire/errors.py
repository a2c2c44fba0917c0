"""What can be wrong with a hello.

Law: an error carries its answer. Whoever raises a `HelloError` says which alert the client gets
and which word the log gets; whoever catches it needs no table of its own.
"""

from enum import StrEnum

from .alert import Alert

__all__ = ["HelloError", "Reason"]


class Reason(StrEnum):
    """The closed list of words that say why a hello was refused; made to be counted and grepped."""

    NOT_HANDSHAKE = "not_handshake"
    NOT_CLIENT_HELLO = "not_client_hello"
    RECORD_OVERFLOW = "record_overflow"
    EMPTY_RECORD = "empty_record"
    HELLO_TOO_LARGE = "hello_too_large"
    MALFORMED_HELLO = "malformed_hello"
    DUPLICATE_EXTENSION = "duplicate_extension"
    DUPLICATE_NAME = "duplicate_name"
    NO_SERVER_NAME = "no_server_name"
    INVALID_NAME = "invalid_name"  # for those who judge the name; here it is only bytes


class HelloError(Exception):
    """A ClientHello that cannot be routed.

    Attributes:
        alert: What to tell the client.
        reason: What to tell the log, one word.
        detail: What to tell a person, one clause; `str(error)`. Made of field names and numbers
            only, never of bytes that the client chose.
    """

    def __init__(self, alert: Alert, reason: Reason, detail: str = "") -> None:
        super().__init__(alert, reason, detail)
        self.alert = alert
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail or self.reason.replace("_", " ")
