from collections.abc import Callable
from functools import partial

import pytest

from sniproxy.wire import Alert, HelloError, Reason
from sniproxy.wire.reader import Reader
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
    reader = Reader(b"\x01\x02\x03", "bytes")
    assert (reader.u8(), reader.skip(1), reader.u8()) == (1, 1, 3)
    reader.end()
    assert refusal(reader.u8) == "bytes ends 1 bytes too early"
    assert refusal(lambda: reader.skip(2)) == "bytes ends 2 bytes too early"


def test_a_bound_holds_although_there_are_bytes_behind_it() -> None:
    reader = Reader(b"\x00\x01\x02\x03", "inside", 1, 3)
    assert (reader.left, reader.u8(), reader.left) == (2, 1, 1)
    for read in reader.opaque16, reader.vector16:
        assert refusal(partial(read, "short")) == "inside ends before short"
    assert reader.u8() == 2  # a failed read moved nothing
    for read in reader.opaque8, reader.opaque16, reader.vector16:
        assert refusal(partial(read, "nothing")) == "inside ends before nothing"
    refusal(reader.u8)


@pytest.mark.parametrize(
    ("method", "prefix"),
    [(Reader.opaque8, b"\x03"), (Reader.opaque16, b"\x00\x03")],
)
def test_opaque(method: Callable[..., bytes], prefix: bytes) -> None:
    reader = Reader(prefix + b"abcd", "outside")
    assert method(reader, "name", minimum=3) == b"abc"
    assert reader.left == 1
    overrun = prefix + b"ab"
    assert refusal(lambda: method(Reader(overrun, "outside"), "name")) == (
        "outside ends 1 bytes too early"
    )
    longest = 256 ** len(prefix) - 1
    assert refusal(lambda: method(Reader(prefix + b"abc", "outside"), "name", 4)) == (
        f"name of 3 bytes, not 4 to {longest}"
    )


def test_a_vector_may_have_a_maximum() -> None:
    def read(maximum: int) -> bytes:
        return Reader(b"\x03abc", "outside").opaque8("name", maximum=maximum)

    assert read(3) == b"abc"
    assert refusal(lambda: read(2)) == "name of 3 bytes, not 0 to 2"


def test_a_vector_is_read_inside_its_own_bounds() -> None:
    outside = Reader(b"\x00\x02ab" + b"c", "outside")
    inside = outside.vector16("inside", minimum=2)
    assert (inside.left, inside.u8(), inside.u8(), inside.left) == (2, ord("a"), ord("b"), 0)
    inside.end()
    assert outside.u8() == ord("c")
    assert refusal(lambda: Reader(b"\x00\x03ab", "outside").vector16("inside")) == (
        "outside ends 1 bytes too early"
    )
    assert refusal(lambda: Reader(b"\x00\x00", "outside").vector16("inside", minimum=1)) == (
        "inside of 0 bytes, not 1 to 65535"
    )


def test_a_length_has_two_whole_bytes() -> None:
    content = bytes(range(256)) * 2
    for read in Reader.opaque16, Reader.vector16:
        reader = Reader(b"\x01\x02" + content[:0x102], "outside")
        read(reader, "name")
        reader.end()
    assert Reader(b"\x01\x02" + content, "outside").opaque16("name") == content[:0x102]
    assert Reader(b"\xff" + bytes(255), "outside").opaque8("name") == bytes(255)
    assert Reader(b"\xff\xff" + bytes(65535), "outside").opaque16("name") == bytes(65535)


def test_a_vector_may_be_empty_unless_said_otherwise() -> None:
    assert Reader(b"\x00", "outside").opaque8("name") == b""
    assert Reader(b"\x00\x00", "outside").opaque16("name") == b""
    Reader(b"\x00\x00", "outside").vector16("name").end()


def test_a_vector_speaks_by_its_own_name() -> None:
    inside = Reader(b"\x00\x01a", "outside").vector16("inside")
    assert refusal(inside.end) == "1 bytes left over in inside"
    assert refusal(partial(inside.skip, 3)) == "inside ends 2 bytes too early"
    found = Reader(extension(7, b"a"), "extensions").extensions({7: "seven"})
    assert refusal(found[7].end) == "1 bytes left over in seven"


def test_end_does_not_forgive() -> None:
    assert refusal(Reader(b"ab", "block").end) == "2 bytes left over in block"
    Reader(b"", "block").end()


def test_extensions_returns_the_wanted_ones() -> None:
    block = extension(7, b"ab") + extension(8, b"unwanted") + extension(9) + extension(8)
    reader = Reader(block, "extensions")
    found = reader.extensions({7: "seven", 9: "nine", 10: "ten"})
    assert {kind: data.left for kind, data in found.items()} == {7: 2, 9: 0}
    assert found[7].skip(2) == 4
    found[7].end()
    reader.end()
    assert Reader(b"", "extensions").extensions({0: "any"}) == {}


def test_a_wanted_extension_may_come_once() -> None:
    reader = Reader(extension(7) + extension(8) + extension(7), "extensions")
    with pytest.raises(HelloError) as caught:
        reader.extensions({7: "seven"})
    assert caught.value.alert is Alert.ILLEGAL_PARAMETER
    assert caught.value.reason is Reason.DUPLICATE_EXTENSION
    assert str(caught.value) == "two extensions seven"


@pytest.mark.parametrize("trailing", [b"", b"\x00" * 8], ids=["at the end", "bytes behind"])
@pytest.mark.parametrize(
    "size", [size for size in range(1, 13) if size != 6], ids="cut to {} bytes".format
)
def test_extensions_stop_at_the_bound(size: int, trailing: bytes) -> None:
    block = extension(7, b"ab") + extension(9, b"cd")
    reader = Reader(block[:size] + block[size:] * bool(trailing) + trailing, "extensions", 0, size)
    if size == len(block):
        assert reader.extensions({9: "nine"}).keys() == {9}
    else:
        detail = refusal(lambda: reader.extensions({9: "nine"}))
        assert detail == "extensions ends inside an extension"
