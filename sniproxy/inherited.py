"""The listening sockets: what whoever started us has bound, on standard input or by LISTEN_FDS.

Or else, where an option says so, sockets that we bind.
"""

import os
import socket as std
from _socket import socket
from collections.abc import Sequence
from contextlib import ExitStack

from sniproxy.engine.listener import NotListeningError, take_listening_socket
from sniproxy.service import listen_fds, standard
from sniproxy.service.bind import listen_anywhere
from sniproxy.service.fatal import FatalError, UsageError, attempt


def take_listening_sockets(
    how_to_call: str, *, most: int = 1, may_be_unix: bool = False
) -> list[tuple[socket, str]]:
    """Return the listening sockets, of which no other descriptor stays open behind our back.

    Args:
        how_to_call: an example of how to pass one, for who has not.
        most: how many there may be.
        may_be_unix: whether Unix sockets will do, too.

    Returns:
        Each with its name in LISTEN_FDNAMES. There is one at the least.

    Raises:
        UsageError: there is none, or too many.
        FatalError: a system call failed.
    """
    passed = listen_fds.take()
    if len(passed) > most:
        raise UsageError(
            f"unable to accept connections: LISTEN_FDS passes {len(passed)} sockets; start one "
            "copy for each socket"
        )
    where = "LISTEN_FDS" if passed else "standard input"
    try:
        standard.open_missing(besides=next(iter(passed), 0))
        taken = []
        for descriptor, name in (passed or {0: ""}).items():
            taken.append((take_listening_socket(descriptor, may_be_unix=may_be_unix), name))
            if passed:
                os.close(descriptor)
    except NotListeningError as error:
        kind = "TCP or Unix socket" if may_be_unix else "TCP socket"
        raise UsageError(
            f"unable to accept connections: {where} must be a listening {kind}, but "
            f"{error}; pass one like this: {how_to_call}",
        ) from None
    except OSError as error:
        raise FatalError.of(f"use the socket of {where}", error) from error
    return taken


def use_given_socket(given: std.socket) -> socket:
    """Return the listening socket that the copy of the program before us has given.

    What a supervisor has passed is left alone.

    Raises:
        FatalError: a system call failed.
    """
    with attempt("start"), given:
        standard.open_missing()
        for descriptor in listen_fds.take():
            os.close(descriptor)
        return take_listening_socket(given.fileno())


def open_listening_sockets(places: Sequence[str]) -> list[socket]:
    """Return listening sockets as `take_listening_sockets` does, that are opened for it.

    Standard input is left as it is.

    Args:
        places: where to listen, as `bind.check` allows it.

    Raises:
        UsageError: sockets are passed, too. Their clients would wait for ever.
        FatalError: a system call failed.
    """
    if listen_fds.take():
        raise UsageError(
            "unable to accept connections: LISTEN_FDS passes sockets, and options say where to "
            "listen; do one or the other"
        )
    with attempt("start"):
        standard.open_missing()
    opened = []
    with ExitStack() as stack:
        for place in places:
            with listen_anywhere(place) as listening, attempt(f"listen on {place}"):
                opened.append(take_listening_socket(listening.fileno(), may_be_unix=True))
            stack.callback(opened[-1].close)
        stack.pop_all()
    return opened
