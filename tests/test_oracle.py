"""The differential oracle: OpenSSL, a server, reads the same name as we do, or nobody is routed.

A router that reads another name than the backend does is a security hole. So both are shown the
same bytes, thousands of flights made up and spoilt, and then one of these must hold:

- both read the same name, but for case and one trailing dot;
- OpenSSL breaks off before it has a name. That is safe whatever we do: a backend that refuses
  serves nothing under any name, and its own alert reaches the client through us. `WE_ROUTE` lists
  what we let through knowingly;
- we refuse. If OpenSSL read a name nevertheless, `WE_REFUSE` must list that kind of flight, with
  our answer and the reason for it, and a test proves that each entry is still a difference;
- neither has enough bytes yet.

Two differences cannot be seen in a first flight, by nobody. They are at the end, and real.

One thing that this oracle cannot try: with Encrypted Client Hello a backend that holds the key
reads the inner name, and we route by the outer one. That is what the outer name is for.
"""

import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple, TypeVar

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sniproxy.wire import Alert, HelloError, HelloReader, Reason
from sniproxy_hostname import Hostname, InvalidHostname
from tests.support import hellos, strategies
from tests.support.certificates import Certificates
from tests.support.hellos import (
    GREASE,
    TLS12,
    TLS13,
    client_hello,
    extension,
    handshake,
    hello_bytes,
    name_entry,
    record,
    records,
    server_name,
    supported_versions,
    u16,
    vector8,
    vector16,
)
from tests.support.openssl_server import OpenSSLServer

LARGEST_RECORD = 2**14
LARGEST_MESSAGE = 65_536  # ours, SPEC's 64 KiB

SIGNATURE_ALGORITHMS = 13
X25519 = 29
ED25519, RSA_PSS = 0x0807, 0x0804
ECDSA = 0x0403  # with P-256, as the certificate of these tests

T = TypeVar("T")

Verdict = Hostname | tuple[Alert, Reason] | None


@pytest.fixture(scope="session")
def openssl(certificates: Certificates) -> OpenSSLServer:
    return OpenSSLServer(certificates.server_context("oracle.example"))


def route(flight: bytes) -> Verdict:
    """Whom we route to; an alert and a reason if to nobody; None before there is enough to say."""
    try:
        hello = HelloReader().feed(flight)
        return None if hello is None else Hostname(hello.required_server_name())
    except HelloError as error:
        return error.alert, error.reason
    except InvalidHostname:
        return Alert.UNRECOGNIZED_NAME, Reason.INVALID_NAME  # as `session` has it


def compare(openssl: OpenSSLServer, flight: bytes) -> str:
    """Hold both readings against each other; say how it went."""
    ours, theirs = route(flight), openssl.look(flight)
    if isinstance(ours, Hostname):
        if theirs.waiting:
            # The message was whole, but its last record is not. Whatever fills it now, nothing
            # about the name may hang on it.
            theirs = openssl.look(flight + bytes(LARGEST_RECORD))
            assert not theirs.waiting, flight.hex()
        for name in theirs.names:
            assert name is not None, flight.hex()
            assert name.lower().removesuffix(b".") == ours.encode(), flight.hex()
        return "the same name" if theirs.names else "OpenSSL refuses"
    if not theirs.names:
        return "neither has read enough" if ours is None else "no name is read"
    # OpenSSL read a name, we did not. Waiting is no answer, and a refusal has to be one of ours.
    assert ours is not None, flight.hex()
    kind = kind_of(flight, theirs.names[0], *ours)
    assert kind is not None, f"{ours}, but OpenSSL read {theirs.names[0]!r} in {flight.hex()}"
    assert WE_REFUSE[kind].answer == ours, flight.hex()
    return f"we refuse: {kind}"


# What we refuse though OpenSSL reads a name, or at least asks its callback what to do without one.


class WeRefuse(NamedTuple):
    flight: bytes  # an example
    openssl: bytes | None  # what OpenSSL reads in it
    answer: tuple[Alert, Reason]
    because: str


def _name(name: str | bytes, because: str) -> WeRefuse:
    wire = name if isinstance(name, bytes) else name.encode()
    flight = hello_bytes(None, extra=[server_name(name_entry(wire))])
    return WeRefuse(flight, wire, (Alert.UNRECOGNIZED_NAME, Reason.INVALID_NAME), because)


_MESSAGE = handshake(hellos.hello_body("a.example"))
_SSL2_HELLO = (
    (b"\1" + u16(TLS12) + u16(3) + u16(0) + u16(32)) + b"\0\xc0\x2f" + bytes(range(32))
)  # type, version, lengths of ciphers, session id and challenge; one cipher, of three bytes

