"""Calls of the C library that Python's `os` has no name for."""

import ctypes
import os
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: object) -> int:
    """Call `function` of the C library, and return what it returns.

    Args:
        function: its name.
        arguments: what fits a register each: integers, None, `ctypes.byref` of something.

    Raises:
        OSError: it returned a negative number; the reason is errno's.
    """
    # As long as a register: where the function is variadic, ctypes would pass 32 bits of an int.
    registers = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    result: int = getattr(_LIBC, function)(*registers)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
