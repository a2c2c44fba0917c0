"""Programs for the kernel's filters, of packets and of system calls: linux/filter.h."""

import ctypes
from collections.abc import Sequence

# Code, how many to skip if a comparison holds, and if not; a constant.
Instruction = tuple[int, int, int, int]


class _Instruction(ctypes.Structure):
    # struct sock_filter
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("constant", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """A program as the kernel takes it: struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))

    def code(self) -> bytes:
        """Return the instructions."""
        size = self.length * ctypes.sizeof(_Instruction)
        return ctypes.string_at(self.instructions, size)

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> "Program":
        """Return the program that these instructions make."""
        array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
        return cls(len(array), array)
