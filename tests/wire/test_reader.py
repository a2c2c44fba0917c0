from collections.abc import Callable
from struct import Struct

import pytest

from sniproxy.wire import Alert, HelloError, Reason
from sniproxy.wire.reader import entries, not_one_vector
from tests.support.hellos import extension


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(HelloError) as caught:
        call()
    assert (caught.value.alert, caught.value.reason) == (
        Alert.DECODE_ERROR,
        Reason.MALFORMED_HELLO,
    )
    return str(caught.value)


@pytest.mark.parametrize("prefix", [1, 2])
def test_what_is_wrong_with_a_vector(prefix: int) -> None:
    def detail(data: bytes, minimum: int) -> str:
        data = bytes(prefix - 1) + data
        error = not_one_vector(data, prefix, "outside", "inside", minimum)
        assert (error.alert, error.reason) == (Alert.DECODE_ERROR, Reason.MALFORMED_HELLO)
        return str(error)

    assert detail(b"\x02ab", 3) == "inside of 2 bytes, not 3 or more"
    assert detail(b"\x03ab", 2) == detail(b"\x03ab", 3) == "outside ends 1 bytes too early"
    assert detail(b"\x02abc", 2) == "1 bytes left over in outside"
    assert detail(b"", 0) == "outside ends before inside"


def test_the_first_byte_of_a_length_counts() -> None:
    error = not_one_vector(b"\x01\x02a", 2, "outside", "inside", 1)
    assert str(error) == "outside ends 257 bytes too early"


EXTENSION = Struct("!HH")


def walk(block: bytes, wanted: dict[int, str]) -> dict[int, bytes]:
    return entries(block, 0, "extensions", EXTENSION, wanted, Reason.DUPLICATE_EXTENSION)


def test_entries_returns_the_wanted_ones() -> None:
    block = extension(7, b"ab") + extension(8, b"unwanted") + extension(9) + extension(8)
    assert walk(block, {7: "seven", 9: "nine", 10: "ten"}) == {7: b"ab", 9: b""}
    assert walk(b"", {0: "any"}) == {}


def test_a_list_may_begin_anywhere() -> None:
    block = b"12345" + extension(7, b"ab")
    assert entries(block, 5, "names", EXTENSION, {7: "seven"}, Reason.DUPLICATE_NAME) == {7: b"ab"}


def test_an_entry_has_the_header_that_was_said() -> None:
    found = entries(
        b"\x07\x00\x01a", 0, "names", Struct("!BH"), {7: "seven"}, Reason.DUPLICATE_NAME
    )
    assert found == {7: b"a"}


def test_a_wanted_entry_may_come_once() -> None:
    block = extension(7) + extension(8) + extension(7)
    with pytest.raises(HelloError) as caught:
        entries(block, 0, "names", EXTENSION, {7: "seven"}, Reason.DUPLICATE_NAME)
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
