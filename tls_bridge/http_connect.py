"""HTTP's CONNECT: reading it, passing it on, and answering it (RFC 9110 §9.3.6). h11 parses.

Bytes in, events out: whoever calls waits for the bytes, from a socket or from TLS.
"""

import contextlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

import h11

from mutual_tls.dial import Endpoint
from mutual_tls.refusal import Refusal
from sniproxy_hostname import Hostname
from tls_bridge.refusal import ANSWERS, BridgeReason

# The most that a header may take, all fields together: what Apache and nginx allow is 8 to 32 KiB.
MOST_HEADER = 1 << 14

# RFC 9110 §7.6.1: fields that a proxy "MUST remove", whether Connection names them or not. The
# credentials of a proxy are for us, not for the next one (RFC 9110 §11.7.2).
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"transfer-encoding"),
        *(b"upgrade", b"trailer", b"proxy-authorization", b"host", b"content-length"),
    }
)

# What is understood is remembered, for clients and peers say the same in each connection, and h11
# takes 150 µs for the four messages of one. Requests and answers take four megabytes each at the
# most: a field takes a tenth of a kilobyte, however short it is, so there are few of them.
_LONGEST_REMEMBERED = 1024
_MOST_LINES_REMEMBERED = 12
_MOST_REMEMBERED = 1024

# To find a member of an Enum, Python 3.11 runs a function written in Python. Once is enough.
_MULTIPLE_CHOICES: Final = HTTPStatus.MULTIPLE_CHOICES.value

_HEAD = b"HEAD "
_VERSIONS = frozenset({b"1.0", b"1.1"})

Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[bytes]]


class Request(NamedTuple):
    """A CONNECT: where to, the fields that are for the next hop, and bytes that came with it."""

    target: Endpoint
    headers: Headers
    early: bytes


class Response(NamedTuple):
    """An answer to a CONNECT; for 2xx, `body` is what the service has said already."""

    status: int
    reason: bytes
    headers: Headers
    body: bytes

    @property
    def opens_tunnel(self) -> bool:
        """Whether what comes now is of the service: RFC 9110 §9.3.6, "Any 2xx (Successful)"."""
        return self.status < _MULTIPLE_CHOICES


class PeerRefusal(Refusal):
    """The peer has answered, and not with 2xx; `response` is that answer."""

    def __init__(self, response: Response) -> None:
        phrase = response.reason.decode("ascii", "backslashreplace")
        super().__init__(BridgeReason.PEER_REFUSED, f"{response.status} {phrase}")
        self.response = response


class Asked:
    """What a client asks of us: reads one CONNECT, and answers it.

    Args:
        receive: returns the next bytes that the client has sent, none at the end.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._begin = b""  # of the request
        self._is_answered = False

    async def read(self, data: bytes) -> Request:
        """Return what the client asks; `data` is how it begins.

        Raises:
            Refusal: that is no CONNECT to a host and a port.
        """
        if (end := _end_of_head(data)) is None:
            return await self._read_in_pieces(data)
        self._begin = data[: len(_HEAD)]
        request = _understand_request(data[:end])
        if len(data) == end:
            return request
        return request._replace(early=request.early + data[end:])

    async def _read_in_pieces(self, data: bytes) -> Request:
        connection = _server()
        room = MOST_HEADER
        while True:
            piece, data = data[:room], data[room:]
            room -= len(piece)
            connection.receive_data(piece)
            self._begin = (self._begin + piece)[: len(_HEAD)]
            if (event := _next_event(connection)) is not h11.NEED_DATA:
                break
            if not room:
                raise Refusal(BridgeReason.HEADER_TOO_LARGE, f"it is over {MOST_HEADER} bytes long")
            data = data or await self._receive()
        request = _check_request(connection, event)
        return request._replace(early=request.early + data)

    def accept(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
        """Return the bytes that say: what comes now is for the service."""
        self._is_answered = True
        return _show_head(b"HTTP/1.1 200 Connection established", headers)

    def refuse(self, reason: StrEnum, detail: str, proxy: str) -> bytes:
        """Return the bytes that say that, and why, it can't be done."""
        status = ANSWERS[reason].status
        phrase = HTTPStatus(status).phrase
        body = f"{status} {phrase}: {reason}\n".encode()
        headers = [
            (b"Proxy-Status", proxy_status(proxy, reason, detail)),
            (b"Content-Type", b"text/plain"),
        ]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append((b"Allow", b"CONNECT"))  # RFC 9110 §15.5.6: "MUST"
        return self.pass_back(Response(status, phrase.encode(), headers, body))

    def pass_back(self, response: Response) -> bytes:
        """Return the bytes of an answer that is not 2xx."""
        if self._is_answered:
            return b""
        self._is_answered = True
        body = response.body
        headers = [*response.headers, (b"Content-Length", b"%d" % len(body))]
        headers.append((b"Connection", b"close"))
        head = _show_head(b"HTTP/1.1 %d %b" % (response.status, response.reason), headers)
        # RFC 9110 §9.3.2: "the server MUST NOT send content in the response" to HEAD.
        return head if self._begin == _HEAD else head + body