WE_REFUSE = {
    "an underscore at the edge": _name(
        "_dmarc.example",
        "Hostnames are letters, digits and hyphens (RFC 952, RFC 1123 section 2.1). Browsers ask "
        "for names with an underscore inside a label all the same; with one at its begin it is the "
        "name of a DNS record that is no host.",
    ),
    "not ASCII": _name(
        "bücher.example",
        "RFC 6066 section 3 wants A-labels. To decode UTF-8, or Latin-1, would be a guess, and "
        "two guesses differ.",
    ),
    "a colon": _name(
        "2001:db8::1", "An IPv6 address; RFC 6066 section 3: literal addresses are not permitted."
    ),
    "a byte of no hostname": _name(
        "a/../b", "It is to become a name in a directory, and no host is called so."
    ),
    "a number at the end": _name(
        "192.0.2.1",
        "An IPv4 address in one of its spellings; RFC 6066 section 3 does not permit them, and no "
        "top-level domain is a number.",
    ),
    "an empty label": _name(
        "a..example",
        "Only the root has an empty label. If dots were folded, two spellings would be one host "
        "here and two for the backend.",
    ),
    "a hyphen at the edge": _name(
        "-a.example",
        "RFC 952 and RFC 1123: a label begins and ends with a letter or digit. And a name that "
        "looks like an option will meet a command line.",
    ),
    "a long label": _name("a" * 64 + ".example", "RFC 1035 section 2.3.4: 63 octets or less."),
    "a long name": _name(
        ".".join(["a" * 63] * 3 + ["b" * 62]),
        "RFC 1035 section 2.3.4 leaves 253 bytes. OpenSSL takes 255 (TLSEXT_MAXLEN_host_name), "
        "which is the limit of the other way of writing, with length bytes.",
    ),
    "an empty name": WeRefuse(
        hello_bytes(""),
        b"",
        (Alert.DECODE_ERROR, Reason.MALFORMED_HELLO),
        "RFC 6066 section 3: opaque HostName<1..2^16-1>. It cannot be parsed, so it is no name "
        "at all, not even a wrong one.",
    ),
    "no name, TLS 1.3": WeRefuse(
        hello_bytes(None),
        None,
        (Alert.MISSING_EXTENSION, Reason.NO_SERVER_NAME),
        "A server has a default host to fall back to. A router that had one would let a client "
        "reach it by leaving things out.",
    ),
    "no name": WeRefuse(
        hello_bytes(None, versions=()),
        None,
        (Alert.UNRECOGNIZED_NAME, Reason.NO_SERVER_NAME),
        "As above; a client without TLS 1.3 does not know the alert missing_extension.",
    ),
    "an empty record": WeRefuse(
        record(b"") + record(_MESSAGE),
        b"a.example",
        (Alert.DECODE_ERROR, Reason.EMPTY_RECORD),
        "RFC 8446 section 5.1 forbids them. OpenSSL lets up to 32 pass (MAX_EMPTY_RECORDS); "
        "counting them is more than any client is worth that sends them.",
    ),
    "a large message": WeRefuse(
        records(hellos.hello_of_size(LARGEST_MESSAGE + 1, "a.example")),
        b"a.example",
        (Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE),
        "It must fit a socket's receive buffer, where it is left for the backend. OpenSSL goes to "
        "131,396 bytes, the largest ClientHello that the lengths in it allow.",
    ),
    "a large flight": WeRefuse(
        records(hellos.hello_of_size(20_000, "a.example"), [1]),
        b"a.example",
        (Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE),
        "The same buffer: five sixths of this are record headers.",
    ),
}

# OpenSSL 4.0 has removed it, like everybody else before.
if ssl.OPENSSL_VERSION_INFO < (4,):
    WE_REFUSE["SSL 2.0"] = WeRefuse(
        u16(0x8000 | len(_SSL2_HELLO)) + _SSL2_HELLO,
        None,
        (Alert.UNEXPECTED_MESSAGE, Reason.NOT_HANDSHAKE),
        "This oldest way to say hello has no extensions, so no name, and RFC 8446 appendix D.5 "
        "advises against it.",
    )


