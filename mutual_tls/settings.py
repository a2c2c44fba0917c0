"""Small files that are the configuration, read anew for each connection.

A file holds one value a line. `#` begins a comment, at the begin of a line or after white space,
so that a value may hold one inside. Blank lines are skipped, and white space around a value is
taken away.

To read anew is to look again: what stat(2) shows to be the same as before is not opened.

Law: every call blocks for a bounded time, and what can't be read in full is an error, never a
shorter list. Only what is absent may be taken for unset, and it has an exception of its own,
`FileNotFoundError`. Any other OSError says that no descriptor or no memory is left to read with.
"""

import errno
import os
import re
import stat
import time
from pathlib import Path

from mutual_tls.exhausted import EXHAUSTED
from mutual_tls.signature import Signature, signature

__all__ = [
    "SettingsError",
    "StrPath",
    "exists",
    "read_entries",
    "read_lines",
    "read_names",
    "read_value",
    "read_values",
    "unreadable",
]

# The most bytes of a file, and of all files of a directory together. A line is seldom longer than
# 64 bytes, so that is a thousand values; beyond, a connection would wait for milliseconds.
_LARGEST = 64 * 1024

# The most entries of a directory: each is opened and read, which takes about 10 µs, and 10 ms are
# the most that all other connections should have to wait. It holds where the entries are only
# listed, too: whoever lists them looks into them next.
_MOST_ENTRIES = 1000

# O_NONBLOCK: a FIFO without a writer opens at once (fifo(7)), and is refused then. O_NOCTTY: a
# terminal must not become ours (open(2)).
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

# Seconds within which a file may be changed again without a trace: its times are those of the
# kernel's clock, whose ticks take up to 10 ms. What was changed so recently is read again.
_SETTLED = 1.0

# Files and directories that are remembered; then all are forgotten, which bounds the memory.
_MOST_REMEMBERED = 4096

_NOT_REGULAR = "it is not a regular file"

# ASCII only: another kind of space is a part of the value, and what reads the value refuses it.
_WHITE_SPACE = " \t\r\v\f"
_COMMENT = re.compile(rf"(?:^|(?<=[{_WHITE_SPACE}]))#.*", re.DOTALL)

StrPath = str | Path


class _Seen:
    """What was looked at while something was read.

    Attributes:
        signatures: Paths, and what was there.
        is_settled: Whether another look would tell that something has changed.
    """

    __slots__ = ("_now", "is_settled", "signatures")

    def __init__(self) -> None:
        self.signatures: list[tuple[str, Signature]] = []
        self.is_settled = True
        self._now = time.time()

    def note(self, path: str, status: os.stat_result) -> None:
        """Note what is going to be read."""
        self.signatures.append((path, signature(status)))
        if abs(self._now - status.st_ctime) < _SETTLED:
            self.is_settled = False


# Values, each with the number of its line; 0 is the name of an entry of a directory.
_Lines = list[tuple[int, str]]

# What was read, by its path, and whether that might have been a directory.
_known: dict[tuple[str, bool], tuple[list[tuple[str, Signature]], _Lines]] = {}

# The entries of directories that were listed, by their paths.
_listed: dict[str, tuple[Signature, frozenset[str]]] = {}


class SettingsError(Exception):
    """A setting is there, and can't be read. The message says which and why, for a person."""

    def __init__(self, path: StrPath, reason: str) -> None:
        super().__init__(f"unable to read {path}: {reason}")


def unreadable(path: StrPath, error: OSError | ValueError) -> OSError | SettingsError:
    """Return what to raise where something that is there can't be read.

    If the machine has nothing left to read it with, that is no fault of the setting, and `error`
    remains what it is.
    """
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return error
    return SettingsError(path, _reason(error))


def read_values(path: StrPath) -> list[str]:
    """Return the values in the file at `path`, in their order.

    Raises:
        FileNotFoundError: nothing is there (ENOENT, ENOTDIR).
        SettingsError: it is no regular file, too large, not text, out of reach, or a link that
            leads nowhere.
    """
    return [value for _, value in _read_or_remember(path, may_be_directory=False)]


def read_lines(path: StrPath) -> list[tuple[int, str]]:
    """Return the values in the file at `path`, each with the number of its line.

    Raises:
        FileNotFoundError, SettingsError: as `read_values`.
    """
    return _read_or_remember(path, may_be_directory=False)


def read_value(path: StrPath) -> str:
    """Return the one value in the file at `path`.

    Raises:
        FileNotFoundError: nothing is there.
        SettingsError: as `read_values`, or the file has no value, or several.
    """
    values = read_values(path)
    if len(values) != 1:
        raise SettingsError(path, f"it has {len(values)} values, and must have one")
    return values[0]


def read_names(path: StrPath) -> list[str]:
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
    return [value for _, value in _read_or_remember(path, may_be_directory=True)]