def _server() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEADER)


def _next_event(connection: h11.Connection) -> object:
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        is_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        reason = BridgeReason.HEADER_TOO_LARGE if is_large else BridgeReason.BAD_REQUEST
        raise Refusal(reason, str(error)) from None


def _end_of_head(data: bytes) -> int | None:
    """Return where a head ends that is there as a whole, and short enough to be remembered."""
    end = data.find(b"\r\n\r\n", 0, _LONGEST_REMEMBERED)
    if end < 0 or data.count(b"\n", 0, end) >= _MOST_LINES_REMEMBERED:
        return None
    return end + 4


@lru_cache(_MOST_REMEMBERED)
def _understand_request(head: bytes) -> Request:
    connection = _server()
    connection.receive_data(head)
    return _check_request(connection, _next_event(connection))


def _check_request(connection: h11.Connection, event: object) -> Request:
    if not isinstance(event, h11.Request):
        raise Refusal(BridgeReason.BAD_REQUEST, "it has a body without a header")
    if event.method != b"CONNECT":
        method = event.method.decode("ascii", "backslashreplace")
        raise Refusal(BridgeReason.NOT_CONNECT, f"its method is {method}")
    if event.http_version not in _VERSIONS:
        raise Refusal(BridgeReason.BAD_REQUEST, "its version is neither HTTP/1.1 nor 1.0")
    # RFC 9110 §9.3.6: "A CONNECT request message does not have content."
    is_framed = any(name == b"transfer-encoding" for name, _ in event.headers)
    if is_framed or not isinstance(_next_event(connection), h11.EndOfMessage):
        raise Refusal(BridgeReason.BAD_REQUEST, "a CONNECT has no content")
    early, _ = connection.trailing_data
    return Request(target(event.target), _end_to_end(event.headers), early)