def kind_of(flight: bytes, name: bytes | None, alert: Alert, reason: Reason) -> str | None:
    """Explain a refusal by what is in the flight; None if nothing in it does.

    Told from the bytes, and with none of the code under test, so that a refusal for a wrong reason
    is not explained.
    """
    match reason:
        case Reason.INVALID_NAME if name is not None:
            return fault_of_name(name)
        case Reason.MALFORMED_HELLO if name == b"":
            return "an empty name"
        case Reason.NO_SERVER_NAME if name is None:
            return "no name, TLS 1.3" if alert is Alert.MISSING_EXTENSION else "no name"
        case Reason.NOT_HANDSHAKE if name is None and flight[0] & 0x80:
            return "SSL 2.0"
        case Reason.EMPTY_RECORD if b"" in fragments(flight):
            return "an empty record"
        case Reason.HELLO_TOO_LARGE:
            message = b"".join(fragments(flight))
            large = int.from_bytes(message[1:4]) > LARGEST_MESSAGE
            return "a large message" if large else "a large flight"
        case _:
            return None


def fault_of_name(name: bytes) -> str | None:
    """Say what makes this no hostname: slowly, and by other means than `Hostname`."""
    name = name.removesuffix(b".")
    labels = name.split(b".")
    strangers = {chr(byte) for byte in name if not (chr(byte).isascii() and chr(byte).isalnum())}
    strangers -= set("-_.")
    faults = {
        "not ASCII": any(ord(stranger) > 127 for stranger in strangers),
        "a colon": ":" in strangers,
        "a byte of no hostname": bool(strangers),
        "an empty label": b"" in labels,
        "a hyphen at the edge": any(label[:1] == b"-" or label[-1:] == b"-" for label in labels),
        "an underscore at the edge": any(
            label[:1] == b"_" or label[-1:] == b"_" for label in labels
        ),
        "a long label": max(map(len, labels)) > 63,
        "a long name": len(name) > 253,
        "a number at the end": labels[-1].isdigit(),
    }
    return next((fault for fault, there in faults.items() if there), None)


def fragments(flight: bytes) -> Iterator[bytes]:
    """What the records hold, up to the end of the stream."""
    while len(flight) >= 5:
        end = 5 + int.from_bytes(flight[3:5])
        yield flight[5:end]
        flight = flight[end:]


@pytest.mark.parametrize("kind", WE_REFUSE)
def test_we_refuse_what_openssl_reads(kind: str, openssl: OpenSSLServer) -> None:
    """Proves that the entry is a difference, and the one it says; else it has to leave the list."""
    entry = WE_REFUSE[kind]
    assert openssl.look(entry.flight).names == (entry.openssl,)
    assert route(entry.flight) == entry.answer
    assert kind_of(entry.flight, entry.openssl, *entry.answer) == kind


# What we route though OpenSSL refuses it. The client gets the backend's alert instead of ours.


class WeRoute(NamedTuple):
    flight: bytes
    because: str


def _flight(body: bytes) -> bytes:
    return record(handshake(body))


_NAME = server_name("a.example")
_OTHER_NAME = name_entry("b.example", 1)
_VERSIONS = supported_versions(TLS13, TLS12)

WE_ROUTE = {
    "another type of name behind the host_name": WeRoute(
        hello_bytes(None, extra=[server_name("a.example", _OTHER_NAME)]),
        "RFC 6066 section 3 made room for them. OpenSSL knows no list, only one host_name; nobody "
        "reads the other entry as one.",
    ),
    "another type of name before the host_name": WeRoute(
        hello_bytes(None, extra=[server_name(_OTHER_NAME, "a.example")]), "As above."
    ),
    "record version": WeRoute(
        record(_MESSAGE, version=0x0400),
        "RFC 8446 section 5.1: it MUST be ignored for all purposes.",
    ),
    "legacy_version": WeRoute(
        _flight(client_hello([_NAME], legacy_version=0x0300)),
        "Versions are between client and backend; the place of the name does not depend on them.",
    ),
    "no common version": WeRoute(
        _flight(client_hello([_NAME, supported_versions(GREASE)])), "As above."
    ),
    "no common cipher": WeRoute(
        _flight(client_hello([_NAME, _VERSIONS], cipher_suites=u16(GREASE))),
        "Ciphers are between client and backend.",
    ),
    "no null compression": WeRoute(
        _flight(client_hello([_NAME], compression_methods=b"\1")),
        "Its presence is a rule about values, not about how to parse; the backend's to keep.",
    ),
    "an extension twice that we do not read": WeRoute(
        _flight(client_hello([_NAME, extension(23), extension(23)])),
        "Which of two counts matters only for those that choose the route: server_name, ALPN and "
        "supported_versions, and for these we refuse. For the rest, remembering is a cost.",
    ),
    "an extension spoilt that we do not read": WeRoute(
        _flight(client_hello([_NAME, extension(hellos.SUPPORTED_GROUPS, b"\0")])),
        "Nor do we look inside.",
    ),
    "bytes behind the message in its record": WeRoute(
        record(_MESSAGE + handshake(hellos.hello_body("b.example"))),
        "What comes after the message is not looked at. In TLS 1.3 OpenSSL wants a ClientHello to "
        "end its record; before that it goes on, with this first name.",
    ),
}


