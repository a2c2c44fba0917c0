"""Why a connection was refused: one closed list of reasons."""

from enum import StrEnum

from mutual_tls.refusal import SessionReason


class WrapReason(StrEnum):
    """Why a connection was refused, where neither TLS nor the network is to blame."""

    # How the client has come here.
    NOT_REDIRECTED = "not_redirected"  # it has connected to our own port
    NO_NAME = "no_name"  # nobody here has looked up a name that has that address
    # What the directory says.
    UNKNOWN_NAME = "unknown_name"  # nothing is said of that name
    ADDRESS_NOT_ALLOWED = "address_not_allowed"  # the name has fixed addresses: others
    PORT_NOT_ALLOWED = "port_not_allowed"
    UNKNOWN_CHECKER = "unknown_checker"  # no plugin has a certificate checker of that name
    # What a certificate checker does.
    CERTIFICATE_REJECTED = "certificate_rejected"
    CHECKER_FAILED = "checker_failed"  # it has a fault, so nobody knows what it would have said
    # What the server does, or does not.
    SERVER_SILENT = "server_silent"
    STARTTLS_DECLINED = "starttls_declined"  # it does not offer TLS
    STARTTLS_FAILED = "starttls_failed"  # it says what the protocol does not have, or nothing


# What is meant to happen, and is no fault of ours or of the server's: what the directory says.
EXPECTED: frozenset[StrEnum] = frozenset(
    {
        WrapReason.NOT_REDIRECTED,
        WrapReason.UNKNOWN_NAME,
        WrapReason.PORT_NOT_ALLOWED,
        SessionReason.CAPACITY,
    }
)
