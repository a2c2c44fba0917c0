"""The stream: what the verdict is, when it falls, and that nothing else has a say in it."""

import random
import ssl
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.wire import (
    MAX_WIRE,
    Alert,
    ClientHello,
    HelloError,
    HelloReader,
    Reason,
    read_at_once,
)
from sniproxy.wire.hello import MAX_HANDSHAKE
from sniproxy.wire.records import HEADER, MAX_RECORD
from tests.support import hellos, strategies
from tests.support.hellos import cut, handshake, record, records

Verdict = ClientHello | tuple[Alert, Reason] | None


def verdict(pieces: Iterable[bytes]) -> tuple[Verdict, HelloReader]:
    """Feed pieces until there is a verdict; an error as (alert, reason)."""
    reader = HelloReader()
    for piece in pieces:
        try:
            hello = reader.feed(piece)
        except HelloError as error:
            return (error.alert, error.reason), reader
        if hello is not None:
            return hello, reader
    return None, reader


def whole(stream: bytes) -> Verdict:
    return verdict([stream])[0]


def byte_by_byte(stream: bytes) -> tuple[Verdict, int]:
    """The verdict, and after how many bytes it fell."""
    result, reader = verdict(cut(stream, [1]))
    return result, reader.size


def case(name: str, *values: object) -> object:
    return pytest.param(*values, id=name)


MESSAGE = handshake(hellos.hello_body("a.example", protocols=["h2"]))
HELLO = ClientHello(b"a.example", b"\2h2", b"\3\4\3\3")
HEADERS = HEADER + 4  # of the first record and of the handshake message


# What can be read.

READABLE = [
    case("ours", hellos.hello_bytes("a.example"), b"a.example", True),
    case("ours, TLS 1.2", hellos.hello_bytes("a.example", versions=()), b"a.example", False),
    case("ours, no name", hellos.hello_bytes(None), None, True),
    case("a browser's", hellos.chromium_hello("a.example"), b"a.example", True),
    case("OpenSSL's", hellos.genuine_hello("a.example"), b"a.example", True),
    case("OpenSSL's, no name", hellos.genuine_hello(None), None, True),
    case(
        "OpenSSL's, TLS 1.3 only",
        hellos.genuine_hello("a.example", minimum=ssl.TLSVersion.TLSv1_3),
        b"a.example",
        True,
    ),
    case(
        "OpenSSL's, TLS 1.2 only",
        hellos.genuine_hello("a.example", maximum=ssl.TLSVersion.TLSv1_2),
        b"a.example",
        False,
    ),
]


@pytest.mark.parametrize(("stream", "name", "offers_tls13"), READABLE)
def test_a_hello(stream: bytes, name: bytes | None, offers_tls13: bool) -> None:
    hello = whole(stream)
    assert isinstance(hello, ClientHello)
    assert (hello.server_name, hello.offers_tls13) == (name, offers_tls13)
    assert byte_by_byte(stream) == (hello, len(stream))
    assert whole(stream + b"\x15 what comes later") == hello
    assert byte_by_byte(stream + b"\x15") == (hello, len(stream))
    for size in range(len(stream)):
        assert whole(stream[:size]) is None


def test_openssl_and_we_agree_on_protocols() -> None:
    hello = whole(hellos.genuine_hello(protocols=["h2", "http/1.1"]))
    assert isinstance(hello, ClientHello)
    assert hello.alpn_protocols == (b"h2", b"http/1.1")


@pytest.mark.parametrize("size", [*range(1, 12), 50, len(MESSAGE) - 1, len(MESSAGE)])
def test_records_of_every_size(size: int) -> None:
    stream = records(MESSAGE, [size])
    assert whole(stream) == HELLO
    assert byte_by_byte(stream) == (HELLO, len(stream))


def test_records_of_random_sizes() -> None:
    chance = random.Random(6066)
    for _ in range(50):
        stream = records(MESSAGE, [chance.randint(1, 30) for _ in range(len(MESSAGE))])
        assert whole(stream) == HELLO
        assert verdict(cut(stream, [chance.randint(1, 30)]))[0] == HELLO


LARGEST_RECORD = record(hellos.hello_of_size(MAX_RECORD - 4))


