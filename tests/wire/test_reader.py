from collections.abc import Callable
from functools import partial
from struct import Struct

import pytest

from sniproxy.wire import Alert, HelloError, Reason
from sniproxy.wire.reader import Reader, entries, opaque8, opaque16
from tests.support.hellos import extension


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(HelloError) as caught:
        call()
    assert (caught.value.alert, caught.value.reason) == (
        Alert.DECODE_ERROR,
        Reason.MALFORMED_HELLO,
    )
    return str(caught.value)


def test_bytes_are_read_in_order() -> None:
    reader = Reader(b"12\x0134\x00\x01567", "bytes")
    reader.skip(2)
    assert (reader.opaque8("a"), reader.rest()) == (b"3", b"4\x00\x01567")
    reader = Reader(b"12\x0134\x00\x01567", "bytes")
    reader.skip(5)
    assert (reader.opaque16("b"), str(reader.left_over())) == (b"5", "2 bytes left over in bytes")
    assert (reader.rest(), reader.rest()) == (b"67", b"")


def test_skip_stops_at_the_end() -> None:
    reader = Reader(b"123", "bytes")
    reader.skip(3)
    assert refusal(partial(reader.skip, 2)) == "bytes ends 2 bytes too early"


VECTORS = [
    pytest.param(Reader.opaque8, b"\x03", id="opaque8"),
    pytest.param(Reader.opaque16, b"\x00\x03", id="opaque16"),
]


@pytest.mark.parametrize(("method", "prefix"), VECTORS)
def test_opaque(method: Callable[..., bytes], prefix: bytes) -> None:
    reader = Reader(prefix + b"abcd", "outside")
    assert method(reader, "name", minimum=3) == b"abc"
    assert reader.rest() == b"d"
    for missing in 1, 3:
        overrun = Reader(prefix + b"abc"[:-missing], "outside")
        detail = f"outside ends {missing} bytes too early"
        # Of the least length, of the greatest, and in between: what is wrong is that bytes miss.
        assert refusal(partial(method, overrun, "name", minimum=3)) == detail
        assert refusal(partial(method, overrun, "name")) == detail
        overrun.rest()
        assert refusal(partial(method, overrun, "name")) == "outside ends before name"
    longest = 256 ** len(prefix) - 1
    short = Reader(prefix + b"abc", "outside")
    assert refusal(partial(method, short, "name", minimum=4)) == (
        f"name of 3 bytes, not 4 to {longest}"
    )
    assert method(short, "name", minimum=3) == b"abc"  # a failed read moved nothing
    cut = Reader(prefix[:-1], "outside")
    assert refusal(partial(method, cut, "name")) == "outside ends before name"


@pytest.mark.parametrize(("method", "prefix"), VECTORS)
def test_a_vector_of_the_greatest_length(method: Callable[..., bytes], prefix: bytes) -> None:
    length = 256 ** len(prefix) - 1
    greatest = b"\xff" * len(prefix)
    assert method(Reader(greatest + bytes(length), "outside"), "name") == bytes(length)
    cut = Reader(greatest + bytes(length - 1), "outside")
    assert refusal(partial(method, cut, "name")) == "outside ends 1 bytes too early"


def test_a_vector_may_have_a_maximum() -> None:
    def read(data: bytes, maximum: int) -> bytes:
        return Reader(data, "outside").opaque8("name", maximum=maximum)

    assert read(b"\x03abc", 3) == b"abc"
    assert refusal(lambda: read(b"\x03abc", 2)) == "name of 3 bytes, not 0 to 2"
    assert refusal(lambda: read(b"\x03ab", 3)) == "outside ends 1 bytes too early"


def test_a_length_has_two_whole_bytes() -> None:
    content = bytes(range(256)) * 2
    assert Reader(b"\x01\x02" + content, "outside").opaque16("name") == content[:0x102]
    assert opaque16(b"\x01\x02" + content[:0x102], "outside", "name", 0) == content[:0x102]


def test_a_vector_may_be_empty_unless_said_otherwise() -> None:
    assert Reader(b"\x00", "outside").opaque8("name") == b""
    assert Reader(b"\x00\x00", "outside").opaque16("name") == b""


@pytest.mark.parametrize(
    ("function", "prefix"),
    [pytest.param(opaque8, b"", id="opaque8"), pytest.param(opaque16, b"\x00", id="opaque16")],
)
def test_one_vector_and_nothing_more(function: Callable[..., bytes], prefix: bytes) -> None:
    longest = 256 ** (len(prefix) + 1) - 1

    def read(data: bytes, minimum: int) -> bytes:
        return function(prefix + data, "outside", "inside", minimum)

    assert read(b"\x00", 0) == b""
    assert read(b"\x02ab", 2) == b"ab"
    assert refusal(lambda: read(b"\x02ab", 3)) == f"inside of 2 bytes, not 3 to {longest}"
    assert refusal(lambda: read(b"\x03ab", 2)) == "outside ends 1 bytes too early"
    assert refusal(lambda: read(b"\x02abc", 2)) == "1 bytes left over in outside"
    assert refusal(lambda: read(b"", 0)) == "outside ends before inside"
    assert refusal(lambda: function(b"", "outside", "inside", 0)) == "outside ends before inside"


EXTENSION = Struct("!HH")


def walk(block: bytes, wanted: dict[int, str]) -> dict[int, bytes]:
    return entries(block, "extensions", EXTENSION, wanted, Reason.DUPLICATE_EXTENSION)


def test_entries_returns_the_wanted_ones() -> None:
    block = extension(7, b"ab") + extension(8, b"unwanted") + extension(9) + extension(8)
    assert walk(block, {7: "seven", 9: "nine", 10: "ten"}) == {7: b"ab", 9: b""}
    assert walk(b"", {0: "any"}) == {}


def test_an_entry_has_the_header_that_was_said() -> None:
    found = entries(b"\x07\x00\x01a", "names", Struct("!BH"), {7: "seven"}, Reason.DUPLICATE_NAME)
    assert found == {7: b"a"}


def test_a_wanted_entry_may_come_once() -> None:
    block = extension(7) + extension(8) + extension(7)
    with pytest.raises(HelloError) as caught:
        entries(block, "names", EXTENSION, {7: "seven"}, Reason.DUPLICATE_NAME)
    assert caught.value.alert is Alert.ILLEGAL_PARAMETER
    assert caught.value.reason is Reason.DUPLICATE_NAME
    assert str(caught.value) == "two entries seven in names"


@pytest.mark.parametrize(
    "size", [size for size in range(1, 13) if size != 6], ids="cut to {} bytes".format
)
@pytest.mark.parametrize("wanted", [7, 9])
def test_entries_stop_at_the_end(size: int, wanted: int) -> None:
    block = extension(7, b"ab") + extension(9, b"cd")
    if size == len(block):
        assert walk(block, {wanted: "some"}).keys() == {wanted}
    else:
        detail = refusal(lambda: walk(block[:size], {wanted: "some"}))
        assert detail == "extensions ends inside an entry"
