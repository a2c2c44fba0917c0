"""Why a connection was refused: one closed list of reasons."""

from enum import StrEnum

from mutual_tls.refusal import SessionReason


class PodReason(StrEnum):
    """Why a connection was refused, where neither TLS nor the network is to blame."""

    NOT_REDIRECTED = "not_redirected"  # it was made to our own port
    PORT_NOT_ALLOWED = "port_not_allowed"  # pod/ingress has others
    CLIENT_NOT_ALLOWED = "client_not_allowed"  # its certificate is for nobody in clients
    SERVER_SILENT = "server_silent"
    NO_TLS_ANSWER = "no_tls_answer"  # a server that may be a plain one has not answered our hello
    PROGRAM_SILENT = "program_silent"  # the program here does not accept
    PROGRAM_CLOSED = "program_closed"  # nor wants to hear who has connected


EXPECTED: frozenset[StrEnum] = frozenset(
    {PodReason.NOT_REDIRECTED, PodReason.PORT_NOT_ALLOWED, SessionReason.CAPACITY}
)
