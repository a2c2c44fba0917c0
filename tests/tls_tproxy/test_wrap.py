"""What is wrapped, and how: what the working directory says, and what is wrong with it."""

import errno
import ipaddress
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mutual_tls import settings
from mutual_tls.dial import IPAddress
from mutual_tls.identity import Files, Identities, IdentityError
from mutual_tls.refusal import Refusal, SessionReason
from sniproxy_hostname import Hostname, InvalidHostname
from tests.mutual_tls.test_settings import as_nobody
from tests.support.bridge import write, write_identity
from tests.support.strategies import steady
from tls_tproxy.checkers import Checkers, UnknownCheckerError
from tls_tproxy.refusal import WrapReason
from tls_tproxy.starttls import StartTLS
from tls_tproxy.wrap import Service, Wrap, parse_port_map

NAME = Hostname(b"db.example.com")
ADDRESS = ipaddress.ip_address("192.0.2.1")
OTHER = ipaddress.ip_address("192.0.2.2")


class Case:
    """A working directory, and what is found there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names = directory / "wrap" / "names"
        self.problems: list[str] = []
        self.seconds = itertools.count()  # one more whenever the clock is looked at
        self.start()

    def start(
        self,
        ports: dict[int, int] | None = None,
        identity: Files | None = None,
        checker: str | None = None,
    ) -> None:
        self.wrap = Wrap(
            self.directory,
            Identities(lambda *_: None),
            Checkers([]),
            self.problems.append,
            ports=ports,
            identity=identity,
            checker=checker,
            clock=lambda: next(self.seconds),
        )

    def write(self, path: str, text: str = "") -> Path:
        return write(self.directory / "wrap" / path, text)

    def name(self, entry: str, port: int = 8443) -> None:
        """Permit to wrap connections to a name, and tell it by the port where they lead."""
        self.write(f"names/{entry}/ports/8443", str(port))

    def find(self, name: str = NAME, port: int = 8443) -> Service:
        return self.wrap.find(Hostname(name.encode()), port, ADDRESS)

    def refused(self, name: str = NAME, port: int = 8443) -> Refusal:
        with pytest.raises(Refusal) as caught:
            self.find(name, port)
        return caught.value

    def allows(self, name: Hostname, address: IPAddress) -> bool:
        """Tell whether a name may be at an address, whatever port was asked for."""
        try:
            self.wrap.find(name, 8443, address)
        except Refusal as refusal:
            if refusal.reason is WrapReason.ADDRESS_NOT_ALLOWED:
                return False
            if refusal.reason is not WrapReason.PORT_NOT_ALLOWED:
                raise
        return True

    def misconfigured(self, name: str = NAME) -> str:
        refusal = self.refused(name)
        assert refusal.reason is SessionReason.MISCONFIGURED
        return str(refusal).replace(f"{self.directory}/", "")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def reachable() -> Iterator[Case]:
    """A case where others than its owner come as far as they are let: pytest lets nobody."""
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Case(Path(directory))


# --- which directory counts


@pytest.mark.parametrize(
    ("name", "port"),
    [
        ("db.example.com", 1),
        ("more.example.org", 1),
        ("more.b.example.com", 1),
        ("x.b.example.com", 2),
        ("y.x.b.example.com", 2),
        ("b.example.com", 3),
        ("other.example.com", 3),
        ("example.com", 4),
        ("single", 4),
    ],
)
def test_the_exact_name_then_the_longest_suffix_then_the_default(
    case: Case, name: str, port: int
) -> None:
    case.name("db.example.com", 1)
    case.write("names/db.example.com/also/more.example.org")
    case.write("names/db.example.com/also/list", "More.B.example.com.\n")
    case.name("_.b.example.com", 2)
    case.name("_.example.com", 3)
    case.name("_default", 4)
    found = case.find(name)
    assert (found.name, found.port) == (name, port)


@pytest.mark.parametrize("name", ["example.com", "b.example.org", "com"])
def test_what_is_not_named_is_refused(case: Case, name: str) -> None:
    case.name("db.example.com")
    case.name("_.example.com")
    refusal = case.refused(name)
    assert refusal.reason is WrapReason.UNKNOWN_NAME
    assert str(refusal) == f"nothing is said of {name}"


@pytest.mark.parametrize("entry", ["DB.example.com", "db.example.com.", ".db.example.com", "_db"])
def test_what_is_no_name_in_its_canonical_form_is_nobody_s(case: Case, entry: str) -> None:
    case.name(entry)
    case.write(f"names/{entry}/also/{NAME}")
    case.write(f"names/{entry}/addresses/{ADDRESS}")
    assert case.refused().reason is WrapReason.UNKNOWN_NAME
    assert case.wrap.ports() == set()
    assert case.wrap.fixed_names(ADDRESS) == []


def test_a_name_that_two_directories_claim(case: Case) -> None:
    case.name("a.example")
    case.name("b.example")
    case.write("names/a.example/also/c.example")
    assert case.find("c.example").name == "c.example"
    case.write("names/b.example/also", "c.example")
    assert case.misconfigured("c.example") == (
        "c.example is in wrap/names/a.example/also and wrap/names/b.example/also"
    )
    case.name("c.example", 9)
    assert case.find("c.example").port == 9
    assert case.find("a.example").port == 8443


def test_a_directory_may_list_itself(case: Case) -> None:
    case.name("a.example")
    case.write("names/a.example/also/a.example")
    assert case.find("a.example").port == 8443


def test_what_else_a_name_may_be_called_is_not_guessed(case: Case) -> None:
    case.name("a.example")
    case.name("_default")
    case.write("names/a.example/also", "c.example\n../../etc\n")
    # It might have been meant for this name.
    assert case.misconfigured("d.example").startswith(
        "unable to read wrap/names/a.example/also: '../../etc': a label is empty"
    )
    assert case.find("a.example").name == "a.example"


def test_a_file_beside_the_names_is_no_name(case: Case) -> None:
    case.name("_default")
    case.write("names/notes.txt")
    assert case.find().port == 8443
    assert case.misconfigured("notes.txt").endswith("names/notes.txt: it is not a directory")
    assert case.wrap.fixed_names(ADDRESS) == []


def test_a_link_to_a_directory_is_one(case: Case) -> None:
    case.name("a.example", 9)
    (case.names / NAME).symlink_to("a.example")
    assert case.find().port == 9


def test_links_to_nothing_are_not_absent(case: Case) -> None:
    case.name("_default")
    (case.names / NAME).symlink_to("nothing")
    assert (
        case.misconfigured() == f"unable to read wrap/names/{NAME}: it is a link that leads nowhere"
    )
    # Nobody knows what names it would have had beside.
    assert "it is a link that leads nowhere" in case.misconfigured("b.example")
    (case.names / NAME).unlink()
    assert case.find().port == 8443


def test_names_that_are_a_link_to_nothing(case: Case) -> None:
    case.start(ports={8443: 443})
    case.names.parent.mkdir()
    case.names.symlink_to("nothing")
    assert case.misconfigured() == "unable to read wrap/names: it is a link that leads nowhere"


def test_names_that_are_a_file(case: Case) -> None:
    case.start(ports={8443: 443})
    case.write("names")
    assert case.misconfigured() == "unable to read wrap/names: it is not a directory"


LABELS = st.sampled_from(["a", "b", "c"])
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
ENTRIES = NAMES | NAMES.map("_.{}".format) | st.just("_default")


@hypothesis.settings(steady, max_examples=50)  # it writes many files
@given(st.dictionaries(ENTRIES, st.lists(NAMES, max_size=2), max_size=6), NAMES)
def test_every_name_is_found_where_it_is_said(also: dict[str, list[str]], name: str) -> None:
    """Against what a reader of the manual would do by hand."""
    labels = name.split(".")
    claims = sorted(entry for entry in also if name in also[entry])
    suffixes = [f"_.{'.'.join(labels[start:])}" for start in range(1, len(labels))]
    order = [name, *claims, *suffixes, "_default"]
    expected = next((entry for entry in order if entry in also), None)

    with TemporaryDirectory() as directory:
        case = Case(Path(directory))
        case.names.mkdir(parents=True)
        for port, (entry, names) in enumerate(also.items(), 1):
            case.name(entry, port)
            for each in names:
                case.write(f"names/{entry}/also/{each}")
        if expected is None:
            assert case.refused(name).reason is WrapReason.UNKNOWN_NAME
        elif name not in also and len(claims) > 1:
            assert case.misconfigured(name).startswith(f"{name} is in wrap/names/")
        else:
            assert case.find(name).port == 1 + list(also).index(expected)


# --- the command line


def test_without_a_directory_every_name_is_allowed(case: Case) -> None:
    case.start(ports={8443: 443})
    found = case.find()
    assert found[:2] == (NAME, 443)
    assert found[3:] == (None, [], None)
    assert case.refused(port=443).reason is WrapReason.PORT_NOT_ALLOWED


def test_without_ports_of_the_command_line_no_name_is_allowed(case: Case) -> None:
    case.write("ports/8443")
    assert case.refused().reason is WrapReason.UNKNOWN_NAME


def test_names_that_were_there_once_do_not_vanish(case: Case) -> None:
    case.start(ports={8443: 443})
    assert case.find().port == 443
    case.names.mkdir(parents=True)
    assert case.refused().reason is WrapReason.UNKNOWN_NAME
    case.names.rename(case.names.with_name("old"))
    assert case.refused().reason is WrapReason.UNKNOWN_NAME


def test_names_that_are_seen_in_passing_do_not_vanish(case: Case) -> None:
    case.start(ports={8443: 443})
    case.names.mkdir(parents=True)
    case.wrap.ports()
    case.names.rmdir()
    assert case.refused().reason is WrapReason.UNKNOWN_NAME


def test_the_directory_overrides_the_ports_of_the_command_line(case: Case) -> None:
    case.start(ports={8443: 443, 8080: 80})
    case.write("ports/8443", "444")
    assert (case.find().port, case.find(port=8080).port) == (444, 80)
    case.write("ports/8443", "nowhere")
    assert "'nowhere' is no port" in case.misconfigured()


def test_ports_of_a_name_narrow_those_of_the_command_line(case: Case) -> None:
    case.start(ports={8443: 443, 8080: 80})
    case.name(NAME, 444)
    assert case.find().port == 444
    assert case.refused(port=8080).reason is WrapReason.PORT_NOT_ALLOWED


def test_a_checker_of_the_command_line_is_asked_for_every_name(case: Case) -> None:
    case.start(ports={8443: 443}, checker="san")
    assert [each.name for each in case.find().checkers] == ["san"]
    case.name(NAME)
    case.write(f"names/{NAME}/verify", "spki-pin # and\nsan\n")
    assert [each.name for each in case.find().checkers] == ["san", "spki-pin"]
    with pytest.raises(UnknownCheckerError, match="no certificate checker 'other'; there are san"):
        case.start(checker="other")


# --- identities


def test_an_identity_of_its_own_then_that_of_the_command_line_then_that_beside(
    case: Case, tmp_path: Path
) -> None:
    case.name(NAME)
    with pytest.raises(IdentityError, match=r"identity: cert\.pem: No such file"):
        case.find().identity.client_context()
    for place in "identity", f"wrap/names/{NAME}/identity", "files":
        write_identity(tmp_path / place, "client.example")
    identities = Identities(lambda *_: None)
    files = Files(*(f"{tmp_path}/files/{name}.pem" for name in ("cert", "key", "ca")))

    def found(name: str, identity: Files | None) -> object:
        wrap = Wrap(tmp_path, identities, Checkers([]), print, identity=identity)
        service = wrap.find(Hostname(name.encode()), 8443, ADDRESS)
        service.identity.client_context()
        return service.identity

    case.name("other.example")
    for identity in files, None:
        assert found(NAME, identity) is identities(f"{case.names}/{NAME}/identity")
    assert found("other.example", files) is identities(files)
    assert found("other.example", None) is identities(f"{tmp_path}/identity")


def test_a_link_is_an_identity_and_one_to_nothing_is_not_absent(case: Case, tmp_path: Path) -> None:
    write_identity(tmp_path / "identity", "client.example")
    case.name(NAME)
    link = case.names / NAME / "identity"
    link.symlink_to("../../../identity")
    case.find().identity.client_context()
    link.unlink()
    link.symlink_to("nothing")
    case.start()
    with pytest.raises(IdentityError, match="No such file"):
        case.find().identity.client_context()


# --- ports


def test_ports(case: Case) -> None:
    case.write("ports/8443", "443")
    case.write("ports/5432")
    case.write("names/a.example/also/b.example")
    assert case.find("a.example", 8443).port == 443
    assert case.find("b.example", 5432).port == 5432
    assert case.refused("a.example", 443).reason is WrapReason.PORT_NOT_ALLOWED
    case.write("names/a.example/ports/8443", "9443 # another one")
    assert case.find("a.example", 8443).port == 9443
    refusal = case.refused("a.example", 5432)
    assert refusal.reason is WrapReason.PORT_NOT_ALLOWED
    assert str(refusal) == f"{case.names}/a.example/ports has no 5432"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "there is no port 0"),
        ("65536", "'65536' is no port"),
        ("https", "'https' is no port"),
        ("443\n444", "it has 2 values, not one"),
        ("\u0664", "is no port"),
    ],
)
def test_what_is_no_port_is_misconfigured(case: Case, text: str, why: str) -> None:
    case.name(NAME)
    case.write(f"names/{NAME}/ports/8443", text)
    assert f"names/{NAME}/ports/8443: {why}" in case.misconfigured().replace("'\\u0664' ", "")
    # All the same nothing leaves in plaintext.
    assert case.wrap.ports() == {8443}


def test_ports_that_are_no_directory(case: Case) -> None:
    case.write(f"names/{NAME}/ports", "8443")
    assert case.misconfigured().endswith("ports: it is not a directory")
    case.write("names/b.example/ports/8443/443")
    assert case.misconfigured("b.example").endswith("ports/8443: it is not a regular file")
    case.write("names/d.example/ports/443")
    (case.names / "d.example/ports/8443").symlink_to("nothing")
    assert case.misconfigured("d.example").endswith("ports/8443: it is a link that leads nowhere")
    (case.names / "c.example").mkdir()
    (case.names / "c.example" / "ports").symlink_to("nothing")
    assert case.misconfigured("c.example").endswith("ports: it is a link that leads nowhere")


def test_an_empty_directory_of_ports_allows_none(case: Case) -> None:
    case.write("ports/8443")
    (case.names / NAME / "ports").mkdir(parents=True)
    assert case.refused().reason is WrapReason.PORT_NOT_ALLOWED


def test_all_ports_that_are_taken(case: Case) -> None:
    assert case.wrap.ports() == set()
    case.start(ports={1: 443})
    case.write("ports/2", "443")
    case.write("names/a.example/ports/3", "443")
    case.write("names/_.example.com/ports/4")
    case.write("names/_default/ports/5", "not a port")
    (case.directory / "wrap/ports/6").symlink_to("nothing")
    (case.names / "b.example").mkdir()
    assert case.wrap.ports() == {1, 2, 3, 4, 5, 6}
    (case.names / "a.example/ports/3").unlink()
    assert case.wrap.ports() == {1, 2, 4, 5, 6}
    assert case.problems == []


def test_entries_that_are_no_ports_are_told_once(case: Case) -> None:
    for entry in "0", "65536", "08443", "+1", "1e3", "\u0664", "a\nb", "8443 ", "-1":
        case.write(f"ports/{entry}")
    with open(os.fsencode(case.directory) + b"/wrap/ports/\xff", "w"):
        pass
    case.write("ports/.8443.swp")
    assert case.wrap.ports() == case.wrap.ports() == set()
    assert len(case.problems) == 10
    assert all(problem.isprintable() for problem in case.problems)
    assert f"unable to read {case.directory}/wrap/ports: there is no port 0" in case.problems
    (case.directory / "wrap/ports/0").unlink()
    case.wrap.ports()
    assert len(case.problems) == 10
    case.write("ports/0")
    case.wrap.ports()
    assert len(case.problems) == 11


@pytest.mark.parametrize("path", ["", "ports", "names", "names/a.example", "names/a.example/ports"])
def test_ports_that_can_not_be_listed_stay_taken(reachable: Case, path: str) -> None:
    case = reachable
    case.write("ports/1")
    case.write("names/a.example/ports/2")
    assert case.wrap.ports() == {1, 2}
    where = case.directory / "wrap" / path
    where.chmod(0)
    with as_nobody():
        assert case.wrap.ports() == case.wrap.ports() == {1, 2}
    assert f"unable to read {where}: Permission denied" in case.problems
    assert len(set(case.problems)) == len(case.problems)
    where.chmod(0o755)
    where.rename(where.with_name(".before"))
    where.symlink_to("nothing")
    assert case.wrap.ports() == {1, 2}
    assert f"unable to read {where}: it is a link that leads nowhere" in case.problems
    where.unlink()
    if path:
        assert case.wrap.ports() < {1, 2}


def test_ports_stay_taken_when_all_of_the_directory_has_gone(case: Case) -> None:
    """It is moved away, or what it was mounted from is gone."""
    case.start(ports={3: 443})
    assert case.wrap.ports() == {3}
    case.write("ports/1")
    case.write("names/a.example/ports/2")
    assert case.wrap.ports() == {1, 2, 3}
    where = case.directory / "wrap"
    where.rename(where.with_name("away"))
    assert case.wrap.ports() == case.wrap.ports() == {1, 2, 3}
    assert case.problems == [f"unable to read {where}: it is not there any more"]
    assert case.misconfigured() == "unable to read wrap: it is not there any more"
    case.write("ports/4")
    assert case.wrap.ports() == {3, 4}


def test_ports_stay_taken_while_no_descriptor_is_left(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write("ports/1")
    case.write("names/a.example/ports/2")
    case.write("names/a.example/accept-cname")
    name = Hostname(b"a.example")
    assert case.wrap.ports() == {1, 2}
    assert case.wrap.accepts_cname(name)

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert case.wrap.ports() == case.wrap.ports() == {1, 2}
        assert not case.wrap.accepts_cname(name)
        assert case.problems
        assert all("Too many open files" in problem for problem in case.problems)
    assert case.wrap.ports() == {1, 2}
    (case.directory / "wrap/ports/1").unlink()
    assert case.wrap.ports() == {2}


# --- addresses


def test_a_name_is_at_its_fixed_addresses_only(case: Case) -> None:
    case.name(NAME)
    assert case.allows(NAME, ADDRESS)
    assert case.allows(NAME, OTHER)
    case.write(f"names/{NAME}/addresses/{ADDRESS}")
    case.write(f"names/{NAME}/addresses/more", "2001:DB8:0::1 # in another spelling\n")
    assert case.find().name == NAME
    assert case.allows(NAME, ipaddress.ip_address("2001:db8::1"))
    assert case.allows(NAME, ipaddress.ip_address("::ffff:192.0.2.1"))
    assert not case.allows(NAME, OTHER)
    assert not case.allows(NAME, ipaddress.ip_address("2001:db8::2"))
    assert not case.allows(NAME, ipaddress.ip_address("::192.0.2.1"))
    with pytest.raises(Refusal, match=f"{NAME}/addresses has no 192.0.2.2") as caught:
        case.wrap.find(NAME, 8443, OTHER)
    assert caught.value.reason is WrapReason.ADDRESS_NOT_ALLOWED


def test_names_by_their_addresses(case: Case) -> None:
    for entry in "b.example", "a.example", "_.example.com", "_default":
        case.name(entry)
        case.write(f"names/{entry}/addresses", "192.0.2.1\n::ffff:192.0.2.3\n")
    case.name("c.example")
    assert case.wrap.fixed_names(ADDRESS) == ["a.example", "b.example"]
    assert case.wrap.fixed_names(OTHER) == []
    assert len(case.wrap.fixed_names(ipaddress.ip_address("192.0.2.3"))) == 2
    assert case.problems == []


def test_a_suffix_and_other_names_have_the_addresses_of_their_directory(case: Case) -> None:
    case.name("_.example.com")
    case.write("names/_.example.com/also/a.example")
    case.write(f"names/_.example.com/addresses/{ADDRESS}")
    for name in NAME, Hostname(b"a.example"):
        assert case.allows(name, ADDRESS)
        assert not case.allows(name, OTHER)


@pytest.mark.parametrize("text", ["192.0.2.1/24", "192.0.2.256", "localhost", "1", "192.0.2.1 x"])
def test_what_is_no_address_is_misconfigured(case: Case, text: str) -> None:
    for name in "a.example", "z.example":
        case.write(f"names/{name}/addresses/192.0.2.1")
    case.name(NAME)
    case.write(f"names/{NAME}/addresses", f"192.0.2.1\n{text}\n")
    assert case.misconfigured().startswith(f"unable to read wrap/names/{NAME}/addresses: ")
    with pytest.raises(Refusal):
        case.allows(NAME, ADDRESS)
    for _ in range(2):
        assert case.wrap.fixed_names(ADDRESS) == ["a.example", "z.example"]
    assert len(case.problems) == 1


def test_no_address_that_is_a_link_to_nothing_is_one(case: Case) -> None:
    case.name(NAME)
    addresses = case.names / NAME / "addresses"
    addresses.mkdir()
    (addresses / str(ADDRESS)).symlink_to("nothing")
    assert not case.allows(NAME, ADDRESS)
    addresses.rename(addresses.with_name("old"))
    addresses.symlink_to("nothing")
    assert case.misconfigured().endswith("addresses: it is a link that leads nowhere")


def test_of_an_unknown_name_no_address_is_known(case: Case) -> None:
    assert case.wrap.fixed_names(ADDRESS) == []
    with pytest.raises(Refusal) as caught:
        case.allows(NAME, ADDRESS)
    assert caught.value.reason is WrapReason.UNKNOWN_NAME


def test_names_that_can_not_be_listed_have_no_address(case: Case) -> None:
    case.names.parent.mkdir()
    case.names.symlink_to("nothing")
    assert case.wrap.fixed_names(ADDRESS) == []
    assert case.problems == [f"unable to read {case.names}: it is a link that leads nowhere"]


# --- what else a name has


def test_servers(case: Case) -> None:
    case.name(NAME)
    assert case.find().rules is None
    (case.names / NAME / "servers").mkdir()
    assert case.find().rules == []
    case.write(f"names/{NAME}/servers/cn:one")
    case.write(f"names/{NAME}/servers/list", "*.example.com\n")
    assert list(map(str, case.find().rules or [])) == ["cn:one", "*.example.com"]


def test_starttls(case: Case) -> None:
    case.name(NAME)
    assert case.find().starttls is None
    case.write(f"names/{NAME}/starttls", "postgres\n")
    assert case.find().starttls is StartTLS.POSTGRES


def test_accept_cname(case: Case) -> None:
    assert not case.wrap.accepts_cname(NAME)
    case.name(NAME)
    assert not case.wrap.accepts_cname(NAME)
    case.write(f"names/{NAME}/accept-cname")
    assert case.wrap.accepts_cname(NAME)
    (case.names / "a.example").symlink_to("nothing")
    assert not case.wrap.accepts_cname(Hostname(b"a.example"))


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # sun_path has 108 bytes, unix(7)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


def too_long(path: Path) -> None:
    path.write_text("# " + "x" * 70000)


@pytest.mark.parametrize("make", [a_link_to_nothing, a_loop, a_fifo, a_socket, not_text, too_long])
@pytest.mark.parametrize("entry", ["servers", "verify", "starttls", "addresses", "ports", "also"])
def test_what_can_not_be_read_is_refused(
    case: Case, entry: str, make: Callable[[Path], None]
) -> None:
    case.write("ports/8443")
    (case.names / NAME).mkdir(parents=True)
    (case.names / "_default").mkdir()
    make(case.names / NAME / entry)
    name = "b.example" if entry == "also" else NAME
    assert case.misconfigured(name).startswith(f"unable to read wrap/names/{NAME}/{entry}: ")
    (case.names / NAME / entry).unlink()
    assert case.find(name).name == name


@pytest.mark.parametrize(
    ("entry", "text", "why"),
    [
        ("servers", "a*", "'a*': '*' stands for the whole first label"),
        ("starttls", "", "it has 0 values"),
        ("starttls", "smtp", "'smtp' is no protocol that is known: postgres"),
        ("starttls", "postgres\npostgres", "it has 2 values"),
    ],
)
def test_what_can_not_be_understood_is_refused(case: Case, entry: str, text: str, why: str) -> None:
    case.name(NAME)
    case.write(f"names/{NAME}/{entry}", text)
    assert case.misconfigured().startswith(f"unable to read wrap/names/{NAME}/{entry}: {why}")


def test_a_checker_that_is_not_there(case: Case) -> None:
    case.name(NAME)
    case.write(f"names/{NAME}/verify", "san\n../../other\n")
    refusal = case.refused()
    assert refusal.reason is WrapReason.UNKNOWN_CHECKER
    assert "no certificate checker '../../other'" in str(refusal)


def test_out_of_reach(reachable: Case) -> None:
    case = reachable
    case.name("a.example")
    case.name("_default")
    (case.names / "a.example").chmod(0)
    with as_nobody():
        denied = "unable to read wrap/names/a.example: Permission denied"
        assert case.misconfigured("a.example") == denied
        # It may claim this name, too.
        assert case.misconfigured("b.example") == denied
        assert not case.wrap.accepts_cname(Hostname(b"a.example"))
        assert case.wrap.fixed_names(ADDRESS) == []


def test_nothing_is_opened_while_nothing_changes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write("ports/8443", "443")
    case.write(f"names/{NAME}/servers/cn:one")
    case.write(f"names/{NAME}/addresses/{ADDRESS}")
    case.write(f"names/{NAME}/also/b.example")
    monkeypatch.setattr(settings, "_SETTLED", -1.0)

    def look() -> object:
        wrap = case.wrap
        return case.find(), case.find("b.example"), wrap.ports(), wrap.fixed_names(ADDRESS)

    before = look()
    monkeypatch.setattr(os, "open", None)
    assert look() == before


FILE_NAMES = st.lists(
    st.sampled_from(
        [b"a", b"B", b"_", b".", b"-", b"*", b"\n", b"\xff", "\u00e9".encode(), b"%s", b" "]
    )
    | st.binary(min_size=1, max_size=3),
    min_size=1,
    max_size=6,
).map(b"".join)


@hypothesis.settings(steady, max_examples=50)  # it makes many files
@given(FILE_NAMES)
@example(b"a" * 255)
def test_whatever_else_a_directory_is_called_nobody_is_disturbed(entry: bytes) -> None:
    assume(not set(entry) & set(b"/\0") and entry not in {b".", b".."})
    try:
        is_name = Hostname(entry.removeprefix(b"_.")).encode() == entry.removeprefix(b"_.")
    except InvalidHostname:
        is_name = False
    with TemporaryDirectory() as directory:
        case = Case(Path(directory))
        case.name(NAME)
        place = os.path.join(os.fsencode(case.names), entry)
        for each in b"ports", b"addresses":
            os.makedirs(os.path.join(place, each))
        os.mknod(os.path.join(place, b"ports", b"5432"))
        os.mknod(os.path.join(place, b"addresses", b"192.0.2.1"))
        assert case.find().port == 8443
        assert case.refused("other.example").reason is WrapReason.UNKNOWN_NAME
        assert case.wrap.ports() == ({8443, 5432} if is_name else {8443})
        is_exact = is_name and not entry.startswith(b"_")
        assert case.wrap.fixed_names(ADDRESS) == ([entry.decode()] if is_exact else [])
        assert case.problems == []


# --- --portMap


def test_port_map() -> None:
    assert parse_port_map("8443:443") == {8443: 443}
    assert parse_port_map("8443:443,5432:5432,65535:1") == {8443: 443, 5432: 5432, 65535: 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not FROM:TO, two ports"),
        ("8443", "'8443' is not FROM:TO"),
        ("8443:443,", "'' is not FROM:TO"),
        ("0:443", "there is no port 0"),
        ("443:0", "there is no port 0"),
        ("65536:1", "'65536' is no port"),
        ("1:65536", "'65536' is no port"),
        ("1:99999999999999999999", "is no port"),
        ("-1:1", "'-1' is no port"),
        ("+1:1", "is no port"),
        ("1:2:3", "'2:3' is no port"),
        (":1", "'' is no port"),
        ("1:", "'' is no port"),
        ("1:2, 3:4", "' 3' is no port"),
        ("\u0661:1", "is no port"),
        ("1:2,1:3", "port 1 is there twice"),
        ("1:2,01:2", "port 1 is there twice"),
    ],
)
def test_what_is_no_port_map(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_port_map(text)


@steady
@given(st.dictionaries(st.integers(1, 65535), st.integers(1, 65535), min_size=1, max_size=20))
def test_every_port_map_is_read_back(ports: dict[int, int]) -> None:
    text = ",".join(f"{taken}:{leads_to}" for taken, leads_to in ports.items())
    assert parse_port_map(text) == ports


@steady
@given(st.text("0123456789:, \n", max_size=12))
def test_no_port_map_is_understood_in_part(text: str) -> None:
    try:
        ports = parse_port_map(text)
    except ValueError:
        return
    assert len(ports) == text.count(":") == text.count(",") + 1


def test_what_all_names_add_up_to_is_looked_for_once_a_second(case: Case) -> None:
    other = Hostname(b"other.example")
    case.seconds = itertools.count(step=0)
    case.name("_default", 1)
    case.name(NAME, 2)
    assert case.wrap.fixed_names(ADDRESS) == []
    case.write(f"names/{NAME}/addresses", str(ADDRESS))
    case.write(f"names/{NAME}/also/{other}")
    assert case.wrap.fixed_names(ADDRESS) == []
    assert case.find(other).port == 1
    case.seconds = itertools.count(start=1, step=0)
    assert case.wrap.fixed_names(ADDRESS) == [NAME]
    assert case.find(other).port == 2
    # But what is taken away is gone at once.
    (case.names / NAME / "also" / other).unlink()
    assert case.find(other).port == 1
