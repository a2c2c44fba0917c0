"""Which connections get mutual TLS: what the directory pod/ says, and what is wrong with it."""

import errno
import ipaddress
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mutual_tls.dial import Endpoint, IPAddress
from mutual_tls.identity import Files, Identities, IdentityError
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.settings import read_entries
from mutual_tls.verify import parse_rule
from tests.mutual_tls.test_settings import as_nobody
from tests.support.bridge import write, write_identity
from tests.support.strategies import steady
from tests.test_man import items, section
from tproxy_pod import pod as pod_module
from tproxy_pod.pod import (
    Egress,
    Ingress,
    Mode,
    Network,
    Overview,
    Pod,
    parse_prefix,
    parse_source,
)
from tproxy_pod.refusal import PodReason

PRIVATE = ["192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "fc00::/7"]
EVERYTHING = ["0.0.0.0/0", "::/0"]
MTLS = Egress(Mode.MTLS, None)
UNTOUCHED = Egress(Mode.PLAIN, None)
ANY_CLIENT = Ingress(Mode.MTLS, None, None, keep_source=True, proxy=None)
EXHAUSTED = OSError(errno.EMFILE, "Too many open files")


class Case:
    """A working directory, and what is found there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = directory / "pod"
        self.problems: list[str] = []
        self.start()

    def start(self, *probes: str, identity: Files | None = None) -> None:
        self.pod = Pod(
            Identities(lambda *_: None),
            self.problems.append,
            identity=identity,
            probes=[parse_source(each) for each in probes],
            directory=str(self.place),
        )

    def write(self, path: str, text: str = "") -> Path:
        return write(self.place / path, text)

    def egress(self, address: str) -> Egress:
        return self.pod.egress(ipaddress.ip_address(address))

    def ingress(self, port: int = 8080) -> Ingress:
        return self.pod.ingress(port)

    def refused_egress(self, address: str) -> str:
        return self._misconfigured(lambda: self.egress(address))

    def refused_ingress(self, port: int = 8080) -> str:
        return self._misconfigured(lambda: self.ingress(port))

    def _misconfigured(self, find: Callable[[], object]) -> str:
        with pytest.raises(Refusal) as caught:
            find()
        assert caught.value.reason is SessionReason.MISCONFIGURED
        return self._short(str(caught.value))

    def is_allowed(self, port: int) -> bool:
        try:
            self.ingress(port)
        except Refusal as refusal:
            if refusal.reason is not PodReason.PORT_NOT_ALLOWED:
                raise
            return False
        return True

    def told(self) -> list[str]:
        """Return what an overview tells anew."""
        self.problems.clear()
        self.pod.overview()
        return [self._short(each) for each in self.problems]

    def taken(self) -> list[str]:
        """Return the prefixes that the kernel takes, in their order; ! marks what is left alone."""
        return [f"{'' if is_taken else '!'}{each}" for each, is_taken in self.pod.overview().egress]

    def ports(self) -> tuple[set[int], set[int], bool]:
        """Return ports that are left alone, those that are taken, and whether others are not."""
        found = self.pod.overview()
        return set(found.plain_ports), set(found.taken_ports), found.is_default_plain

    def probes(self) -> list[str]:
        return [str(each) for each in self.pod.overview().probes]

    def _short(self, text: str) -> str:
        return text.replace(f"{self.directory}/", "").removeprefix("unable to read ")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def reachable() -> Iterator[Case]:
    """A case where others than its owner come as far as they are let: pytest lets nobody."""
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Case(Path(directory))


# --- without a directory


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("10.0.0.0", MTLS),
        ("10.255.255.255", MTLS),
        ("172.16.0.1", MTLS),
        ("172.31.255.255", MTLS),
        ("192.168.3.4", MTLS),
        ("fc00::1", MTLS),
        ("fdff::1", MTLS),
        ("::ffff:10.1.2.3", MTLS),
        ("11.0.0.0", UNTOUCHED),
        ("9.255.255.255", UNTOUCHED),
        ("172.32.0.0", UNTOUCHED),
        ("192.169.0.0", UNTOUCHED),
        ("fe00::1", UNTOUCHED),
        ("fbff::1", UNTOUCHED),
        ("::ffff:192.0.2.1", UNTOUCHED),
        ("::a00:1", UNTOUCHED),
    ],
)
def test_without_a_directory_private_addresses_have_mutual_tls(
    case: Case, address: str, found: Egress
) -> None:
    assert case.egress(address) == found


def test_without_a_directory_all_ports_have_mutual_tls_for_any_client(case: Case) -> None:
    assert [case.ingress(port) for port in (1, 8080, 65535)] == [ANY_CLIENT] * 3


@pytest.mark.parametrize("is_there", [False, True])
def test_without_a_directory_private_addresses_and_all_ports_are_taken(
    case: Case, is_there: bool
) -> None:
    if is_there:
        case.place.mkdir()
    assert case.pod.overview() == Overview(
        tuple((ipaddress.ip_network(each), True) for each in PRIVATE),
        frozenset(),
        frozenset(),
        is_default_plain=False,
        probes=(),
    )
    assert case.problems == []


def test_the_directory_is_in_the_working_directory(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write("egress/203.0.113.0_24", "mtls")
    monkeypatch.chdir(case.directory)
    found = Pod(Identities(lambda *_: None), case.problems.append).overview()
    assert found.egress == ((ipaddress.ip_network("203.0.113.0/24"), True),)


# --- which prefix counts


def test_the_longest_prefix_counts_and_others_are_left_alone(case: Case) -> None:
    case.write("egress/10.0.0.0_8", "mtls\n")
    case.write("egress/10.1.0.0_16", "plain # the old machines\n")
    case.write("egress/10.1.2.3_32", "permissive")
    case.write("egress/fd00::_8", "mtls")
    addresses = ["10.2.0.1", "10.1.2.4", "10.1.2.3", "fd00::1", "192.168.0.1", "fc00::1"]
    assert [case.egress(each).mode for each in addresses] == [
        *[Mode.MTLS, Mode.PLAIN, Mode.PERMISSIVE, Mode.MTLS, Mode.PLAIN, Mode.PLAIN]
    ]
    assert case.egress("::ffff:10.1.2.3").mode is Mode.PERMISSIVE
    assert case.taken() == ["10.1.2.3/32", "!10.1.0.0/16", "10.0.0.0/8", "fd00::/8"]
    assert case.problems == []


def test_a_prefix_of_length_0_is_for_one_family(case: Case) -> None:
    case.write("egress/::_0", "mtls")
    assert case.egress("2001:db8::1") == MTLS
    assert case.egress("192.0.2.1") == UNTOUCHED
    case.write("egress/0.0.0.0_0", "mtls")
    assert case.egress("192.0.2.1") == MTLS


def test_an_empty_directory_leaves_all_addresses_alone(case: Case) -> None:
    (case.place / "egress").mkdir(parents=True)
    assert case.egress("10.0.0.1") == UNTOUCHED
    assert case.taken() == []


@st.composite
def addresses(draw: st.DrawFn) -> IPAddress:
    """Addresses that often have a prefix in common: most of their bits are the same."""
    first = ipaddress.ip_address(draw(st.sampled_from(["10.0.0.0", "fd00::"])))
    number = int(first)
    for bit in draw(st.lists(st.integers(0, first.max_prefixlen - 1), max_size=3)):
        number ^= 1 << bit
    return type(first)(number)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    address = draw(addresses())
    length = draw(st.integers(0, address.max_prefixlen))
    return ipaddress.ip_network((address, length), strict=False)


@hypothesis.settings(steady, max_examples=100)  # it writes many files
@given(st.dictionaries(networks(), st.sampled_from(list(Mode)), max_size=8), addresses())
@example({ipaddress.ip_network("0.0.0.0/0"): Mode.MTLS}, ipaddress.ip_address("255.255.255.255"))
@example({ipaddress.ip_network("::/0"): Mode.MTLS}, ipaddress.ip_address("::"))
def test_the_longest_prefix_is_found(modes: dict[Network, Mode], address: IPAddress) -> None:
    """Against looking at all of them."""
    fitting = [each for each in modes if address in each]
    expected = modes[max(fitting, key=lambda each: each.prefixlen)] if fitting else Mode.PLAIN
    with TemporaryDirectory() as directory:
        case = Case(Path(directory))
        (case.place / "egress").mkdir(parents=True)
        for network, mode in modes.items():
            case.write(f"egress/{str(network).replace('/', '_')}", mode)
        assert case.pod.egress(address).mode is expected
        # And what the kernel does by the first rule that fits.
        taken = (is_taken for network, is_taken in case.pod.overview().egress if address in network)
        assert next(taken, False) is (expected is not Mode.PLAIN)
        assert case.problems == []


# --- how prefixes are written


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0_8", "10.0.0.0/8"),
        ("10.1.2.3_32", "10.1.2.3/32"),
        ("0.0.0.0_0", "0.0.0.0/0"),
        ("fd00::_8", "fd00::/8"),
        ("::_0", "::/0"),
        ("2001:db8::1_128", "2001:db8::1/128"),
        ("2001-db8--1_128", "2001:db8::1/128"),
        ("fd00--_8", "fd00::/8"),
    ],
)
def test_prefixes(text: str, network: str) -> None:
    assert parse_prefix(text) == ipaddress.ip_network(network)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10.0.0.0", "'10.0.0.0' is not ADDRESS_LENGTH, such as 10.0.0.0_8"),
        ("fd00::", "'fd00::' is not ADDRESS_LENGTH, such as 10.0.0.0_8"),
        ("", "'' is not ADDRESS_LENGTH, such as 10.0.0.0_8"),
        ("\udcff_8", "'\\udcff_8' has no IP address"),
        ("_default", "'_default' is no address and the length of a prefix"),
        ("_8", "'_8' has no IP address"),
        ("10.0.0.0_", "'10.0.0.0_' is no address and the length of a prefix"),
        ("10.0.0.0_-8", "'10.0.0.0_-8' is no address and the length of a prefix"),
        ("10.0.0.0_8_8", "'10.0.0.0_8_8' is no address and the length of a prefix"),
        ("10.0.0.0_8~", "'10.0.0.0_8~' is no address and the length of a prefix"),
        ("10.0.0.0_\u0668", "'10.0.0.0_\\u0668' is no address and the length of a prefix"),
        ("10.0.0.0_255.0.0.0", "'10.0.0.0_255.0.0.0' is no address and the length of a prefix"),
        ("fe80::%eth0_64", "'fe80::%eth0_64' is no address and the length of a prefix"),
        ("web.example_8", "'web.example_8' has no IP address"),
        ("10_8", "'10_8' has no IP address"),
        ("010.0.0.0_8", "'010.0.0.0_8' has no IP address"),
        ("10.0.0.0_33", "'10.0.0.0_33' is longer than an address, 32 bits"),
        ("fd00::_129", "'fd00::_129' is longer than an address, 128 bits"),
        ("10.0.0.1_8", "'10.0.0.1_8' has an address with bits behind the prefix"),
        ("fd00::1_8", "'fd00::1_8' has an address with bits behind the prefix"),
        ("10.0.0.0_08", "'10.0.0.0_08' is not how 10.0.0.0_8 is written"),
        ("FD00::_8", "'FD00::_8' is not how fd00::_8 is written"),
        ("fd00:0::_8", "'fd00:0::_8' is not how fd00::_8 is written"),
        (
            "::ffff:10.0.0.0_104",
            "'::ffff:10.0.0.0_104' is for IPv4 addresses, which are to be written as such",
        ),
        (
            "::ffff:0:0_96",
            "'::ffff:0:0_96' is for IPv4 addresses, which are to be written as such",
        ),
    ],
)
def test_what_is_no_prefix(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        parse_prefix(text)


@given(networks())
@hypothesis.settings(steady)
def test_every_prefix_has_a_name_that_is_understood(network: Network) -> None:
    assert parse_prefix(f"{network.network_address}_{network.prefixlen}") == network


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.1", "10.0.0.1/32"),
        ("fd00::1", "fd00::1/128"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("FD00::/8", "fd00::/8"),
    ],
)
def test_sources_of_the_command_line(text: str, network: str) -> None:
    assert parse_source(text) == ipaddress.ip_network(network)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10.0.0.1/8", "has an address with bits behind the prefix"),
        ("10.0.0.0/", "is no address and the length of a prefix"),
        ("10.0.0.0/255.0.0.0", "is no address and the length of a prefix"),
        ("10.0.0.0_8", "has no IP address"),
        ("fe80::1%eth0", "is no address and the length of a prefix"),
        ("node", "has no IP address"),
        ("", "has no IP address"),
    ],
)
def test_what_is_no_source(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(text))} {problem}$"):
        parse_source(text)


def test_an_entry_that_is_no_prefix_might_be_for_any_address(case: Case) -> None:
    """10.1.2.0_24 was meant to have mutual TLS."""
    case.write("egress/10.0.0.0_8", "mtls")
    case.write("egress/10.1.0.0_16", "plain")
    case.write("egress/10.3.0.0_16", "permissive")
    case.write("egress/10.1.2.0_2A", "mtls")
    problem = "pod/egress: '10.1.2.0_2A' is no address and the length of a prefix"
    for address in "10.1.2.1", "10.3.0.1", "192.0.2.1", "2001:db8::1":
        assert case.refused_egress(address) == problem
    assert case.egress("10.2.0.1") == MTLS
    # Else those would leave in plaintext that were to be refused.
    assert case.taken() == EVERYTHING
    assert case.problems == [f"unable to read {case.place.parent}/{problem}"]
    assert case.told() == []
    (case.place / "egress" / "10.1.2.0_2A").rename(case.place / "egress" / "10.1.2.0_24")
    assert case.egress("10.1.2.1") == MTLS
    assert case.egress("192.0.2.1") == UNTOUCHED
    assert case.taken() == ["10.1.2.0/24", "!10.1.0.0/16", "10.3.0.0/16", "10.0.0.0/8"]
    assert case.told() == []
    case.write("egress/10.1.2.0_2A", "mtls")
    assert case.told() == [problem]  # it is another one


def test_hidden_entries_are_none(case: Case) -> None:
    case.write("egress/..data/10.0.0.0_8", "plain")
    case.write("ingress/.swp")
    case.write("probes/.swp")
    assert case.egress("10.0.0.1") == UNTOUCHED
    assert not case.is_allowed(8080)
    assert case.told() == []


# --- what is said of a prefix


def test_a_directory_of_a_prefix(case: Case) -> None:
    case.write("egress/10.0.0.0_8/servers", "spiffe://example.org/**\n")
    rules = [parse_rule("spiffe://example.org/**")]
    assert case.egress("10.0.0.1") == (Mode.MTLS, rules)
    case.write("egress/10.0.0.0_8/mode", "permissive")
    assert case.egress("10.0.0.1") == (Mode.PERMISSIVE, rules)
    case.write("egress/10.0.0.0_8/mode", "plain")
    assert case.egress("10.0.0.1") == UNTOUCHED
    (case.place / "egress/10.0.0.0_8/servers").unlink()
    case.write("egress/10.0.0.0_8/mode", "mtls")
    assert case.egress("10.0.0.1") == MTLS


def test_an_empty_list_of_servers_is_nobody(case: Case) -> None:
    (case.place / "egress/10.0.0.0_8/servers").mkdir(parents=True)
    assert case.egress("10.0.0.1") == (Mode.MTLS, [])


def bad_word(case: Case, path: str) -> str:
    case.write(path, "tls")
    return f"{path}: 'tls' is none of mtls, permissive, plain"


def two_words(case: Case, path: str) -> str:
    case.write(path, "mtls\nplain\n")
    return f"{path}: it has 2 values, and must have one"


def no_word(case: Case, path: str) -> str:
    case.write(path, "# plain\n")
    return f"{path}: it has 0 values, and must have one"


def link_to_nothing(case: Case, path: str) -> str:
    (case.place / path).parent.mkdir(parents=True, exist_ok=True)
    (case.place / path).symlink_to("nothing")
    return f"{path}: it is a link that leads nowhere"


def a_socket(case: Case, path: str) -> str:
    (case.place / path).parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(case.place / path))
    return f"{path}: it is not a regular file"


def no_text(case: Case, path: str) -> str:
    case.write(path).write_bytes(b"\xff")
    return f"{path}: line 1 is not UTF-8"


BAD_WORDS = bad_word, two_words, no_word, link_to_nothing, a_socket, no_text
bad_words = pytest.mark.parametrize("make", BAD_WORDS)


@pytest.mark.parametrize(
    ("entry", "make"),
    [
        *(("10.1.0.0_16", make) for make in (bad_word, link_to_nothing, a_socket, no_text)),
        *(("10.1.0.0_16/mode", make) for make in BAD_WORDS),
    ],
)
def test_a_prefix_whose_word_is_bad_is_taken_and_refused(
    case: Case, entry: str, make: Callable[[Case, str], str]
) -> None:
    case.write("egress/10.0.0.0_8", "plain")
    problem = f"pod/{make(case, f'egress/{entry}')}"
    assert case.refused_egress("10.1.0.1") == problem
    assert case.egress("10.2.0.1") == UNTOUCHED
    assert case.told() == [problem]
    assert case.told() == []
    assert case.taken() == ["10.1.0.0/16", "!10.0.0.0/8"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# nothing\n", "it has no mode"),
        ("plain\nweb.example\n", "with plain, nobody is asked who they are"),
        ("mtls\nspiffe://\n", "'spiffe://': a trust domain has"),
    ],
)
def test_a_prefix_whose_lines_are_bad_is_taken_and_refused(
    case: Case, text: str, problem: str
) -> None:
    case.write("egress/10.1.0.0_16", text)
    assert problem in case.refused_egress("10.1.0.1")
    assert case.taken() == ["10.1.0.0/16"]


@pytest.mark.parametrize("mode", ["mtls", "permissive"])
def test_a_file_may_say_who_the_server_is(case: Case, mode: str) -> None:
    case.write("egress/10.1.0.0_16", f"{mode}\nweb.example  # of us\nspiffe://a/**\n")
    rules = [parse_rule("web.example"), parse_rule("spiffe://a/**")]
    assert case.egress("10.1.0.1") == Egress(Mode(mode), rules)


def test_two_spellings_of_one_prefix_are_one_too_many(case: Case) -> None:
    case.write("egress/fd00::_8", "plain")
    case.write("egress/fd00--_8", "mtls")
    assert case.refused_egress("2001:db8::1").endswith("'fd00--_8' and 'fd00::_8' are the same")


@bad_words
@pytest.mark.parametrize("port", ["8080", "_default"])
def test_a_port_whose_word_is_bad_is_taken_and_refused(
    case: Case, port: str, make: Callable[[Case, str], str]
) -> None:
    problem = f"pod/{make(case, f'ingress/{port}/mode')}"
    assert case.refused_ingress() == problem
    assert case.told() == [problem]
    assert case.told() == []
    taken = set() if port == "_default" else {8080}
    assert case.ports() == (set(), taken, False)


def test_rules_that_are_bad(case: Case) -> None:
    def refused() -> list[str]:
        return [case.refused_egress("10.0.0.1"), case.refused_ingress()]

    paths = ["egress/10.0.0.0_8/servers", "ingress/8080/clients"]
    for path in paths:
        case.write(path, "spiffe://")
    assert all(f"pod/{path}: " in each for path, each in zip(paths, refused(), strict=True))
    for path in paths:
        (case.place / path).unlink()
    problems = [f"pod/{link_to_nothing(case, path)}" for path in paths]
    assert refused() == problems
    assert case.told() == problems
    assert case.taken() == ["10.0.0.0/8"]


# --- ports


def test_only_ports_that_are_listed_are_allowed(case: Case) -> None:
    (case.place / "ingress/8080").mkdir(parents=True)
    assert case.ingress(8080) == ANY_CLIENT
    assert [case.is_allowed(port) for port in (80, 8081, 443)] == [False] * 3
    with pytest.raises(Refusal, match=r"/pod/ingress has no 80$"):
        case.ingress(80)
    # All are taken, so that the others are refused.
    assert case.ports() == (set(), {8080}, False)


def test_the_default_is_for_other_ports(case: Case) -> None:
    case.write("ingress/_default/mode", "plain")
    case.write("ingress/8080/mode", "permissive")
    case.write("ingress/80/mode", "plain")
    (case.place / "ingress/443").mkdir()
    assert [case.ingress(port).mode for port in (1, 80, 443, 8080)] == [
        *[Mode.PLAIN, Mode.PLAIN, Mode.MTLS, Mode.PERMISSIVE]
    ]
    assert case.ports() == ({80}, {443, 8080}, True)
    case.write("ingress/_default/mode", "mtls")
    assert case.ingress(1) == ANY_CLIENT
    assert case.ports() == ({80}, {443, 8080}, False)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("08080", "'08080' is not how port 8080 is written"),
        ("0", "there is no port 0"),
        ("65536", "'65536' is no port, a number up to 65535"),
        ("http", "'http' is no port, a number up to 65535"),
        ("_defualt", "'_defualt' is no port, a number up to 65535"),
        ("\u0668", "'\\u0668' is no port, a number up to 65535"),
    ],
)
def test_an_entry_that_is_no_port_might_be_for_any_port(
    case: Case, entry: str, problem: str
) -> None:
    case.write("ingress/_default/mode", "plain")
    case.write("ingress/80/mode", "plain")
    case.write(f"ingress/{entry}/mode", "mtls")
    assert case.refused_ingress(8080) == f"pod/ingress: {problem}"
    assert case.ingress(80).mode is Mode.PLAIN
    assert case.told() == [f"pod/ingress: {problem}"]
    assert case.told() == []
    assert case.ports() == ({80}, set(), False)


def test_a_port_that_is_a_file(case: Case) -> None:
    case.write("ingress/8080", "plain")
    assert case.refused_ingress() == "pod/ingress/8080: it is not a directory"
    assert case.ports() == (set(), {8080}, False)


def test_clients_of_a_port(case: Case) -> None:
    case.write("ingress/8080/clients/web.example")
    case.write("ingress/8080/clients/more", "spiffe://example.org/ns/*/sa/web\ncn:web\n")
    rules = ["spiffe://example.org/ns/*/sa/web", "cn:web", "web.example"]
    assert case.ingress().rules == [parse_rule(each) for each in rules]
    case.write("ingress/8081/clients")
    assert case.ingress(8081).rules == []


@pytest.mark.parametrize(
    ("text", "upstream"),
    [
        ("9090", 9090),
        ("127.0.0.1:80", Endpoint("127.0.0.1", 80)),
        ("[::1]:80", Endpoint("::1", 80)),
        ("[0:0::1]:80", Endpoint("::1", 80)),
        ("/run/web.sock", "/run/web.sock"),
        ("./web.sock", "./web.sock"),
        ("./127.0.0.1:80", "./127.0.0.1:80"),
    ],
)
def test_where_a_port_leads(case: Case, text: str, upstream: Endpoint | str | int) -> None:
    case.write("ingress/8080/upstream", text)
    assert case.ingress().upstream == upstream


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0", "'0': there is no port 0"),
        ("65536", "'65536': '65536' is no port, a number up to 65535"),
        ("localhost:80", "'localhost:80': it has a name where an IP address has to be"),
        ("127.1:80", "'127.1:80': it has a name where an IP address has to be"),
        ("::1", "'::1': an IPv6 address stands in brackets: [2001:db8::1]:443"),
        ("[fe80::1%lo]:80", "'[fe80::1%lo]:80': it has a name where an IP address has to be"),
        ("web.sock", "'web.sock': it is not HOST:PORT"),
        ("127.0.0.1:", "'127.0.0.1:': '' is no port, a number up to 65535"),
        ("\u0668", "'\\u0668': '\\u0668' is no port, a number up to 65535"),
        ("", "it has 0 values, and must have one"),
        ("80\n81", "it has 2 values, and must have one"),
    ],
)
def test_a_port_that_leads_nowhere(case: Case, text: str, problem: str) -> None:
    case.write("ingress/8080/upstream", text)
    assert case.refused_ingress() == f"pod/ingress/8080/upstream: {problem}"


@pytest.mark.parametrize(("text", "kept"), [("", True), ("yes", True), ("no # NAT\n", False)])
def test_whether_the_program_sees_the_client_s_address(case: Case, text: str, kept: bool) -> None:
    case.write("ingress/8080/keep-source", text)
    assert case.ingress().keep_source is kept


@pytest.mark.parametrize("text", ["No", "0", "yes\nno", "false"])
def test_what_is_neither_yes_nor_no(case: Case, text: str) -> None:
    case.write("ingress/8080/keep-source", text)
    assert case.refused_ingress() == "pod/ingress/8080/keep-source: it is neither yes nor no"


@pytest.mark.parametrize("upstream", ["127.0.0.1:8080", "[::1]:8080", "/run/app.sock"])
def test_elsewhere_the_address_of_the_client_is_not_kept(case: Case, upstream: str) -> None:
    case.write("ingress/8080/upstream", upstream)
    assert not case.ingress().keep_source
    case.write("ingress/8080/keep-source", "yes")
    message = "pod/ingress/8080/keep-source: upstream has an address, or a path"
    assert case.refused_ingress() == message
    case.write("ingress/8080/upstream", "9090")
    assert case.ingress().keep_source


@pytest.mark.parametrize("name", ["upstream", "keep-source"])
def test_settings_of_a_port_that_are_links_to_nothing(case: Case, name: str) -> None:
    problem = link_to_nothing(case, f"ingress/8080/{name}")
    assert case.refused_ingress() == f"pod/{problem}"


def test_the_version_of_the_header(case: Case) -> None:
    case.write("ingress/8080/send-proxy-v1")
    assert case.ingress().proxy == 1
    case.write("ingress/8080/send-proxy-v2")
    assert case.ingress().proxy == 2
    (case.place / "ingress/8080/send-proxy-v1").unlink()
    assert case.ingress().proxy == 2


def test_of_a_plain_port_nothing_else_counts(case: Case) -> None:
    """The kernel leaves it alone, so nothing can."""
    case.write("ingress/8080/mode", "plain")
    case.write("ingress/8080/upstream", "9090")
    case.write("ingress/8080/clients", "web.example")
    case.write("ingress/8080/send-proxy-v1")
    assert case.ingress() == (Mode.PLAIN, None, None, True, None)


# --- probes


def test_probes_of_the_command_line_and_of_the_directory(case: Case) -> None:
    case.start("192.0.2.1", "192.0.2.0/24")
    assert case.probes() == ["192.0.2.1/32", "192.0.2.0/24"]
    case.write("probes/192.0.2.1_32")
    case.write("probes/198.51.100.7_32")
    case.write("probes/fd00::7_128")
    assert case.probes() == ["192.0.2.1/32", "198.51.100.7/32", "192.0.2.0/24", "fd00::7/128"]
    shutil.rmtree(case.place / "probes")
    assert case.probes() == ["192.0.2.1/32", "192.0.2.0/24"]
    assert case.problems == []


def test_a_probe_that_is_bad_lets_nobody_connect(case: Case) -> None:
    case.write("probes/192.0.2.1")
    case.write("probes/192.0.2.2_32")
    problem = "pod/probes: '192.0.2.1' is not ADDRESS_LENGTH, such as 10.0.0.0_8"
    assert case.told() == [problem]
    assert case.told() == []
    assert case.probes() == ["192.0.2.2/32"]


# --- identities


def test_the_identity_of_the_command_line_then_that_of_the_directory(case: Case) -> None:
    with pytest.raises(IdentityError, match=r"pod/identity: cert\.pem: No such file"):
        case.pod.identity().server_context()
    write_identity(case.place / "identity", "web.example")
    write_identity(case.directory / "other", "other.example")
    case.pod.identity().server_context()
    assert case.pod.identity() is case.pod.identity()
    files = Files(*(f"{case.directory}/other/{name}.pem" for name in ("cert", "key", "ca")))
    case.start(identity=files)
    shutil.rmtree(case.place)
    case.pod.identity().server_context()


# --- what can't be read


@pytest.mark.parametrize("how", ["moved", "all moved", "unmounted"])
def test_what_was_there_does_not_become_absent(case: Case, how: str) -> None:
    case.write("egress/203.0.113.0_24", "mtls")
    case.write("ingress/8080/clients", "web.example")
    before = case.pod.overview()
    for path in [case.place] if how == "all moved" else list(case.place.iterdir()):
        path.rename(case.directory / f"old-{path.name}")
    if how == "unmounted":
        (case.place / "egress").symlink_to("nothing")
        (case.place / "ingress").symlink_to("nothing")
    why = "it is a link that leads nowhere" if how == "unmounted" else "it is not there any more"
    assert case.refused_egress("203.0.113.1") == f"pod/egress: {why}"
    assert case.refused_egress("192.0.2.1") == f"pod/egress: {why}"
    assert case.refused_ingress() == f"pod/ingress: {why}"
    assert case.told() == [f"pod/egress: {why}", f"pod/ingress: {why}"]
    assert case.pod.overview() == before


def test_what_a_connection_has_seen_does_not_become_absent(case: Case) -> None:
    case.write("egress/203.0.113.0_24", "mtls")
    case.write("ingress/8080/clients", "web.example")
    assert case.egress("203.0.113.1") == MTLS
    assert case.ingress().rules
    shutil.rmtree(case.place)
    assert case.refused_egress("10.0.0.1") == "pod/egress: it is not there any more"
    assert case.refused_ingress() == "pod/ingress: it is not there any more"


@pytest.mark.parametrize(
    ("path", "problem"), [("pod", "it is not a directory"), ("pod", "it is a link")]
)
def test_a_directory_that_is_none_takes_everything(case: Case, path: str, problem: str) -> None:
    case.start("192.0.2.1")
    if "link" in problem:
        case.place.symlink_to("nothing")
    else:
        case.place.write_text("")
    assert case.refused_egress("192.0.2.1").startswith(f"{path}: {problem}")
    assert case.refused_ingress().startswith(f"{path}: {problem}")
    assert case.taken() == EVERYTHING
    assert case.ports() == (set(), set(), False)
    assert case.probes() == ["192.0.2.1/32"]
    assert len(case.problems) == 1


@pytest.mark.parametrize("name", ["egress", "ingress", "probes"])
def test_a_file_in_the_place_of_a_directory(case: Case, name: str) -> None:
    case.write(name)
    assert case.told() == [f"pod/{name}: it is not a directory"]
    if name == "egress":
        assert case.refused_egress("192.0.2.1") == "pod/egress: it is not a directory"
        assert case.taken() == EVERYTHING
    elif name == "ingress":
        assert case.refused_ingress() == "pod/ingress: it is not a directory"
    else:
        assert case.probes() == []


def test_what_is_out_of_reach_is_refused(reachable: Case) -> None:
    reachable.write("egress/10.0.0.0_8", "plain").chmod(0)
    reachable.write("ingress/8080/mode", "plain").parent.chmod(0)
    with as_nobody():
        assert reachable.refused_egress("10.0.0.1") == "pod/egress/10.0.0.0_8: Permission denied"
        assert reachable.refused_ingress() == "pod/ingress/8080: Permission denied"
        assert reachable.taken() == ["10.0.0.0/8"]
        assert reachable.ports() == (set(), {8080}, False)
    reachable.place.chmod(0)
    with as_nobody():
        assert "Permission denied" in reachable.refused_egress("192.0.2.1")
        assert "Permission denied" in reachable.refused_ingress()


def test_where_no_descriptor_is_left_all_stays_as_it_was(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write("egress/10.0.0.0_8", "plain")
    case.write("ingress/8080/mode", "plain")
    case.write("ingress/_default/mode", "plain")
    case.write("probes/192.0.2.1_32")
    before = case.pod.overview()

    def fail(*_: object) -> None:
        raise EXHAUSTED

    with monkeypatch.context() as patch:
        patch.setattr(pod_module, "read_value", fail)
        patch.setattr(pod_module, "read_entries", fail)
        assert case.pod.overview() == before
        assert case.problems == [str(EXHAUSTED)]
        for find in (lambda: case.egress("10.0.0.1")), case.ingress:
            with pytest.raises(OSError, match="Too many open files") as caught:
                find()
            assert caught.value is EXHAUSTED
    with monkeypatch.context() as patch:  # and amid the entries
        patch.setattr(pod_module, "read_value", fail)
        assert case.pod.overview() == before
    assert case.pod.overview() == before


def test_an_entry_that_vanishes_meanwhile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the reading."""
    case.write("egress/10.0.0.0_8", "plain")
    case.write("ingress/8080/mode", "plain")
    case.write("ingress/8080/keep-source", "no")
    listed = {
        str(case.place): {"egress", "ingress"},
        f"{case.place}/egress": {"10.0.0.0_8", "11.0.0.0_8"},
        f"{case.place}/ingress": {"8080", "8081"},
        f"{case.place}/ingress/8080": {"keep-source"},
    }
    monkeypatch.setattr(
        pod_module, "read_entries", lambda path: frozenset(listed.get(path) or read_entries(path))
    )
    assert case.refused_egress("11.0.0.1") == "pod/egress/11.0.0.0_8: it is not there any more"
    assert case.refused_ingress(8081) == "pod/ingress/8081: it is not there any more"
    for name in "mode", "clients", "upstream", "keep-source":
        listed[f"{case.place}/ingress/8080"] = {name}
        (case.place / "ingress/8080" / name).unlink(missing_ok=True)
        assert case.refused_ingress() == f"pod/ingress/8080/{name}: it is not there any more"


def test_a_directory_that_vanishes_meanwhile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing of pod/ and its own."""
    case.write("probes/192.0.2.1_32")
    listed = {str(case.place): frozenset({"egress", "ingress", "probes"})}
    monkeypatch.setattr(
        pod_module, "read_entries", lambda path: listed.get(path) or read_entries(path)
    )
    gone = [f"pod/{name}: it is not there any more" for name in ("egress", "ingress")]
    assert case.told() == gone
    assert case.probes() == ["192.0.2.1/32"]
    shutil.rmtree(case.place / "probes")
    assert [case.refused_egress("192.0.2.1"), case.refused_ingress()] == gone
    assert case.probes() == []


# --- the manual


def test_every_entry_is_in_the_manual() -> None:
    """What the module says that reads them."""
    said = re.findall(r"^    (pod/\S+)", pod_module.__doc__ or "", re.MULTILINE)
    assert len(said) == 10
    synopsis = section("tproxy-pod.5", "SYNOPSIS")
    told = re.sub(r"^\.Pa | Ns | ?Ar |Pa (?=/)", "", synopsis, flags=re.MULTILINE).split()
    assert {*said, "pod/ingress/PORT/send-proxy-v2"} == {each for each in told if "pod/" in each}
    for heading, place in (
        ("Connections that leave the pod", "pod/egress/PREFIX/"),
        ("Connections to the pod", "pod/ingress/PORT/"),
    ):
        described = [
            each.removeprefix("Pa ") for each in items(section("tproxy-pod.5", heading, "Ss"))
        ]
        assert described == sorted(
            each.removeprefix(place).rstrip("/") for each in told if each.startswith(place)
        )


def test_every_mode_is_in_the_manual() -> None:
    described = items(section("tproxy-pod.5", "Modes", "Ss"))
    assert described == [f"Cm {mode}" for mode in Mode]


def test_every_example_of_the_manual_is_understood(case: Case) -> None:
    source = section("tproxy-pod.5", "EXAMPLES")
    examples = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", source, re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    for commands in examples:
        subprocess.run(["sh", "-eu"], cwd=case.directory, input=commands, text=True, check=True)
    assert case.told() == []
    assert case.taken() == [*["!10.96.0.1/32", "!10.96.0.10/32", "10.244.0.0/16", "10.96.0.0/12"]]
    shop = [parse_rule("spiffe://cluster.local/ns/shop/sa/*")]
    assert case.egress("10.97.0.1") == (Mode.MTLS, shop)
    clients = [parse_rule("spiffe://cluster.local/ns/shop/sa/web"), parse_rule("web.example")]
    upstream = Endpoint("127.0.0.1", 8080)
    assert case.ingress(8080) == (Mode.MTLS, clients, upstream, False, None)
    assert case.ingress(80).mode is Mode.PERMISSIVE
    assert case.probes() == ["192.0.2.1/32"]


# --- what it costs


def test_a_prefix_that_stays_the_same_is_not_opened_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write("egress/10.0.0.0_8", "mtls")
    case.write("ingress/8080/clients", "web.example")
    monkeypatch.setattr("mutual_tls.settings._SETTLED", 0.0)
    found = case.egress("10.0.0.1"), case.ingress()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it is opened")

    monkeypatch.setattr("mutual_tls.settings.os.open", fail)
    assert (case.egress("10.0.0.1"), case.ingress()) == found
    case.pod.overview()


def test_a_volume_of_kubernetes_may_be_the_directory(case: Case) -> None:
    """Its entries are links by way of `..data`, which is replaced when the ConfigMap changes."""
    place = case.place / "egress"
    for version, word in ("1", "mtls"), ("2", "plain"):
        case.write(f"egress/..{version}/10.0.0.0_8", word)
        case.write(f"egress/..{version}/fd00--_8", "mtls")
        new = place / "..new"
        new.symlink_to(f"..{version}")
        new.rename(place / "..data")
        for entry in "10.0.0.0_8", "fd00--_8":
            if version == "1":
                (place / entry).symlink_to(f"..data/{entry}")
        assert case.egress("10.0.0.1").mode is Mode(word)
        assert case.egress("fd00::1").mode is Mode.MTLS
        assert case.told() == []
    assert case.taken() == ["!10.0.0.0/8", "fd00::/8"]