@pytest.mark.parametrize("kind", WE_ROUTE)
def test_we_route_what_openssl_refuses(kind: str, openssl: OpenSSLServer) -> None:
    entry = WE_ROUTE[kind]
    assert route(entry.flight) == "a.example"
    sight = openssl.look(entry.flight)
    assert sight.names == ()
    assert sight.refusal


# Where both agree, and a parser might not.


def _in_two(middle: bytes) -> bytes:
    return record(_MESSAGE[:50]) + middle + record(_MESSAGE[50:])


_MESSAGE_12 = handshake(hellos.hello_body("a.example", versions=()))
_LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])
_WARNING = record(b"\1\x5a", content_type=hellos.ALERT)  # user_canceled
_CHANGE_CIPHER_SPEC = record(b"\1", content_type=20)

THE_SAME_NAME = {
    "upper case": hello_bytes("A.EXAMPLE"),
    "a trailing dot": hello_bytes("a.example."),
    "the longest": hello_bytes(_LONGEST),
    "the longest, and a trailing dot": hello_bytes(_LONGEST + "."),
    "an A-label that decodes to nothing": hello_bytes("xn--a.example"),
    "the last extension": hello_bytes("a.example", versions=(), extra=[extension(GREASE)] * 3),
    "the first extension": _flight(
        client_hello([_NAME, _VERSIONS, extension(GREASE), extension(GREASE)])
    ),
    "one byte a record": records(_MESSAGE, [1]),
    "legacy_version of the future": record(b"\1" + _MESSAGE[1:4] + b"\4\0" + _MESSAGE[6:]),
    "record version of the future": record(_MESSAGE, version=0x03FF),
    "TLS 1.0": _flight(client_hello([_NAME, supported_versions(0x0301)])),
    "the largest message": records(hellos.hello_of_size(LARGEST_MESSAGE, "a.example")),
    "bytes behind, TLS 1.2": record(_MESSAGE_12 + b"junk"),
    "a hello behind, TLS 1.2": record(_MESSAGE_12 + handshake(hellos.hello_body("b.example"))),
    "a record behind": record(_MESSAGE_12) + hello_bytes("b.example"),
    "a record that is not all there": record(_MESSAGE_12, length=len(_MESSAGE_12) + 9),
    "a name inside ALPN": hello_bytes("a.example", protocols=["b.example"]),
    "a server_name inside padding": hello_bytes(
        "a.example", extra=[extension(hellos.PADDING, server_name("b.example"))]
    ),
}


@pytest.mark.parametrize("kind", THE_SAME_NAME)
def test_both_read_the_same_name(kind: str, openssl: OpenSSLServer) -> None:
    assert compare(openssl, THE_SAME_NAME[kind]) == "the same name"


def _name_extension(data: bytes) -> bytes:
    return hello_bytes(None, extra=[extension(hellos.SERVER_NAME, data)])


_ENTRY = name_entry("a.example")

NO_NAME_IS_READ = {
    "two names": _name_extension(vector16(_ENTRY + name_entry("b.example"))),
    "the same name twice": _name_extension(vector16(_ENTRY + _ENTRY)),
    "two extensions": hello_bytes("a.example", extra=[server_name("b.example")]),
    "an empty extension": _name_extension(b""),
    "an empty list": _name_extension(vector16(b"")),
    "only another type of name": _name_extension(vector16(_OTHER_NAME)),
    "a byte left over in the list": _name_extension(vector16(_ENTRY + b"\0")),
    "a byte left over in the extension": _name_extension(vector16(_ENTRY) + b"\0"),
    "a list longer than the extension": _name_extension(vector16(_ENTRY, len(_ENTRY) + 1)),
    "a list shorter than its name": _name_extension(vector16(_ENTRY, len(_ENTRY) - 1)),
    "a name longer than the list": _name_extension(vector16(name_entry("a.example", length=10))),
    "a NUL": hello_bytes("a.example\0.b.example"),
    "256 bytes": hello_bytes("a" * 256),
    "ALPN twice": _flight(client_hello([_NAME, hellos.alpn("h2"), hellos.alpn("h2")])),
    "an odd supported_versions": _flight(
        client_hello([_NAME, extension(hellos.SUPPORTED_VERSIONS, b"\3\3\4\3")])
    ),
    "no cipher": _flight(client_hello([_NAME], cipher_suites=b"")),
    "half a cipher": _flight(client_hello([_NAME], cipher_suites=b"\x13\x01\x13")),
    "no compression method": _flight(client_hello([_NAME], compression_methods=b"")),
    "a long session_id": _flight(client_hello([_NAME], session_id=bytes(33))),
    "a byte behind the extensions": _flight(client_hello([_NAME], trailing=b"\0")),
    "another message before": record(bytes(4) + _MESSAGE),  # hello_request
    "a warning before": _WARNING + record(_MESSAGE),
    "a warning between": _in_two(_WARNING),
    "change_cipher_spec before": _CHANGE_CIPHER_SPEC + record(_MESSAGE),
    "change_cipher_spec between": _in_two(_CHANGE_CIPHER_SPEC),
    "application data before": record(b"x", content_type=hellos.APPLICATION_DATA)
    + record(_MESSAGE),
    "a record of 2^14 + 1 bytes": records(hellos.hello_of_size(20_000), [2**14 + 1]),
}