@pytest.mark.parametrize(
    ("stream", "direct"),
    [
        case("alone in its record", record(MESSAGE), True),
        case("in the largest record", LARGEST_RECORD, True),
        case("in the smallest record", record(handshake(b"!")), True),
        case("with a record behind it", record(MESSAGE) + record(b"\0"), True),
        case("with a message behind it", record(MESSAGE + b"\0"), False),
        case("with no body", record(handshake(b"")) + b"!", True),
        case("in two records", records(MESSAGE, [100]), False),
        case("without its last byte", record(MESSAGE)[:-1], False),
        case("without its body", record(MESSAGE)[:HEADERS], False),
        case("another message", record(handshake(MESSAGE[4:], msg_type=2)), False),
        case("another content type", record(MESSAGE, content_type=23), False),
        case("a record too long", record(handshake(bytes(MAX_RECORD - 3))), False),
        # As one number these bytes are the header of a ClientHello with a length of -1.
        case("no room for a header", record(b"\0\xff\xff") + b"\xff" * 30, False),
    ],
)
def test_a_hello_alone_in_its_record_is_read_at_once(stream: bytes, direct: bool) -> None:
    """It is quicker; that it changes no verdict is what all the other tests show."""
    try:
        at_once: Verdict = read_at_once(stream)
    except HelloError as error:
        at_once = error.alert, error.reason
    assert at_once == (whole(stream) if direct else None)


def test_a_reader_of_a_hello_that_is_read_at_once() -> None:
    reader = HelloReader()
    assert reader.feed(record(MESSAGE) + b"!") == HELLO
    assert (reader.size, reader.missing) == (HEADER + len(MESSAGE) + 1, 0)
    assert reader._records.count == 0  # no record was taken apart


@pytest.mark.parametrize(
    "behind",
    [b"\x00" * 3, handshake(b"", msg_type=20), b"\x16" * 5000],
    ids=["zeros", "another message", "many bytes"],
)
def test_bytes_behind_the_message_in_its_own_record_are_ignored(behind: bytes) -> None:
    stream = record(MESSAGE + behind)
    assert whole(stream) == HELLO
    assert byte_by_byte(stream) == (HELLO, HEADER + len(MESSAGE))


def test_what_looks_like_a_hello_later_in_the_stream_is_none() -> None:
    stream = record(record(MESSAGE))
    assert whole(stream) == (Alert.UNEXPECTED_MESSAGE, Reason.NOT_CLIENT_HELLO)
    assert verdict([stream[:HEADER], stream[HEADER:]])[0] == whole(stream)


# What cannot, and the byte that shows it.

REFUSED = [
    case("an alert", record(b"\2\0", content_type=21), 1, 10, "not_handshake"),
    case("HTTP", b"GET / HTTP/1.1\r\n", 1, 10, "not_handshake"),
    case("SSL 2", b"\x80\x2e\x01\x00\x02", 1, 10, "not_handshake"),
    case("handshake type", record(b"\2\0\0\0"), HEADER + 1, 10, "not_client_hello"),
    case("record of 2^14 + 1", record(b"", length=2**14 + 1), HEADER, 22, "record_overflow"),
    case("empty record", record(b""), HEADER, 50, "empty_record"),
    case(
        "another type between fragments",
        record(MESSAGE[:10]) + record(b"\2\0", content_type=21),
        HEADER + 10 + 1,
        10,
        "not_handshake",
    ),
    case(
        "empty record between fragments",
        record(MESSAGE[:10]) + record(b"") + record(MESSAGE[10:]),
        HEADER + 10 + HEADER,
        50,
        "empty_record",
    ),
    case(
        "long record between fragments",
        record(MESSAGE[:10]) + record(b"", length=2**16 - 1),
        HEADER + 10 + HEADER,
        22,
        "record_overflow",
    ),
    case("empty message", record(handshake(b"")), HEADERS, 50, "malformed_hello"),
    case(
        "message one byte short",
        record(handshake(MESSAGE[4:], length=len(MESSAGE) - 5)),
        HEADER + len(MESSAGE) - 1,
        50,
        "malformed_hello",
    ),
    case(
        "message one byte over",
        record(handshake(MESSAGE[4:], length=len(MESSAGE) - 3) + b"\0"),
        HEADER + len(MESSAGE) + 1,
        50,
        "malformed_hello",
    ),
    case(
        "two names",
        record(name_twice := handshake(hellos.client_hello([hellos.server_name("a", "b")]))),
        HEADER + len(name_twice),
        47,
        "duplicate_name",
    ),
    case(
        "announced too large",
        record(handshake(b"", length=MAX_HANDSHAKE + 1)),
        HEADERS,
        80,
        "hello_too_large",
    ),
]


@pytest.mark.parametrize(("stream", "at", "alert", "reason"), REFUSED)
def test_a_refusal_and_its_moment(stream: bytes, at: int, alert: int, reason: str) -> None:
    expected = (Alert(alert), Reason(reason))
    assert byte_by_byte(stream) == (expected, at)
    assert whole(stream) == expected
    assert whole(stream + MESSAGE) == expected
    assert whole(stream[: at - 1]) is None


