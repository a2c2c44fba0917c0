"""Small files that are the configuration: one value a line.

They are read anew for each connection. What is absent, and what can't be read, are two different
things: the first may have a meaning, the second refuses the connection.
"""

import errno
import os
import re
import stat
from pathlib import Path

# The longest file that is read: a thousand values of 64 bytes each. A longer one is a mistake.
_LONGEST = 1 << 16

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})

# What stands behind a # is for readers, if that begins the line or follows white space.
_COMMENT = re.compile(r"(?:^|\s)#.*")


class SettingsError(Exception):
    """A setting can't be read; the message names the file, and says why."""

    def __init__(self, path: Path, why: str | None) -> None:
        super().__init__(f"unable to read {path}: {why}")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the values in a file, each with the number of its line.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: it can't be read.
    """
    try:
        # Not to wait for whoever writes to a FIFO, and not to get a terminal.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise SettingsError(path, error.strerror) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SettingsError(path, "it is no regular file")
        data = os.read(fd, _LONGEST + 1)
    except OSError as error:
        raise SettingsError(path, error.strerror) from None
    finally:
        os.close(fd)
    if len(data) > _LONGEST:
        raise SettingsError(path, f"it is longer than {_LONGEST} bytes")
    if b"\0" in data:
        raise SettingsError(path, "it has a NUL byte in it")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise SettingsError(path, "it is not UTF-8") from None
    numbered = ((number, _COMMENT.sub("", line).strip()) for number, line in enumerate(lines, 1))
    return [(number, value) for number, value in numbered if value]


def read_values(path: Path) -> list[str]:
    """Return the values in a file.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: it can't be read.
    """
    return [value for _, value in read_lines(path)]


def read_value(path: Path) -> str:
    """Return the one value in a file.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: it can't be read, or has none, or several.
    """
    values = read_values(path)
    if len(values) != 1:
        raise SettingsError(path, f"it has {len(values) or 'no'} values, not one")
    return values[0]


def read_names(path: Path) -> list[str]:
    """Return values that are the lines of a file; or in a directory, names of files, and lines.

    A file in the directory that is empty has its value in its name. A name that begins with a dot
    is none.

    Raises:
        FileNotFoundError: there is neither.
        SettingsError: something can't be read.
    """
    try:
        names = sorted(os.listdir(path))
    except NotADirectoryError:
        return read_values(path)
    except OSError as error:
        if error.errno in _ABSENT:
            raise
        raise SettingsError(path, error.strerror) from None
    found = []
    for name in names:
        if not name.startswith("."):
            try:
                found += read_values(path / name) or [name]
            except FileNotFoundError:  # removed meanwhile, or a link that leads nowhere
                raise SettingsError(path / name, os.strerror(errno.ENOENT)) from None
    return found


def exists(path: Path) -> bool:
    """Tell whether there is such a file or directory.

    Raises:
        SettingsError: that can't be found out.
    """
    try:
        path.lstat()
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise SettingsError(path, error.strerror) from None
    return True
