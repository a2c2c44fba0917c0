"""Which peer carries connections to a host, and what is wrong with the directory."""

import time
from pathlib import Path

import pytest

from mutual_tls.dial import Endpoint
from mutual_tls.identity import Identities
from mutual_tls.refusal import Refusal, SessionReason
from tests.support.bridge import write
from tls_bridge.refusal import BridgeReason
from tls_bridge.routes import Peer, Routes


def routes(directory: Path, *pairs: tuple[str, str]) -> Routes:
    return Routes(directory, Identities(lambda word, detail: None), lambda *line: None, pairs)


def peer(directory: Path, name: str, address: str = "192.0.2.1:443") -> None:
    write(directory / "peers" / name / "address", address)


def refused(directory: Path, host: str, port: int = 80) -> Refusal:
    with pytest.raises(Refusal) as caught:
        routes(directory).find(host, port)
    return caught.value


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("a.b.example.com", "exact"),
        ("c.b.example.com", "longest"),
        ("x.c.b.example.com", "longest"),
        ("b.example.com", "shorter"),
        ("c.example.com", "shorter"),
        ("web.rack1", "rack"),
        ("192.0.2.7", "address"),
        ("2001:db8::1", "address"),
    ],
)
def test_the_exact_name_first_and_then_the_longest_suffix(
    tmp_path: Path, host: str, expected: str
) -> None:
    for name, its_peer in {
        "a.b.example.com": "exact",
        "_.b.example.com": "longest",
        "_.example.com": "shorter",
        "_.rack1": "rack",
        "192.0.2.7": "address",
        "2001:db8::1": "address",
    }.items():
        write(tmp_path / "hosts" / name / "peer", its_peer)
        peer(tmp_path, its_peer)
    assert routes(tmp_path).find(host, 443).name == expected


@pytest.mark.parametrize("host", ["example.com", "192.0.2.8", "2001:db8::2", "com"])
def test_what_is_not_named_has_no_peer(tmp_path: Path, host: str) -> None:
    for name in "_.example.com", "_.0.2.8", "_.2.8":
        write(tmp_path / "hosts" / name / "peer", "p")
    peer(tmp_path, "p")
    assert refused(tmp_path, host).reason is BridgeReason.NO_ROUTE


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"hosts/a/peer": ""}, "hosts/a/peer"),
        ({"hosts/a/peer": "p q\nr"}, "hosts/a/peer"),
        ({"hosts/a/peer": "../../etc"}, "no name of a peer"),
        ({"hosts/a/peer": "absent"}, "peers/absent/address: it is absent"),
        ({"hosts/a/ports/80": "", "hosts/_.a/peer": "p"}, "hosts/a/peer: it is absent"),
        ({"hosts/a/peer": "p", "peers/p/address": "# none"}, "has no address"),
        ({"hosts/a/peer": "p", "peers/p/address": "host"}, "it is not HOST:PORT"),
        ({"hosts/a/peer": "p", "hosts/a/ports": "eighty"}, "'eighty' is no port"),
        ({"hosts/a/peer": "p", "peers/p/address": "b:1", "peers/p/servers": "a*"}, "servers"),
        ({"hosts/a/peer": "p", "peers/p/address": "b:1", "peers/p/server-name": "a\nb"}, "name"),
    ],
)
def test_what_can_not_be_read_is_refused(tmp_path: Path, files: dict[str, str], why: str) -> None:
    for path, text in files.items():
        write(tmp_path / path, text)
    refusal = refused(tmp_path, "a")
    assert refusal.reason is SessionReason.MISCONFIGURED
    assert why in str(refusal)


def test_a_peer(tmp_path: Path) -> None:
    write(tmp_path / "hosts/a/peer", "p  # the first rack")
    write(tmp_path / "peers/p/address", "one.example:1\n[2001:db8::1]:2\n")
    found = routes(tmp_path).find("a", 80)
    assert isinstance(found, Peer)
    assert found.addresses == [Endpoint("one.example", 1), Endpoint("2001:db8::1", 2)]
    assert (found.server_name, found.rules) == ("one.example", None)
    write(tmp_path / "peers/p/server-name", "peer.example")
    write(tmp_path / "peers/p/servers/cn:peer")
    found = routes(tmp_path).find("a", 80)
    assert found.server_name == "peer.example"
    assert found.rules is not None
    assert len(found.rules) == 1


def test_ports(tmp_path: Path) -> None:
    write(tmp_path / "hosts/a/peer", "p")
    peer(tmp_path, "p")
    assert routes(tmp_path).port("a") == 443
    write(tmp_path / "hosts/a/port", "8443")
    assert routes(tmp_path).port("a") == 8443
    write(tmp_path / "hosts/a/ports/8443")
    assert routes(tmp_path).find("a", 8443).name == "p"
    assert refused(tmp_path, "a", 443).reason is BridgeReason.PORT_NOT_ALLOWED


@pytest.mark.parametrize("host", ["x.service.com.evil", "evil-x.service.com", "service.com"])
def test_a_pattern_means_the_whole_name(tmp_path: Path, host: str) -> None:
    pairs = ("x[.]service[.]com", "192.0.2.1:443")
    assert routes(tmp_path, pairs).find("x.service.com", 80).name == "192.0.2.1:443"
    with pytest.raises(Refusal):
        routes(tmp_path, pairs).find(host, 80)


def test_a_file_of_patterns_that_changes_within_a_tick_of_the_clock(tmp_path: Path) -> None:
    """Of the same size, in the same place: nothing that stat(2) shows need have changed."""
    found = routes(tmp_path)
    for number in range(50):
        address = f"192.0.2.{number % 9}:443"
        write(tmp_path / "rules.d/10", f"x {address}")
        assert found.find("x", 80).name == address


def test_no_pattern_takes_long(tmp_path: Path) -> None:
    """With Python's own engine this one would take longer than anybody waits."""
    pairs = ("(([a-z]+)+[.])+x", "192.0.2.1:443")
    began = time.process_time()
    with pytest.raises(Refusal):
        routes(tmp_path, pairs).find(".".join(["a" * 50] * 4), 80)
    assert time.process_time() - began < 5


def test_a_pattern_that_takes_much_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        routes(tmp_path, ("((a{100}){100}){100}", "192.0.2.1:443"))