@pytest.mark.parametrize(
    ("stream", "detail"),
    [
        case(
            "handshake type",
            record(b"\2\0\0\0"),
            "handshake message of type 2, not client_hello",
        ),
        case(
            "message too large",
            record(handshake(b"", length=MAX_HANDSHAKE + 1)),
            "message of 65537 bytes, more than 65536",
        ),
        case(
            "largest length there is",
            record(handshake(b"", length=0xFFFFFF)),
            "message of 16777215 bytes, more than 65536",
        ),
        case(
            "too many headers",
            records(hellos.hello_of_size(60_000), [1]),
            "hello of 98309 bytes on the wire or more, not 98304",
        ),
    ],
)
def test_what_a_person_is_told(stream: bytes, detail: str) -> None:
    with pytest.raises(HelloError) as caught:
        HelloReader().feed(stream)
    assert str(caught.value) == detail


# Limits: exactly at, and one over.

TOO_LARGE = (Alert.INTERNAL_ERROR, Reason.HELLO_TOO_LARGE)


def test_the_largest_message_and_the_largest_record() -> None:
    message = hellos.hello_of_size(MAX_HANDSHAKE)
    stream = records(message, [MAX_RECORD])
    assert len(message) == 4 + 65_536
    assert whole(stream) == ClientHello(b"example.com", b"", b"\3\4\3\3")
    assert whole(stream[:-1]) is None
    assert whole(records(hellos.hello_of_size(MAX_HANDSHAKE + 1), [MAX_RECORD])) == TOO_LARGE


def message_and_sizes_for(wire: int) -> tuple[bytes, list[int]]:
    """A message of 60,000 bytes in records that make it so long on the wire: tiny ones in front."""
    headers, odd = divmod(wire - 60_000, HEADER)
    message = hellos.hello_of_size(60_000 + odd - 4)
    large = 4  # records of the largest size hold what the tiny ones leave
    return message, [1] * (headers - large) + [MAX_RECORD]


def test_the_longest_hello_on_the_wire() -> None:
    message, sizes = message_and_sizes_for(MAX_WIRE)
    stream = records(message, sizes)
    assert len(stream) == MAX_WIRE
    result, at = byte_by_byte(stream)
    assert isinstance(result, ClientHello)
    assert at == MAX_WIRE
    assert whole(stream + b"and more") == result


def test_one_byte_longer_is_known_long_before_it_comes() -> None:
    message, sizes = message_and_sizes_for(MAX_WIRE + 1)
    stream = records(message, sizes)
    assert len(stream) == MAX_WIRE + 1
    result, at = byte_by_byte(stream)
    assert result == TOO_LARGE
    # The header of the last tiny record: had it announced more, the hello would have fitted.
    tiny = len(sizes) - 1
    assert at == tiny * (HEADER + 1) - 1
    assert whole(stream) == TOO_LARGE
    assert whole(stream[: at - 1]) is None


def test_one_byte_records_are_refused_when_even_full_ones_would_not_do() -> None:
    result, at = byte_by_byte(records(hellos.hello_of_size(40_000), [1]))
    assert result == TOO_LARGE
    assert at < MAX_WIRE


# What to wait for.


def stops(sizes: Iterable[int], message_size: int) -> Iterator[int]:
    """Where on the wire there is news, by arithmetic alone: types, ends of headers, the end."""
    wire = done = 0
    for size in sizes:
        yield wire + 1
        yield wire + HEADER
        wire += HEADER
        for milestone in (1, 4, message_size):
            if done < milestone <= done + size:
                yield wire + milestone - done
        wire += size
        done += size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 50, len(MESSAGE) - 1, len(MESSAGE), 5000])
