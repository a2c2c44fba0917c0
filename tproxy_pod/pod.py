"""Which connections get mutual TLS, and how, as the directory pod/ says.

    pod/egress/PREFIX               connections to these addresses: a file with one word, mtls,
                                    permissive or plain, and on more lines who the server may be; or
                                    a directory:
    pod/egress/PREFIX/mode          that word; mtls, if it is absent
    pod/egress/PREFIX/servers/      who the server may be, instead of the address that was asked for
    pod/ingress/PORT/mode           the same word, for connections to this port
    pod/ingress/PORT/clients/       who may connect; if absent, all with a certificate of our
                                    authority
    pod/ingress/PORT/upstream       where they go: PORT, ADDRESS:PORT, [ADDRESS]:PORT, or a Unix
                                    socket, /PATH or ./PATH; if absent, where the client wanted to
    pod/ingress/PORT/keep-source    yes or no: whether the program sees the client's address; yes,
                                    if it is absent, and upstream has no address and no path
    pod/ingress/PORT/send-proxy-v1  the program wants a PROXY header; send-proxy-v2: of version 2
    pod/probes/PREFIX               who may connect in plaintext
    pod/identity/                   what we show

PREFIX is 10.0.0.0_8, or fd00::_8, which is fd00--_8, too; PORT is a port, or `_default`; each is in
its canonical form. The longest prefix counts, and nothing is taken from the others. Where there is
no pod/egress, the private addresses have mtls; where there is one, other addresses than it has are
left alone. Where there is no pod/ingress, all ports have mtls; where there is one, it has all ports
that are allowed.

All of it is read anew for each connection. What can't be read refuses that connection, and never
leaves it in plaintext: a prefix whose file is bad is taken, and so is a port.

An entry of egress/ that is no prefix might have been meant for any address. While it is there, all
addresses are taken, and only those count whose prefix has mtls; connections to all others are
refused. An entry of ingress/ that is no port might have been meant for any port, so that
`_default` does not count while it is there. One of probes/ allows nobody.

Once they were there, egress/ and ingress/ do not become absent: what they were mounted from may be
gone. Where a directory can't be listed, the kernel's rules stay as they were.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from os.path import isdir
from typing import Final, NamedTuple, TypeVar

from mutual_tls.dial import Endpoint, IPAddress, address_family, parse_port
from mutual_tls.identity import Files, Identities, Identity
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.rules import rules_in
from mutual_tls.settings import SettingsError, read_entries, read_value, read_values
from mutual_tls.verify import Rule, RuleError, parse_rule
from tproxy_pod.refusal import PodReason

Network = IPv4Network | IPv6Network

_Part = TypeVar("_Part")

_DEFAULT: Final = "_default"

# Listings whose meaning is remembered: those of egress/, ingress/ and probes/, and one that was
# just replaced.
_MOST_LISTINGS: Final = 4

# RFC 1918 §3, and RFC 4193 §3.1: "FC00::/7 prefix to identify Local IPv6 unicast addresses".
_PRIVATE: Final = frozenset({"10.0.0.0_8", "172.16.0.0_12", "192.168.0.0_16", "fc00::_7"})

_EVERYTHING: Final[tuple[tuple[Network, bool], ...]] = (
    (IPv4Network("0.0.0.0/0"), True),
    (IPv6Network("::/0"), True),
)

# RFC 4291 §2.5.5.2: IPv4 addresses, as sockets of both families show them.
_MAPPED: Final = IPv6Network("::ffff:0:0/96")

_GONE: Final = "it is not there any more"


class Mode(StrEnum):
    """What becomes of a connection."""

    MTLS = "mtls"
    PERMISSIVE = "permissive"  # mutual TLS, or plaintext with those who have none
    PLAIN = "plain"


class Egress(NamedTuple):
    """How a connection leaves.

    Attributes:
        mode: what becomes of it.
        rules: who the server may be; None if its certificate has to be for the address.
    """

    mode: Mode
    rules: list[Rule] | None


class Ingress(NamedTuple):
    """How a connection comes in.

    Attributes:
        mode: what becomes of it.
        rules: who the client may be; None for all whose certificate our authority has made.
        upstream: where it leads: an address, the path of a Unix socket, or a port of the address
            that the client wanted; None for just that address and port.
        keep_source: whether the program sees the client's address as its peer's.
        proxy: the version of the PROXY header that the program wants, 1 or 2; None for none.
    """

    mode: Mode
    rules: list[Rule] | None
    upstream: Endpoint | str | int | None
    keep_source: bool
    proxy: int | None


class Overview(NamedTuple):
    """What the kernel has to know.

    Attributes:
        egress: prefixes, and whether connections to them are taken, or left alone. The longest of
            a family come first. Addresses in none of them are left alone.
        plain_ports: ports whose connections are left alone.
        taken_ports: ports that the directory has, and whose connections are taken.
        is_default_plain: whether other ports are left alone, too. If not, they are taken.
        probes: sources whose connections are left alone, at any port.
    """

    egress: tuple[tuple[Network, bool], ...]
    plain_ports: frozenset[int]
    taken_ports: frozenset[int]
    is_default_plain: bool
    probes: tuple[Network, ...]


_UNTOUCHED: Final = Egress(Mode.PLAIN, None)
_BY_ADDRESS: Final = Egress(Mode.MTLS, None)
_ANY_CLIENT: Final = Ingress(Mode.MTLS, None, None, True, None)
_UNTOUCHED_PORT: Final = Ingress(Mode.PLAIN, None, None, True, None)


class _Ports(NamedTuple):
    """What ingress/ says of ports, as `Overview` has it."""

    plain: frozenset[int]
    taken: frozenset[int]
    is_default_plain: bool


class _Prefixes(NamedTuple):
    """Entries that are prefixes, and what is wrong with others.

    Attributes:
        networks: they, and their entries; the longest of a family come first.
        entries: they, by the version of IP, their length, and the number that these bits are.
        lengths: the lengths that there are, by the version of IP; the longest come first.
        problems: what is wrong.
    """

    networks: tuple[tuple[Network, str], ...]
    entries: dict[tuple[int, int, int], str]
    lengths: dict[int, list[int]]
    problems: tuple[str, ...]

    def find(self, address: IPAddress) -> str | None:
        """Return the entry of the longest prefix that has the address."""
        version, bits, number = address.version, address.max_prefixlen, int(address)
        for length in self.lengths.get(version, ()):
            if entry := self.entries.get((version, length, number >> (bits - length))):
                return entry
        return None


class Pod:
    """Finds what becomes of a connection.

    Args:
        identities: makes an `Identity` of a directory or of files, or has it already.
        on_problem: told of what can't be read or understood, once for as long as it lasts.
        identity: of the command line, instead of that of the directory.
        probes: of the command line, beside those of the directory.
        directory: where everything is; its parent is the working directory.
    """

    def __init__(
        self,
        identities: Identities,
        on_problem: Callable[[str], None],
        *,
        identity: Files | None = None,
        probes: Sequence[Network] = (),
        directory: str = "pod",
    ) -> None:
        self._identities = identities
        self._on_problem = on_problem
        self._directory = directory
        # Joined by hand, here and below: pathlib takes longer than the system calls.
        self._egress = f"{directory}/egress"
        self._ingress = f"{directory}/ingress"
        self._probes = f"{directory}/probes"
        self._identity: str | Files = identity or f"{directory}/identity"
        self._always_probes = frozenset(probes)
        self._seen: set[str] = set()  # what was there, and must not become absent
        self._told: set[str] = set()
        # Until the directory could be read: all is taken that can be.
        self._overview = Overview(
            _EVERYTHING, frozenset(), frozenset(), False, _in_order(self._always_probes)
        )

    def egress(self, address: IPAddress) -> Egress:
        """Return how a connection to an address leaves.

        Raises:
            Refusal: it does not: what is said of it can't be read or understood.
            OSError: there is no descriptor or memory left to find out.
        """
        try:
            entries = self._list(self._egress)
            prefixes = _read_prefixes(_PRIVATE if entries is None else entries)
            entry = prefixes.find(_plain(address))
            if entry is None:
                found = _UNTOUCHED
            elif entries is None:
                found = _BY_ADDRESS
            else:
                found = _read_egress(f"{self._egress}/{entry}")
            # It might be the prefix of this very address.
            if prefixes.problems and found.mode is not Mode.MTLS:
                raise SettingsError(self._egress, prefixes.problems[0])
        except SettingsError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        return found

    def ingress(self, port: int) -> Ingress:
        """Return how a connection to a port comes in.

        Raises:
            Refusal: it does not: the port is not allowed, or what is said of it can't be read or
                understood.
            OSError: there is no descriptor or memory left to find out.
        """
        try:
            entries = self._list(self._ingress)
            if entries is None:
                return _ANY_CLIENT
            if str(port) in entries:
                return _read_ingress(f"{self._ingress}/{port}")
            if problems := _read_ports(entries)[1]:
                raise SettingsError(self._ingress, problems[0])
            if _DEFAULT in entries:
                return _read_ingress(f"{self._ingress}/{_DEFAULT}")
        except SettingsError as error:
            raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
        raise Refusal(PodReason.PORT_NOT_ALLOWED, f"{self._ingress} has no {port}")

    def identity(self) -> Identity:
        """Return what we show. Whether there is one, it says when it is asked for a context."""
        return self._identities(self._identity)

    def overview(self) -> Overview:
        """Return what the kernel has to know at the moment, and tell what is wrong.

        What can't be listed counts as it was before, and as what takes most if it never could be.
        It takes some calls of stat(2) for each entry, and no more while nothing changes.
        """
        problems: set[str] = set()
        before = self._overview
        ports = _try(
            self._look_at_ports,
            _Ports(before.plain_ports, before.taken_ports, before.is_default_plain),
            problems,
        )
        self._overview = Overview(
            _try(self._look_at_egress, before.egress, problems),
            *ports,
            _try(self._look_at_probes, before.probes, problems),
        )
        for problem in sorted(problems - self._told):
            self._on_problem(problem)
        self._told = problems
        return self._overview

    def _look_at_egress(self, problems: set[str]) -> tuple[tuple[Network, bool], ...]:
        entries = self._list(self._egress)
        prefixes = _read_prefixes(_PRIVATE if entries is None else entries)
        if entries is None:
            return tuple((network, True) for network, _ in prefixes.networks)
        problems.update(str(SettingsError(self._egress, each)) for each in prefixes.problems)
        found = []
        for network, entry in prefixes.networks:
            mode = _mode(_read_egress, f"{self._egress}/{entry}", problems)
            found.append((network, mode is not Mode.PLAIN))
        return _EVERYTHING if prefixes.problems else tuple(found)

    def _look_at_ports(self, problems: set[str]) -> _Ports:
        entries = self._list(self._ingress)
        if entries is None:
            return _Ports(frozenset(), frozenset(), False)
        ports, wrong = _read_ports(entries)
        problems.update(str(SettingsError(self._ingress, each)) for each in wrong)
        plain = {
            port
            for port in ports
            if _mode(_read_ingress, f"{self._ingress}/{port}", problems) is Mode.PLAIN
        }
        is_default_plain = _DEFAULT in entries and (
            _mode(_read_ingress, f"{self._ingress}/{_DEFAULT}", problems) is Mode.PLAIN
        )
        return _Ports(frozenset(plain), ports - plain, is_default_plain and not wrong)

    def _look_at_probes(self, problems: set[str]) -> tuple[Network, ...]:
        prefixes = _read_prefixes(self._list(self._probes) or frozenset())
        problems.update(str(SettingsError(self._probes, each)) for each in prefixes.problems)
        return _in_order(self._always_probes.union(network for network, _ in prefixes.networks))

    def _list(self, path: str) -> frozenset[str] | None:
        """Return the entries of one of the directories; None if it is absent.

        Raises:
            SettingsError: they can't be read, or it was there once and may not become absent.
            OSError: there is no descriptor or memory left.
        """
        name = path.rpartition("/")[2]
        if name in (_list(self._directory) or ()):
            if path != self._probes:  # without it fewer may connect
                self._seen.add(name)
            if (entries := _list(path)) is not None:
                return entries
        if name in self._seen:
            raise SettingsError(path, _GONE)
        return None


def parse_prefix(text: str) -> Network:
    """Return the addresses that the name of an entry stands for, such as 10.0.0.0_8.

    A hyphen is a colon: fd00--_8. The keys of a ConfigMap of Kubernetes have no colons.

    Raises:
        ValueError: it is no prefix, or not written as Python and RFC 5952 write it.
    """
    address, line, length = text.partition("_")
    if not line:
        raise ValueError(f"{text!a} is not ADDRESS_LENGTH, such as 10.0.0.0_8")
    network = _network(text, address.replace("-", ":"), length)
    canonical = f"{network.network_address}_{network.prefixlen}"
    if canonical != text.replace("-", ":"):
        raise ValueError(f"{text!a} is not how {canonical} is written")
    return network


def parse_source(text: str) -> Network:
    """Return the addresses that ADDRESS or ADDRESS/LENGTH stands for.

    Raises:
        ValueError: it means nothing.
    """
    address, _, length = text.partition("/")
    if "/" not in text:
        length = "32" if ":" not in address else "128"
    return _network(text, address, length)


def _network(text: str, address: str, length: str) -> Network:
    """Return the network of an address and a length.

    Raises:
        ValueError: the message has the text that both are from.
    """
    # ip_network() knows netmasks, too, and scopes (RFC 4007), which no prefix has.
    if "%" in address or not (length.isascii() and length.isdigit() and len(length) <= 3):
        raise ValueError(f"{text!a} is no address and the length of a prefix")
    try:
        first = ip_address(address)
    except ValueError:
        raise ValueError(f"{text!a} has no IP address") from None
    if int(length) > first.max_prefixlen:
        raise ValueError(f"{text!a} is longer than an address, {first.max_prefixlen} bits")
    try:
        network = ip_network((first, int(length)))
    except ValueError:
        raise ValueError(f"{text!a} has an address with bits behind the prefix") from None
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        raise ValueError(f"{text!a} is for IPv4 addresses, which are to be written as such")
    return network


@lru_cache(_MOST_LISTINGS)
def _read_prefixes(entries: frozenset[str]) -> _Prefixes:
    networks: dict[Network, str] = {}
    problems = []
    for entry in sorted(entries):
        try:
            network = parse_prefix(entry)
        except ValueError as error:
            problems.append(str(error))
            continue
        if (other := networks.setdefault(network, entry)) != entry:
            problems.append(f"{other!a} and {entry!a} are the same")
    by_number: dict[tuple[int, int, int], str] = {}
    lengths: dict[int, list[int]] = {}
    for network in (in_order := _in_order(networks)):
        version, length = network.version, network.prefixlen
        number = int(network.network_address) >> (network.max_prefixlen - length)
        by_number[version, length, number] = networks[network]
        if length not in (known := lengths.setdefault(version, [])):
            known.append(length)
    pairs = tuple((network, networks[network]) for network in in_order)
    return _Prefixes(pairs, by_number, lengths, tuple(problems))


@lru_cache(_MOST_LISTINGS)
def _read_ports(entries: frozenset[str]) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the ports that are among the entries, and what is wrong with others."""
    ports = set()
    problems = []
    for entry in sorted(entries - {_DEFAULT}):
        try:
            port = parse_port(entry)
            # 0443 is for no port, since nobody would look there.
            if str(port) != entry:
                raise ValueError(f"{entry!a} is not how port {port} is written")
            ports.add(port)
        except ValueError as error:
            problems.append(str(error))
    return frozenset(ports), tuple(problems)


