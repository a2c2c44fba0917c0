"""Programs for the kernel's filters, of packets and of system calls: linux/filter.h."""

import ctypes
from _socket import SOL_SOCKET, socket
from collections.abc import Sequence

# asm-generic/socket.h; Python does not have them.
SO_ATTACH_FILTER = 26
SO_LOCK_FILTER = 44

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

    def attach(self, sock: socket) -> None:
        """Have the kernel run it for what a socket receives.

        Raises:
            OSError: setsockopt(2) failed. EPERM: the socket's filter is locked, or, for TCP, some
                kernels want CAP_NET_ADMIN.
        """
        sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, bytes(self))

    @classmethod
    def of(cls, instructions: Sequence[Instruction]) -> "Program":
        """Return the program that these instructions make."""
        array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
        return cls(len(array), array)