def test_missing_is_the_distance_to_the_next_news(size: int) -> None:
    stream = record(MESSAGE + bytes(size - len(MESSAGE))) if size >= len(MESSAGE) else None
    stream = stream or records(MESSAGE, [size])
    count = -(-len(MESSAGE) // size)
    news = sorted(stops([size] * count, len(MESSAGE)))
    end = HEADER * count + len(MESSAGE)
    reader = HelloReader()
    for at in range(end):
        assert reader.size == at
        assert reader.missing == next(stop for stop in news if stop > at) - at
        reader.feed(stream[at : at + 1])
    assert reader.missing == 0


@strategies.steady
@given(st.data(), strategies.sizes, st.binary(max_size=300))
def test_less_than_what_is_missing_changes_nothing_whatever_it_is(
    data: st.DataObject, sizes: list[int], anything: bytes
) -> None:
    stream = records(MESSAGE, sizes)
    prefix = stream[: data.draw(st.integers(0, len(stream) - 1))]
    result, reader = verdict([prefix])
    assert result is None
    missing = reader.missing
    less = (anything + bytes(missing))[: data.draw(st.integers(0, missing - 1))]
    assert reader.feed(less) is None
    assert reader.missing == missing - len(less)


@strategies.steady
@given(strategies.sizes)
def test_a_caller_who_wakes_up_only_for_what_is_missing_loses_nothing(sizes: list[int]) -> None:
    stream = records(MESSAGE, sizes)
    reader = HelloReader()
    hello, turns = None, 0
    while hello is None:
        hello = reader.feed(stream[reader.size : reader.size + reader.missing])
        turns += 1
    assert (hello, reader.size) == (HELLO, len(stream))
    assert turns <= 3 + 2 * len(cut(MESSAGE, sizes))


# Properties.


@strategies.steady
@given(
    strategies.names,
    strategies.protocol_lists,
    strategies.version_lists,
    st.lists(strategies.unknown_extensions, max_size=3),
    strategies.sizes,
    strategies.sizes,
    st.binary(max_size=20),
)
def test_no_segmentation_and_no_fragmentation_changes_the_hello(
    name: str | None,
    protocols: list[str],
    versions: list[int],
    extra: list[bytes],
    fragments: list[int],
    segments: list[int],
    behind: bytes,
) -> None:
    stream = hellos.hello_bytes(
        name, protocols=protocols, versions=versions, extra=extra, sizes=fragments
    )
    expected = ClientHello(
        None if name is None else name.encode(),
        b"".join(hellos.vector8(p.encode()) for p in protocols),
        b"".join(map(hellos.u16, versions)),
    )
    assert verdict(cut(stream + behind, segments))[0] == expected


@strategies.steady
@given(st.data(), strategies.sizes, strategies.sizes)
def test_a_spoilt_hello_gives_one_verdict_and_no_other_exception(
    data: st.DataObject, fragments: list[int], segments: list[int]
) -> None:
    stream = data.draw(strategies.mutations(records(MESSAGE, fragments)))
    expected = whole(stream)
    assert verdict(cut(stream, segments))[0] == expected
    assert byte_by_byte(stream)[0] == expected


@strategies.steady
@given(st.binary(max_size=200), strategies.sizes)
def test_any_bytes_as_a_body(body: bytes, segments: list[int]) -> None:
    stream = record(handshake(body))
    assert verdict(cut(stream, segments))[0] == whole(stream) is not None


# The object.


def test_a_verdict_is_final() -> None:
    reader = HelloReader()
    reader.feed(record(MESSAGE))
    with pytest.raises(RuntimeError, match=r"^feed\(\) after the verdict$"):
        reader.feed(b"")
    reader = HelloReader()
    with pytest.raises(HelloError):
        reader.feed(b"G")
    with pytest.raises(RuntimeError, match="after the verdict"):
        reader.feed(b"ET")


def test_nothing_new_changes_nothing() -> None:
    reader = HelloReader()
    for at in range(20):
        before = (reader.size, reader.missing)
        assert reader.feed(b"") is None
        assert (reader.size, reader.missing) == before
        reader.feed(record(MESSAGE)[at : at + 1])


@pytest.mark.parametrize("middle", [0, 3, 7, 30])
def test_the_buffer_is_free_again_after_each_feed(middle: int) -> None:
    stream = record(MESSAGE)
    reader = HelloReader()
    hello = None
    for part in (stream[:middle], stream[middle:]):
        buffer = bytearray(part)
        with memoryview(buffer) as view:
            hello = reader.feed(view)
        buffer.clear()  # forbidden while anyone holds a view
    assert hello == HELLO


def test_the_buffer_is_free_even_while_the_error_lives() -> None:
    buffer = bytearray(b"GET / HTTP/1.1\r\n")
    with pytest.raises(HelloError) as caught:
        HelloReader().feed(buffer)
    buffer.clear()
    assert "content type 71" in str(caught.value)


def test_nothing_is_held_but_the_message_whatever_the_records_weigh() -> None:
    stream = records(hellos.hello_of_size(16_000), [1])
    reader = HelloReader()
    for piece in cut(stream[:-1], [1]):
        assert reader.feed(piece) is None
    assert len(reader._message) == 16_004 - 1
    assert reader.feed(stream[-1:]) is not None