def _in_order(networks: Iterable[Network]) -> tuple[Network, ...]:
    return tuple(
        sorted(networks, key=lambda each: (each.version, -each.prefixlen, each.network_address))
    )


def _plain(address: IPAddress) -> IPAddress:
    """Return the IPv4 address for one that a socket of both families shows as IPv6."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _try(look: Callable[[set[str]], _Part], before: _Part, problems: set[str]) -> _Part:
    try:
        return look(problems)
    except (SettingsError, OSError) as error:  # EMFILE, for one
        problems.add(str(error))
        return before


def _mode(read: Callable[[str], Egress | Ingress], path: str, problems: set[str]) -> Mode | None:
    """Return what is said of a prefix or of a port; None, and a problem, if it can't be read."""
    try:
        return read(path).mode
    except SettingsError as error:
        problems.add(str(error))
        return None


def _list(path: str) -> frozenset[str] | None:
    """Return the entries of a directory; None if it is absent."""
    try:
        return read_entries(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise SettingsError(path, "it is not a directory") from None


def _entries(path: str) -> frozenset[str]:
    """Return the entries of a directory that was there a moment ago."""
    entries = _list(path)
    if entries is None:
        raise SettingsError(path, _GONE)
    return entries


def _read_egress(path: str) -> Egress:
    if not isdir(path):
        return _parse_egress(path, _read_lines(path))
    entries = _entries(path)
    mode = _read_mode(f"{path}/mode") if "mode" in entries else Mode.MTLS
    return Egress(mode, None if mode is Mode.PLAIN else _rules(path, entries, "servers"))


def _parse_egress(path: str, values: Sequence[str]) -> Egress:
    """Return what a file says: the mode, and then who the server may be."""
    if not values:
        raise SettingsError(path, "it has no mode")
    mode = _parse_mode(path, values[0])
    if mode is Mode.PLAIN and len(values) > 1:
        raise SettingsError(path, "with plain, nobody is asked who they are")
    try:
        return Egress(mode, [parse_rule(text) for text in values[1:]] or None)
    except RuleError as error:
        raise SettingsError(path, str(error)) from None


def _read_ingress(path: str) -> Ingress:
    entries = _entries(path)
    mode = _read_mode(f"{path}/mode") if "mode" in entries else Mode.MTLS
    if mode is Mode.PLAIN:
        return _UNTOUCHED_PORT  # the kernel leaves it alone, and we do the same
    upstream = _read_upstream(f"{path}/upstream") if "upstream" in entries else None
    # Elsewhere, what the program says to the client's address would not come back to us.
    keeps_source = may_keep = upstream is None or isinstance(upstream, int)
    if "keep-source" in entries:
        keeps_source = _read_keep_source(f"{path}/keep-source")
    if keeps_source and not may_keep:
        raise SettingsError(f"{path}/keep-source", "upstream has an address, or a path")
    return Ingress(
        mode,
        _rules(path, entries, "clients"),
        upstream,
        keeps_source,
        2 if "send-proxy-v2" in entries else 1 if "send-proxy-v1" in entries else None,
    )


def _read_mode(path: str) -> Mode:
    return _parse_mode(path, _read_word(path))


def _parse_mode(path: str, word: str) -> Mode:
    try:
        return Mode(word)
    except ValueError:
        raise SettingsError(path, f"{word!a} is none of {', '.join(Mode)}") from None


def _rules(path: str, entries: frozenset[str], name: str) -> list[Rule] | None:
    if name not in entries:
        return None
    if (rules := rules_in(f"{path}/{name}")) is None:
        raise SettingsError(f"{path}/{name}", _GONE)
    return rules


def _read_upstream(path: str) -> Endpoint | str | int:
    text = _read_word(path)
    try:
        return _parse_upstream(text)
    except ValueError as error:
        raise SettingsError(path, f"{text!a}: {error}") from None


@lru_cache
def _parse_upstream(text: str) -> Endpoint | str | int:
    if text.startswith(("/", "./")):
        return text
    if text.isdigit():
        return parse_port(text)
    endpoint = Endpoint.parse(text)
    if address_family(endpoint.host) is None:
        raise ValueError("it has a name where an IP address has to be")
    return endpoint


def _read_keep_source(path: str) -> bool:
    values = _read_lines(path)
    if values in ([], ["yes"]):
        return True
    if values == ["no"]:
        return False
    raise SettingsError(path, "it is neither yes nor no")


def _read_lines(path: str) -> list[str]:
    try:
        return read_values(path)
    except FileNotFoundError:
        raise SettingsError(path, _GONE) from None


def _read_word(path: str) -> str:
    try:
        return read_value(path)
    except FileNotFoundError:
        raise SettingsError(path, _GONE) from None
