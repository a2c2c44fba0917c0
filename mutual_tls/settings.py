"""Small files that are the configuration, read anew for each connection.

A file holds one value a line. `#` begins a comment, at the begin of a line or after white space,
so that a value may hold one inside. Blank lines are skipped, and white space around a value is
taken away.

Law: every call blocks for a bounded time, and what can't be read in full is an error, never a
shorter list. Only what is absent may be taken for unset, and it has an exception of its own,
`FileNotFoundError`.
"""

import errno
import os
import re
import stat
from pathlib import Path

__all__ = ["SettingsError", "exists", "read_lines", "read_names", "read_value", "read_values"]

# The most bytes of a file, and of all files of a directory together. A line is seldom longer than
# 64 bytes, so that is a thousand values; beyond, a connection would wait for milliseconds.
_LARGEST = 64 * 1024

# The most entries of a directory: each is opened and read, which takes about 10 µs, and 10 ms are
# the most that all other connections should have to wait.
_MOST_ENTRIES = 1000

# O_NONBLOCK: a FIFO without a writer opens at once (fifo(7)), and is refused then. O_NOCTTY: a
# terminal must not become ours (open(2)).
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_NOT_REGULAR = "it is not a regular file"

# ASCII only: another kind of space is a part of the value, and what reads the value refuses it.
_WHITE_SPACE = " \t\r\v\f"
_COMMENT = re.compile(rf"(?:^|(?<=[{_WHITE_SPACE}]))#.*", re.DOTALL)


class SettingsError(Exception):
    """A setting is there, and can't be read. The message says which and why, for a person."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"unable to read {path}: {reason}")


def read_values(path: Path) -> list[str]:
    """Return the values in the file at `path`, in their order.

    Raises:
        FileNotFoundError: nothing is there (ENOENT, ENOTDIR).
        SettingsError: it is no regular file, too large, not text, or out of reach.
    """
    return [value for _, value in read_lines(path)]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the values in the file at `path`, each with the number of its line.

    Raises:
        FileNotFoundError, SettingsError: as `read_values`.
    """
    fd = _open(path, path)
    try:
        return _parse_lines(path, _read(fd, path, _LARGEST))
    finally:
        os.close(fd)


def read_value(path: Path) -> str:
    """Return the one value in the file at `path`.

    Raises:
        FileNotFoundError: nothing is there.
        SettingsError: as `read_values`, or the file has no value, or several.
    """
    values = read_values(path)
    if len(values) != 1:
        raise SettingsError(path, f"it has {len(values)} values, and must have one")
    return values[0]


def read_names(path: Path) -> list[str]:
    """Return the names that the directory or the file at `path` lists.

    In a directory, an entry is a value by its name if it is an empty file or a directory. A file
    that is not empty holds values instead, as one that `read_values` reads, and its own name means
    nothing. Entries that begin with "." are skipped: they are temporary files of editors, or
    Kubernetes' `..data`. So are those that vanish meanwhile, and links to nothing.

    Returns:
        The values in the order of the lines, entries in the order of their names.

    Raises:
        FileNotFoundError: nothing is there.
        SettingsError: as `read_values`, for the file or for any entry; or there are too many.
    """
    fd = _open(path, path)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            return _parse(path, _read(fd, path, _LARGEST))
        return _read_directory(fd, path)
    finally:
        os.close(fd)


def exists(path: Path) -> bool:
    """Tell whether there is an entry at `path`, such as the empty file `send-proxy-v1`.

    Whatever it is: a link to nothing was put there on purpose, too.

    Raises:
        SettingsError: nobody can say.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise SettingsError(path, _reason(error)) from None
    return True


def _read_directory(fd: int, path: Path) -> list[str]:
    # All from the directory that was opened, even while a link to it is being swapped.
    try:
        entries = sorted(name for name in os.listdir(fd) if not name.startswith("."))
    except OSError as error:
        raise SettingsError(path, _reason(error)) from None
    if len(entries) > _MOST_ENTRIES:
        raise SettingsError(path, f"it has more than {_MOST_ENTRIES} entries")
    values: list[str] = []
    left = _LARGEST
    for name in entries:
        entry_path = path / name
        try:
            entry = _open(name, entry_path, directory=fd)
        except FileNotFoundError:
            continue
        try:
            content = b""
            if not stat.S_ISDIR(os.fstat(entry).st_mode):
                content = _read(entry, entry_path, left)
        finally:
            os.close(entry)
        left -= len(content)
        values += _parse(entry_path, content) if content else [_entry_value(entry_path)]
    return values


def _entry_value(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise SettingsError(path.parent, "the name of an entry is not UTF-8") from None
    return path.name


def _open(name: Path | str, path: Path, *, directory: int | None = None) -> int:
    try:
        return os.open(name, _FLAGS, dir_fd=directory)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, os.fspath(path)) from None
    except (OSError, ValueError) as error:
        raise SettingsError(path, _reason(error)) from None


def _read(fd: int, path: Path, most: int) -> bytes:
    try:
        # Before a read: reading from a device or a terminal may do something.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SettingsError(path, _NOT_REGULAR)
        # Not by its size: files in /proc and /sys have none.
        content = b""
        while len(content) <= most and (piece := os.read(fd, most + 1 - len(content))):
            content += piece
    except OSError as error:
        raise SettingsError(path, _reason(error)) from None
    if len(content) > most:
        raise SettingsError(path, f"there are more than {_LARGEST} bytes")
    return content


def _parse(path: Path, content: bytes) -> list[str]:
    return [value for _, value in _parse_lines(path, content)]


def _parse_lines(path: Path, content: bytes) -> list[tuple[int, str]]:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(path, f"line {line} is not UTF-8") from None
    if "\0" in text:
        raise SettingsError(path, "there is a NUL in it")
    # Not splitlines(), which also breaks at characters that a value may hold.
    lines = (_COMMENT.sub("", line).strip(_WHITE_SPACE) for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line]


def _reason(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return "its name is not one that a file can have"  # a NUL, or what is not Unicode
    if error.errno == errno.ENXIO:
        return _NOT_REGULAR  # open(2): a socket
    return error.strerror or str(error)