@pytest.mark.parametrize("kind", NO_NAME_IS_READ)
def test_neither_reads_a_name(kind: str, openssl: OpenSSLServer) -> None:
    flight = NO_NAME_IS_READ[kind]
    assert compare(openssl, flight) == "no name is read"
    assert openssl.look(flight).refusal


# Flights by the thousand. A generator should spoil little, and in the right places: a flight that
# OpenSSL throws away at once tries nothing. It should also draw little, for that is what takes the
# time: one choice of what is odd, mostly nothing, and not a choice for each thing that could be.


def mostly(usual: T, odd: list[T]) -> st.SearchStrategy[T]:
    """Five times in six; the odd ones in the middle, because Hypothesis is fond of both ends."""
    return st.sampled_from([usual] * 4 * len(odd) + odd + [usual] * len(odd))


spellings = st.one_of(
    st.sampled_from([b"a.example", b"A.Example.", b"xn--bcher-kva.example", b"localhost"]),
    # Short ones of these few characters are hostnames half of the time.
    st.text("aZ09a-.", min_size=1, max_size=12).map(str.encode),
    st.text("a0-._*:/ \0\u00e9", max_size=8).map(str.encode),
    # Around the limits: 3 times 63 and 61, with dots, is the longest.
    st.integers(59, 64).map(lambda last: b".".join([b"a" * 63] * 3 + [b"b" * last])),
    st.integers(62, 65).map(lambda label: b"a" * label + b".Example"),
    st.binary(max_size=8),
)

# Odd ways to put a name, and another one, into the extension.
SERVER_NAMES: list[Callable[[bytes, bytes], bytes]] = [
    lambda a, b: server_name(name_entry(a), name_entry(b)),
    lambda a, b: server_name(name_entry(a), name_entry(b, 1)),
    lambda a, b: server_name(name_entry(b, 1), name_entry(a)),
    lambda a, _: server_name(name_entry(a, 255)),
    lambda a, b: server_name(name_entry(a + b, length=len(a))),
    lambda a, _: server_name(name_entry(a, length=len(a) + 1)),
    lambda a, b: server_name(name_entry(a), name_entry(b), length=len(a) + 3),
    lambda a, _: server_name(name_entry(a), length=len(a) + 4),
    lambda a, _: extension(hellos.SERVER_NAME, vector16(name_entry(a)) + b"\0"),
    lambda a, _: extension(hellos.SERVER_NAME, name_entry(a)),
    lambda a, b: server_name(name_entry(a)) + server_name(name_entry(b)),
]
server_names = st.builds(
    lambda build, a, b: build(a, b),
    mostly(lambda a, _: server_name(name_entry(a)), SERVER_NAMES),
    spellings,
    st.sampled_from([b"b.example", b"", b"B"]),
)

# As a client would send them. That they need not make sense together is the backend's business;
# it learns the name before it looks (ext_defs in OpenSSL's ssl/statem/extensions.c).
WELL_FORMED = [
    extension(5, b"\1" + bytes(4)),  # status_request
    # With no key yet: TLS 1.3 will ask for one, after the name.
    extension(hellos.SUPPORTED_GROUPS, vector16(u16(GREASE) + u16(X25519)))
    + extension(hellos.KEY_SHARE, vector16(b"")),
    extension(11, vector8(b"\0")),  # ec_point_formats
    extension(SIGNATURE_ALGORITHMS, vector16(u16(ECDSA) + u16(RSA_PSS) + u16(ED25519))),
    hellos.alpn("h2", "http/1.1"),
    extension(18),  # signed_certificate_timestamp
    extension(hellos.PADDING, server_name("padding.example")),
    extension(22),  # encrypt_then_mac
    extension(23),  # extended_master_secret
    extension(35),  # session_ticket
    extension(45, vector8(b"\1")),  # psk_key_exchange_modes
    extension(GREASE),
    extension(GREASE, b"\0"),
    extension(hellos.ENCRYPTED_CLIENT_HELLO, b"\0" + bytes(40)),
]
VERSIONS = [
    b"",
    supported_versions(GREASE, TLS13, TLS12),
    supported_versions(TLS12, 0x0301),
    supported_versions(TLS13),
]

