"""What can go wrong between pods, and how much they can take at once."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from sniproxy.engine.tcp import LINGER_0
from tests.support.daemon import PATIENCE, eventually
from tests.support.network import why_no_network
from tests.support.pods import (
    Pod,
    Pods,
    Running,
    ask,
    client_context,
    receive_all,
    running,
    say_it_back,
    serving,
    show,
)

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

MEBIBYTE: Final = 1 << 20

# What the manual says that --chroot takes.
WITH_PROC: Final = (
    *("unshare", "--mount", "sh", "-c"),
    *('mkdir proc && mount --bind /proc proc && exec "$@"', "sh"),
)


class Joined:
    """A client and a program, connected through both pods."""

    def __init__(self, here: Running, there: Running, port: int) -> None:
        with there.pod.listen(port) as listening:
            self.client = here.pod.connect(there.pod, port)
            self.program, _ = listening.accept()
        for sock in self.client, self.program:
            sock.settimeout(PATIENCE)

    def __enter__(self) -> tuple[socket.socket, socket.socket]:
        return self.client, self.program

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.program.close()


@pytest.mark.parametrize("first", ["client", "program"])
def test_a_half_close_and_a_late_megabyte(here: Running, there: Running, first: str) -> None:
    data = bytes(range(256)) * (MEBIBYTE // 256)
    with Joined(here, there, 8100) as (client, program):
        one, other = (client, program) if first == "client" else (program, client)
        one.sendall(b"that is all")
        one.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b"that is all"

        def send() -> None:
            other.sendall(data)
            other.close()

        sender = threading.Thread(target=send)
        sender.start()
        assert receive_all(one) == data
        sender.join()


@pytest.mark.parametrize("first", ["client", "program"])
def test_a_reset_becomes_a_reset(here: Running, there: Running, first: str) -> None:
    with Joined(here, there, 8101) as (client, program):
        one, other = (client, program) if first == "client" else (program, client)
        one.sendall(b"half of")
        assert other.recv(100) == b"half of"
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        one.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_truncated_stream_is_a_reset_for_the_program(
    there: Running, outsider: Pod, tmp_path: Path
) -> None:
    """A client of TLS that ends its connection without a close_notify."""
    context = client_context(outsider, tmp_path)
    with there.pod.listen(8102) as listening:
        plain = outsider.connect(there.pod, 8102)
        client = context.wrap_socket(plain, server_hostname=there.pod.address)
        with listening.accept()[0] as program:
            program.settimeout(PATIENCE)
            client.sendall(b"half of")
            assert program.recv(100) == b"half of"
            client.shutdown(socket.SHUT_WR)  # of TCP alone
            with pytest.raises(ConnectionResetError):
                program.recv(1)
        client.close()
    there.line("connection", "ending=truncated")


def test_forty_megabytes_both_ways_at_once(here: Running, there: Running) -> None:
    data = bytes(range(256)) * (40 * MEBIBYTE // 256)
    digests: dict[str, str] = {}

    def receive(name: str, sock: socket.socket) -> None:
        digest = sha256()
        while piece := sock.recv(1 << 18):
            digest.update(piece)
        digests[name] = digest.hexdigest()

    def send(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    with Joined(here, there, 8103) as (client, program):
        threads = [
            threading.Thread(target=receive, args=("client", client)),
            threading.Thread(target=receive, args=("program", program)),
            threading.Thread(target=send, args=(client,)),
            threading.Thread(target=send, args=(program,)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(6 * PATIENCE)
    whole = sha256(data).hexdigest()
    assert digests == {"client": whole, "program": whole}


def test_500_connections_at_once_to_three_pods(pods: Pods, tmp_path: Path, here: Running) -> None:
    """All are open at the same time, and each gets its own bytes back, and no others."""
    with ExitStack() as stack:
        targets = []
        for number in range(3):
            there = stack.enter_context(running(pods.pod(), tmp_path / str(number)))
            stack.enter_context(serving(there.pod, 8104, say_it_back))
            targets.append(there)
        everybody_is_there = threading.Barrier(500)
        # A socket is of the namespace of the thread that makes it.
        sockets = here.pod.machine.do(lambda: [socket.socket() for _ in range(500)])

        def talk(number: int) -> bool:
            said = f"this is {number}".encode()
            pod = targets[number % 3].pod
            with sockets[number] as client:
                client.settimeout(3 * PATIENCE)
                client.connect((pod.address, 8104))
                client.sendall(said)
                heard = client.recv(100)
                everybody_is_there.wait(3 * PATIENCE)
                client.shutdown(socket.SHUT_WR)
                return heard == said and not client.recv(1)

        with ThreadPoolExecutor(500) as threads:
            assert all(threads.map(talk, range(500)))
        for there in targets:
            eventually(
                lambda there=there: (
                    sum("direction=in" in line for line in there.daemon.log())  # type: ignore[misc]
                    >= 166
                )
            )
            assert not any("refused" in line for line in there.daemon.log())


def test_several_processes_serve(pods: Pods, tmp_path: Path) -> None:
    with (
        running(pods.pod(), tmp_path / "one", "--workers=2") as here,
        running(pods.pod(), tmp_path / "other", "--workers=2") as there,
        there.pod.listen(8105) as listening,
    ):
        for _ in range(20):
            seen = ask(here.pod.connect(there.pod, 8105), listening)
            assert seen[0] == here.pod.address
        there.change("pod/ingress/8105/mode", "plain")
        assert not any("bug" in line for line in here.daemon.log())


def test_in_a_root_directory_of_its_own_and_as_nobody(pods: Pods, tmp_path: Path) -> None:
    place = tmp_path / "one"
    one, other = pods.pod(), pods.pod()
    one.issue(place / "pod/identity")
    (place / "pod/identity/tls.key").chmod(0o644)
    for each in (place, *place.parents):
        if each != Path("/") and each.owner() == "root":
            each.chmod(each.stat().st_mode | 0o011)
    options = "--chroot", "--user=nobody"
    with (
        one.start(place, *options, under=WITH_PROC, measured=False) as daemon,
        running(other, tmp_path / "other") as there,
    ):
        with there.pod.listen(8106) as listening:
            assert ask(one.connect(other, 8106), listening)[0] == one.address
        with one.listen(8107) as listening:
            assert ask(other.connect(one, 8107), listening)[0] == other.address
        # What it has of root's rights: to set marks, and to take addresses.
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert "CapEff:\t0000000000002000\n" in status  # CAP_NET_RAW, linux/capability.h


def test_no_descriptors_are_left(pods: Pods, tmp_path: Path, there: Running) -> None:
    """Who is served goes on, and there is room again when somebody leaves."""
    limit = ("prlimit", "--nofile=60")
    with there.pod.listen(8108) as listening:
        place = tmp_path / "few"
        place.mkdir()
        pod = pods.pod()
        with pod.start(place, under=limit) as daemon, ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(pod.connect(there.pod, 8108))
            daemon.wait_for_log("listening")
            stack.close()
            ask_again(pod, there, listening)


def ask_again(pod: Pod, there: Running, listening: socket.socket) -> None:
    """Connect after those who have left, whose connections are still to be accepted."""
    client = pod.connect(there.pod, 8108)
    with client:
        client.settimeout(PATIENCE)
        client.sendall(b"me")
        while True:
            with listening.accept()[0] as program:
                program.settimeout(PATIENCE)
                if program.recv(100) == b"me":
                    program.sendall(b"you")
                    assert client.recv(100) == b"you"
                    return


def test_who_is_silent_gives_way(pods: Pods, tmp_path: Path, outsider: Pod) -> None:
    """Clients who connect to the pod, and do not say a byte, keep nobody else out."""
    pod = pods.pod()
    with (
        running(pod, tmp_path / "pod", "--max-connections=10") as there,
        pod.listen(8109) as listening,
        ExitStack() as stack,
    ):
        for _ in range(30):
            stack.enter_context(outsider.connect(pod, 8109))
        context = client_context(outsider, tmp_path / "client")
        plain = outsider.connect(pod, 8109)
        with (
            context.wrap_socket(plain, server_hostname=pod.address) as client,
            listening.accept()[0] as program,
        ):
            client.sendall(b"hello")
            assert program.recv(100) == b"hello"
        there.line("refused", "reason=capacity", f"destination={show(pod, 8109)}")
