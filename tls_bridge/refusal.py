"""Why a connection was refused, and what each kind of client is told: one table."""

from enum import StrEnum
from typing import NamedTuple

from mutual_tls.dial import DialReason
from mutual_tls.end import TLSReason
from mutual_tls.refusal import SessionReason
from sniproxy.wire import Alert


class BridgeReason(StrEnum):
    """Why a connection was refused, where neither TLS nor the network is to blame."""

    # What the client asks for.
    BAD_REQUEST = "bad_request"  # it is no HTTP, or no CONNECT that makes sense
    BAD_HELLO = "bad_hello"  # it is no ClientHello that can be read, or has no server name
    HEADER_TOO_LARGE = "header_too_large"
    NOT_CONNECT = "not_connect"
    LOOP = "loop"  # it has been here before
    # What the directory says.
    NO_ROUTE = "no_route"  # nothing is said of that host
    PORT_NOT_ALLOWED = "port_not_allowed"
    CLIENT_NOT_ALLOWED = "client_not_allowed"
    # What the peer, or the service, does.
    PEER_SILENT = "peer_silent"
    PEER_CLOSED = "peer_closed"  # without an answer
    PEER_NOT_HTTP = "peer_not_http"
    PEER_REFUSED = "peer_refused"  # it has answered, and not with 2xx


class Answer(NamedTuple):
    """What a client is told.

    Attributes:
        status: HTTP's, RFC 9110 §15.
        error: the type of error in Proxy-Status, RFC 9209 §2.3.
        alert: TLS's, for a client that has sent a ClientHello.
    """

    status: int
    error: str
    alert: Alert = Alert.INTERNAL_ERROR


ANSWERS: dict[StrEnum, Answer] = {
    BridgeReason.BAD_REQUEST: Answer(400, "http_request_error"),
    BridgeReason.BAD_HELLO: Answer(400, "http_request_error", Alert.DECODE_ERROR),
    BridgeReason.HEADER_TOO_LARGE: Answer(431, "http_request_error"),
    BridgeReason.NOT_CONNECT: Answer(405, "http_request_denied"),
    BridgeReason.LOOP: Answer(502, "proxy_loop_detected"),
    SessionReason.CLIENT_SILENT: Answer(408, "http_request_error"),
    SessionReason.CAPACITY: Answer(503, "connection_limit_reached"),
    BridgeReason.NO_ROUTE: Answer(403, "http_request_denied", Alert.UNRECOGNIZED_NAME),
    BridgeReason.PORT_NOT_ALLOWED: Answer(403, "http_request_denied", Alert.UNRECOGNIZED_NAME),
    BridgeReason.CLIENT_NOT_ALLOWED: Answer(403, "http_request_denied"),
    SessionReason.MISCONFIGURED: Answer(500, "proxy_configuration_error"),
    BridgeReason.PEER_SILENT: Answer(504, "connection_timeout"),
    BridgeReason.PEER_CLOSED: Answer(502, "connection_terminated"),
    BridgeReason.PEER_NOT_HTTP: Answer(502, "http_protocol_error"),
    BridgeReason.PEER_REFUSED: Answer(502, "http_request_denied"),
    DialReason.UNRESOLVED: Answer(502, "dns_error"),
    DialReason.REFUSED: Answer(502, "connection_refused"),
    DialReason.UNREACHABLE: Answer(502, "destination_ip_unroutable"),
    DialReason.FORBIDDEN: Answer(403, "destination_ip_prohibited"),
    TLSReason.TLS_CLOSED: Answer(502, "connection_terminated"),
    TLSReason.TLS_RESET: Answer(502, "connection_terminated"),
    TLSReason.NOT_TLS: Answer(502, "tls_protocol_error"),
    TLSReason.UNTRUSTED: Answer(502, "tls_certificate_error"),
    TLSReason.EXPIRED: Answer(502, "tls_certificate_error"),
    TLSReason.WRONG_NAME: Answer(502, "tls_certificate_error"),
    TLSReason.REJECTED: Answer(502, "tls_alert_received"),
    TLSReason.TLS_FAILED: Answer(502, "tls_protocol_error"),
}
