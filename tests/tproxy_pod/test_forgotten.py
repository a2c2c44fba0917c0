"""Half-closed connections in which nothing is said for longer than the kernel remembers them."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write
from tests.support.daemon import PATIENCE, eventually
from tests.support.network import why_no_network
from tests.support.pods import Pod, Pods, running

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

# Seconds that the kernel remembers them by itself in these pods, its shortest; and a silence.
FORGETS: Final = 1
SILENCE: Final = 1.5


@pytest.fixture
def forgetful(pods: Pods) -> tuple[Pod, Pod]:
    """Two pods that forget half-closed connections soon."""
    both = pods.pod(), pods.pod()
    for pod in both:
        for state in "close_wait", "fin_wait":
            path = f"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}"
            pod.machine.run("sh", "-c", f"echo {FORGETS} >{path}")
    return both


@contextmanager
def wire(pod: Pod) -> Iterator[socket.socket]:
    """Hear what comes and leaves."""
    arguments = socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)  # ETH_P_ALL
    with pod.machine.do(socket.socket, *arguments) as heard:
        heard.bind(("cable", 0))
        heard.setblocking(False)
        yield heard


def has_passed(wire: socket.socket, data: bytes) -> bool:
    passed = False
    while True:
        try:
            passed |= data in wire.recv(1 << 16)
        except BlockingIOError:
            return passed


def answer_late(client: socket.socket, listening: socket.socket, *, client_ends: bool) -> None:
    """Have one side end, and the other one speak after a silence."""
    with listening.accept()[0] as server, client:
        one, other = (client, server) if client_ends else (server, client)
        one.settimeout(PATIENCE)
        other.settimeout(PATIENCE)
        client.sendall(b"a question")
        assert server.recv(100) == b"a question"
        one.shutdown(socket.SHUT_WR)
        assert other.recv(100) == b""
        time.sleep(SILENCE)
        other.sendall(b"a late answer")
        assert one.recv(100) == b"a late answer"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("client_ends", [True, False], ids=["client", "program"])
@pytest.mark.parametrize("prefixes", [["0.0.0.0_0", "::_0"], ["192.0.2.0_24"]])
def test_a_late_answer_is_encrypted_and_arrives(
    forgetful: tuple[Pod, Pod], tmp_path: Path, version: int, client_ends: bool, prefixes: list[str]
) -> None:
    """Whether connections from the server's pod to that of the client are taken or not."""
    here, there = forgetful
    for prefix in prefixes:
        write(tmp_path / "there/pod/egress" / prefix, "mtls\n")
    with (
        running(here, tmp_path / "here"),
        running(there, tmp_path / "there"),
        wire(here) as heard,
        there.listen(8080, version=version) as listening,
    ):
        client = here.connect(there, 8080, version=version)
        answer_late(client, listening, client_ends=client_ends)
        assert not has_passed(heard, b"a late answer")


@pytest.mark.parametrize("version", [4, 6])
def test_a_late_answer_from_an_address_that_is_left_alone_arrives(
    forgetful: tuple[Pod, Pod], pods: Pods, tmp_path: Path, version: int
) -> None:
    here = forgetful[0]
    with running(here, tmp_path), pods.router.listen(8080, version=version) as listening:
        client = here.connect(pods.router, 8080, version=version)
        answer_late(client, listening, client_ends=True)


def test_what_is_of_no_connection_does_not_leave(pods: Pods, tmp_path: Path) -> None:
    """A packet that connection tracking makes nothing of: SYN and FIN at once, with data."""
    here, outsider = pods.pod(), pods.pod()
    raw = here.machine.do(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    segment = struct.pack("!HHIIBBHHH", 5000, 8080, 1, 0, 5 << 4, 0x03, 1024, 0, 0) + b"a secret"
    with raw, wire(outsider) as heard:
        raw.sendto(segment, (outsider.address, 0))
        eventually(lambda: has_passed(heard, b"a secret"))
        with running(here, tmp_path):
            raw.sendto(segment, (outsider.address, 0))
            time.sleep(0.2)  # nothing tells that it has not come
            assert not has_passed(heard, b"a secret")
