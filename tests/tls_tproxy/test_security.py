"""docs/tls-tproxy-security.md: a test behind each of its sentences, here or where it was before."""

import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from mutual_tls.netfilter.mark import MARK
from sniproxy.service import libc
from tests.support import sentences
from tests.support.bridge import authority, write, write_identity
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.dns import answering, asking
from tests.support.network import Machine, why_no_network
from tests.support.wrapping import (
    CLIENT,
    HERE,
    ROUTER,
    Name,
    Site,
    is_reset,
    options,
    server_context,
    works,
)
from tls_tproxy.wrap import _OVERVIEW_FOR

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/tls-tproxy-security.md"

# The ports that are taken here: apart from those of other files, whose instances may run.
TAKEN, APART = 8643, 8644
LISTENING: Final = 8645
PLAYED: Final = "10.77.9.8"  # a resolver that a test plays

# Which tests are behind a sentence: FILE::TEST, the file below tests/; without one it is this file.
TESTS: Final = {
    # On the way to the server.
    "Whoever is on the way sees TLS, the server's name, and how much is said.": [
        "test_on_the_way_are_tls_and_the_name"
    ],
    "With TLS 1.2 they see our certificate, too.": ["test_on_the_way_are_tls_and_the_name"],
    "Who answers in the server's place gets neither our certificate nor a byte of the program.": [
        "tls_tproxy/test_tproxy.py::test_a_server_that_is_not_the_one"
    ],
    "A connection that was cut off does not look like one that has ended.": [
        "tls_tproxy/test_tproxy.py::test_the_server_is_cut_off"
    ],
    "Who holds packets back makes connections fail, within ten seconds.": [
        "tls_tproxy/test_tproxy.py::test_who_is_silent_for_ten_seconds"
    ],
    "A pin is against an authority that errs.": ["test_a_pin_is_against_an_authority_that_errs"],
    # On the resolver.
    "Who has not seen the question has to guess its port and its id, before the server answers.": [
        "tls_tproxy/test_tproxy.py::test_a_forged_answer_names_nobody",
        "tls_tproxy/names/test_resolver.py::test_answers_that_are_forged_by_the_server_s_neighbours",
        "tls_tproxy/names/test_resolver.py::test_a_stranger_plants_nothing",
    ],
    "Of the answers that match, the first one counts, as it does for the program.": [
        "tls_tproxy/names/test_resolver.py::test_a_forged_answer_of_which_everything_is_right",
        "tls_tproxy/names/test_questions.py::test_the_first_answer_that_matches_is_the_last",
    ],
    "A resolver that lies chooses the address, and not the name.": [
        "test_a_resolver_that_lies_chooses_the_address_and_not_the_name"
    ],
    "Names at one address are interchangeable.": ["test_names_at_one_address_are_interchangeable"],
    "A name that is not allowed is never tried.": [
        "test_a_name_that_is_not_allowed_is_never_tried"
    ],
    "A port of its own keeps a name apart.": ["test_a_port_of_its_own_keeps_a_name_apart"],
    "A name with fixed addresses is nowhere else, and who is led elsewhere by it is refused.": [
        "test_who_is_led_elsewhere_by_a_name_with_fixed_addresses_is_refused",
        "tls_tproxy/test_tproxy.py::test_fixed_addresses",
    ],
    "The target of a CNAME is no name, since nobody here has asked for it.": [
        "tls_tproxy/test_tproxy.py::test_the_target_of_a_cname_is_no_name"
    ],
    "With `accept-cname` it is one, if it is allowed itself.": [
        "test_with_accept_cname_the_target_is_a_name_if_it_is_allowed",
        "tls_tproxy/test_tproxy.py::test_accept_cname",
    ],
    "A rule in `servers` takes the place of the name.": [
        "tls_tproxy/test_tproxy.py::test_rules_and_checkers"
    ],
    "A certificate checker can refuse, and can't allow.": [
        "test_a_checker_can_not_allow",
        "tls_tproxy/test_tproxy.py::test_rules_and_checkers",
    ],
    # Names that are not seen.
    "A name that was looked up by TCP is not known, and its connection is refused.": [
        "test_a_name_that_was_looked_up_by_tcp_is_not_known"
    ],
    "`addresses/` and `/etc/hosts` serve such names.": [
        "test_a_name_that_was_looked_up_by_tcp_is_not_known",
        "tls_tproxy/names/test_watch.py::test_dns_first_and_then_the_hosts_file",
    ],
    # Other programs.
    "Programs of all users are wrapped, root's too, and so they all speak with our certificate.": [
        "tls_tproxy/test_tproxy.py::test_a_connection_is_wrapped"
    ],
    "`--user-only` and `--cgroup` leave the others alone, who leave in plaintext then.": [
        "tls_tproxy/test_redirect.py::test_only_chosen_users",
        "tls_tproxy/test_redirect.py::test_only_a_control_group",
    ],
    "Any user can make a name known, by asking for it.": ["test_any_user_can_make_a_name_known"],
    "Nobody gets anywhere by connecting to our own port.": [
        "tls_tproxy/test_tproxy.py::test_who_connects_to_our_own_port_is_refused"
    ],
    "Without a right nobody has our mark, with which one gets past the rules.": [
        "tls_tproxy/test_redirect.py::test_the_mark_is_not_to_be_had_without_rights"
    ],
    "Root gets past them, and so does whoever has `CAP_NET_RAW` or `CAP_NET_ADMIN`.": [
        "test_who_has_our_mark_gets_past"
    ],
    "A connection with another mark is taken.": ["test_a_connection_with_another_mark_is_taken"],
    "Who may kill tls-tproxy ends the redirection.": [
        "tls_tproxy/test_redirect.py::test_nothing_is_left_behind_by_one_who_is_killed",
        "tls_tproxy/test_redirect.py::test_fail_closed",
    ],
    "What is forwarded is not taken: containers with a network of their own.": [
        "test_what_is_forwarded_is_not_taken"
    ],
    # What leaves in plaintext.
    "Ports that are not taken, and UDP.": [
        "test_udp_leaves_as_it_is",
        "tls_tproxy/test_tproxy.py::test_a_port_that_is_not_taken_is_left_alone",
    ],
    "Everything, before tls-tproxy has started and after it has ended.": [
        "test_before_and_after_everything_leaves_in_plaintext"
    ],
    "With `--fail-closed` it is refused from the first start on, until the next boot.": [
        "test_with_fail_closed_nothing_leaves_in_plaintext_afterwards",
        "service/test_systemd_tproxy.py::test_a_restart_keeps_the_port_wrapped",
    ],
    "Root can remove what refuses, and `nft flush ruleset` does.": [
        "test_root_can_remove_what_refuses_and_not_what_redirects",
        "tls_tproxy/test_redirect.py::test_what_others_have_flushed_is_made_anew",
    ],
    # Itself.
    "After its start it has the right to set the mark, and no other.": [
        "service/test_systemd_tproxy.py::test_it_has_the_right_to_mark_and_no_other"
    ],
}


