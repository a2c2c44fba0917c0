"""The checksum, with the examples of RFC 3720 appendix B.4 and of everybody."""

import pytest

from sniproxy.wire.crc32c import crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_examples(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
