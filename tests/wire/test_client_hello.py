"""The message alone: SPEC section 4, row by row, as far as the body of a ClientHello decides it."""

import pytest

from sniproxy.wire import Alert, ClientHello, HelloError, Reason
from sniproxy.wire import client_hello as client_hello_module
from sniproxy.wire.client_hello import parse_client_hello
from tests.support import hellos
from tests.support.hellos import (
    ALPN,
    GREASE,
    SERVER_NAME,
    SUPPORTED_VERSIONS,
    TLS12,
    TLS13,
    client_hello,
    extension,
    name_entry,
    server_name,
    supported_versions,
    u16,
    vector8,
    vector16,
)

A = server_name("a.example")
NAMED = ClientHello(b"a.example")


def case(name: str, *values: object) -> object:
    return pytest.param(*values, id=name)


READABLE = [
    case("no extensions block, as before TLS 1.0", client_hello(None), ClientHello()),
    case("empty extensions block", client_hello([]), ClientHello()),
    case("a name", client_hello([A]), NAMED),
    case("a name with no last byte to spare", client_hello([A], session_id=b""), NAMED),
    case("legacy_version is ignored", client_hello([A], legacy_version=0xFFFF), NAMED),
    case("longest session_id", client_hello([A], session_id=bytes(32)), NAMED),
    case("one cipher suite", client_hello([A], cipher_suites=b"\x13\x01"), NAMED),
    case("most cipher suites", client_hello([A], cipher_suites=bytes(2**16 - 2)), NAMED),
    case("most compression", client_hello([A], compression_methods=bytes(255)), NAMED),
    case("GREASE", client_hello([extension(GREASE), A, extension(GREASE, b"\0")]), NAMED),
    case("unknown extension twice", client_hello([extension(99), A, extension(99)]), NAMED),
    case(
        "a name that is not one", client_hello([server_name("\0/é")]), ClientHello("\0/é".encode())
    ),
    case("ECH changes nothing", client_hello([extension(0xFE0D, b"\0" * 99), A]), NAMED),
    case(
        "unknown name types, before and behind, empty too",
        client_hello([server_name(name_entry("", 7), "a.example", name_entry("x", 7))]),
        NAMED,
    ),
    case("unknown name types only", client_hello([server_name(name_entry("x", 1))]), ClientHello()),
    case("longest name", client_hello([server_name("a" * 65_000)]), ClientHello(b"a" * 65_000)),
    case(
        "long name beside another type",
        client_hello([server_name(name_entry("x", 7), "a" * 40_000)]),
        ClientHello(b"a" * 40_000),
    ),
    case(
        "protocols",
        client_hello([hellos.alpn("h2", "x" * 255)]),
        ClientHello(None, vector8(b"h2") + vector8(b"x" * 255)),
    ),
    case("one protocol", client_hello([hellos.alpn("h")]), ClientHello(None, vector8(b"h"))),
    case("TLS 1.3", client_hello([supported_versions(TLS13)]), ClientHello(versions=u16(TLS13))),
    case(
        "TLS 1.3 among others",
        client_hello([supported_versions(GREASE, TLS12, TLS13)]),
        ClientHello(versions=u16(GREASE) + u16(TLS12) + u16(TLS13)),
    ),
    case(
        "most versions",
        client_hello([supported_versions(*[TLS12] * 127)]),
        ClientHello(versions=u16(TLS12) * 127),
    ),
]

TOO_SHORT = "ClientHello ends before its extensions"