def test_there_is_a_test_behind_each_sentence() -> None:
    sentences.check(PAGE, TESTS, __file__)


# --- The place


class Wrapped:
    """A running instance, with names that are allowed.

    Attributes:
        daemon: It.
        names: Its directory wrap/names.
    """

    def __init__(self, daemon: Daemon, names: Path) -> None:
        self.daemon = daemon
        self.names = names

    def allow(self, name: str, **entries: str) -> None:
        """Allow a name, with files in its directory; `a/b` is `a__b` here."""
        (self.names / name).mkdir(parents=True, exist_ok=True)
        for entry, content in entries.items():
            write(self.names / name / entry.replace("__", "/"), content)

    def wait_for_refusal(self, address: str, reason: str, port: int = TAKEN) -> None:
        words = {"refused", f"destination={address}:{port}", f"reason={reason}"}
        eventually(lambda: any(words <= set(line.split()) for line in self.daemon.log()))


def make(place: Path) -> Path:
    """Make a working directory; return its wrap/names."""
    write(place / f"run/wrap/ports/{TAKEN}", "443\n")
    write_identity(place / "run/identity", CLIENT)
    names = place / "run/wrap/names"
    names.mkdir()
    return names


@pytest.fixture(scope="module")
def wrapped(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrapped]:
    place = tmp_path_factory.mktemp("security")
    names = make(place)
    with site.start(place) as daemon:
        yield Wrapped(daemon, names)


