"""The command `sniproxy-hostname`: names as a person types them → directory names.

All or nothing: standard output carries one line for every name, or nothing at all, so that
`dir=$(sniproxy-hostname NAME) && mkdir "$dir"` makes the right directory or none.

Standard input and output are opened by number and not taken from `sys`: Python sets those to
None, and print() then succeeds silently, when the descriptor is closed.
"""

import contextlib
import sys
from collections.abc import Sequence

from ._directory import directory_namer
from ._name import InvalidHostname
from ._unicode import from_unicode

# Djb's convention, and the daemon's: 100 and 111 mean that there is no answer, 1 that it is no.
_MAPPED, _REFUSED, _CALLED_WRONGLY, _SYSTEM_FAILED = 0, 1, 100, 111

_USAGE = "usage: sniproxy-hostname [--hashed] NAME..."
_HELP = f"""{_USAGE}

Print the name of the directory that sniproxy opens for each NAME, one a line.
The NAME - stands for the names on standard input, one a line, in UTF-8.

  --hashed    the names that sniproxy --hashed opens: BLAKE3 as 64 hex digits
  --help      print this
  --version   print the version

For example: mkdir "$(sniproxy-hostname one.example)"
"""


class _FatalError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv`; return its exit code."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except _FatalError as error:
        _complain(f"fatal: {error}")
        return error.code


def _run(argv: Sequence[str]) -> int:
    hashed = False
    names: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        match argument:
            case "-h" | "--help":
                return _print(_HELP)
            case "--version":
                return _print(_version())
            case "--hashed":
                hashed = True
            case "--":
                names.extend(arguments)
            # No label begins with a hyphen, so `-a.example` can be no name. But someone meant it
            # as one, and learns more from hearing that than of an unknown option -a.
            case _ if argument.startswith("--") and "." not in argument:
                raise _FatalError(_CALLED_WRONGLY, f"unknown option {argument!r} ({_USAGE})")
            case _:
                names.append(argument)
    if not names:
        raise _FatalError(_CALLED_WRONGLY, f"no name was given ({_USAGE})")
    return _map(names, hashed)


def _map(names: list[str], hashed: bool) -> int:
    try:
        directory_name = directory_namer(hashed)
    except ImportError as error:
        message = f"unable to hash names: Python's package blake3 is needed: {error}"
        raise _FatalError(_CALLED_WRONGLY, message) from None
    lines: list[str] = []
    refused = False
    for argument in names:
        for name in _names_on_standard_input() if argument == "-" else [argument]:
            try:
                lines.append(directory_name(from_unicode(name)) + "\n")
            except InvalidHostname as error:
                refused = True
                # repr() escapes whatever a terminal might obey, and what no encoding can print.
                _complain(f"{name!r}: {error}")
    return _REFUSED if refused else _print("".join(lines))


def _names_on_standard_input() -> list[str]:
    try:
        with open(0, "rb", closefd=False) as standard_input:
            text = standard_input.read()
    except OSError as error:
        message = f"unable to read standard input: {error.strerror}"
        raise _FatalError(_SYSTEM_FAILED, message) from error
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    # What is not UTF-8 becomes surrogates, as in an argument: no name has them, so it is refused.
    return [line.removesuffix(b"\r").decode("utf-8", "surrogateescape") for line in lines]


def _print(text: str) -> int:
    try:
        with open(1, "wb", closefd=False) as standard_output:
            standard_output.write(text.encode("ascii"))
    except OSError as error:
        message = f"unable to write standard output: {error.strerror}"
        raise _FatalError(_SYSTEM_FAILED, message) from error
    return _MAPPED


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # there is nobody left to tell
        print(f"sniproxy-hostname: {message}", file=sys.stderr, flush=True)


def _version() -> str:
    from importlib import metadata  # slow to load, and rarely needed

    try:
        version = metadata.version("sniproxy")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    return f"sniproxy-hostname {version}\n"


if __name__ == "__main__":
    sys.exit(main())
