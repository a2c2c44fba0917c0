"""What is wrapped, and how, as the working directory says.

    wrap/ports/8443                connections to port 8443, at any address, are taken, and leave to
                                   the port that the file holds; to the same one, if it is empty
    wrap/names/NAME/               connections to NAME may be wrapped; NAME may be _.suffix, for all
                                   names below it, and _default, for all names
    wrap/names/NAME/also/          more names that are served as this one is
    wrap/names/NAME/addresses/     the addresses of NAME, if they are fixed
    wrap/names/NAME/ports/         as wrap/ports, and instead of it
    wrap/names/NAME/identity/      what we show
    wrap/names/NAME/servers/       who the server may be, instead of NAME; see mutual_tls.verify
    wrap/names/NAME/verify         certificate checkers that are asked in addition, one a line
    wrap/names/NAME/pins           what the checker spki-pin reads
    wrap/names/NAME/starttls       the protocol that has to be asked for TLS: postgres
    wrap/names/NAME/accept-cname   targets of CNAMEs count as names, too
    identity/                      what we show for names that have none

For a name counts, in this order, its own directory; the one whose `also/` has it; that of the
longest suffix; `_default`. Nothing is taken from the others.

Fixed addresses serve those names whose DNS answers can't be seen. And they protect against forged
answers: a name that has `addresses/` is at these addresses and at no others, whatever the DNS says.
With `accept-cname`, whoever can forge an answer for NAME chooses whom the server has to be.

All of it is read anew for each connection; but what `also/` and `addresses/` of all names add up to
is looked for once a second. What can't be read refuses that connection, and never makes the rules
weaker: a link to nothing is not absent, and ports that can't be listed are taken as they were, so
that nothing leaves in plaintext; and so they are when all of wrap/ has gone. To take a port no
more, remove its file, or the directory that has it. Links to nothing within `also/`, `addresses/`
and `servers/` list nothing.

On the command line there are ports, an identity and a certificate checker. Given ports, no
`wrap/names` is needed, and all names are allowed; once it was there they never are again.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple

from mutual_tls.dial import IPAddress, parse_port
from mutual_tls.identity import Files, Identity
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.rules import rules_in
from mutual_tls.settings import (
    SettingsError,
    exists,
    read_entries,
    read_names,
    read_value,
    read_values,
)
from mutual_tls.verify import Rule
from sniproxy_hostname import Hostname, InvalidHostname
from tls_tproxy.checkers import Checker, Checkers, UnknownCheckerError
from tls_tproxy.refusal import WrapReason
from tls_tproxy.starttls import StartTLS

_DEFAULT: Final = "_default"

# Names and addresses whose meaning is remembered. Each takes a few microseconds to find out, and is
# looked at for each connection.
_MOST_REMEMBERED: Final = 4096

# Seconds for which it is enough to have looked into the directories of all names.
_OVERVIEW_FOR: Final = 1.0

_NOWHERE: Final = "it is a link that leads nowhere"


class Service(NamedTuple):
    """How a connection to a name is wrapped.

    Attributes:
        name: as it was asked for: it is sent as SNI; and the certificate has to be for it, if there
            are no rules.
        port: where the connection leaves to.
        identity: what we show. Whether there is one, it says when it is asked for a context.
        rules: who the server may be instead.
        checkers: asked in addition.
        starttls: what comes before TLS.
    """

    name: Hostname
    port: int
    identity: Identity
    rules: Sequence[Rule] | None
    checkers: Sequence[Checker]
    starttls: StartTLS | None


class _Place(NamedTuple):
    """A directory of a name, and what is in it."""

    path: str
    entries: frozenset[str]


class _Overview(NamedTuple):
    """What all directories say together.

    Attributes:
        addresses: Fixed addresses, and the names that have them.
        also: More names, and the directories that serve them.
        broken_also: What is wrong with one of these lists: it might have any name in it.
    """

    addresses: dict[IPAddress, list[Hostname]]
    also: dict[Hostname, list[str]]
    broken_also: SettingsError | None


class Wrap:
    """Finds how a connection is wrapped.

    Args:
        directory: the working directory.
        identities: makes an `Identity` of a directory or of files, or has it already.
        checkers: those that there are.
        on_problem: told of what can't be read, and refuses nobody by itself, for the log; once for
            as long as it lasts.
        ports: of the command line: taken ports, and where they lead. wrap/ports overrides them.
        identity: of the command line, for names that have none.
        checker: of the command line, asked for all names.
        clock: seconds that never go back.

    Raises:
        UnknownCheckerError: there is no such checker.
    """

    def __init__(
        self,
        directory: Path,
        identities: Callable[[str | Files], Identity],
        checkers: Checkers,
        on_problem: Callable[[str], None],
        *,
        ports: Mapping[int, int] | None = None,
        identity: Files | None = None,
        checker: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Joined by hand, here and below: pathlib takes longer than the system calls.
        within = "" if directory == Path() else f"{directory}/"
        self._wrap = f"{within}wrap"
        self._names = f"{self._wrap}/names"
        self._identities = identities
        self._checkers = checkers
        self._on_problem = on_problem
        self._ports = dict(ports or {})
        self._identity: str | Files = identity or f"{within}identity"
        self._always_asked = [] if checker is None else [checker]
        for name in self._always_asked:
            checkers.find(name, f"{self._names}/{_DEFAULT}")
        # Whether only names count that have a directory. A directory of names that is moved away
        # for a moment must not allow all names.
        self._needs_names = not self._ports
        self._has_wrap = False  # yet
        # The entries of ports/ in each directory, as they could be read last; and what was told.
        self._taken: dict[str, frozenset[str]] = {}
        self._told: dict[str, set[str]] = {}
        self._clock = clock
        self._overview = _Overview({}, {}, None)
        self._overview_until = 0.0

    def find(self, name: Hostname, port: int, address: IPAddress) -> Service:
        """Return how a connection is wrapped.

        Args:
            name: whom it may be for.
            port: that was asked for.
            address: that was asked for.

        Raises:
            Refusal: it is not.
        """
        try:
            place = self._place(name)
            if not _is_allowed(place, address):
                raise Refusal(
                    WrapReason.ADDRESS_NOT_ALLOWED, f"{place.path}/addresses has no {address}"
                )
            return Service(
                name,
                self._leads_to(place, port),
                self._identities(
                    f"{place.path}/identity" if "identity" in place.entries else self._identity
                ),
                _rules(place),
                self._asked(place),
                _starttls(place),
            )
        except SettingsError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        except UnknownCheckerError as error:
            raise Refusal(WrapReason.UNKNOWN_CHECKER, str(error)) from None

    def directory(self, name: str) -> str | None:
        """Return the path of the directory that counts for a name; None if none does."""
        try:
            return self._place(Hostname(name.encode())).path
        except (Refusal, SettingsError, InvalidHostname):
            return None

    def accepts_cname(self, name: Hostname) -> bool:
        """Tell whether targets of a name's CNAMEs count as names for it; no, if nobody can say."""
        try:
            return "accept-cname" in self._place(name).entries
        except (Refusal, SettingsError, OSError):
            return False

    def fixed_names(self, address: IPAddress) -> list[Hostname]:
        """Return the names that have an address fixed, in their order.

        What can't be read names nobody, and is told.
        """
        return list(self._look_over().addresses.get(_plain(address), ()))

    def _look_over(self) -> _Overview:
        """Return what all directories say together, as it was within the last second.

        To read all of them takes 20 ms where there are a thousand.
        """
        now = self._clock()
        if now < self._overview_until:
            return self._overview
        addresses: dict[IPAddress, list[Hostname]] = {}
        also: dict[Hostname, list[str]] = {}
        broken: SettingsError | None = None
        problems: set[str] = set()
        try:
            entries = sorted(self._list_names() or ())
        except SettingsError as error:
            problems.add(str(error))
            entries = []
        for entry in entries:
            try:
                for other in self._also(entry):
                    also.setdefault(other, []).append(entry)
            except SettingsError as error:
                broken = broken or error
            if (name := _hostname(entry)) is None:
                continue
            try:
                for address in _addresses(_place(f"{self._names}/{entry}")) or ():
                    addresses.setdefault(address, []).append(name)
            except SettingsError as error:
                problems.add(str(error))
        self._tell("addresses", problems)
        self._overview = _Overview(addresses, also, broken)
        self._overview_until = now + _OVERVIEW_FOR
        return self._overview

    def ports(self) -> frozenset[int]:
        """Return all ports whose connections are to be taken at the moment, for any name.

        What can't be read counts as it was before, and is told; it is nothing if it never could be.
        What is wrong within the file of a port, `find` refuses. It takes some calls of stat(2) for
        each name, and no more while nothing changes.
        """
        problems: set[str] = set()
        before, self._taken = self._taken, {}
        places = {self._wrap}
        try:
            there = self._list_names() or frozenset()
            places |= {f"{self._names}/{entry}" for entry in there if _is_place(entry)}
        except (SettingsError, OSError) as error:
            problems.add(str(error))
            self._taken = {place: before[place] for place in before.keys() - places}
        for place in places:
            try:
                self._taken[place] = self._list_ports(place)
            except (SettingsError, OSError) as error:  # EMFILE, for one
                problems.add(str(error))
                self._taken[place] = before.get(place, frozenset())
        found = set(self._ports)
        for place, entries in self._taken.items():
            for entry in entries:
                try:
                    found.add(_port_entry(entry))
                except ValueError as error:
                    problems.add(f"unable to read {place}/ports: {error}")
        self._tell("ports", problems)
        return frozenset(found)

    def _list_ports(self, place: str) -> frozenset[str]:
        there = self._list_wrap() if place == self._wrap else _list(place)
        return _list(f"{place}/ports") if "ports" in there else frozenset()

    def _list_names(self) -> frozenset[str] | None:
        """Return the entries of wrap/names; None if it is absent."""
        if "names" not in self._list_wrap():
            return None
        self._needs_names = True
        return _list(self._names)

    def _list_wrap(self) -> frozenset[str]:
        # It may be absent, for the command line suffices. But when it is moved away, or what it was
        # mounted from is gone, nothing is to leave in plaintext.
        if exists(self._wrap):
            self._has_wrap = True
            return _list(self._wrap)
        if self._has_wrap:
            raise SettingsError(self._wrap, "it is not there any more")
        return frozenset()

    def _tell(self, kind: str, problems: set[str]) -> None:
        told, self._told[kind] = self._told.get(kind, set()), problems
        for problem in sorted(problems - told):
            self._on_problem(problem)

    def _place(self, name: Hostname) -> _Place:
        """Find the directory that counts for a name.

        Raises:
            Refusal: there is none, or two claim the name.
            SettingsError: it can't be read.
        """
        there = self._list_names()
        if there is not None:
            found = self._find_place(there, name)
            if found is not None:
                return _place(f"{self._names}/{found}")
        elif not self._needs_names:
            return _Place(f"{self._names}/{_DEFAULT}", frozenset())
        raise Refusal(WrapReason.UNKNOWN_NAME, f"nothing is said of {name}")

    def _find_place(self, there: frozenset[str], name: Hostname) -> str | None:
        if name in there:
            return name
        overview = self._look_over()
        if overview.broken_also is not None:
            raise overview.broken_also
        # Whom it claims there now, not a second ago.
        claimed = [entry for entry in overview.also.get(name, ()) if name in self._also(entry)]
        if len(claimed) > 1:
            paths = " and ".join(f"{self._names}/{entry}/also" for entry in claimed)
            raise Refusal(SessionReason.MISCONFIGURED, f"{name} is in {paths}")
        if claimed:
            return claimed[0]
        for suffix in _suffixes(name):
            if suffix in there:
                return suffix
        return _DEFAULT if _DEFAULT in there else None

    def _also(self, entry: str) -> list[Hostname]:
        """Return the other names that a directory serves."""
        if not _is_place(entry):
            return []
        place = f"{self._names}/{entry}"
        path = f"{place}/also"
        try:
            if "also" not in read_entries(place):
                return []
            return [_name(path, text) for text in read_names(path)]
        except NotADirectoryError:
            return []  # a file that lies about is nobody's list
        except FileNotFoundError:
            raise SettingsError(path, _NOWHERE) from None

    def _leads_to(self, place: _Place, port: int) -> int:
        is_own = "ports" in place.entries
        where = place.path if is_own else self._wrap
        if str(port) in self._list_ports(where):
            return _read_port(f"{where}/ports/{port}", port)
        if not is_own and port in self._ports:
            return self._ports[port]
        raise Refusal(WrapReason.PORT_NOT_ALLOWED, f"{where}/ports has no {port}")

    def _asked(self, place: _Place) -> list[Checker]:
        names = self._always_asked
        if "verify" in place.entries:
            path = f"{place.path}/verify"
            try:
                names = [*names, *read_values(path)]
            except FileNotFoundError:
                raise SettingsError(path, _NOWHERE) from None
        return [self._checkers.find(name, place.path) for name in dict.fromkeys(names)]


