import pytest

from sniproxy.wire import Alert, Reason
from sniproxy.wire.vectors import not_one_vector


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
