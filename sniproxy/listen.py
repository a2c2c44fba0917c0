"""sniproxy-listen: bind, listen, put the socket on standard input, become another program.

For places without a supervisor. Exit codes: those of `fatal`, otherwise those of the program.
"""

import contextlib
import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple, NoReturn

from sniproxy import __version__
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

# An IPv6 address has colons of its own, so it stands in brackets, as in a URL (RFC 3986 §3.2.2).
_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<v4>[^\[\]:]*)):(?P<port>[0-9]{1,5})", re.ASCII)

_HIGHEST_PORT = 65535

# More than any kernel lets wait: it takes net.core.somaxconn instead, listen(2). SOMAXCONN is what
# that was by default where this Python was built.
_LONGEST_QUEUE = (1 << 31) - 1


class Endpoint(NamedTuple):
    """Where to listen."""

    family: socket.AddressFamily
    address: tuple[Any, ...]  # as socket.getaddrinfo gives it
    dual_stack: bool


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


def parse(where: str) -> Endpoint:
    """Return what `ADDRESS:PORT` stands for.

    Raises:
        ValueError: it is no numeric address and port; the message says what is wrong.
    """
    match = _ADDRESS.fullmatch(where)
    if match is None:
        raise ValueError("not of the form ADDRESS:PORT (an IPv6 address stands in brackets)")
    port = int(match["port"])
    if port > _HIGHEST_PORT:
        raise ValueError(f"no port is higher than {_HIGHEST_PORT}")
    if match["v6"] is None and match["v4"]:
        family, host = socket.AF_INET, match["v4"]
    else:
        family, host = socket.AF_INET6, match["v6"] if match["v6"] is not None else "::"
    try:
        # Numeric: a name may have many addresses, and none before the network is up. getaddrinfo
        # alone would take 127.1 and 2130706433 for addresses, and * for loopback.
        _ = IPv4Address(host) if family == socket.AF_INET else IPv6Address(host)
        [(_, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except (ValueError, socket.gaierror):
        version = "IPv4" if family == socket.AF_INET else "IPv6"
        raise ValueError(f"{host!a} is not a numeric {version} address") from None
    # The option means something for the wildcard address only.
    return Endpoint(family, address, dual_stack=address[0] == "::")


def listen(where: str) -> socket.socket:
    """Return a socket that listens on `ADDRESS:PORT`.

    Raises:
        FatalError: the message says which address, and why.
    """
    try:
        endpoint = parse(where)
    except ValueError as error:
        message = f"unable to listen on {where!a}: {error}"
        raise UsageError(message) from None
    try:
        try:
            listening = socket.socket(endpoint.family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT or not where.startswith(":"):
                raise
            # A kernel without IPv6: all addresses are those of IPv4.
            return listen(f"0.0.0.0{where}")
        # A port whose last connections are still in TIME_WAIT can be had at once.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            only = not endpoint.dual_stack
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        listening.bind(endpoint.address)
        listening.listen(_LONGEST_QUEUE)
    except OSError as error:
        raise FatalError.of(f"listen on {where}", error) from None
    return listening


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
