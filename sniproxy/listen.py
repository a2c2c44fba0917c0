"""sniproxy-listen: bind, listen, put the socket on standard input, become another program.

For places without a supervisor. Exit codes: those of `fatal`, otherwise those of the program.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sniproxy import __version__
from sniproxy.service.bind import listen
from sniproxy.service.fatal import FatalError, UsageError, print_out

_USAGE = "usage: sniproxy-listen ADDRESS:PORT PROGRAM [ARG...]"
_HELP = f"""\
{_USAGE}

Listen on a TCP port, and run PROGRAM with the listening socket as its standard input.

  127.0.0.1:443  one IPv4 address     0.0.0.0:443  all IPv4 addresses
  [::1]:443      one IPv6 address     :443, [::]:443  all addresses, IPv4 and IPv6

  --help         print this
  --version      print the version

For example: cd /srv/hosts && sniproxy-listen :443 sniproxy
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv`; return the exit code, if it comes to that."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except FatalError as error:
        with contextlib.suppress(OSError):  # nobody is left to tell
            os.write(2, f"sniproxy-listen: fatal: {error}\n".encode(errors="backslashreplace"))
        return error.code


def _run(arguments: list[str]) -> int:
    match arguments:
        case ["-h" | "--help", *_]:
            print_out(_HELP)
        case ["--version", *_]:
            print_out(f"sniproxy-listen {__version__}\n")
        case [where, program, *_] if program and not where.startswith("-"):
            listening = listen(where).detach()
            # It is descriptor 0 already if standard input was closed.
            if listening == 0:
                os.set_inheritable(0, True)
            else:
                os.dup2(listening, 0)
            _become(program, arguments[1:])
        case _:
            raise UsageError(f"unable to understand the arguments: {_USAGE}")
    return 0


def _become(program: str, argv: list[str]) -> NoReturn:
    # Python ignores these, and what is ignored stays so across exec.
    for number in signal.SIGPIPE, signal.SIGXFSZ:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program, argv)  # noqa: S606 - to become the program that was named is the purpose
    except OSError as error:
        raise FatalError.of(f"run {program!a}", error) from None


if __name__ == "__main__":
    sys.exit(main())
