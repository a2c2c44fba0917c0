"""What is learned from which packets; and the façade. The kernel's part is played here."""

import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import cast

import pytest

from sniproxy.engine.loop import EventLoop
from tests.support import dns
from tests.support.dns import CLIENT, CNAME, PORT, SERVER, A, answering, asking, packet
from tls_tproxy.names import Names
from tls_tproxy.names.cache import Cache
from tls_tproxy.names.watch import Watch

WWW = "www.example"
HERE = "192.0.2.1"

ETHERNET, LOOPBACK = 1, 772  # linux/if_arp.h

OUT = socket.PACKET_OUTGOING
IN = socket.PACKET_HOST
NOT_FOR_US = [socket.PACKET_OTHERHOST, socket.PACKET_BROADCAST, socket.PACKET_MULTICAST]

QUESTION = packet(CLIENT, PORT, SERVER, 53, asking(WWW))
ANSWER = packet(SERVER, 53, CLIENT, PORT, answering(WWW, HERE))

# A packet, what the kernel calls it, and the sort of its interface.
Seen = tuple[bytes, int, int]


class PacketSocket:
    """What `open_packet_socket` returns, as far as it is used."""

    def __init__(self) -> None:
        self.queue: list[Seen | OSError] = []
        self.lost = 0
        self.fd = 3

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int, int, int, bytes]]:
        if not self.queue:
            raise BlockingIOError
        seen = self.queue.pop(0)
        if isinstance(seen, OSError):
            raise seen
        content, kind, hardware = seen
        return content[:size], ("eth0", 0x0800, kind, hardware, b"")

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (263, 6, 8)
        lost, self.lost = self.lost, 0
        return struct.pack("@II", 9, lost)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        self.fd = -1


class It:
    """A watch and its cache."""

    def __init__(self, *, accept_cname: bool = False) -> None:
        self.socket = PacketSocket()
        self.cache = Cache()
        self.watch = Watch(
            cast(socket.socket, self.socket), self.cache, accept_cname=lambda name: accept_cname
        )

    def see(self, *seen: Seen) -> list[str]:
        """Read these packets; return the names of one address."""
        self.socket.queue += seen
        self.watch.read_now()
        return self.names(HERE)

    def names(self, address: str) -> list[str]:
        return self.cache.names(ip_address(address).packed)


@pytest.fixture
def it() -> It:
    return It()


def ethernet(*packets: tuple[bytes, int]) -> Iterable[Seen]:
    return [(content, kind, ETHERNET) for content, kind in packets]


def test_asked_and_answered(it: It) -> None:
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, IN))) == [WWW]
    counts = it.watch.counts
    assert (counts.packets, counts.questions, counts.answers, counts.learned) == (2, 1, 1, 1)


def test_over_ipv6(it: It) -> None:
    question = packet("fd00::1", PORT, "fd00::2", 53, asking(WWW))
    answer = packet("fd00::2", 53, "fd00::1", PORT, answering(WWW, HERE))
    assert it.see(*ethernet((question, OUT), (answer, IN))) == [WWW]


def test_over_loopback_everything_is_seen_twice(it: It) -> None:
    copies = [(each, kind, LOOPBACK) for each in (QUESTION, ANSWER) for kind in (OUT, IN)]
    assert it.see(*copies) == [WWW]
    assert it.watch.counts.learned == 1
    assert it.watch.counts.unasked == 0


def test_both_from_port_53(it: It) -> None:
    question = packet(CLIENT, 53, SERVER, 53, asking(WWW))
    answer = packet(SERVER, 53, CLIENT, 53, answering(WWW, HERE))
    assert it.see(*ethernet((question, OUT), (answer, IN))) == [WWW]


def test_a_question_to_another_port(it: It) -> None:
    other = packet(CLIENT, PORT, SERVER, 54, asking(WWW))
    assert it.see(*ethernet((other, OUT), (ANSWER, IN))) == []


def test_an_answer_twice_is_learned_once(it: It) -> None:
    it.see(*ethernet((QUESTION, OUT), (ANSWER, IN), (ANSWER, IN)))
    assert it.watch.counts.learned == 1
    assert it.watch.counts.unasked == 1


