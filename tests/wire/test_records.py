"""The record layer alone. What it does to a hello is in test_hello."""

import pytest

from sniproxy.wire import Alert, HelloError, Reason
from sniproxy.wire.records import HEADER, MAX_RECORD, Records
from tests.support.hellos import ALERT, APPLICATION_DATA, cut, record


def refusal(stream: bytes) -> tuple[Alert, Reason, str]:
    with pytest.raises(HelloError) as caught:
        list(Records().fragments(stream))
    return caught.value.alert, caught.value.reason, str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 100])
def test_headers_are_taken_off_in_any_segmentation(size: int) -> None:
    records = Records()
    stream = record(b"hello") + record(b",") + record(b" world", version=0xFFFF)
    fragments = [f for piece in cut(stream, [size]) for f in records.fragments(piece)]
    assert b"".join(fragments) == b"hello, world"
    assert (records.count, records.announced, records.left) == (3, 12, 0)


def test_a_header_is_news_before_its_fragment_begins() -> None:
    records = Records()
    waits = []
    for byte in record(b"ab"):
        waits.append((records.header_missing, records.left, records.count))
        list(records.fragments(bytes([byte])))
    assert waits[:5] == [(1, 0, 0), (4, 0, 0), (3, 0, 0), (2, 0, 0), (1, 0, 0)]
    assert [left for _, left, _ in waits[5:]] == [2, 1]
    assert list(Records().fragments(record(b"ab")[:HEADER])) == [b""]


@pytest.mark.parametrize("content_type", [0, 20, ALERT, APPLICATION_DATA, 24, 255])
@pytest.mark.parametrize("before", [b"", record(b"part")], ids=["first", "between fragments"])
def test_the_first_byte_of_another_type_is_enough(before: bytes, content_type: int) -> None:
    assert refusal(before + bytes([content_type])) == (
        Alert.UNEXPECTED_MESSAGE,
        Reason.NOT_HANDSHAKE,
        f"record of content type {content_type}, not handshake",
    )


def test_plain_http_is_not_tls() -> None:
    assert refusal(b"GET / HTTP/1.1\r\n")[:2] == (Alert.UNEXPECTED_MESSAGE, Reason.NOT_HANDSHAKE)


def test_a_record_may_be_so_long_and_no_longer() -> None:
    assert list(Records().fragments(record(b"", length=MAX_RECORD))) == [b""]
    too_long = record(b"", length=MAX_RECORD + 1)
    assert list(Records().fragments(too_long[:4])) == []
    assert refusal(too_long) == (
        Alert.RECORD_OVERFLOW,
        Reason.RECORD_OVERFLOW,
        "record of 16385 bytes, more than 16384",
    )


def test_a_record_must_not_be_empty() -> None:
    assert refusal(record(b"")) == (
        Alert.DECODE_ERROR,
        Reason.EMPTY_RECORD,
        "handshake record with nothing in it",
    )


def test_a_record_is_not_judged_before_the_fragment_in_front_of_it_is_used() -> None:
    fragments = Records().fragments(record(b"enough") + b"\xff")
    assert next(fragments) == b"enough"
    with pytest.raises(HelloError):
        next(fragments)