def parse_port_map(text: str) -> dict[int, int]:
    """Understand FROM:TO[,FROM:TO...]: ports that are taken, and where they lead.

    Raises:
        ValueError: it can't be understood.
    """
    ports: dict[int, int] = {}
    for pair in text.split(","):
        taken, colon, leads_to = pair.partition(":")
        if not colon:
            raise ValueError(f"{pair!a} is not FROM:TO, two ports")
        port = parse_port(taken)
        if port in ports:
            raise ValueError(f"port {port} is there twice")
        ports[port] = parse_port(leads_to)
    return ports


def _list(path: str) -> frozenset[str]:
    """Return the entries of a directory that is there."""
    try:
        return read_entries(path)
    except FileNotFoundError:
        raise SettingsError(path, _NOWHERE) from None
    except NotADirectoryError:
        raise SettingsError(path, "it is not a directory") from None


def _place(path: str) -> _Place:
    return _Place(path, _list(path))


@lru_cache(_MOST_REMEMBERED)
def _hostname(entry: str) -> Hostname | None:
    """Return the name that an entry is; None if it is none, or not in its canonical form."""
    try:
        name = Hostname(os.fsencode(entry))
    except InvalidHostname:
        return None
    return name if name == entry else None


def _is_place(entry: str) -> bool:
    """Tell whether an entry is the directory of a name that can be asked for."""
    return entry == _DEFAULT or _hostname(entry.removeprefix("_.")) is not None