@pytest.mark.parametrize("kind", [IN, *NOT_FOR_US])
def test_a_stranger_plants_a_question(it: It, kind: int) -> None:
    assert it.see(*ethernet((QUESTION, kind), (ANSWER, IN))) == []


@pytest.mark.parametrize("kind", [OUT, *NOT_FOR_US])
def test_an_answer_that_is_not_for_us(it: It, kind: int) -> None:
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, kind))) == []


def test_an_answer_on_another_way(it: It) -> None:
    # A stranger's packet with our own address as its source: the kernel shows it, then drops it.
    assert it.see((QUESTION, OUT, LOOPBACK), (ANSWER, IN, ETHERNET)) == []
    assert it.see((ANSWER, IN, LOOPBACK)) == [WWW]
    it = It()
    assert it.see((QUESTION, OUT, ETHERNET), (ANSWER, IN, LOOPBACK)) == []


@pytest.mark.parametrize("kind", [IN, *NOT_FOR_US])
def test_what_is_passed_on_is_not_ours(it: It, kind: int) -> None:
    inside = packet("10.7.7.7", PORT, SERVER, 53, asking(WWW))
    assert it.see(*ethernet((inside, kind), (QUESTION, OUT), (ANSWER, IN))) == []


FORGED = {
    "another id": packet(SERVER, 53, CLIENT, PORT, answering(WWW, HERE, number=dns.ID ^ 1)),
    "another name": packet(SERVER, 53, CLIENT, PORT, answering("wwv.example", HERE)),
    "another server": packet("10.0.0.3", 53, CLIENT, PORT, answering(WWW, HERE)),
    "another port of the server": packet(SERVER, 54, CLIENT, PORT, answering(WWW, HERE)),
    "another client": packet(SERVER, 53, "10.0.0.3", PORT, answering(WWW, HERE)),
    "another port of the client": packet(SERVER, 53, CLIENT, PORT + 1, answering(WWW, HERE)),
    "another type": packet(SERVER, 53, CLIENT, PORT, answering(WWW, "fd00::1", kind=dns.AAAA)),
    "over IPv6": packet("::10.0.0.2", 53, "::10.0.0.1", PORT, answering(WWW, HERE)),
    "a fragment": ANSWER[:6] + b"\x20" + ANSWER[7:],
    "not whole": ANSWER[:-1],
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_answer(it: It, forged: bytes) -> None:
    assert it.see(*ethernet((QUESTION, OUT), (forged, IN))) == []
    assert it.see(*ethernet((ANSWER, IN))) == [WWW]


def test_a_forged_answer_that_matches_counts(it: It) -> None:
    # Nobody can tell: neither the client nor we. The certificate has to be valid all the same.
    forged = packet(SERVER, 53, CLIENT, PORT, answering(WWW, "192.0.2.66"))
    assert it.see(*ethernet((QUESTION, OUT), (forged, IN), (ANSWER, IN))) == []
    assert it.names("192.0.2.66") == [WWW]


def test_an_answer_that_says_nothing(it: It) -> None:
    broken = packet(SERVER, 53, CLIENT, PORT, answering(WWW, HERE) + b"\0")
    assert it.see(*ethernet((QUESTION, OUT), (broken, IN))) == []
    assert (it.watch.counts.answers, it.watch.counts.learned) == (1, 0)


RECORDS = [
    dns.record(WWW, CNAME, "a.example"),
    dns.record("a.example", CNAME, "_b.example"),
    dns.record("_b.example", CNAME, "c.example"),
    dns.record("c.example", A, HERE),
    dns.record("a.example", A, "192.0.2.2"),
    dns.record(WWW, A, "192.0.2.3"),
]
CHAIN = packet(SERVER, 53, CLIENT, PORT, dns.message([dns.question(WWW)], RECORDS))


def test_aliases_are_no_names(it: It) -> None:
    assert it.see(*ethernet((QUESTION, OUT), (CHAIN, IN))) == [WWW]


def test_aliases_are_names_if_they_are_to_be() -> None:
    it = It(accept_cname=True)
    assert it.see(*ethernet((QUESTION, OUT), (CHAIN, IN))) == [WWW, "a.example", "c.example"]
    assert it.names("192.0.2.2") == [WWW, "a.example"]
    assert it.names("192.0.2.3") == [WWW]


def test_a_turn_of_the_loop_reads_a_part(it: It) -> None:
    it.socket.queue += [(QUESTION, OUT, ETHERNET)] * 1000
    it.watch.on_event(1)
    assert it.watch.counts.packets == 64
    it.watch.read_now()
    assert it.watch.counts.packets == 64 + 512


def test_an_error_of_an_interface(it: It) -> None:
    it.socket.queue += [OSError(100, "Network is down")]
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, IN))) == []
    assert it.watch.counts.errors == 1
    assert it.see() == [WWW]