# legacy_version, session_id, cipher_suites, compression_methods
FRONTS = list(
    product(
        [TLS12, 0x0301, TLS13, 0x0400],
        [bytes(32), b"", b"\1"],
        [b"\x13\x01\xc0\x2b", b"\x13\x02\0\xff\xc0\x2f", b"\x1a\x1a\x13\x01"],
        [b"\0", b"\0\1", b"\1\0"],
    )
)
ODD_FRONTS = [
    (0x0300, b"", b"\x13\x01", b"\0"),
    (TLS12, bytes(33), b"\x13\x01", b"\0"),
    (TLS12, b"", b"", b"\0"),
    (TLS12, b"", b"\x13\x01\x13", b"\0"),
    (TLS12, b"", b"\x13\x01", b""),
    (TLS12, b"", b"\x13\x01", b"\1"),
]
ODD_MESSAGES = ["no name", "no extensions", "front", "behind", "garbage", "one more", "length"]


@st.composite
def messages_made_up(draw: st.DrawFn) -> bytes:
    """A handshake message with well-formed extensions, and among them whatever is to be a name."""
    odd = draw(mostly("nothing", ODD_MESSAGES))
    chosen = draw(st.integers(0, 2 ** len(WELL_FORMED) - 1))
    extensions = [e for at, e in enumerate(WELL_FORMED) if chosen >> at & 1]
    extensions.append(draw(st.sampled_from(VERSIONS)))
    at = draw(st.integers(0, len(WELL_FORMED)))
    if odd != "no name":
        extensions.insert(at, draw(server_names))
    if odd == "garbage":
        extensions.insert(at, draw(strategies.unknown_extensions | st.binary(max_size=4)))
    if odd == "one more":
        extensions.append(draw(server_names))
    front = draw(st.sampled_from(ODD_FRONTS if odd == "front" else FRONTS))
    legacy_version, session_id, cipher_suites, compression_methods = front
    body = client_hello(
        None if odd == "no extensions" else extensions,
        legacy_version=legacy_version,
        session_id=session_id,
        cipher_suites=cipher_suites,
        compression_methods=compression_methods,
        extensions_length=draw(st.integers(0, 300)) if odd == "length" else None,
        trailing=b"\0" if odd == "behind" else b"",
    )
    return handshake(body)


class Parts(NamedTuple):
    """A flight taken apart, to be spoilt at one place and put together with lengths that fit."""

    front: bytes  # of the body, before the extensions
    extensions: list[bytes]

    @classmethod
    def of(cls, flight: bytes) -> "Parts":
        body = flight[9:]  # the headers of record and message
        at = 2 + 32  # legacy_version, random
        for width in (1, 2, 1):  # legacy_session_id, cipher_suites, legacy_compression_methods
            at += width + int.from_bytes(body[at : at + width])
        front, block = body[:at], body[at + 2 :]
        extensions = []
        while block:
            end = 4 + int.from_bytes(block[2:4])
            extensions.append(block[:end])
            block = block[end:]
        return cls(front, extensions)

    def message(self) -> bytes:
        return handshake(self.front + vector16(b"".join(self.extensions)))

    def names(self) -> bool:
        return any(map(_is_server_name, self.extensions))


def _is_server_name(whole: bytes) -> bool:
    return whole[:2] == u16(hellos.SERVER_NAME)


def a_browser(name: str) -> Parts:
    """`chromium_hello`, with values in it that OpenSSL can use, where that has zeros."""
    parts = Parts.of(hellos.chromium_hello(name))
    zeros = u16(GREASE) + bytes(30)
    assert zeros in parts.front
    usable = {
        hellos.SUPPORTED_GROUPS: vector16(u16(GREASE) + u16(0x11EC) + u16(X25519) + u16(23)),
        SIGNATURE_ALGORITHMS: vector16(u16(ECDSA) + u16(RSA_PSS)),
        hellos.KEY_SHARE: vector16(
            (u16(GREASE) + vector16(b"\0")) + (u16(X25519) + vector16(bytes([9]) + bytes(31)))
        ),
    }
    return Parts(
        parts.front.replace(zeros, u16(GREASE) + u16(0x1301) + u16(0xC02B) + bytes(26)),
        [
            extension(extension_type, usable.get(extension_type, whole[4:]))
            for whole in parts.extensions
            for extension_type in [int.from_bytes(whole[:2])]
        ],
    )