def read_entries(path: StrPath) -> frozenset[str]:
    """Return the names of the entries of a directory, whatever they are: links to nothing, too.

    Entries that begin with "." are skipped, as in `read_names`. A name that is not UTF-8 has
    surrogates in it, os.fsdecode.

    Raises:
        FileNotFoundError: nothing is there.
        NotADirectoryError: something else is.
        SettingsError: it has too many entries, or is out of reach.
    """
    path = os.fspath(path)
    known = _listed.get(path)
    if known is not None and _look(path) == known[0]:
        return known[1]
    fd = _open(path, path)
    try:
        seen = _Seen()
        seen.note(path, status := os.fstat(fd))
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        entries = frozenset(_list(fd, path))
    finally:
        os.close(fd)
    if seen.is_settled:
        if len(_listed) >= _MOST_REMEMBERED:
            _listed.clear()
        _listed[path] = signature(status), entries
    return entries


def exists(path: StrPath) -> bool:
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
        raise unreadable(path, error) from None
    return True


def _read_or_remember(path: StrPath, *, may_be_directory: bool) -> _Lines:
    path = os.fspath(path)
    known = _known.get((path, may_be_directory))
    if known is not None and _are_the_same(known[0]):
        return known[1]
    fd = _open(path, path)
    try:
        seen = _Seen()
        if may_be_directory and stat.S_ISDIR(os.fstat(fd).st_mode):
            lines = _read_directory(fd, path, seen)
        else:
            lines = _parse(path, _read(fd, path, _LARGEST, seen))
    finally:
        os.close(fd)
    if seen.is_settled:
        if len(_known) >= _MOST_REMEMBERED:
            _known.clear()
        _known[path, may_be_directory] = seen.signatures, lines
    return lines


def _are_the_same(signatures: list[tuple[str, Signature]]) -> bool:
    for path, before in signatures:  # noqa: SIM110 - a generator takes as long as stat(2)
        if _look(path) != before:
            return False
    return True


def _look(path: str) -> Signature | None:
    try:
        return signature(os.stat(path))
    except OSError:
        return None  # whoever opens it will find out why


def _read_directory(fd: int, path: str, seen: _Seen) -> _Lines:
    # All from the directory that was opened, even while a link to it is being swapped.
    seen.note(path, os.fstat(fd))
    lines: _Lines = []
    left = _LARGEST
    for name in sorted(_list(fd, path)):
        entry_path = f"{path}/{name}"
        try:
            entry = _open(name, entry_path, directory=fd)
        except FileNotFoundError:
            seen.is_settled = False  # a link to nothing, which may lead to something soon
            continue
        try:
            content = b""
            if stat.S_ISDIR((status := os.fstat(entry)).st_mode):
                seen.note(entry_path, status)
            else:
                content = _read(entry, entry_path, left, seen)
        finally:
            os.close(entry)
        left -= len(content)
        lines += _parse(entry_path, content) if content else [_entry_value(path, name)]
    return lines


def _list(fd: int, path: str) -> list[str]:
    try:
        entries = [name for name in os.listdir(fd) if not name.startswith(".")]
    except OSError as error:
        raise unreadable(path, error) from None
    if len(entries) > _MOST_ENTRIES:
        raise SettingsError(path, f"it has more than {_MOST_ENTRIES} entries")
    return entries


def _entry_value(path: str, name: str) -> tuple[int, str]:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SettingsError(path, "the name of an entry is not UTF-8") from None
    return 0, name


def _open(name: str, path: str, *, directory: int | None = None) -> int:
    may_be_link = False
    try:
        if directory is None:
            # This alone tells that a setting is absent, as most are. If open(2) were the first to
            # say so, there would be the question whether that was a link to nothing.
            os.lstat(path)
            may_be_link = True
        return os.open(name, _FLAGS, dir_fd=directory)
    except FileNotFoundError:
        # Of the entries of a directory such a link is none; but by its own name somebody has put
        # it there to say something.
        if may_be_link and os.path.islink(path):
            raise SettingsError(path, "it is a link that leads nowhere") from None
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _read(fd: int, path: str, most: int, seen: _Seen) -> bytes:
    try:
        # Before a read: reading from a device or a terminal may do something. And what is changed
        # while it is read is not what was noted here.
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SettingsError(path, _NOT_REGULAR)
        seen.note(path, status)
        # Not by its size: files in /proc and /sys have none.
        content = b""
        while len(content) <= most and (piece := os.read(fd, most + 1 - len(content))):
            content += piece
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) > most:
        raise SettingsError(path, f"there are more than {_LARGEST} bytes")
    if len(content) != status.st_size:
        seen.is_settled = False  # in /proc contents change and leave no trace
    return content


def _parse(path: str, content: bytes) -> _Lines:
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