def test_the_lost_ones_add_up(it: It) -> None:
    it.socket.lost = 3
    assert it.watch.counts.lost == 3
    it.socket.lost = 4
    assert it.watch.counts.lost == 7


def test_after_a_loss_nothing_that_was_asked_counts(it: It) -> None:
    # What was lost may have been a question that came in, and is now seen as one that leaves.
    it.socket.lost = 1
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, IN))) == []
    assert (it.watch.counts.answers, it.watch.counts.lost) == (1, 1)
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, IN))) == [WWW]


def test_after_a_loss_nothing_in_the_queue_counts(it: It) -> None:
    it.socket.queue += ethernet((QUESTION, OUT), (ANSWER, IN))
    it.socket.lost = 1
    assert it.watch.counts.lost == 1
    assert it.see() == []
    assert (it.watch.counts.questions, it.watch.counts.unasked) == (0, 1)
    assert it.see(*ethernet((QUESTION, OUT), (ANSWER, IN))) == [WWW]


def test_a_loss_while_a_question_waits(it: It) -> None:
    it.see(*ethernet((QUESTION, OUT)))
    it.socket.lost = 1
    assert it.watch.counts.lost == 1
    assert it.see(*ethernet((ANSWER, IN))) == []


def test_closed(it: It) -> None:
    it.socket.queue += ethernet((QUESTION, OUT), (ANSWER, IN))
    it.watch.close()
    it.watch.read_now()
    assert not it.watch.is_open
    assert it.names(HERE) == []
    assert it.watch.counts.packets == 0


def test_closed_in_the_loop() -> None:
    ours, other = socket.socketpair()
    loop = EventLoop(lambda error: None)
    watch = Watch(ours, Cache())
    with other:
        watch.start(loop)
        assert loop.watcher(ours.fileno()) is watch
        watch.abort()
        loop.shut()
    assert not watch.is_open


# --- the façade


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


def test_dns_first_and_then_the_hosts_file(hosts: Path) -> None:
    packets = PacketSocket()
    names = Names(cast(socket.socket, packets), hosts=hosts)
    assert names.of(ip_address(HERE)) == []
    hosts.write_text(f"{HERE} local.example {WWW}\nfd00::1 six.example\n")
    assert names.of(ip_address(HERE)) == ["local.example", WWW]
    packets.queue += ethernet((QUESTION, OUT), (ANSWER, IN))
    assert names.of(ip_address(HERE)) == [WWW, "local.example"]
    assert names.of(ip_address(f"::ffff:{HERE}")) == [WWW, "local.example"]
    assert names.of(ip_address("fd00::1")) == ["six.example"]
    assert names.counts.learned == 1
    names.close()
    assert names.of(ip_address(HERE)) == [WWW, "local.example"]


def test_trouble_with_the_hosts_file_is_told(hosts: Path) -> None:
    names = Names(cast(socket.socket, PacketSocket()), hosts=hosts)
    assert names.of(ip_address(HERE)) == []
    assert names.hosts_trouble is None
    hosts.mkdir()
    assert names.of(ip_address(HERE)) == []
    trouble = names.hosts_trouble
    assert trouble == f"unable to read {hosts}: it is not a regular file"
