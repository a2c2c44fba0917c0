"""The real thing: a kernel, resolvers, and a stranger, in network namespaces."""

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import pytest
import trio
from trio.testing import trio_test

from sniproxy.engine.loop import EventLoop
from tests.support import dns
from tests.support.daemon import PATIENCE
from tests.support.dns import AAAA, A, answering, asking, packet
from tests.support.network import Machine, Network, why_no_network
from tls_tproxy.names import Names, open_packet_socket

_why_not: Final = why_no_network(("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

CLIENT, RESOLVER = "10.9.1.2", "10.9.1.1"
CLIENT6, RESOLVER6 = "fd09::2", "fd09::1"
PLAYED: Final = "10.9.1.9"  # a server that a test plays
BEYOND: Final = "10.9.2.2"  # behind the router

ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q = 0x0800, 0x86DD, 0x8100

# What the resolver knows. Each test has names and addresses of its own.
RECORDS: Final = [
    *(f"--host-record=v{n}.example,192.0.2.{n},2001:db8::{n:x}" for n in range(1, 60)),
    "--host-record=brief.example,198.51.100.1,0",
    "--host-record=end.example,198.51.100.2",
    *("--cname=alias.example,middle.example", "--cname=middle.example,end.example"),
    "--host-record=libc.example,198.51.100.3,2001:db8:1::3",
]


def start_dnsmasq(stack: ExitStack, machine: Machine, *arguments: str) -> None:
    command = [
        *(*machine.under, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
        *("--no-resolv", "--no-hosts", "--pid-file", "--user=root", "--bind-interfaces"),
    ]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def ask(server: str, name: str, kind: int = A) -> bytes:
    """Ask as a stub resolver does, until it is answered; return the answer."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(1)
            client.connect((server, 53))
            try:
                client.send(asking(name, kind))
                return client.recv(4096)
            except OSError:
                time.sleep(0.01)  # it has not started yet
    raise AssertionError("nobody answers")


def open_server() -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.settimeout(PATIENCE)
    server.bind((PLAYED, 53))
    return server


class Place:
    """A client that is watched, a router that is also its resolver, and somebody beyond."""

    def __init__(self, stack: ExitStack) -> None:
        network = stack.enter_context(Network())
        self.client = network.machine(CLIENT)
        self.router = network.router
        self.beyond = network.machine(BEYOND)
        self.router.run("ip", "address", "add", f"{PLAYED}/24", "dev", "to1")
        for machine, cable, address in (
            (self.client, "cable", CLIENT6),
            (self.router, "to1", RESOLVER6),
        ):
            machine.run("ip", "address", "add", f"{address}/64", "dev", cable, "nodad")
        self.mac = bytes.fromhex(
            json.loads(self.client.run("ip", "-j", "link", "show", "cable"))[0]["address"].replace(
                ":", ""
            )
        )
        at_router = [f"--listen-address={each}" for each in (RESOLVER, RESOLVER6)]
        start_dnsmasq(stack, self.router, *at_router, *RECORDS)
        at_client = [f"--listen-address={each}" for each in ("127.0.0.1", "::1")]
        start_dnsmasq(
            stack,
            self.client,
            *at_client,
            f"--server={RESOLVER}",
            "--interface=lo",
            "--cache-size=0",
        )
        self._raw = stack.enter_context(
            self.router.do(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        )
        for server in RESOLVER, RESOLVER6, "127.0.0.1", "::1":
            self.client.do(ask, server, "v1.example")

    def throw(self, content: bytes, protocol: int = ETH_P_IP) -> None:
        """Send any packet whatever to the client, from the router."""
        self._raw.sendto(content, ("to1", protocol, 0, 0, self.mac))


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack)


def watch(machine: Machine, stack: ExitStack, *, accept_cname: bool = False) -> Names:
    names = Names(
        machine.do(open_packet_socket),
        accept_cname=lambda name: accept_cname,
        hosts="/dev/null/none",
    )
    stack.callback(names.close)
    return names


@pytest.fixture
def names(place: Place) -> Iterator[Names]:
    with ExitStack() as stack:
        yield watch(place.client, stack)


def of(names: Names, address: str) -> list[str]:
    return [str(name) for name in names.of(ip_address(address))]


SERVERS = [RESOLVER, RESOLVER6, "127.0.0.1", "::1"]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", [A, AAAA], ids=["A", "AAAA"])
def test_known_with_the_answer(place: Place, names: Names, server: str, kind: int) -> None:
    n = 2 + 2 * SERVERS.index(server) + (kind == A)
    address = f"192.0.2.{n}" if kind == A else f"2001:db8::{n:x}"
    assert of(names, address) == []
    answer = place.client.do(ask, server, f"v{n}.example", kind)
    assert ip_address(address).packed in answer
    # Without waiting: it is in the queue before the client has it.
    assert of(names, address) == [f"v{n}.example"]
    assert names.counts.lost == 0


@pytest.mark.parametrize("server", SERVERS)
def test_an_answer_over_loopback_is_learned_once(place: Place, names: Names, server: str) -> None:
    place.client.do(ask, server, "v20.example")
    assert of(names, "192.0.2.20") == ["v20.example"]
    # A resolver of this machine asks another one: two exchanges, of the same name.
    assert names.counts.learned == (2 if server in {"127.0.0.1", "::1"} else 1)


def test_a_ttl_of_zero(place: Place, names: Names) -> None:
    answer = place.client.do(ask, RESOLVER, "brief.example")
    assert dns.record(dns.pointer(12), A, "198.51.100.1", 0) in answer
    assert of(names, "198.51.100.1") == ["brief.example"]


@pytest.mark.parametrize("accept_cname", [False, True])
def test_a_chain(place: Place, accept_cname: bool) -> None:
    with ExitStack() as stack:
        names = watch(place.client, stack, accept_cname=accept_cname)
        answer = place.client.do(ask, RESOLVER, "ALIAS.example")
        assert answer[7] == 3, "three records"
        aliases = ["middle.example", "end.example"] if accept_cname else []
        assert of(names, "198.51.100.2") == ["alias.example", *aliases]


def test_a_name_that_is_not_there(place: Place, names: Names) -> None:
    place.client.do(ask, RESOLVER, "nowhere.example")
    assert of(names, RESOLVER) == []
    assert (names.counts.questions, names.counts.learned) == (1, 0)


@pytest.mark.parametrize("server", SERVERS)
def test_getaddrinfo(place: Place, names: Names, server: str, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(f"nameserver {server}\n")
    script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {sys.executable} -c "
    script += "'import socket; print(socket.getaddrinfo(\"libc.example\", 443))'"
    said = place.client.run("unshare", "--mount", "sh", "-c", script)
    for address in "198.51.100.3", "2001:db8:1::3":
        assert address in said
        assert of(names, address) == ["libc.example"]


@trio_test
async def test_in_the_loop(place: Place) -> None:
    faults: list[Exception] = []
    loop = EventLoop(faults.append)
    with ExitStack() as stack:
        names = watch(place.client, stack)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            names.start(loop)
            await trio.to_thread.run_sync(place.client.do, ask, RESOLVER, "v21.example")
            with trio.fail_after(PATIENCE):
                while not names.counts.learned:  # noqa: ASYNC110 - nothing announces it
                    await trio.sleep(0.001)
            assert of(names, "192.0.2.21") == ["v21.example"]
            nursery.cancel_scope.cancel()
        loop.shut()
    assert faults == []


# --- forged


def exchange(place: Place, answers: Callable[[socket.socket, tuple[str, int]], object]) -> int:
    """Ask a server that the test plays; return the port that was asked from.

    Args:
        answers: called with the server's socket, and where the question came from.
    """
    with place.client.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.connect((PLAYED, 53))
        with place.router.do(open_server) as server:
            client.send(asking("v30.example"))
            _, where = server.recvfrom(4096)
            answers(server, where)
            server.sendto(answering("v30.example", "192.0.2.30"), where)
            # The genuine one: what came before it has been seen, too.
            while client.recv(4096) != answering("v30.example", "192.0.2.30"):
                pass
        port: int = where[1]
        return port


EVIL: Final = "203.0.113.66"


def test_answers_that_are_forged_by_the_server_s_neighbours(place: Place, names: Names) -> None:
    def forge(server: socket.socket, where: tuple[str, int]) -> None:
        server.sendto(answering("v30.example", EVIL, number=dns.ID ^ 1), where)
        server.sendto(answering("bank.example", EVIL), where)
        server.sendto(answering("v30.example", "fd00::66", kind=AAAA), where)
        server.sendto(asking("v30.example"), where)
        client, port = where
        good = answering("v30.example", EVIL)
        place.throw(packet(PLAYED, 53, client, port ^ 1, good))
        place.throw(packet(PLAYED, 54, client, port, good))
        place.throw(packet(RESOLVER, 53, client, port, good))
        place.throw(packet(PLAYED, 53, RESOLVER, port, good))
        place.throw(packet(PLAYED, 53, client, port, good)[:-1])
        whole = packet(PLAYED, 53, client, port, good)
        place.throw(whole[:6] + b"\x20" + whole[7:])
        place.throw(whole[:9] + b"\x06" + whole[10:])
        # With a VLAN tag, of a VLAN that is not here.
        place.throw(struct.pack("!HH", 5, ETH_P_IP) + whole, ETH_P_8021Q)

    exchange(place, forge)
    assert of(names, EVIL) == []
    assert of(names, "fd00::66") == []
    assert of(names, "192.0.2.30") == ["v30.example"]
    # The other port of the server, the fragment, TCP and the tag stop at the filter; another one is
    # not whole.
    counts = names.counts
    assert (counts.questions, counts.answers, counts.unasked) == (1, 1, 7)
    assert counts.packets == 1 + 1 + 7 + 1


def test_a_forged_answer_of_which_everything_is_right(place: Place, names: Names) -> None:
    exchange(
        place,
        lambda _, where: place.throw(
            packet(PLAYED, 53, where[0], where[1], answering("v30.example", EVIL))
        ),
    )
    # So it is for the client. It is a name that was asked for, and the certificate decides.
    assert of(names, EVIL) == ["v30.example"]
    assert of(names, "192.0.2.30") == []


def test_an_ipv6_extension_header(place: Place, names: Names) -> None:
    whole = packet(RESOLVER6, 53, CLIENT6, 4000, answering("v31.example", EVIL))
    options = struct.pack("!BB6x", socket.IPPROTO_UDP, 0)
    place.throw(
        whole[:4]
        + struct.pack("!HBB", len(whole) - 40 + 8, socket.IPPROTO_DSTOPTS, 64)
        + whole[8:40]
        + options
        + whole[40:],
        ETH_P_IPV6,
    )
    place.throw(whole, ETH_P_IPV6)
    place.client.do(ask, RESOLVER6, "v31.example")
    assert of(names, EVIL) == []
    assert (names.counts.packets, names.counts.unasked) == (3, 1)


def test_a_stranger_plants_nothing(place: Place, names: Names) -> None:
    asked, answered = asking("bank.example"), answering("bank.example", EVIL)
    place.throw(packet(CLIENT, 4000, RESOLVER, 53, asked))
    place.throw(packet(RESOLVER, 53, CLIENT, 4000, answered))
    place.throw(packet(RESOLVER, 4000, CLIENT, 53, asked))
    place.throw(packet(RESOLVER, 53, CLIENT, 4000, answered))
    # As if over loopback.
    place.throw(packet("127.0.0.1", 4000, "127.0.0.1", 53, asked))
    place.throw(packet("127.0.0.1", 53, "127.0.0.1", 4000, answered))
    place.client.do(ask, RESOLVER, "v32.example")
    assert of(names, "192.0.2.32") == ["v32.example"]
    assert of(names, EVIL) == []
    assert (names.counts.questions, names.counts.learned) == (1, 1)


@pytest.mark.parametrize("masquerade", [False, True])
def test_a_router_learns_nothing_of_others(
    place: Place,
    masquerade: bool,
) -> None:
    if masquerade and shutil.which("nft") is None:
        pytest.skip("nft is not installed (Debian package nftables)")
    with ExitStack() as stack:
        if masquerade:
            rule = "type nat hook postrouting priority srcnat\n oifname to2 masquerade"
            place.router.run(
                "nft", "-f", "-", stdin=f"table ip nat {{\n chain p {{\n {rule}\n }}\n }}\n"
            )
            stack.callback(place.router.run, "nft", "delete", "table", "ip", "nat")
        start_dnsmasq(stack, place.beyond, f"--listen-address={BEYOND}", *RECORDS)
        names = watch(place.router, stack)
        place.client.do(ask, BEYOND, "v33.example")
        assert of(names, "192.0.2.33") == []
        assert names.counts.questions == 0
        # What it asks itself, it learns.
        place.router.do(ask, BEYOND, "v34.example")
        assert of(names, "192.0.2.34") == ["v34.example"]


# --- the socket


def test_what_does_not_fit_the_queue_is_counted(place: Place) -> None:
    with ExitStack() as stack:
        sock = place.client.do(open_packet_socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the least that there is
        names = Names(sock, hosts="/dev/null/none")
        stack.callback(names.close)
        for _ in range(50):
            place.client.do(ask, RESOLVER, "v35.example")
        assert of(names, CLIENT) == []
        counts = names.counts
        assert counts.lost > 0
        assert counts.packets + counts.lost == 100
        place.client.do(ask, RESOLVER, "v36.example")
        assert of(names, "192.0.2.36") == ["v36.example"]


def test_how_much_may_wait(place: Place) -> None:
    with place.client.do(open_packet_socket) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 4 * 1024 * 1024
        # Nobody can take the filter away.
        with pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, 27, 0)


WITHOUT_ADMIN: Final = """
import socket
from tls_tproxy.names import open_packet_socket
with open_packet_socket() as sock:
    print(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
"""


def test_net_raw_is_enough() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed (Debian package util-linux)")
    under = ["setpriv", "--inh-caps=-net_admin", "--bounding-set=-net_admin"]
    done = subprocess.run(
        [*under, sys.executable, "-c", WITHOUT_ADMIN], capture_output=True, text=True, check=True
    )
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert int(done.stdout) == min(2 * most, 2 * 4 * 1024 * 1024)


def test_a_socket_that_cannot_be_bound_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str, fd: int, *__: object) -> int:
        seen.append(fd)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    seen: list[int] = []
    monkeypatch.setattr("sniproxy.service.libc.call", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        open_packet_socket()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


def test_no_privilege() -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            open_packet_socket()
    finally:
        os.seteuid(0)