CLIENTS = {
    "OpenSSL": Parts.of(hellos.genuine_hello("a.example", protocols=["h2", "http/1.1"])),
    "OpenSSL, TLS 1.2": Parts.of(
        hellos.genuine_hello("www.a.example", maximum=ssl.TLSVersion.TLSv1_2)
    ),
    "OpenSSL, no name": Parts.of(hellos.genuine_hello(None)),
    "a browser": a_browser("a.example"),
}
NAMING = [parts for parts in CLIENTS.values() if parts.names()]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_unspoilt(client: str, openssl: OpenSSLServer) -> None:
    """What is spoilt below is good before: OpenSSL reads the name, and answers."""
    flight = record(CLIENTS[client].message())
    expected = "we refuse: no name, TLS 1.3" if "no name" in client else "the same name"
    assert compare(openssl, flight) == expected
    assert openssl.look(flight).refusal is None


@st.composite
def spoilt(draw: st.DrawFn, stream: bytes) -> bytes:
    """The stream with one byte changed, mostly a little; or one put in, or one taken out."""
    at = draw(st.integers(0, max(0, len(stream) - 1)))
    old = stream[at : at + 1] or b"\0"
    # By 0x20: the case of a letter. By one: a length. By 0x80: not ASCII any more.
    changed = [bytes([old[0] ^ change]) for change in (0x20, 1, 2, 3, 4, 0x80, 0xFF, old[0])]
    longer = [old + old, old + b"\0", b"." + old, b""]
    return stream[:at] + draw(st.sampled_from(changed + longer)) + stream[at + 1 :]


# Where a message is spoilt. The name, twice as often: there a change need not be the end of it.
PLACES = ["name", "name", "entry", "list", "header", "order", "cut", "any"]


@st.composite
def messages_spoilt(draw: st.DrawFn) -> bytes:
    """A real client's message, spoilt at one depth; the lengths around it fit again.

    Most of them in and around the name, for that is where two readers would part.
    """
    front, unspoilt = draw(st.sampled_from(NAMING))
    extensions = list(unspoilt)
    at = next(at for at, e in enumerate(extensions) if _is_server_name(e))
    data = extensions[at][4:]
    match draw(st.sampled_from(PLACES)):
        case "name":
            extensions[at] = server_name(name_entry(draw(spoilt(data[5:]))))
        case "entry":
            extensions[at] = server_name(draw(spoilt(data[2:])))
        case "list":
            extensions[at] = extension(hellos.SERVER_NAME, draw(spoilt(data)))
        case "header":
            extensions[at] = draw(spoilt(extensions[at][:9])) + extensions[at][9:]
        case "order":
            one = draw(st.integers(0, len(extensions) - 1))
            extensions = extensions[one:] + extensions[:one]
            if draw(st.booleans()):
                extensions.append(server_name(name_entry(draw(spellings))))
        case "cut":
            del extensions[draw(st.integers(0, len(extensions))) :]
            if extensions:
                extensions[-1] = extensions[-1][: draw(st.integers(0, 12))]
        case _:
            one = draw(st.integers(-1, len(extensions) - 1))
            if one == -1:
                front = draw(spoilt(front))
            else:
                extensions[one] = draw(spoilt(extensions[one]))
    return Parts(front, extensions).message()


BETWEEN = [record(b""), _WARNING, _CHANGE_CIPHER_SPEC]
# One hello in a flight, so its name is the only one: no second hello behind it.
BEHIND = [b"\0", b"\1\0\0\1\0", _WARNING, _CHANGE_CIPHER_SPEC, record(b"", content_type=23)]
ODD_FLIGHTS = ["header", "between", "behind", "behind in its record", "bytes", "cut"]
RECORD_VERSIONS = [0x0301, 0x0303, 0x0300, 0x03FF]