@contextmanager
def plain_server(site: Site, name: Name, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Be where plaintext would arrive: at the very port that is taken."""
    listening = site.router.do(socket.socket, socket.AF_INET, kind)
    with listening:
        listening.settimeout(PATIENCE)
        listening.bind((name.address, TAKEN))
        if kind == socket.SOCK_STREAM:
            listening.listen()
        yield listening


def arrives(client: socket.socket, listening: socket.socket) -> bool:
    """Tell whether what a client says arrives in plaintext."""
    with client, listening.accept()[0] as accepted:
        client.sendall(b"hello")
        return accepted.recv(100) == b"hello"


def forge(site: Site, asked: str, address: str) -> None:
    """Have this machine ask for a name, and get a forged answer, of which everything is right."""
    server = site.router.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    client = site.here.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with server, client:
        server.bind((PLAYED, 53))
        for sock in server, client:
            sock.settimeout(PATIENCE)
        client.connect((PLAYED, 53))
        client.send(asking(asked))
        _, where = server.recvfrom(4096)
        server.sendto(answering(asked, address), where)
        client.recv(4096)


# --- On the way to the server


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_on_the_way_are_tls_and_the_name(
    site: Site, wrapped: Wrapped, version: ssl.TLSVersion
) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    with site.serve(name.address, server_context(name.name, version=version)) as server:
        assert works(site.visit(name, TAKEN))
        end = server.end()
        assert bytes(end.received) == b"hello"
        assert b"hello" not in end.raw
        assert name.name.encode() in end.raw
        assert (CLIENT.encode() in end.raw) == (version is ssl.TLSVersion.TLSv1_2)


def test_a_pin_is_against_an_authority_that_errs(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name, verify="spki-pin\n", pins=f"pin-sha256:{'A' * 43}=\n")
    # Of the right authority, and for the right name.
    with site.serve(name.address, server_context(name.name)) as server:
        assert is_reset(lambda: site.visit(name, TAKEN))
        assert not server.end().is_certificate_seen
    wrapped.wait_for_refusal(name.address, "certificate_rejected")


# --- On the resolver, and on the way to it


def test_a_resolver_that_lies_chooses_the_address_and_not_the_name(
    site: Site, wrapped: Wrapped
) -> None:
    name, evil = site.new_name(), site.new_name()
    wrapped.allow(name.name)
    forge(site, name.name, evil.address)
    with site.serve(evil.address, server_context(evil.name)) as server:
        assert is_reset(lambda: site.connect(evil.address, TAKEN))
        assert server.end().sni == name.name
        assert not server.end().is_certificate_seen
    wrapped.wait_for_refusal(evil.address, "wrong_name")


def test_names_at_one_address_are_interchangeable(site: Site, wrapped: Wrapped) -> None:
    name, evil = site.new_name(), site.new_name()
    for each in name, evil:
        wrapped.allow(each.name)
    # Somebody who has a server that is allowed, at an address of his, lies about another one.
    site.look_up(evil.name)
    forge(site, name.name, evil.address)
    with site.serve(evil.address, server_context(evil.name)) as server:
        assert works(site.connect(evil.address, TAKEN))
        assert [end.sni for end in server.ends] == [name.name, evil.name]


def test_a_name_that_is_not_allowed_is_never_tried(site: Site, wrapped: Wrapped) -> None:
    name, evil = site.new_name(), site.new_name()
    wrapped.allow(name.name)
    site.look_up(evil.name)
    forge(site, name.name, evil.address)
    with site.serve(evil.address, server_context(evil.name)) as server:
        assert is_reset(lambda: site.connect(evil.address, TAKEN))
        assert [end.sni for end in server.ends] == [name.name]
    wrapped.wait_for_refusal(evil.address, "wrong_name")


def test_a_port_of_its_own_keeps_a_name_apart(site: Site, wrapped: Wrapped) -> None:
    name, evil = site.new_name(), site.new_name()
    wrapped.allow(name.name, **{f"ports__{APART}": "443\n"})
    wrapped.allow(evil.name)
    eventually(lambda: any(f"ports={TAKEN},{APART}" in line for line in wrapped.daemon.log()))
    site.look_up(evil.name)
    forge(site, name.name, evil.address)
    with site.serve(evil.address, server_context(evil.name)) as server:
        assert is_reset(lambda: site.connect(evil.address, APART))
        assert [end.sni for end in server.ends] == [name.name]
    wrapped.wait_for_refusal(evil.address, "wrong_name", APART)
    with site.serve(name.address, server_context(name.name)):
        assert works(site.visit(name, APART))


def test_who_is_led_elsewhere_by_a_name_with_fixed_addresses_is_refused(
    site: Site, wrapped: Wrapped
) -> None:
    name, evil = site.new_name(), site.new_name()
    wrapped.allow(name.name, addresses=f"{name.address}\n")
    wrapped.allow(evil.name)
    with site.serve(evil.address, server_context(evil.name)) as server:
        assert works(site.visit(evil, TAKEN))
        forge(site, name.name, evil.address)
        assert is_reset(lambda: site.connect(evil.address, TAKEN))
        assert len(server.ends) == 1
    wrapped.wait_for_refusal(evil.address, "address_not_allowed")


def test_with_accept_cname_the_target_is_a_name_if_it_is_allowed(
    site: Site, wrapped: Wrapped
) -> None:
    name = site.new_name()
    wrapped.allow(f"alias-{name.name}", **{"accept-cname": ""})
    with site.serve(name.address, server_context(name.name)):
        site.look_up(f"alias-{name.name}")
        assert is_reset(lambda: site.connect(name.address, TAKEN))
        wrapped.allow(name.name)
        assert works(site.connect(name.address, TAKEN))


def test_a_checker_can_not_allow(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    # It accepts any certificate for the name, and so does not look at the authority.
    wrapped.allow(name.name, verify="san\n")
    stranger = server_context(name.name, ca=authority("a stranger"))
    with site.serve(name.address, stranger):
        assert is_reset(lambda: site.visit(name, TAKEN))
    wrapped.wait_for_refusal(name.address, "untrusted")


# --- Names that are not seen


def ask_by_tcp(name: str) -> bytes:
    question = asking(name)
    with socket.create_connection((ROUTER[4], 53), PATIENCE) as client:
        # RFC 1035 §4.2.2: "prefixed with a two byte length field".
        client.sendall(len(question).to_bytes(2, "big") + question)
        return client.recv(4096)


def test_a_name_that_was_looked_up_by_tcp_is_not_known(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    assert socket.inet_aton(name.address) in site.here.do(ask_by_tcp, name.name)
    with site.serve(name.address, server_context(name.name)):
        assert is_reset(lambda: site.connect(name.address, TAKEN))
        wrapped.wait_for_refusal(name.address, "no_name")
        wrapped.allow(name.name, addresses=f"{name.address}\n")
        time.sleep(_OVERVIEW_FOR)
        assert works(site.connect(name.address, TAKEN))


# --- Other programs of this machine


def test_any_user_can_make_a_name_known(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    # Whose a socket is, is the file system's user id of the thread that makes it, setfsuid(2).
    site.here.do(libc.call, "setfsuid", 1000)
    try:
        site.look_up(name.name)
    finally:
        site.here.do(libc.call, "setfsuid", 0)
    with site.serve(name.address, server_context(name.name)):
        assert works(site.connect(name.address, TAKEN))


def connect_with_mark(address: str, mark: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    client.settimeout(PATIENCE)
    client.connect((address, TAKEN))
    return client


def test_who_has_our_mark_gets_past(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    with plain_server(site, name) as plain:
        site.look_up(name.name)
        assert arrives(site.here.do(connect_with_mark, name.address, MARK), plain)


def test_a_connection_with_another_mark_is_taken(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    with site.serve(name.address, server_context(name.name)):
        for mark in 1, MARK ^ 1:
            site.look_up(name.name)
            assert works(site.here.do(connect_with_mark, name.address, mark))


def test_what_is_forwarded_is_not_taken(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    site.look_up(name.name)
    container = Machine()
    try:
        leader = container.place.parts[4]
        link = ("ip", "link", "add", "bridge", "type", "veth", "peer", "name", "eth0")
        site.here.run(*link, "netns", leader)
        site.here.run("ip", "address", "add", "10.66.0.1/24", "dev", "bridge")
        site.here.run("ip", "link", "set", "bridge", "up")
        site.here.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        container.run("ip", "address", "add", "10.66.0.2/24", "dev", "eth0")
        container.run("ip", "link", "set", "eth0", "up")
        container.run("ip", "route", "add", "default", "via", "10.66.0.1")
        site.router.run("ip", "route", "add", "10.66.0.0/24", "via", HERE[4])
        with plain_server(site, name) as plain:
            client = container.do(socket.create_connection, (name.address, TAKEN), PATIENCE)
            assert arrives(client, plain)
    finally:
        site.router.run("ip", "route", "del", "10.66.0.0/24")
        site.here.run("ip", "link", "del", "bridge")
        container.end()


# --- What leaves in plaintext


def test_udp_leaves_as_it_is(site: Site, wrapped: Wrapped) -> None:
    name = site.new_name()
    wrapped.allow(name.name)
    site.look_up(name.name)
    with (
        plain_server(site, name, socket.SOCK_DGRAM) as plain,
        site.here.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.sendto(b"hello", (name.address, TAKEN))
        assert plain.recv(100) == b"hello"


@pytest.fixture
def alone(site: Site, tmp_path: Path) -> tuple[Name, Path]:
    """A name, and a place for an instance that a test starts and ends."""
    return site.new_name(), tmp_path


# Its own port is not one of those above, for they are taken all the time.
ALONE: Final = 8646


@contextmanager
def plain_alone(site: Site, name: Name) -> Iterator[socket.socket]:
    with site.router.do(socket.create_server, (name.address, ALONE)) as listening:
        listening.settimeout(PATIENCE)
        yield listening


def stop_refusing(site: Site, place: Path) -> None:
    done = site.run(place, f"--port={LISTENING}", "--stop-refusing")
    assert done.returncode == 0, done.stderr


def test_before_and_after_everything_leaves_in_plaintext(
    site: Site, alone: tuple[Name, Path]
) -> None:
    name, place = alone
    with plain_alone(site, name) as plain:
        assert arrives(site.visit(name, ALONE), plain)
        with (
            site.serve(name.address, server_context(name.name)),
            site.start(place, *options(place), f"--portMap={ALONE}:443"),
        ):
            assert works(site.visit(name, ALONE))
        assert arrives(site.visit(name, ALONE), plain)


def test_with_fail_closed_nothing_leaves_in_plaintext_afterwards(
    site: Site, alone: tuple[Name, Path]
) -> None:
    name, place = alone
    closed = (f"--port={LISTENING}", "--fail-closed")
    with site.start(place, *options(place), f"--portMap={ALONE}:443", *closed):
        pass
    try:
        with plain_alone(site, name), pytest.raises(ConnectionRefusedError):
            site.visit(name, ALONE)
    finally:
        stop_refusing(site, place)
    with plain_alone(site, name) as plain:
        assert arrives(site.visit(name, ALONE), plain)


def handles(site: Site) -> dict[str, int]:
    """Return the handles of all tables, by which the kernel knows them."""
    listed = site.here.run("nft", "-a", "list", "ruleset")
    found = re.findall(r"^table inet (\w+) \{.*handle (\d+)", listed, re.MULTILINE)
    return {name: int(handle) for name, handle in found}


def test_root_can_remove_what_refuses_and_not_what_redirects(
    site: Site, alone: tuple[Name, Path]
) -> None:
    name, place = alone
    closed = (f"--port={LISTENING}", "--fail-closed")
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(place, *options(place), f"--portMap={ALONE}:443", *closed),
    ):
        before = handles(site)
        assert len(before) > 1
        site.here.run("nft", "flush", "ruleset")
        assert works(site.visit(name, ALONE))
        # A table that is made anew has another handle.
        eventually(lambda: handles(site).keys() == before.keys())
        changed = {table for table, handle in handles(site).items() if before[table] != handle}
        assert changed == {f"tls_tproxy_refuse_{LISTENING}"}
    stop_refusing(site, place)
