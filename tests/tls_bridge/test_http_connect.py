"""HTTP's CONNECT: what is read, passed on and answered."""

import contextlib
from collections.abc import Sequence

import h11
import pytest
import trio

from mutual_tls.dial import Endpoint
from mutual_tls.refusal import Refusal
from tls_bridge.http_connect import (
    MOST_HEADER,
    Asked,
    Receive,
    Request,
    Response,
    has_been_here,
    proxy_status,
    read_response,
    request_bytes,
    target,
)
from tls_bridge.refusal import ANSWERS, BridgeReason

REQUEST = b"CONNECT web.internal:80 HTTP/1.1\r\nHost: web.internal:80\r\nX-One: 1\r\n\r\n"


def receiver(pieces: Sequence[bytes]) -> Receive:
    """Return what gives one piece after the other, and then the end."""
    left = iter(pieces)

    async def receive() -> bytes:
        return next(left, b"")

    return receive


def read(first: bytes, *pieces: bytes) -> Request:
    return trio.run(Asked(receiver(pieces)).read, first)


def refused(first: bytes, *pieces: bytes) -> BridgeReason:
    with pytest.raises(Refusal) as caught:
        read(first, *pieces)
    assert isinstance(caught.value.reason, BridgeReason)
    return caught.value.reason


@pytest.mark.parametrize("early", [b"", b"\x16\x03\x01 hello\r\n\r\n"])
def test_it_does_not_matter_how_the_bytes_come(early: bytes) -> None:
    expected = Request(Endpoint("web.internal", 80), [(b"x-one", b"1")], early)
    assert read(REQUEST + early) == expected
    for cut in range(1, len(REQUEST)):
        assert read(REQUEST[:cut], REQUEST[cut:] + early) == expected
    got = read(*(bytes([byte]) for byte in REQUEST))
    assert got == expected._replace(early=b"")


def test_a_blank_line_may_be_a_short_one_and_what_follows_is_early() -> None:
    request = REQUEST.replace(b"\r\n", b"\n")
    assert read(request + b"early\r\n\r\n") == (
        Request(Endpoint("web.internal", 80), [(b"x-one", b"1")], b"early\r\n\r\n")
    )
    answer = b"HTTP/1.1 200 OK\n\n"
    assert ask(answer + b"early\r\n\r\n") == Response(200, b"OK", [], b"early\r\n\r\n")


def test_what_is_remembered_is_not_what_came_behind_it() -> None:
    for early in b"one", b"two", b"":
        assert read(REQUEST + early).early == early
        assert ask(b"HTTP/1.1 200 OK\r\n\r\n" + early).body == early


@pytest.mark.parametrize(("fields", "is_remembered"), [(3, True), (30, False)])
def test_what_would_take_much_memory_is_not_remembered(fields: int, is_remembered: bool) -> None:
    """Each field of four bytes takes two hundred, and whoever asks makes up how many there are."""
    request = REQUEST.replace(b"X-One: 1", b"\r\n".join(b"%d: 1" % n for n in range(fields)))
    one, two = read(request), read(request)
    assert one == two
    assert len(one.headers) == fields
    assert (one.headers is two.headers) == is_remembered


def test_a_remembered_request_is_refused_and_answered_like_a_new_one() -> None:
    for request in REQUEST, REQUEST.replace(b"CONNECT", b"HEAD"):
        answers = []
        for first, *rest in [request], [request], [request[:9], request[9:]]:
            asked = Asked(receiver(rest))
            with contextlib.suppress(Refusal):
                trio.run(asked.read, first)
            answers.append(asked.refuse(BridgeReason.NO_ROUTE, "x", "tls-bridge"))
        assert answers[0].startswith(b"HTTP/1.1 403 ")
        assert len(set(answers)) == 1
        # RFC 9110 §9.3.2: "the server MUST NOT send content in the response" to HEAD.
        assert answers[0].endswith(b"\r\n\r\n") == request.startswith(b"HEAD")


def test_whoever_leaves_in_the_middle_is_told() -> None:
    assert refused(REQUEST[:20]) is BridgeReason.BAD_REQUEST