@st.composite
def flights(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """The message in one record or in many, with something between or behind them now and then."""
    message = draw(messages)
    odd = draw(mostly("nothing", ODD_FLIGHTS))
    if odd == "header":
        message = draw(spoilt(message[:4])) + message[4:]
    elif odd == "behind in its record":
        message += draw(st.sampled_from(BEHIND))
    version = draw(st.sampled_from(RECORD_VERSIONS))
    size = draw(st.sampled_from([LARGEST_RECORD] * 4 + [1, 2, 5, 40, 100, 300]))
    stream = [record(piece, version=version) for piece in hellos.cut(message, [size])]
    if odd == "between":
        stream.insert(draw(st.integers(0, len(stream))), draw(st.sampled_from(BETWEEN)))
    elif odd == "behind":
        stream.append(draw(st.sampled_from(BEHIND)))
    flight = b"".join(stream)
    if odd == "bytes":
        return draw(spoilt(flight))
    return flight[: draw(st.integers(0, len(flight)))] if odd == "cut" else flight


def tally(
    openssl: OpenSSLServer, generated: st.SearchStrategy[bytes], examples: int
) -> Counter[str]:
    """Compare so many flights, and count how it went."""
    outcomes: Counter[str] = Counter()

    @settings(strategies.steady, max_examples=examples)
    @given(generated)
    def never_another_name(flight: bytes) -> None:
        outcome = compare(openssl, flight)
        outcomes[outcome] += 1
        event(outcome)  # pytest --hypothesis-show-statistics

    never_another_name()
    return outcomes


def share(outcomes: Counter[str], *beginnings: str) -> float:
    """Return how many of all came out so."""
    return sum(n for o, n in outcomes.items() if o.startswith(beginnings)) / outcomes.total()


# Shares are those of a run, with room for another version of Hypothesis to draw differently: they
# say that the oracle has teeth. Where OpenSSL reads no name, nothing was compared.


def test_hellos_made_up(openssl: OpenSSLServer) -> None:
    result = tally(openssl, flights(messages_made_up()), 1000)
    assert share(result, "the same name", "we refuse") > 1 / 3, result
    assert share(result, "the same name") > 1 / 6, result


def test_hellos_spoilt(openssl: OpenSSLServer) -> None:
    result = tally(openssl, flights(messages_spoilt()), 1000)
    assert share(result, "the same name", "we refuse") > 1 / 3, result
    assert share(result, "the same name") > 1 / 6, result


def test_bytes_spoilt_anywhere(openssl: OpenSSLServer) -> None:
    """Nothing is put right afterwards: any byte, any length, as it comes."""
    whole = st.sampled_from([record(parts.message()) for parts in CLIENTS.values()])
    result = tally(openssl, whole.flatmap(strategies.mutations), 300)
    assert share(result, "the same name", "we refuse") > 1 / 20, result


def test_records_cut_anywhere(openssl: OpenSSLServer) -> None:
    """However a good hello is cut, both go on to read it."""
    whole = st.sampled_from([parts.message() for parts in NAMING])
    cut = st.builds(hellos.records, whole, strategies.sizes)
    assert share(tally(openssl, cut, 100), "the same name") == 1


# What no first flight tells. We route by the first hello, and a backend can still come to know of
# another name. Whoever has one process serve several names must not take the route as proof of one.


def _asking(name: str, *key_shares: bytes) -> bytes:
    return record(
        handshake(
            client_hello(
                [
                    server_name(name),
                    supported_versions(TLS13),
                    extension(hellos.SUPPORTED_GROUPS, vector16(u16(X25519))),
                    extension(SIGNATURE_ALGORITHMS, vector16(u16(ECDSA))),
                    extension(hellos.KEY_SHARE, vector16(b"".join(key_shares))),
                ]
            )
        )
    )


def test_a_second_hello_may_name_another(openssl: OpenSSLServer) -> None:
    """After a HelloRetryRequest the client says hello again, and OpenSSL believes the second one.

    RFC 8446 section 4.1.2 has the client send "the same ClientHello without modification" except
    for a few extensions, server_name not among them; OpenSSL does not check it. The second hello
    answers what the backend said, so to see it a router would have to follow the handshake. The
    backend is the one that the first name leads to, all the same: a client gets nowhere that it
    could not have asked for.
    """
    key_share = u16(X25519) + vector16(bytes([9]) + bytes(31))
    flight = _asking("a.example") + _asking("b.example", key_share)
    assert route(flight) == "a.example"
    sight = openssl.look(flight)
    assert (sight.names, sight.refusal) == ((b"a.example", b"b.example"), None)


def test_a_session_may_name_another(openssl: OpenSSLServer) -> None:
    """Up to TLS 1.2 a session has a name, and whoever resumes it gets that one, whatever it asks.

    RFC 6066 section 3 has the server not resume if the hello contains another name; OpenSSL does,
    and tells `sni_callback` the name of the session (SSL_get_servername(3)). The session is a
    secret between client and backend. It needs a backend for the second name that can open
    sessions of the first one: the same process, or ticket keys that were shared on purpose.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.maximum_version = ssl.TLSVersion.TLSv1_2

    flight, sight, connection = openssl.converse(client, "a.example")
    assert (route(flight), sight.names) == ("a.example", (b"a.example",))

    flight, sight, connection = openssl.converse(client, "b.example", connection.session)
    assert connection.session_reused
    assert (route(flight), sight.names) == ("b.example", (b"a.example",))