DECODE_ERRORS = [
    case("nothing", b"", TOO_SHORT),
    case("random too short", client_hello()[:33], TOO_SHORT),
    case(
        "session_id of 32 and no more",
        client_hello()[:34] + b"\x20" + bytes(31),
        TOO_SHORT,
    ),
    case(
        "session_id of 33",
        client_hello([A], session_id=bytes(33)),
        "legacy_session_id of 33 bytes, more than 32",
    ),
    case(
        "odd cipher suites",
        client_hello([A], cipher_suites=b"\x13\x01\x00"),
        "odd length of cipher_suites",
    ),
    case(
        "no cipher suites",
        client_hello([A], cipher_suites=b""),
        "no cipher_suites",
    ),
    case(
        "no compression method",
        client_hello([A], compression_methods=b""),
        "no legacy_compression_methods",
    ),
    case(
        "one byte of an extensions block",
        client_hello(None, trailing=b"\0"),
        TOO_SHORT,
    ),
    case(
        "bytes behind the extensions",
        client_hello([A], trailing=b"\0"),
        "1 bytes left over in ClientHello",
    ),
    case(
        "extensions block one short",
        client_hello([A], extensions_length=len(A) - 1),
        "1 bytes left over in ClientHello",
    ),
    case(
        "extensions block one over",
        client_hello([A], extensions_length=len(A) + 1),
        "ClientHello ends 1 bytes too early",
    ),
    case(
        "half an extension header",
        client_hello([A, b"\0\1\0"]),
        "extensions ends inside an entry",
    ),
    case(
        "extension overruns",
        client_hello([A, extension(99, b"ab", length=3)]),
        "extensions ends inside an entry",
    ),
    case(
        "server_name without a list",
        client_hello([extension(SERVER_NAME)]),
        "server_name ends before server_name_list",
    ),
    case(
        "server_name list empty",
        client_hello([server_name()]),
        "server_name_list of 0 bytes, not 1 or more",
    ),
    case(
        "server_name list short",
        client_hello([server_name("ab", length=4)]),
        "1 bytes left over in server_name",
    ),
    case(
        "server_name list over",
        client_hello([server_name("ab", length=6)]),
        "server_name ends 1 bytes too early",
    ),
    case(
        "server_name with leftovers",
        client_hello([extension(SERVER_NAME, vector16(name_entry("a")) + b"!")]),
        "1 bytes left over in server_name",
    ),
    case(
        "host_name empty",
        client_hello([server_name("")]),
        "host_name of 0 bytes",
    ),
    case(
        "host_name overruns",
        client_hello([server_name(name_entry("ab", length=3))]),
        "server_name_list ends inside an entry",
    ),
    case(
        "host_name leaves a byte",
        client_hello([server_name(name_entry("ab", length=1))]),
        "server_name_list ends inside an entry",
    ),
    case(
        "unknown name overruns",
        client_hello([server_name(name_entry("ab", 7, length=3))]),
        "server_name_list ends inside an entry",
    ),
    case(
        "name type alone",
        client_hello([server_name(b"\0")]),
        "server_name_list ends inside an entry",
    ),
    case(
        "ALPN empty",
        client_hello([extension(ALPN)]),
        "application_layer_protocol_negotiation ends before protocol_name_list",
    ),
    case(
        "ALPN list empty",
        client_hello([extension(ALPN, vector16(b""))]),
        "protocol_name_list of 0 bytes, not 2 or more",
    ),
    case(
        "ALPN list too short",
        client_hello([extension(ALPN, vector16(b"\0"))]),
        "protocol_name_list of 1 bytes, not 2 or more",
    ),
    case(
        "ALPN name empty",
        client_hello([extension(ALPN, vector16(vector8(b"h2") + b"\0"))]),
        "a protocol_name of 0 bytes",
    ),
    case(
        "ALPN name overruns",
        client_hello([extension(ALPN, vector16(vector8(b"h2", 3)))]),
        "protocol_name_list ends inside a protocol_name",
    ),
    case(
        "ALPN with leftovers",
        client_hello([extension(ALPN, vector16(vector8(b"h2")) + b"!")]),
        "1 bytes left over in application_layer_protocol_negotiation",
    ),
    case(
        "versions empty",
        client_hello([supported_versions()]),
        "versions of 0 bytes, not 2 or more",
    ),
    case(
        "versions missing",
        client_hello([extension(SUPPORTED_VERSIONS)]),
        "supported_versions ends before versions",
    ),
    case(
        "versions odd",
        client_hello([extension(SUPPORTED_VERSIONS, vector8(b"\3\4\3"))]),
        "odd length of versions",
    ),
    case(
        "versions overrun",
        client_hello([extension(SUPPORTED_VERSIONS, vector8(u16(TLS13), 4))]),
        "supported_versions ends 2 bytes too early",
    ),
    case(
        "versions leftover",
        client_hello([extension(SUPPORTED_VERSIONS, vector8(u16(TLS13)) + b"!")]),
        "1 bytes left over in supported_versions",
    ),
]

DUPLICATES = [
    case(
        "server_name",
        client_hello([A, extension(99), A]),
        Reason.DUPLICATE_EXTENSION,
        "two entries server_name in extensions",
    ),
    case(
        "host_name",
        client_hello([server_name("a", "a")]),
        Reason.DUPLICATE_NAME,
        "two entries host_name in server_name_list",
    ),
    case(
        "host_name around another type",
        client_hello([server_name("a", name_entry("x", 7), "b")]),
        Reason.DUPLICATE_NAME,
        "two entries host_name in server_name_list",
    ),
    case(
        "ALPN",
        client_hello([hellos.alpn("h2")] * 2),
        Reason.DUPLICATE_EXTENSION,
        "two entries application_layer_protocol_negotiation in extensions",
    ),
    case(
        "versions",
        client_hello([supported_versions(TLS13)] * 2),
        Reason.DUPLICATE_EXTENSION,
        "two entries supported_versions in extensions",
    ),
]


