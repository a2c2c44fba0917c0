"""Why a connection was refused: one closed list of reasons."""

from enum import StrEnum

from mutual_tls.dial import DialReason
from mutual_tls.end import TLSReason


class WrapReason(StrEnum):
    """Why a connection was refused, where neither TLS nor the network is to blame."""

    # What the directory says.
    UNKNOWN_NAME = "unknown_name"  # nothing is said of that name
    ADDRESS_NOT_ALLOWED = "address_not_allowed"  # the name has fixed addresses: others
    PORT_NOT_ALLOWED = "port_not_allowed"
    MISCONFIGURED = "misconfigured"
    UNKNOWN_CHECKER = "unknown_checker"  # no plugin has a certificate checker of that name
    # What a certificate checker does.
    CERTIFICATE_REJECTED = "certificate_rejected"
    CHECKER_FAILED = "checker_failed"  # it has a fault, so nobody knows what it would have said
    # What the server does before TLS begins.
    STARTTLS_DECLINED = "starttls_declined"  # it does not offer TLS
    STARTTLS_FAILED = "starttls_failed"  # it says what the protocol does not have, or nothing


Reason = WrapReason | DialReason | TLSReason


class Refusal(Exception):  # noqa: N818 - it is an answer as well
    """The connection is refused; the message says more than the reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
