from collections.abc import Callable

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


def test_numbers_are_big_endian_and_read_in_order() -> None:
    reader = Reader(b"\x01\x02\x03\x04\x05\x06", "numbers")
    assert (reader.u8(), reader.u16(), reader.u24()) == (0x01, 0x0203, 0x040506)
    reader.end()


@pytest.mark.parametrize(("read", "size"), [(Reader.u8, 1), (Reader.u16, 2), (Reader.u24, 3)])
def test_a_number_needs_all_its_bytes(read: Callable[[Reader], int], size: int) -> None:
    assert read(Reader(b"\xff" * size, "number")) == 256**size - 1
    assert "number ends 1 bytes too early" in refusal(
        lambda: read(Reader(b"\xff" * (size - 1), "number"))
    )


def test_a_bound_holds_although_there_are_bytes_behind_it() -> None:
    reader = Reader(b"\x00\x01\x02\x03", "inside", 1, 3)
    assert (reader.left, reader.u8(), reader.left) == (2, 1, 1)
    refusal(reader.u16)
    assert reader.u8() == 2  # a failed read moved nothing
    refusal(reader.u8)


@pytest.mark.parametrize(
    ("method", "prefix"),
    [(Reader.opaque8, b"\x03"), (Reader.opaque16, b"\x00\x03")],
)
def test_opaque(method: Callable[..., bytes], prefix: bytes) -> None:
    reader = Reader(prefix + b"abcd", "outside")
    assert method(reader, "name", minimum=3, maximum=3) == b"abc"
    assert reader.left == 1
    overrun = prefix + b"ab"
    assert "ends 1 bytes too early" in refusal(lambda: method(Reader(overrun, "outside"), "name"))
    assert refusal(lambda: method(Reader(prefix + b"abc", "outside"), "name", 4)).startswith(
        "name of 3 bytes"
    )
    refusal(lambda: method(Reader(prefix + b"abc", "outside"), "name", 0, 2))


def test_a_vector_is_read_inside_its_own_bounds() -> None:
    outside = Reader(b"\x00\x02ab" + b"c", "outside")
    inside = outside.vector16("inside", minimum=2)
    assert (inside.left, inside.u16(), inside.left) == (2, 0x6162, 0)
    inside.end()
    assert outside.u8() == ord("c")
    refusal(lambda: Reader(b"\x00\x03ab", "outside").vector16("inside"))
    refusal(lambda: Reader(b"\x00\x00", "outside").vector16("inside", minimum=1))


def test_end_does_not_forgive() -> None:
    assert refusal(Reader(b"ab", "block").end) == "2 bytes left over in block"
    Reader(b"", "block").end()


def test_extensions_yields_the_wanted_ones_in_order() -> None:
    block = extension(7, b"ab") + extension(8, b"unwanted") + extension(9) + extension(7, b"c")
    reader = Reader(block, "extensions")
    found = [(kind, data.left) for kind, data in reader.extensions({7: "seven", 9: "nine"})]
    assert found == [(7, 2), (9, 0), (7, 1)]
    reader.end()
    assert list(Reader(b"", "extensions").extensions({0: "any"})) == []


@pytest.mark.parametrize("trailing", [b"", b"\x00" * 8], ids=["at the end", "bytes behind"])
@pytest.mark.parametrize(
    "size", [size for size in range(1, 13) if size != 6], ids="cut to {} bytes".format
)
def test_extensions_stop_at_the_bound(size: int, trailing: bytes) -> None:
    block = extension(7, b"ab") + extension(9, b"cd")
    reader = Reader(block[:size] + block[size:] * bool(trailing) + trailing, "extensions", 0, size)
    if size == len(block):
        assert len(list(reader.extensions({9: "nine"}))) == 1
    else:
        refusal(lambda: list(reader.extensions({})))
