"""What a client may send first, and the answer that it gets: the contract's table, row by row.

Each row is a whole flight, so that the parser alone and the daemon on its socket can be asked the
same. `test_answers.py` asks both.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.support import hellos
from tests.support.hellos import (
    ALERT,
    ALPN,
    APPLICATION_DATA,
    GREASE,
    SERVER_NAME,
    SUPPORTED_VERSIONS,
    TLS12,
    TLS13,
    client_hello,
    extension,
    handshake,
    name_entry,
    record,
    server_name,
    supported_versions,
    u16,
    vector16,
)

NAME = "host.example"
A = server_name(NAME)
CHANGE_CIPHER_SPEC = 20

# The beginning of a hello that would be right, so far.
BEGIN = handshake(client_hello([A]))[:20]


@dataclass(frozen=True)
class Row:
    """A flight and its answer.

    Attributes:
        case: What is special about the flight.
        flight: The bytes.
        alert: The number of the alert; None if it is routed to `NAME`.
        in_message: Whether the flight is one handshake message, right as far as the record layer is
            concerned. Then it means the same in records of any size, and whatever follows.
    """

    case: str
    flight: bytes
    alert: int | None
    in_message: bool = True


def _message(case: str, body: bytes, alert: int | None) -> Row:
    return Row(case, hellos.records(handshake(body)), alert)


def _records(case: str, flight: bytes, alert: int) -> Row:
    return Row(case, flight, alert, in_message=False)


def _not_handshake() -> Iterator[Row]:
    yield _records("plain HTTP", b"GET / HTTP/1.1\r\nHost: host.example\r\n\r\n", 10)
    yield _records("SSL 2", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", 10)
    yield _records("SSH", b"SSH-2.0-client\r\n", 10)
    yield _records("a single byte", b"\0", 10)
    for content_type in (0, CHANGE_CIPHER_SPEC, ALERT, APPLICATION_DATA, 24, 255):
        wrong = record(b"\1\0", content_type=content_type)
        yield _records(f"content type {content_type} first", wrong, 10)
        yield _records(f"content type {content_type} between", record(BEGIN) + wrong, 10)
        yield _records(
            f"content type {content_type} in the message header", record(BEGIN[:2]) + wrong, 10
        )
    for msg_type in (0, 2, 11, 24, 255):
        flight = record(handshake(client_hello([A]), msg_type=msg_type))
        yield _records(f"handshake type {msg_type}", flight, 10)


def _record_layer() -> Iterator[Row]:
    for length in (2**14 + 1, 2**14 + 256, 2**16 - 1):
        yield _records(f"record of {length}", record(b"", length=length), 22)
        second = record(BEGIN) + record(b"", length=length)
        yield _records(f"second record of {length}", second, 22)
    yield _records("empty record first", record(b""), 50)
    yield _records("empty record between", record(BEGIN) + record(b""), 50)
    yield _records("empty record in the message header", record(BEGIN[:3]) + record(b""), 50)


def _malformed() -> Iterator[Row]:
    body = client_hello([A])
    yield _message("empty message", b"", 50)
    for size in (1, 2, 33, 34, 35, 66, 67, 68, 69, 73):
        yield _message(f"cut to {size} bytes", body[:size], 50)
    yield _message("a byte behind", body + b"\0", 50)
    yield _message("cut by one byte", body[:-1], 50)
    for size in (33, 255):
        yield _message(f"session_id of {size}", client_hello([A], session_id=bytes(size)), 50)
    yield _message("no cipher suites", client_hello([A], cipher_suites=b""), 50)
    yield _message("half a cipher suite", client_hello([A], cipher_suites=b"\x13"), 50)
    yield _message("odd cipher suites", client_hello([A], cipher_suites=bytes(5)), 50)
    yield _message("no compression method", client_hello([A], compression_methods=b""), 50)
    for off in (-5, -1, 1, 1000):
        wrong = client_hello([A], extensions_length=len(A) + off)
        yield _message(f"extensions length off by {off}", wrong, 50)
    yield _message("half an extensions length", client_hello(None, trailing=b"\0"), 50)
    for size in (1, 2, 3):
        yield _message(f"{size} bytes of an extension", client_hello([A, bytes(size)]), 50)
    yield _message("extension overruns", client_hello([A, extension(99, b"", length=1)]), 50)
    yield _message(
        "extension overruns by much", client_hello([A, extension(99, length=60_000)]), 50
    )


def _malformed_names() -> Iterator[Row]:
    def name(case: str, *extensions: bytes) -> Row:
        return _message(case, client_hello([supported_versions(TLS13), *extensions]), 50)

    yield name("server_name without a list", extension(SERVER_NAME))
    yield name("server_name with half a length", extension(SERVER_NAME, b"\0"))
    yield name("server_name list empty", server_name())
    for off in (-1, 1, 100):
        wrong = server_name(NAME, length=3 + len(NAME) + off)
        yield name(f"server_name list length off by {off}", wrong)
        entry = server_name(name_entry(NAME, length=len(NAME) + off))
        yield name(f"host_name length off by {off}", entry)
    leftover = extension(SERVER_NAME, vector16(name_entry(NAME)) + b"\0")
    yield name("a byte behind the server_name list", leftover)
    yield name("host_name empty", server_name(""))
    yield name("a second entry cut short", server_name(NAME, b"\7\0"))
    yield name("a name type alone", server_name(NAME, b"\7"))
    yield name("unknown name type overruns", server_name(NAME, name_entry("x", 7, length=2)))
    yield name("ALPN without a list", A, extension(ALPN))
    yield name("ALPN list empty", A, extension(ALPN, vector16(b"")))
    yield name("ALPN protocol empty", A, extension(ALPN, vector16(b"\0\2h2")))
    yield name("ALPN protocol overruns", A, extension(ALPN, vector16(b"\3h2")))
    for versions in (b"", b"\0", b"\1\3", b"\3\3\4\3", b"\4\3\4", b"\2\3\4\0"):
        wrong = extension(SUPPORTED_VERSIONS, versions)
        yield _message(f"supported_versions {versions.hex()}", client_hello([A, wrong]), 50)


def _duplicates() -> Iterator[Row]:
    B = server_name("other.example")  # noqa: N806 - as A
    yield _message("server_name twice", client_hello([A, A]), 47)
    yield _message("two server_names", client_hello([B, extension(99), A]), 47)
    yield _message("two host_names", client_hello([server_name("other.example", NAME)]), 47)
    yield _message("the same host_name twice", client_hello([server_name(NAME, NAME)]), 47)
    apart = server_name(NAME, name_entry("x", 7), NAME)
    yield _message("two host_names, and another type between", client_hello([apart]), 47)
    yield _message("ALPN twice", client_hello([A, hellos.alpn("h2"), hellos.alpn("h2")]), 47)
    yield _message(
        "supported_versions twice", client_hello([supported_versions(TLS13)] * 2 + [A]), 47
    )


def _nameless() -> Iterator[Row]:
    other = server_name(name_entry("x", 7))
    for versions, extensions, alert in (
        ("TLS 1.3", [supported_versions(TLS13)], 109),
        ("TLS 1.3 and 1.2", [supported_versions(GREASE, TLS13, TLS12)], 109),
        ("TLS 1.2 by supported_versions", [supported_versions(TLS12)], 112),
        ("TLS 1.2", [], 112),
    ):
        yield _message(f"no server_name, {versions}", client_hello(extensions), alert)
        with_other = client_hello([*extensions, other])
        yield _message(f"no host_name but another type, {versions}", with_other, alert)
    yield _message("no extensions at all", client_hello(None), 112)


NOT_NAMES = (
    "127.0.0.1",
    "1.2.3",
    "1",
    "host.1",
    "::1",
    "[::1]",
    "[::1].example",
    "",
    ".",
    "..",
    "../host.example",
    "/",
    "host/example",
    "/host.example",
    "host..example",
    ".host.example",
    "host.example..",
    "-host.example",
    "host-.example",
    "host.-",
    "ho_st.example",
    "*.example",
    "host example",
    " host.example",
    "host.example\n",
    "host.example\0",
    "host\0.example",
    "hös.example",
    "🕸💍.ws",
    "host。example",
    "HOST.EXAMPLE:443",
    "a" * 64 + ".example",
    ".".join(["a" * 63] * 4)[:254],
    "a." * 127 + "a",
    "a" * 5000,
)


def _names() -> Iterator[Row]:
    for name in filter(None, NOT_NAMES):
        shown = name if len(name) < 40 else f"{name[:8]} and so on, {len(name)}"
        yield _message(f"name {shown!a}", client_hello([server_name(name)]), 112)
    for name in ("unknown.example", "example", NAME + ".example", "x" + NAME, "xn--sr8hvo.ws"):
        yield _message(f"unknown name {name}", client_hello([server_name(name)]), 112)


def _too_large() -> Iterator[Row]:
    yield _records("message of 64 KiB and a byte", record(handshake(b"", length=65_537)), 80)
    yield _records("message of 16 MiB", record(handshake(b"", length=2**24 - 1)), 80)
    # 96 KiB hold 16,384 records of one byte.
    long = hellos.hello_of_size(16_381, NAME)
    assert len(long) == 16_385
    yield _records("more than 96 KiB on the wire", hellos.records(long, [1]), 80)


def _routed() -> Iterator[Row]:
    def routed(case: str, body: bytes) -> Row:
        return _message(case, body, None)

    yield routed("plain", client_hello([A]))
    yield Row("a browser's", hellos.chromium_hello(NAME), None)
    yield Row("OpenSSL's", hellos.genuine_hello(NAME), None)
    for spelling in ("HOST.example", "host.example.", "HoSt.ExAmPlE."):
        yield routed(f"spelt {spelling}", client_hello([server_name(spelling)]))
    for version in (0, 0x0300, 0x0301, TLS13, 0xFFFF):
        yield routed(f"legacy_version {version:04x}", client_hello([A], legacy_version=version))
        flight = record(handshake(client_hello([A])), version=version)
        yield Row(f"legacy_record_version {version:04x}", flight, None)
    for size in (0, 1, 32):
        yield routed(f"session_id of {size}", client_hello([A], session_id=bytes(size)))
    yield routed("one cipher suite", client_hello([A], cipher_suites=u16(0x1301)))
    yield routed("all compression methods", client_hello([A], compression_methods=bytes(255)))
    grease = [extension(GREASE), A, extension(0xFAFA, b"\0")]
    yield routed("GREASE", client_hello(grease, cipher_suites=u16(GREASE) + u16(0x1301)))
    yield routed("Encrypted ClientHello", client_hello([extension(0xFE0D, bytes(200)), A]))
    yield routed("an empty Encrypted ClientHello", client_hello([A, extension(0xFE0D)]))
    yield routed("an unknown extension twice", client_hello([extension(99), A, extension(99)]))
    yield routed(
        "an unknown name type before", client_hello([server_name(name_entry("", 7), NAME)])
    )
    yield routed("and behind", client_hello([server_name(NAME, name_entry("other.example", 1))]))
    yield routed("ALPN", client_hello([hellos.alpn("h2", "http/1.1"), A]))
    yield routed("the name last", client_hello([extension(99, bytes(3000)), A]))
    for size in (2**14 - 4, 2**14, 40_000, 65_536):
        flight = hellos.records(hellos.hello_of_size(size, NAME))
        yield Row(f"{size} bytes long", flight, None)


ROWS = [
    *_not_handshake(),
    *_record_layer(),
    *_malformed(),
    *_malformed_names(),
    *_duplicates(),
    *_nameless(),
    *_names(),
    *_too_large(),
    *_routed(),
]
assert len({row.case for row in ROWS}) == len(ROWS)
