"""The ingress: which peer carries connections to a host, as the working directory says.

    hosts/NAME/peer                 the name of a peer; NAME may be _.suffix, for all names below it
    hosts/NAME/ports/               the ports that may be asked for; all, if it is absent
    peers/P/address                 HOST:PORT, one a line: tried in order
    peers/P/server-name             whose certificate it shows; the host of the address, if absent
    peers/P/identity/               what we show
    peers/P/servers/                who it may be, instead of the server-name
    rules.d/*                       lines REGEX PEER, for names that have no directory

All of it is read anew for each connection. What can't be read refuses that connection.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import re2

from mutual_tls.dial import Endpoint, parse_port
from mutual_tls.identity import Identity
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.rules import rules_in
from mutual_tls.settings import (
    SettingsError,
    StrPath,
    exists,
    read_lines,
    read_names,
    read_value,
    read_values,
    unreadable,
)
from mutual_tls.verify import Rule
from tls_bridge.refusal import BridgeReason

# A name of a peer: one component of a path that is neither hidden nor above us.
_PEER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")

# Bytes that one pattern may take in the memory of the engine. It runs in linear time whatever the
# pattern is, so that nobody stops the loop by one.
_PATTERN_MEMORY = 1 << 20

# Addresses whose meaning is remembered, so that it is not looked for in each connection.
_MOST_REMEMBERED = 1024


class Peer(NamedTuple):
    """Where a connection is carried to.

    Attributes:
        name: for the log.
        addresses: tried in order.
        server_name: sent as SNI; and the certificate has to be for it, if there are no rules.
        identity: what we show.
        rules: who it may be instead.
    """

    name: str
    addresses: Sequence[Endpoint]
    server_name: str
    identity: Identity
    rules: Sequence[Rule] | None


class Pattern(NamedTuple):
    """A line of a file of rules, or a pair of the command line."""

    matches: Callable[[str], object]
    peer: str


class Routes:
    """Finds the peer for a host.

    Args:
        directory: the working directory.
        identities: makes an `Identity` of a directory, or has it already.
        on_bad_line: told of each line that is skipped: file, line, and what is wrong.
        pairs: patterns and peers of the command line.
        files: files of rules, beside those in rules.d.
        identity: what we show to peers that are given by their address.
        server_name: their name; by default the host of the address.
    """

    def __init__(
        self,
        directory: Path,
        identities: Callable[[StrPath], Identity],
        on_bad_line: Callable[[Path, int, str], None],
        pairs: Sequence[tuple[str, str]] = (),
        files: Sequence[Path] = (),
        identity: Path | None = None,
        server_name: str | None = None,
    ) -> None:
        self._directory = directory
        # What paths begin with: nothing, in the current directory.
        self._within = "" if directory == Path() else f"{directory}/"
        self._identities = identities
        self._on_bad_line = on_bad_line
        self._pairs = [parse_pattern(pattern, peer) for pattern, peer in pairs]
        self._files = files
        self._identity = identity
        self._server_name = server_name
        self._read: dict[Path, tuple[list[tuple[int, str]], list[Pattern]]] = {}

    def find(self, host: str, port: int) -> Peer:
        """Return the peer for a host.

        Args:
            host: in canonical form, as `http_connect.host` returns it.
            port: that is asked for.

        Raises:
            Refusal: there is none.
        """
        try:
            for place in self._places(host):
                try:
                    name = read_value(f"{place}/peer")
                except FileNotFoundError:
                    if exists(place):
                        raise SettingsError(f"{place}/peer", "it is absent") from None
                    continue
                self._check_port(f"{place}/ports", port)
                return self._peer(name)
            for pattern in self._patterns():
                if pattern.matches(host):
                    return self._peer(pattern.peer)
        except SettingsError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        raise Refusal(BridgeReason.NO_ROUTE, f"nothing is said of {host}")

    def port(self, host: str) -> int:
        """Return the port for a host that was asked for by its name only; 443 if none is given.

        Raises:
            Refusal: it can't be read.
        """
        for place in self._places(host):
            path = f"{place}/port"
            try:
                return _port(path, read_value(path))
            except FileNotFoundError:
                continue
            except SettingsError as error:
                raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        return 443

    def _places(self, host: str) -> Iterator[str]:
        """Yield what may stand for a host: its own directory, then suffixes, the longest first."""
        # Joined by hand, here and below: pathlib takes longer than the system calls.
        hosts = f"{self._within}hosts"
        yield f"{hosts}/{host}"
        # An address has no suffixes; the last label of a name is no number.
        if ":" not in host and not host.rpartition(".")[2].isdigit():
            while "." in host:
                host = host.partition(".")[2]
                yield f"{hosts}/_.{host}"

    def _check_port(self, path: str, port: int) -> None:
        try:
            allowed = [_port(path, name) for name in read_names(path)]
        except FileNotFoundError:
            return
        if port not in allowed:
            raise Refusal(BridgeReason.PORT_NOT_ALLOWED, f"{path} has no {port}")

    def _peer(self, name: str) -> Peer:
        if ":" in name:
            return self._peer_by_address(name)
        if not _PEER.fullmatch(name):
            raise Refusal(SessionReason.MISCONFIGURED, f"{name!a} is no name of a peer")
        place = f"{self._within}peers/{name}"
        path = f"{place}/address"
        try:
            addresses = [_endpoint(path, text) for text in read_values(path)]
        except FileNotFoundError:
            raise SettingsError(path, "it is absent") from None
        if not addresses:
            raise SettingsError(path, "it has no address in it")
        try:
            server_name = read_value(f"{place}/server-name")
        except FileNotFoundError:
            server_name = addresses[0].host
        return Peer(
            name,
            addresses,
            server_name,
            self._identities(f"{place}/identity"),
            rules_in(f"{place}/servers"),
        )

    def _peer_by_address(self, text: str) -> Peer:
        address = _endpoint(self._directory, text)
        directory = self._identity or self._directory / "identity"
        server_name = self._server_name or address.host
        return Peer(text, [address], server_name, self._identities(directory), None)

    def _patterns(self) -> Iterator[Pattern]:
        yield from self._pairs
        for path in self._files:
            yield from self._patterns_in(path)
        directory = self._directory / "rules.d"
        try:
            names = sorted(path.name for path in directory.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise unreadable(directory, error) from None
        for name in names:
            if not name.startswith("."):
                yield from self._patterns_in(directory / name)

    def _patterns_in(self, path: Path) -> list[Pattern]:
        """Return the rules in a file: as they were understood the last time, if it is the same."""
        try:
            lines = read_lines(path)
        except OSError as error:
            raise unreadable(path, error) from None
        if path in self._read and self._read[path][0] == lines:
            return self._read[path][1]
        patterns = []
        for number, line in lines:
            try:
                pattern, peer = line.split()
            except ValueError:
                self._on_bad_line(path, number, "it is not REGEX PEER")
                continue
            try:
                patterns.append(parse_pattern(pattern, peer))
            except ValueError as error:
                self._on_bad_line(path, number, str(error))
        self._read[path] = lines, patterns
        return patterns


def parse_pattern(pattern: str, peer: str) -> Pattern:
    """Understand a regular expression for hosts, and the peer for them.

    All of the host has to match, in lower or upper case.

    Raises:
        ValueError: they can't be understood.
    """
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    options.max_mem = _PATTERN_MEMORY
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        text = error.args[0] if error.args else "unknown"
        why = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        raise ValueError(f"{pattern!a} is no regular expression: {why}") from None
    if ":" in peer:
        Endpoint.parse(peer)
    elif not _PEER.fullmatch(peer):
        raise ValueError(f"{peer!a} is no name of a peer")
    return Pattern(compiled.fullmatch, peer)


def _port(path: str, text: str) -> int:
    try:
        return parse_port(text)
    except ValueError as error:
        raise SettingsError(path, str(error)) from None


@lru_cache(_MOST_REMEMBERED)
def _endpoint(path: StrPath, text: str) -> Endpoint:
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise SettingsError(path, f"{text!a}: {error}") from None
