"""How a command ends that can't do what it is for: exit codes, and what is said.

The codes are the convention of djb's and skarnet's programs. They tell a supervisor whether there
is any use in another try.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self


class FatalError(Exception):
    """A system call failed, which may get better; the message says what could not be done, and why.

    Attributes:
        code: The exit code.
    """

    code: ClassVar[int] = 111

    @classmethod
    def of(cls, what: str, error: OSError) -> Self:
        """Return the error for `what`, "write the log", and the reason that the kernel gave."""
        return cls(f"unable to {what}: {error.strerror}")


class UsageError(FatalError):
    """The mistake is the caller's, and does not go away by itself."""

    code: ClassVar[int] = 100


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Do what is in the block. A system call that fails there is fatal: `what` can't be done."""
    try:
        yield
    except OSError as error:
        raise FatalError.of(what, error) from error


def print_out(text: str) -> None:
    """Write `text` to standard output.

    Raises:
        FatalError: it can't be written, all of it.
    """
    with attempt("write standard output"), open(1, "w", closefd=False) as output:
        output.write(text)