def test_the_longest_header_and_one_byte_more() -> None:
    rest = MOST_HEADER - len(REQUEST)
    longest = REQUEST.replace(b"X-One: 1", b"X-One: 1" + rest * b"x")
    assert len(longest) == MOST_HEADER
    assert read(longest).target.port == 80
    too_long = longest.replace(b"X-One: 1", b"X-One: 11")
    assert refused(too_long) is BridgeReason.HEADER_TOO_LARGE
    assert refused(*(bytes([byte]) for byte in too_long)) is BridgeReason.HEADER_TOO_LARGE
    assert refused(b"x" * 100_000) is BridgeReason.HEADER_TOO_LARGE


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (REQUEST.replace(b"CONNECT", b"GET"), BridgeReason.NOT_CONNECT),
        (REQUEST.replace(b"CONNECT", b"connect"), BridgeReason.NOT_CONNECT),
        (REQUEST.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\nx"), BridgeReason.BAD_REQUEST),
        (
            REQUEST.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            BridgeReason.BAD_REQUEST,
        ),
        (REQUEST.replace(b"Host:", b"Ho st:"), BridgeReason.BAD_REQUEST),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/2.0"), BridgeReason.BAD_REQUEST),
        (b"\r\n" + b"\0" * 100 + b"\r\n\r\n", BridgeReason.BAD_REQUEST),
    ],
)
def test_what_is_no_connect(request_bytes: bytes, reason: BridgeReason) -> None:
    assert refused(request_bytes) is reason


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        (b"Web.Internal.:443", Endpoint("web.internal", 443)),
        (b"192.0.2.1:1", Endpoint("192.0.2.1", 1)),
        (b"[2001:DB8:0:0::1]:65535", Endpoint("2001:db8::1", 65535)),
    ],
)
def test_a_target_is_canonical(text: bytes, endpoint: Endpoint) -> None:
    assert target(text) == endpoint
    assert target(str(endpoint).encode()) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b":1", b"a", b"a:", b"a:0", b"a:65536", b"a:+1", b"a:1_0", b"a: 1", b"a:1 "),
        *(b"../a:1", b"a/b:1", b"a%2fb:1", b"a\0:1", b"_a:1", b".:1", b"..:1", b"a..b:1"),
        *(b"2001:db8::1:1", b"[2001:db8::1:1", b"[a]:1", b"[192.0.2.1]:1", b"user@a:1"),
        *(b"0x7f.1:1", b"127.1:1", b"2130706433:1", "\u0661.example:1".encode(), b"a:\xb2"),
    ],
)
def test_what_is_no_target(text: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        target(text)
    assert caught.value.reason is BridgeReason.BAD_REQUEST


@pytest.mark.parametrize("reason", ANSWERS)
def test_every_refusal_is_a_whole_answer(reason: BridgeReason) -> None:
    asked = Asked(receiver([]))
    answer = asked.refuse(reason, 'what "it"\r\nis\\ \u2014', "tls-bridge")
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    event = client.next_event()
    assert isinstance(event, h11.Response)
    assert event.status_code == ANSWERS[reason].status
    fields = dict(event.headers)
    details = f'{reason}: what \\"it\\"??is\\\\ ?'
    shown = f'tls-bridge; error={ANSWERS[reason].error}; details="{details}"'
    assert fields[b"proxy-status"] == shown.encode()
    assert (fields.get(b"allow") == b"CONNECT") == (event.status_code == 405)
    assert isinstance(client.next_event(), h11.Data)
    assert isinstance(client.next_event(), h11.EndOfMessage)


def test_a_structured_string_has_printable_ascii_only() -> None:
    shown = proxy_status("p", BridgeReason.LOOP, "\x00\x7f\xe9")
    assert shown.endswith(b'"loop: ???"')


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"1.1 me", True),
        (b"1.0 other, 1.1 me (comment)", True),
        (b"1.1 me2", False),
        (b"me", False),
        (b"", False),
    ],
)
def test_via(value: bytes, expected: bool) -> None:
    assert has_been_here([(b"via", value)], "me") == expected


def ask(*pieces: bytes, most_body: int = 100) -> Response:
    return trio.run(read_response, receiver(pieces), most_body)


def test_the_request_that_goes_on() -> None:
    assert request_bytes(Endpoint("2001:db8::1", 443), [(b"Via", b"1.1 x")]) == (
        b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\nVia: 1.1 x\r\n\r\n"
    )


def test_any_2xx_opens_the_tunnel_and_what_follows_is_the_services() -> None:
    answer = b"HTTP/1.1 204 Fine\r\nContent-Length: 5\r\nX: y\r\n\r\n"
    expected = Response(204, b"Fine", [(b"x", b"y")], b"hello")
    assert ask(answer + b"hello") == expected
    assert ask(*(bytes([byte]) for byte in answer)) == expected._replace(body=b"")
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    assert ask(interim + interim, answer + b"hello") == expected


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 403 No\r\nContent-Length: 5\r\n\r\nsorry", b"sorry"),
        (b"HTTP/1.0 403 No\r\n\r\nsorry", b"sorry"),
        (
            b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsorry\r\n0\r\n\r\n",
            b"sorry",
        ),
        (b"HTTP/1.1 403 No\r\nContent-Length: 200\r\n\r\n" + 200 * b"x", 100 * b"x"),
    ],
    ids=["length", "end", "chunked", "long"],
)
def test_other_answers_are_read_whole_up_to_a_limit(answer: bytes, body: bytes) -> None:
    assert ask(answer) == Response(403, b"No", [], body)
    assert ask(*(bytes([byte]) for byte in answer)) == Response(403, b"No", [], body)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", BridgeReason.PEER_CLOSED),
        (b"HTTP/1.1 200", BridgeReason.PEER_CLOSED),
        (b"SSH-2.0-OpenSSH\r\n\r\n", BridgeReason.PEER_NOT_HTTP),
        (b"HTTP/1.1 403 No\r\nContent-Length: 5\r\n\r\nso", BridgeReason.PEER_NOT_HTTP),
        (b"HTTP/1.1 200 " + MOST_HEADER * b"x", BridgeReason.PEER_NOT_HTTP),
    ],
)
def test_what_is_no_answer(answer: bytes, reason: BridgeReason) -> None:
    with pytest.raises(Refusal) as caught:
        ask(answer)
    assert caught.value.reason is reason


def test_a_peer_that_goes_on_to_announce_its_answer() -> None:
    async def announce() -> bytes:
        return b"HTTP/1.1 102 Processing\r\n\r\n"

    with pytest.raises(Refusal) as caught:
        trio.run(read_response, announce, 100)
    assert caught.value.reason is BridgeReason.PEER_NOT_HTTP