def _show_head(first: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of a head. The fields are those of a head that h11 has read, and ours."""
    fields = b"".join([b"%b: %b\r\n" % field for field in headers])
    return b"%b\r\n%b\r\n" % (first, fields)


def request_bytes(request_target: Endpoint, headers: Headers) -> bytes:
    """Return the bytes of a CONNECT."""
    where = str(request_target).encode()
    return _show_head(b"CONNECT %b HTTP/1.1" % where, [(b"Host", where), *headers])


async def read_response(receive: Receive, most_body: int) -> Response:
    """Return the answer to a CONNECT, with no more of a body than `most_body` bytes.

    Raises:
        Refusal: the peer has closed instead, or speaks no HTTP.
    """
    data = await receive()
    if (end := _end_of_head(data)) is not None:
        response = _understand_response(data[:end])
        if response is not None and len(data) == end:
            return response
        if response is not None:
            return response._replace(body=response.body + data[end:])
    return await _read_in_pieces(data, receive, most_body)


def _client() -> h11.Connection:
    """Return a connection on which the answer to a CONNECT is to come."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=b"CONNECT", target=b"any:1", headers=[(b"Host", b"any:1")]))
    connection.send(h11.EndOfMessage())
    return connection


@lru_cache(_MOST_REMEMBERED)
def _understand_response(head: bytes) -> Response | None:
    """Return the answer that opens a tunnel; None if the head says something else."""
    connection = _client()
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    response = _response(connection, event) if isinstance(event, h11.Response) else None
    return response if response is not None and response.opens_tunnel else None


def _response(connection: h11.Connection, event: h11.Response) -> Response:
    """Return an answer; of its body what is the service's, if there is a tunnel now."""
    early = connection.trailing_data[0] if event.status_code < _MULTIPLE_CHOICES else b""
    return Response(event.status_code, bytes(event.reason), _end_to_end(event.headers), early)


async def _read_in_pieces(data: bytes, receive: Receive, most_body: int) -> Response:
    connection = _client()
    response = None
    body = bytearray()
    room = MOST_HEADER
    try:
        while True:
            if not data and response is None:
                raise Refusal(BridgeReason.PEER_CLOSED, "the peer has closed and not answered")
            connection.receive_data(data)
            while (event := connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    response = _response(connection, event)
                    if response.opens_tunnel:
                        return response
                elif isinstance(event, h11.Data):
                    body += event.data
                is_over = isinstance(event, h11.EndOfMessage) or len(body) >= most_body
                if is_over and response is not None:
                    return response._replace(body=bytes(body[:most_body]))
            # RFC 9110 §15.2: "one or more 1xx responses" may come before the answer; not for ever.
            room -= len(data)
            if response is None and room <= 0:
                message = f"the header of its answer is over {MOST_HEADER} bytes long"
                raise Refusal(BridgeReason.PEER_NOT_HTTP, message)
            data = await receive()
    except h11.RemoteProtocolError as error:
        raise Refusal(BridgeReason.PEER_NOT_HTTP, str(error)) from None


def target(authority: bytes) -> Endpoint:
    """Return what the target of a CONNECT names, in canonical form.

    RFC 9110 §9.3.6: "only the host and port number of the tunnel destination, separated by a
    colon", and "there is no default port".

    Raises:
        Refusal: it is something else.
    """
    try:
        endpoint = Endpoint.parse(authority.decode("ascii"))
        return endpoint._replace(host=host(endpoint.host.encode()))
    except (ValueError, UnicodeDecodeError) as error:
        raise Refusal(
            BridgeReason.BAD_REQUEST, f"unable to understand its target: {error}"
        ) from None


def host(text: bytes) -> str:
    """Return a hostname or an IP address in canonical form, one safe component of a path.

    Raises:
        InvalidHostname: it is neither. That is a ValueError.
    """
    # What is neither IPv6 nor ends with a digit is no address. To let `ipaddress` find out takes
    # longer than all that follows.
    if b":" in text or text[-1:].isdigit():
        with contextlib.suppress(ValueError):  # UnicodeDecodeError is one
            return str(ipaddress.ip_address(text.decode("ascii")))
    return Hostname(text)


def proxy_status(proxy: str, reason: StrEnum, detail: str) -> bytes:
    """Return the value of a Proxy-Status field, RFC 9209 §2: a structured field, RFC 8941.

    A String there has printable ASCII only; `"` and the backslash are escaped.
    """
    shown = "".join(char if " " <= char <= "~" else "?" for char in f"{reason}: {detail}")
    escaped = re.sub(r'(["\\])', r"\\\1", shown)
    return f'{proxy}; error={ANSWERS[reason].error}; details="{escaped}"'.encode()


def has_been_here(headers: Headers, pseudonym: str) -> bool:
    """Tell whether Via (RFC 9110 §7.6.3) says that the request came by here before."""
    passed = [
        part.split() for name, value in headers if name == b"via" for part in value.split(b",")
    ]
    return any(len(words) > 1 and words[1] == pseudonym.encode() for words in passed)


def check_loop(request: Request, pseudonym: str) -> None:
    """Check that the request has not come by here before.

    Raises:
        Refusal: it has.
    """
    if has_been_here(request.headers, pseudonym):
        raise Refusal(BridgeReason.LOOP, "it has come by here before, Via says")


def _end_to_end(headers: "h11._headers.Headers") -> Headers:
    """Return the fields that are for the next hop."""
    named = {
        word.strip().lower()
        for name, value in headers
        if name == b"connection"
        for word in value.split(b",")
    }
    return [
        (bytes(name), bytes(value))
        for name, value in headers
        if name not in _HOP_BY_HOP and name not in named
    ]