def _suffixes(name: Hostname) -> Iterator[str]:
    """Yield the entries that stand for names below a suffix, the longest first."""
    _, dot, rest = name.partition(".")
    while dot:
        yield f"_.{rest}"
        _, dot, rest = rest.partition(".")


def _name(path: str, text: str) -> Hostname:
    try:
        return Hostname(text.encode())
    except InvalidHostname as error:
        raise SettingsError(path, f"{text!a}: {error}") from None


def _is_allowed(place: _Place, address: IPAddress) -> bool:
    fixed = _addresses(place)
    return fixed is None or _plain(address) in fixed


def _addresses(place: _Place) -> list[IPAddress] | None:
    """Return the addresses that are fixed; None if none are."""
    if "addresses" not in place.entries:
        return None
    path = f"{place.path}/addresses"
    try:
        return [_address(text) for text in read_names(path)]
    except FileNotFoundError:
        raise SettingsError(path, _NOWHERE) from None
    except ValueError as error:
        raise SettingsError(path, str(error)) from None


@lru_cache(_MOST_REMEMBERED)
def _address(text: str) -> IPAddress:
    return _plain(ip_address(text))


def _plain(address: IPAddress) -> IPAddress:
    """Return the IPv4 address for one that a socket of both families shows as IPv6."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _port_entry(entry: str) -> int:
    """Return the port that an entry is for; 0443 is for none, since nobody would look there."""
    port = parse_port(entry)
    if str(port) != entry:
        raise ValueError(f"{entry!a} is not how port {port} is written")
    return port


def _read_port(path: str, port: int) -> int:
    """Return where a port leads."""
    try:
        values = read_values(path)
    except FileNotFoundError:
        raise SettingsError(path, _NOWHERE) from None
    if len(values) > 1:
        raise SettingsError(path, f"it has {len(values)} values, not one")
    try:
        return parse_port(values[0]) if values else port
    except ValueError as error:
        raise SettingsError(path, str(error)) from None


def _rules(place: _Place) -> list[Rule] | None:
    if "servers" not in place.entries:
        return None
    path = f"{place.path}/servers"
    if (rules := rules_in(path)) is None:
        raise SettingsError(path, _NOWHERE)
    return rules


def _starttls(place: _Place) -> StartTLS | None:
    if "starttls" not in place.entries:
        return None
    path = f"{place.path}/starttls"
    try:
        word = read_value(path)
    except FileNotFoundError:
        raise SettingsError(path, _NOWHERE) from None
    try:
        return StartTLS(word)
    except ValueError:
        known = ", ".join(StartTLS)
        raise SettingsError(path, f"{word!a} is no protocol that is known: {known}") from None
