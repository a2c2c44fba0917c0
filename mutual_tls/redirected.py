"""What programs share to whom the kernel redirects connections: their start, and their watch."""

import contextlib
import errno
import os
import socket as std
from _socket import socket
from abc import ABC, abstractmethod
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Final

from mutual_tls.dial import parse_port
from mutual_tls.netfilter.table import Nft, NftEndedError, NftError
from mutual_tls.netfilter.transparent import transparent
from mutual_tls.session import SessionOptions
from sniproxy.engine.listener import take_listening_socket
from sniproxy.service.fatal import FatalError
from sniproxy.service.options import look_up_user
from sniproxy.service.privileges import CAP_NET_ADMIN, CAP_NET_RAW

# The loopback addresses, and all addresses: one for each family.
LOOPBACK: Final = ((std.AF_INET, "127.0.0.1"), (std.AF_INET6, "::1"))
EVERYWHERE: Final = ((std.AF_INET, "0.0.0.0"), (std.AF_INET6, "::"))

# The kernel has no IPv6, or the loopback device has not: net.ipv6.conf.lo.disable_ipv6. The rules
# are for both families all the same: should there be IPv6 later, its connections reach nobody.
_NO_IPV6: Final = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

# Ports that are tried where any will do, until one is free for both families.
_TRIES: Final = 20

# Connections that wait to be accepted; the kernel takes net.core.somaxconn if that is less.
_BACKLOG: Final = 4096

# socket(7): since then CAP_NET_RAW suffices for SO_MARK.
_MARKED_BY_NET_RAW: Final = (5, 17)


def listen(
    places: Sequence[tuple[int, str]], port: int, *, is_transparent: bool = False
) -> list[socket]:
    """Return sockets that listen on one port: one in IPv4, and one in IPv6 where there is IPv6.

    Args:
        places: families and addresses.
        port: which; 0 for any.
        is_transparent: whether they take connections to any address that the kernel leads to them.

    Raises:
        FatalError: the port is taken, or the like.
    """
    for _ in range(_TRIES):
        opened: list[std.socket] = []
        chosen = port
        try:
            for family, host in places:
                try:
                    sock = _bind(family, host, chosen, is_transparent=is_transparent)
                except OSError as error:
                    if family == std.AF_INET6 and error.errno in _NO_IPV6:
                        continue
                    raise
                opened.append(sock)
                chosen = sock.getsockname()[1]
                sock.listen(_BACKLOG)
            return [take_listening_socket(sock.fileno()) for sock in opened]
        except OSError as error:
            failure = error
        finally:
            for sock in opened:
                sock.close()
        if port:
            break
    where = "the loopback addresses" if places is LOOPBACK else "all addresses"
    raise FatalError.of(f"listen on port {chosen} of {where}", failure)


def _bind(family: int, host: str, port: int, *, is_transparent: bool) -> std.socket:
    sock = std.socket(family, std.SOCK_STREAM)
    try:
        sock.setsockopt(std.SOL_SOCKET, std.SO_REUSEADDR, 1)
        if family == std.AF_INET6:
            # IPv4 has a socket of its own.
            sock.setsockopt(std.IPPROTO_IPV6, std.IPV6_V6ONLY, 1)
        if is_transparent:
            sock.setsockopt(*transparent(family))
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def marking_capabilities() -> list[int]:
    """Return what is needed to set a mark: a smaller right, where the kernel knows it."""
    release = os.uname().release.split(".")
    version = tuple(int(part) for part in release[:2] if part.isdigit())
    return [CAP_NET_RAW] if version >= _MARKED_BY_NET_RAW else [CAP_NET_RAW, CAP_NET_ADMIN]


def open_nft(options: SessionOptions) -> Nft:
    """Run nft, as the user that we are going to be.

    Raises:
        FatalError: it can't be run.
    """
    try:
        return Nft(future_user(options))
    except NftError as error:
        raise FatalError(f"unable to redirect connections: {error}") from None


def future_user(options: SessionOptions) -> tuple[int, int] | None:
    """Return the ids of the user and the group that we are going to be; None if we stay.

    Raises:
        UsageError: there is no such user.
    """
    identity = look_up_user(options.user)
    return None if identity is None else (identity.uid, identity.gid)


def port_option(text: str) -> int:
    """Return the port that an option has for its value.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return parse_port(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!a} is no port") from None


class Watch(ABC):
    """What is looked at once a second: that nft and its tables are there, and what to take.

    Args:
        nft: holds the tables.
        on_problem: called with what nft refuses to do, once.
    """

    def __init__(self, nft: Nft, on_problem: Callable[[str], None]) -> None:
        self._nft = nft
        self._on_problem = on_problem
        self._told = ""  # what nft has said last time
        self._is_over = False

    @abstractmethod
    def look_after(self) -> None:
        """Change the tables, if what is to be taken has changed.

        Raises:
            NftError, NftEndedError: it can't be done.
        """

    @abstractmethod
    def take_nothing(self) -> None:
        """Take no new connections any more.

        Raises:
            NftError, NftEndedError: it can't be done.
        """

    def stop(self) -> None:
        """Take no new connections; those that are established go on."""
        self._is_over = True
        with contextlib.suppress(NftError):  # it is gone, and so are its rules
            self.take_nothing()

    def look(self) -> None:
        """Look.

        Raises:
            FatalError: nft has ended, and with it the tables. Connections leave in plaintext.
        """
        if self._is_over:
            return
        if self._nft.has_ended():
            raise FatalError("unable to redirect connections: nft has ended")
        try:
            self.look_after()
        except NftEndedError as error:
            raise FatalError(f"unable to redirect connections: {error}") from None
        except NftError as error:
            # It is tried again: what is not there may come back.
            if str(error) != self._told:
                self._on_problem(str(error))
            self._told = str(error)
        else:
            self._told = ""