@pytest.mark.parametrize(("body", "expected"), READABLE)
def test_what_can_be_read(body: bytes, expected: ClientHello) -> None:
    assert parse_client_hello(body) == expected
    assert parse_client_hello(body) == expected  # parts of it are remembered


@pytest.mark.parametrize(("body", "detail"), DECODE_ERRORS)
def test_decode_error(body: bytes, detail: str) -> None:
    with pytest.raises(HelloError) as caught:
        parse_client_hello(body)
    assert (caught.value.alert, caught.value.reason) == (Alert.DECODE_ERROR, Reason.MALFORMED_HELLO)
    assert str(caught.value) == detail


@pytest.mark.parametrize(("body", "reason", "detail"), DUPLICATES)
def test_illegal_parameter(body: bytes, reason: Reason, detail: str) -> None:
    with pytest.raises(HelloError) as caught:
        parse_client_hello(body)
    assert (caught.value.alert, caught.value.reason) == (Alert.ILLEGAL_PARAMETER, reason)
    assert str(caught.value) == detail


def test_what_is_remembered_has_an_end() -> None:
    for number in range(100):
        parse_client_hello(client_hello([hellos.alpn(str(number))]))
    assert client_hello_module._protocol_name_list.cache_info().currsize <= 32


EXTENSIONS = A + extension(99, b"cd") + extension(98)


@pytest.mark.parametrize("size", range(len(EXTENSIONS) + 1))
def test_extensions_end_with_an_extension(size: int) -> None:
    body = client_hello([EXTENSIONS[:size]])
    if size in {0, len(A), len(A) + 6, len(EXTENSIONS)}:
        assert parse_client_hello(body).server_name == (b"a.example" if size else None)
    else:
        with pytest.raises(HelloError) as caught:
            parse_client_hello(body)
        assert str(caught.value) == "extensions ends inside an entry"


NAMES = name_entry("ab") + name_entry("cd", 7) + name_entry("", 8)


@pytest.mark.parametrize("size", range(1, len(NAMES) + 1))
def test_a_server_name_list_ends_with_a_name(size: int) -> None:
    body = client_hello([server_name(NAMES[:size])])
    if size in {5, 10, len(NAMES)}:
        assert parse_client_hello(body).server_name == b"ab"
    else:
        with pytest.raises(HelloError) as caught:
            parse_client_hello(body)
        assert str(caught.value) == "server_name_list ends inside an entry"


def test_a_hello_cut_anywhere_is_an_error_but_where_the_extensions_are_optional() -> None:
    body = hellos.hello_body(protocols=["h2"])
    without_extensions = len(client_hello(None))
    for size in range(len(body)):
        if size == without_extensions:
            assert parse_client_hello(body[:size]) == ClientHello()
        else:
            with pytest.raises(HelloError):
                parse_client_hello(body[:size])


@pytest.mark.parametrize(
    ("versions", "offers_tls13"),
    [
        ([], False),
        ([TLS12], False),
        ([TLS13], True),
        ([GREASE, TLS12, TLS13], True),
        ([0x7F03, 0x0403], False),  # 0x0304 across two of them
    ],
)
def test_whether_tls13_is_offered(versions: list[int], offers_tls13: bool) -> None:
    assert ClientHello(versions=b"".join(map(u16, versions))).offers_tls13 is offers_tls13


@pytest.mark.parametrize("protocols", [(), (b"h",), (b"h2", b"x" * 255, b"http/1.1")])
def test_protocols_are_taken_apart(protocols: tuple[bytes, ...]) -> None:
    assert ClientHello(None, b"".join(map(vector8, protocols))).alpn_protocols == protocols


@pytest.mark.parametrize(
    ("hello", "alert"),
    [
        (ClientHello(versions=u16(TLS13)), Alert.MISSING_EXTENSION),
        (ClientHello(versions=u16(TLS12)), Alert.UNRECOGNIZED_NAME),
    ],
)
def test_a_required_name_that_is_not_there(hello: ClientHello, alert: Alert) -> None:
    with pytest.raises(HelloError) as caught:
        hello.required_server_name()
    assert (caught.value.alert, caught.value.reason) == (alert, Reason.NO_SERVER_NAME)
    assert str(caught.value) == "no host_name in the ClientHello"


def test_a_required_name_that_is_there() -> None:
    assert ClientHello(b"a.example").required_server_name() == b"a.example"
