"""Why a connection is refused: an exception, and the reasons that all programs have."""

from enum import StrEnum


class SessionReason(StrEnum):
    """Why a connection was refused, where neither TLS nor the network is to blame."""

    CLIENT_SILENT = "client_silent"
    CAPACITY = "capacity"  # others wait for its place, and it has not said what it wants
    MISCONFIGURED = "misconfigured"  # what the directory says can't be read, or understood


class Refusal(Exception):  # noqa: N818 - it is an answer as well
    """The connection is refused; the message says more than the reason.

    Args:
        reason: a word, of one closed list of the program's.
        detail: the reason in more words.
    """

    def __init__(self, reason: StrEnum, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
