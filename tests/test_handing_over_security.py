"""docs/handing-over-security.md: a test behind each of its sentences."""

import contextlib
import ctypes
import errno
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from sniproxy.hand_over import HandOver
from sniproxy.service import libc, sandbox
from tests.support import sentences
from tests.support.backends import RawBackend, host_directory, listen_unix
from tests.support.daemon import PATIENCE, Daemon, eventually, unmeasured
from tests.support.handed import (
    IP_FREEBIND,
    IP_TRANSPARENT,
    NOBODY,
    SO_DETACH_FILTER,
    SO_LOCK_FILTER,
    SO_MARK,
    SO_RCVBUFFORCE,
    TCP_REPAIR,
    WITHOUT_RIGHT,
    Backend,
    Right,
    filter_takes_a_right,
)
from tests.support.hellos import hello_bytes
from tests.support.network import Machine, why_no_network

_why_not: Final = why_no_network(("nft", "nftables"))
needs_network: Final = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs/handing-over-security.md"

NAME: Final = "a.example"
LOOPBACK: Final = "127.0.0.1"
EVERYWHERE: Final = "::"
# Where the daemon's clients arrive: no address of a machine on which the tests run.
ADDRESS: Final = "198.51.100.7"
PORT: Final = 443
# That of a daemon that stays for several tests: most of their time is its start.
STEADY: Final = 442
# Ports that anybody may have: one for the daemon, and one for others.
HIGH, FREE = 8443, 8081
# The user that the daemon becomes. Nobody else's descriptors are on their way as this one's.
USER: Final = 64207
# A moment for what must not come, in seconds.
MOMENT: Final = 0.2

SYN, SYN_ACK = 0x02, 0x12

# Which tests are behind a sentence: FILE::TEST, the file below tests/; without one it is this file.
TESTS: Final = {
    # Who gets what.
    "Without `--handoff` nobody is handed anything.": ["test_without_the_option"],
    "Only a listener that may serve the host is handed a connection.": [
        "test_a_listener_of_somebody_else_s"
    ],
    "It is handed this one connection, and no other descriptor.": ["test_what_comes"],
    "The daemon neither sees nor ends it from then on.": [
        "test_the_connection_outlives_the_daemon"
    ],
    # The guard.
    "Newer kernels want CAP_NET_ADMIN for the filter.": [
        "test_whether_there_is_a_guard",
        "test_whose_right_counts",
        "service/test_systemd.py::test_clients_are_handed_over",
    ],
    "The daemon keeps nothing of that right.": [
        "test_nothing_is_left_of_the_right",
        "service/test_systemd.py::test_clients_are_handed_over",
    ],
    "Without the guard a backend can connect elsewhere there, and is answered.": [
        "test_without_the_guard_it_connects_elsewhere"
    ],
    "Without the guard it can listen there, and others get in.": [
        "test_without_the_guard_it_listens"
    ],
    "Where the right has gone, a client who came before the filter is not handed over.": [
        "test_who_came_before_the_filter"
    ],
    # What else a socket is.
    "A socket that is handed over is still in the network where the listening socket was made.": [
        "test_the_network_is_that_of_the_listening_socket"
    ],
    "The backend's own sandbox does not see that it has a connection.": [
        "test_the_backend_s_sandbox_does_not_see_it",
        "test_the_filter_of_the_backend_s_control_group_does_not_see_it",
    ],
    "It can free the socket and have it connect elsewhere there, but nobody's answer gets in.": [
        "test_without_our_filter_it_connects_elsewhere",
        "test_with_our_filter_no_answer_gets_in",
    ],
    "It can have it listen there, on a port of the kernel's choice, but nobody gets in.": [
        "test_without_our_filter_it_listens",
        "test_with_our_filter_nobody_gets_in",
    ],
    "The filter can't be removed, by root either.": ["test_the_filter_can_t_be_removed"],
    "What a first packet carries gets out.": ["test_a_first_packet_gets_out"],
    "What comes by ICMP gets in.": ["test_icmp_gets_in"],
    "Landlock in the backend forbids to connect and to bind, and does not forbid to listen.": [
        "test_landlock_in_the_backend"
    ],
    "Up to Linux 6.18, at least, it does not forbid a connect that brings data along.": [
        "test_landlock_and_a_connect_with_data"
    ],
    # Ports.
    "A port below 1024, such as 443, is not to be had.": ["test_low_ports_are_not_to_be_had"],
    "A free port from 1024 up can be taken, though nobody gets in: others don't have it then.": [
        "test_a_free_port_can_be_taken"
    ],
    "The daemon's own port, if it is one of these, can be taken once nobody listens on it.": [
        "test_our_port_can_be_taken_once_we_are_gone"
    ],
    "At another address it can be taken at once, if the daemon listens on one address only, but "
    "nobody gets in.": ["test_our_port_can_be_taken_at_another_address"],
    "With `ReusePort=yes` the daemon does not start.": ["test_no_port_is_shared_with_backends"],
    # What it sees and changes.
    "It can ask which interfaces and IPv4 addresses there are.": ["test_it_sees_the_interfaces"],
    "It can send by an interface of its choice.": ["test_it_chooses_the_interface"],
    "It can't change anything there, as root of a user namespace of its own either.": [
        "test_it_can_t_change_anything"
    ],
    "Root without a user namespace can do all of that there.": ["test_root_is_root_there_too"],
    "Its packets are the daemon's user's to a firewall.": ["test_the_rule_of_the_page"],
    # The daemon.
    "Nobody gets a connection any more when too many lie unfetched.": ["test_too_many_unfetched"],
    "A backend can't hold the daemon up when that closes its own descriptor.": [
        "test_the_daemon_is_not_held_up"
    ],
    # What is against it.
    "A firewall keeps in what the filter lets out.": ["test_the_rule_of_the_page"],
    "It does most of what the guard does, where that is not to be had.": [
        "test_the_rule_in_the_place_of_the_guard"
    ],
}


def test_there_is_a_test_behind_each_sentence() -> None:
    sentences.check(PAGE, TESTS, __file__)


# --- The place


class Place:
    """A network, in which nothing but the listening socket is the daemon's.

    Attributes:
        machine: It.
        hosts: The hosts directory.
        path: Where the backend of `NAME` listens.
    """

    def __init__(self, place: Path) -> None:
        self.machine = Machine()
        self.machine.run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
        self.hosts = place
        place.chmod(0o755)  # the daemon is another user
        self.path = place / NAME / "handoff-socket"
        self._ends = contextlib.ExitStack()
        self._has_steady = False

    def end(self) -> None:
        """End what there is."""
        with contextlib.ExitStack() as ends:
            ends.callback(self.machine.end)
            self._ends.close()

    def listen(self, port: int, address: str = ADDRESS) -> socket.socket:
        """Listen in there; `::` is for IPv4, too."""
        is_dual = address == EVERYWHERE
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = self.machine.do(
            lambda: socket.create_server((address, port), family=family, dualstack_ipv6=is_dual)
        )
        listening.settimeout(PATIENCE)
        return listening

    def connect(self, port: int = PORT, name: str = NAME) -> socket.socket:
        """Return a client, which has said hello."""
        client = self.machine.do(socket.create_connection, (ADDRESS, port), PATIENCE)
        client.sendall(hello_bytes(name))
        return client

    def is_open(self, port: int, address: str = ADDRESS) -> bool:
        """Tell whether a connection is to be had there."""
        try:
            self.machine.do(socket.create_connection, (address, port), MOMENT).close()
        except OSError:
            return False
        return True

    @contextmanager
    def daemon(
        self,
        *options: str,
        address: str = ADDRESS,
        port: int = PORT,
        user: int = USER,
        under: tuple[str, ...] = (),
        guarded: bool = True,
    ) -> Iterator[Daemon]:
        """Run the daemon. It is outside, wherever its listening socket is."""
        chosen = ("--handoff", f"--user={user}:{user}", *options)
        with self.listen(port, address) as listening, contextlib.ExitStack() as ends:
            if not guarded:
                under = WITHOUT_RIGHT
                if not filter_takes_a_right():  # what forbids it anywhere
                    listening.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
            daemon = ends.enter_context(
                Daemon(listening, self.hosts, chosen, under=under, measured=False)
            )
            daemon.wait_for_log(f"guarded={'yes' if guarded else 'no'}")
            daemon.wait_for_log("listening")
            listening.close()
            yield daemon

    def listen_unix(
        self, name: str = NAME, uid: int | None = None, backlog: int = socket.SOMAXCONN
    ) -> socket.socket:
        """Listen where the daemon looks for the backend of `name`, and may connect."""
        path = host_directory(self.hosts, name) / "handoff-socket"
        path.unlink(missing_ok=True)
        listening = listen_unix(path, backlog, uid)
        path.chmod(0o666)
        return listening

    @contextmanager
    def backend(self, right: Right = Right.NONE) -> Iterator[Backend]:
        """Run a backend that waits for a connection."""
        with self.listen_unix() as listening, Backend(listening, right) as backend:
            yield backend

    @contextmanager
    def handed(
        self, right: Right = Right.NONE, address: str = ADDRESS, guarded: bool = True
    ) -> Iterator[tuple[socket.socket, Backend]]:
        """Run the daemon, or take the steady one; and a backend that has got a client from it."""
        with contextlib.ExitStack() as ends:
            if address == ADDRESS and guarded:
                port = STEADY
                if not self._has_steady:
                    self._ends.enter_context(self.daemon(port=port))
                    self._has_steady = True
            else:
                port = PORT
                ends.enter_context(self.daemon(address=address, guarded=guarded))
            backend = ends.enter_context(self.backend(right))
            client = ends.enter_context(self.connect(port))
            backend("take")
            yield client, backend

    @contextmanager
    def plain(self, right: Right = Right.NONE) -> Iterator[tuple[socket.socket, Backend]]:
        """Run a backend that has got a client from somebody who knows of no filter."""
        with (
            self.listen(PORT) as listening,
            self.backend(right) as backend,
            self.connect() as client,
            listening.accept()[0] as accepted,
            socket.socket(socket.AF_UNIX) as unix,
        ):
            unix.connect(str(self.path))
            socket.send_fds(unix, [b"\0"], [accepted.fileno()])
            accepted.close()
            backend("take")
            yield client, backend


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("h"))
    try:
        yield place
    finally:
        place.end()


class Packet(NamedTuple):
    """An IPv4 packet with TCP in it.

    Attributes:
        raw: All of it.
        target: Where it goes, and to which port.
        flags: RFC 9293 section 3.1.
        data: What it carries.
    """

    raw: bytes
    target: tuple[str, int]
    flags: int
    data: bytes


@contextmanager
def capture(place: Place) -> Iterator[socket.socket]:
    """Return what sees all packets in there."""
    ipv4 = 0x0800
    kinds = socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ipv4)
    with place.machine.do(socket.socket, *kinds) as packets:
        packets.settimeout(MOMENT)
        yield packets


def next_to(packets: socket.socket, target: tuple[str, int]) -> Packet | None:
    """Return the next packet that goes there; None if there is none for a moment."""
    with contextlib.suppress(TimeoutError):
        while True:
            raw = packets.recv(1 << 16)
            tcp = raw[(raw[0] & 0xF) * 4 :]
            port = int.from_bytes(tcp[2:4], "big")
            if raw[9] == socket.IPPROTO_TCP and target == (socket.inet_ntoa(raw[16:20]), port):
                return Packet(raw, target, tcp[13], tcp[(tcp[12] >> 4) * 4 :])
    return None


# --- Who gets what


@needs_network
def test_without_the_option(place: Place) -> None:
    with (
        place.listen(PORT) as listening,
        Daemon(listening, place.hosts, measured=False) as daemon,
        place.listen_unix() as backend,
    ):
        daemon.wait_for_log("listening")
        with place.connect() as client:
            assert client.recv(1) == b"\x15"  # an alert: there is no such host
        backend.settimeout(0)
        with pytest.raises(BlockingIOError):
            backend.accept()


@needs_network
def test_a_listener_of_somebody_else_s(place: Place) -> None:
    # Root may speak for everybody.
    os.chown(place.path.parent, USER, USER)
    with place.daemon() as daemon, place.listen_unix(uid=NOBODY) as backend:
        with place.connect() as client:
            assert client.recv(1) == b"\x15"
        daemon.wait_for_log("reason=wrong_owner")
        with backend.accept()[0] as connection:
            assert socket.recv_fds(connection, 1, 1)[:2] == (b"", [])
    os.chown(place.path.parent, 0, 0)


@needs_network
def test_what_comes(place: Place) -> None:
    with place.daemon(), place.backend() as backend, place.connect() as client:
        one_byte, one_descriptor, listens = 1, 1, False
        port = client.getsockname()[1]
        assert backend("take") == [one_byte, one_descriptor, listens, port]
        assert backend("receive", 1 << 14) == hello_bytes(NAME).hex()


@needs_network
def test_the_connection_outlives_the_daemon(place: Place) -> None:
    with place.backend() as backend:
        with place.daemon("--idle-timeout=0.1", "--drain=0", "--max-connections=1"):
            client = place.connect()
            backend("take")
            time.sleep(MOMENT)
            # There is room for another one.
            with place.connect(name="nobody.example") as other:
                assert other.recv(1) == b"\x15"
        with client:
            backend("send", "hello")
            assert client.recv(5) == b"hello"


# --- The guard


@needs_network
def test_whether_there_is_a_guard(place: Place) -> None:
    """Without the right it depends on the kernel, and the daemon says what it has found."""
    for under in (), WITHOUT_RIGHT:
        guarded = not under or not filter_takes_a_right()
        with (
            place.listen(PORT) as listening,
            Daemon(listening, place.hosts, ("--handoff",), under=under, measured=False) as daemon,
        ):
            daemon.wait_for_log(f"guarded={'yes' if guarded else 'no'}")


# A command that becomes another one, of root's, in a user namespace.
IN_USER_NAMESPACE: Final = ("unshare", "--user", "--map-root-user")


@needs_network
def test_whose_right_counts(place: Place) -> None:
    """That of the user namespace to which the network belongs."""
    if not filter_takes_a_right():
        pytest.skip("this kernel lets everybody have a filter")
    script = (
        "import socket; from sniproxy.hand_over import HandOver; "
        "listening = {}; print(HandOver(listening).is_guarded)"
    )
    own = "socket.create_server(('127.0.0.1', 0))"
    up = ("sh", "-euc", 'ip link set lo up; exec "$@"', "-")
    passed = script.format("socket.socket(fileno=0)")
    with place.listen(PORT) as listening:
        for command, code, expected in (
            (IN_USER_NAMESPACE, passed, "False"),
            ((*IN_USER_NAMESPACE, "--net"), passed, "False"),
            ((*IN_USER_NAMESPACE, "--net", *up), script.format(own), "True"),
            (("unshare", "--net"), passed, "True"),
        ):
            done = subprocess.run(
                [*command, sys.executable, "-c", code],
                env=unmeasured(),
                stdin=listening.fileno(),
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            assert done.stdout == f"{expected}\n", command


@needs_network
def test_nothing_is_left_of_the_right(place: Place) -> None:
    with place.daemon() as daemon:
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    sets = re.findall(r"^Cap(?:Inh|Prm|Eff|Amb):\t(\w+)$", status, re.MULTILINE)
    assert [int(each, 16) for each in sets] == [0] * 4


@needs_network
def test_without_the_guard_it_connects_elsewhere(place: Place) -> None:
    with place.handed(guarded=False) as (_, backend), place.listen(FREE) as other:
        backend("disconnect")
        backend("connect", ADDRESS, FREE)
        with other.accept()[0] as near:
            near.sendall(b"hello")
            assert backend("receive", 5) == b"hello".hex()


@needs_network
def test_without_the_guard_it_listens(place: Place) -> None:
    with place.handed(guarded=False) as (_, backend):
        backend("disconnect")
        port = _list(backend("listen"))[1]
        assert isinstance(port, int)
        assert place.is_open(port)


@needs_network
def test_who_came_before_the_filter(place: Place) -> None:
    with contextlib.ExitStack() as ends:
        listening = ends.enter_context(place.listen(PORT))
        early = [ends.enter_context(place.connect(name=name)) for name in (NAME, "b.example")]
        place.listen_unix("b.example").close()
        path = place.hosts / "b.example/tls-socket"
        relayed = ends.enter_context(RawBackend(path))
        path.chmod(0o666)
        ends.enter_context(place.listen_unix("b.example"))
        handed = ends.enter_context(place.backend())
        options = ("--handoff", f"--user={USER}:{USER}")
        daemon = ends.enter_context(Daemon(listening, place.hosts, options, measured=False))
        daemon.wait_for_log("guarded=yes")
        if filter_takes_a_right():
            assert early[0].recv(1) == b"\x15"
            assert "Operation not permitted" in daemon.wait_for_log("reason=backend_failed")
            with relayed.accept() as connection:
                assert connection.recv(1 << 14) == hello_bytes("b.example")
            ends.enter_context(place.connect())
        handed("take")


# --- What else a socket is


@needs_network
def test_the_network_is_that_of_the_listening_socket(place: Place) -> None:
    with place.daemon() as daemon, place.backend(Right.ROOT) as backend, place.connect():
        backend("take")
        there = os.stat(place.machine.place).st_ino
        assert backend("namespace") == there
        for pid in daemon.process.pid, backend.pid:
            assert Path(f"/proc/{pid}/ns/net").stat().st_ino != there


@needs_network
def test_the_backend_s_sandbox_does_not_see_it(place: Place) -> None:
    with place.handed() as (client, backend), place.listen(FREE):
        # Nothing of the network is there...
        with pytest.raises(OSError, match="unreachable"):
            backend("reach", ADDRESS, FREE)
        # ...and no socket can be made, as with RestrictAddressFamilies=.
        assert "new_privileges" in _list(backend("enter_sandbox"))
        backend("send", "hello")
        assert client.recv(5) == b"hello"


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


@contextmanager
def control_group(pid: int) -> Iterator[Path]:
    """Have a process in a control group of its own."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    tops = [Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"]
    if not tops:
        pytest.skip("there are no control groups of version 2")
    before = Path(f"/proc/{pid}/cgroup").read_text().rpartition("0::/")[2].strip()
    group = tops[0] / f"test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        (group / "cgroup.procs").write_text(f"{pid}\n")
        yield group
        (tops[0] / before / "cgroup.procs").write_text(f"{pid}\n")
    finally:
        group.rmdir()


def deny_all_packets(group: Path) -> None:
    """Do what IPAddressDeny=any does."""
    call = {"x86_64": 321, "aarch64": 280}.get(platform.machine())
    if call is None:
        pytest.skip("which number has bpf(2) here?")
    load, attach, skb, egress = 5, 8, 8, 1  # linux/bpf.h
    # r0 = 0; exit
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0), 16)
    license_ = ctypes.create_string_buffer(b"GPL")
    where, of = ctypes.addressof(code), ctypes.addressof(license_)
    program = struct.pack("=IIQQIIQII", skb, 2, where, of, 0, 0, 0, 0, 0) + bytes(80)
    fd = directory = None
    try:
        fd = libc.call("syscall", call, load, _pointer(program), len(program))
        directory = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
        request = struct.pack("=IIII", directory, fd, egress, 0)
        libc.call("syscall", call, attach, _pointer(request), len(request))
    except OSError as error:
        pytest.skip(f"no filter of a control group is to be had: {error.strerror}")
    finally:
        for each in fd, directory:
            if each is not None:
                os.close(each)


def _pointer(data: bytes) -> object:
    return ctypes.create_string_buffer(data, len(data))


@needs_network
def test_the_filter_of_the_backend_s_control_group_does_not_see_it(place: Place) -> None:
    with place.handed(Right.ROOT) as (client, backend), control_group(backend.pid) as group:
        backend("reach_itself")
        deny_all_packets(group)
        # It is in the way of the packets of a new socket.
        with pytest.raises((PermissionError, TimeoutError)):
            backend("reach_itself")
        backend("send", "hello")
        assert client.recv(5) == b"hello"


@needs_network
def test_without_our_filter_it_connects_elsewhere(place: Place) -> None:
    """What the filter is for: else a test that nobody gets anywhere could not fail."""
    with place.plain() as (client, backend), place.listen(FREE) as other:
        backend("disconnect")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        backend("connect", ADDRESS, FREE)
        other.accept()[0].close()


# How the daemon listens; and what is to be reached, and by which address.
WAYS: Final = (
    (ADDRESS, ADDRESS, ADDRESS),
    (ADDRESS, LOOPBACK, LOOPBACK),
    (EVERYWHERE, LOOPBACK, f"::ffff:{LOOPBACK}"),
    (EVERYWHERE, "::1", "::1"),
)


@needs_network
@pytest.mark.parametrize(("ours", "listening", "reached"), WAYS)
def test_with_our_filter_no_answer_gets_in(
    place: Place, ours: str, listening: str, reached: str
) -> None:
    with place.handed(address=ours) as (_, backend), place.listen(FREE, listening) as other:
        backend("disconnect")
        with pytest.raises(TimeoutError):
            backend("connect", reached, FREE)
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()


@needs_network
def test_without_our_filter_it_listens(place: Place) -> None:
    with place.plain() as (_, backend):
        backend("disconnect")
        address, port = _list(backend("listen"))
        assert (address, port) != (ADDRESS, PORT)
        assert isinstance(port, int)
        assert place.is_open(port)


@needs_network
@pytest.mark.parametrize("address", [ADDRESS, EVERYWHERE])
def test_with_our_filter_nobody_gets_in(place: Place, address: str) -> None:
    with place.handed(address=address) as (_, backend):
        backend("disconnect")
        port = _list(backend("listen"))[1]
        assert isinstance(port, int)
        assert not place.is_open(port)


@needs_network
@pytest.mark.parametrize("right", Right)
def test_the_filter_can_t_be_removed(place: Place, right: Right) -> None:
    with place.handed(right) as (_, backend):
        for _ in "before", "after":
            for option in SO_DETACH_FILTER, SO_LOCK_FILTER:
                with pytest.raises(PermissionError):
                    backend("set", socket.SOL_SOCKET, option, 0)
            with pytest.raises(PermissionError):
                backend("attach_filter")
            backend("disconnect")


@needs_network
def test_a_first_packet_gets_out(place: Place) -> None:
    with place.handed() as (_, backend), place.listen(FREE), capture(place) as packets:
        backend("disconnect")
        backend("connect_with_data", ADDRESS, FREE, "secret")
        packet = next_to(packets, (ADDRESS, FREE))
        assert packet is not None
        assert (packet.flags, packet.data) == (SYN, b"secret")


@needs_network
def test_icmp_gets_in(place: Place) -> None:
    with place.handed() as (_, backend), place.listen(FREE), capture(place) as packets:
        backend("disconnect")
        backend("begin_to_connect", ADDRESS, FREE)
        packet = next_to(packets, (ADDRESS, FREE))
        assert packet is not None
        # RFC 792: destination unreachable, host; the checksum; and the packet that it is about.
        icmp = struct.pack("!BBHI", 3, 1, 0, 0) + packet.raw
        icmp = icmp[:2] + struct.pack("!H", _checksum(icmp)) + icmp[4:]
        with place.machine.do(
            socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP
        ) as raw:
            raw.sendto(icmp, (socket.inet_ntoa(packet.raw[12:16]), 0))
        assert backend("error") == errno.EHOSTUNREACH


def _checksum(data: bytes) -> int:
    """Return the Internet checksum, RFC 1071."""
    even = data + bytes(len(data) % 2)
    total: int = sum(word for (word,) in struct.iter_unpack("!H", even))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@needs_network
@pytest.mark.skipif(sandbox._landlock_version() < 4, reason="this Landlock knows nothing of TCP")
def test_landlock_in_the_backend(place: Place) -> None:
    with place.plain() as (_, backend), place.listen(FREE):
        assert "tcp" in _list(backend("enter_landlock"))
        backend("disconnect")
        for call in "connect", "bind":
            with pytest.raises(PermissionError):
                backend(call, ADDRESS, FREE)
        _, port = _list(backend("listen"))
        assert isinstance(port, int)
        assert place.is_open(port, ADDRESS) or place.is_open(port, LOOPBACK)


@needs_network
@pytest.mark.skipif(sandbox._landlock_version() < 4, reason="this Landlock knows nothing of TCP")
def test_landlock_and_a_connect_with_data(place: Place) -> None:
    with place.plain() as (_, backend), place.listen(FREE) as other:
        backend("enter_landlock")
        backend("disconnect")
        # It is for the kernel to mend, in any version.
        with contextlib.suppress(PermissionError):
            backend("connect_with_data", ADDRESS, FREE, "secret")
            other.accept()[0].close()


# --- Ports


@needs_network
@pytest.mark.parametrize("right", [Right.NONE, Right.USER_NAMESPACE])
def test_low_ports_are_not_to_be_had(place: Place, right: Right) -> None:
    with place.backend(right) as backend:
        with place.daemon(), place.connect():
            backend("take")
            backend("disconnect")
        # Nobody listens on it any more, either.
        for port in PORT, 1023:
            with pytest.raises(PermissionError):
                backend("bind", ADDRESS, port)
        # The setting that makes ports low.
        setting = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
        before = place.machine.run("cat", setting)
        place.machine.run("tee", setting, stdin="0")
        try:
            backend("bind", ADDRESS, PORT)
        finally:
            place.machine.run("tee", setting, stdin=before)


@needs_network
def test_a_free_port_can_be_taken(place: Place) -> None:
    with place.handed() as (_, backend):
        backend("disconnect")
        backend("bind", ADDRESS, FREE)
        backend("listen")
        assert not place.is_open(FREE)
        with pytest.raises(OSError, match="in use"):
            place.listen(FREE)


@needs_network
def test_our_port_can_be_taken_once_we_are_gone(place: Place) -> None:
    with place.backend() as backend:
        with place.daemon(port=HIGH), place.connect(HIGH):
            backend("take")
            backend("disconnect")
            # As long as somebody listens.
            with pytest.raises(OSError, match="in use"):
                backend("bind", ADDRESS, HIGH)
        backend("bind", ADDRESS, HIGH)
        # Not to connect from there, though.
        with place.listen(FREE), pytest.raises(TimeoutError):
            backend("connect", ADDRESS, FREE)
        backend("disconnect")
        backend("listen")
        assert place.is_open(HIGH)


@needs_network
def test_our_port_can_be_taken_at_another_address(place: Place) -> None:
    with place.daemon(port=HIGH), place.backend() as backend, place.connect(HIGH):
        backend("take")
        backend("disconnect")
        backend("bind", LOOPBACK, HIGH)
        backend("listen")
        assert not place.is_open(HIGH, LOOPBACK)
        with pytest.raises(OSError, match="in use"):
            place.listen(HIGH, LOOPBACK)


@needs_network
def test_no_port_is_shared_with_backends(place: Place) -> None:
    kinds = socket.AF_INET, socket.SOCK_STREAM
    with place.machine.do(socket.socket, *kinds) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((ADDRESS, HIGH))
        listening.listen()
        done = subprocess.run(
            [sys.executable, "-m", "sniproxy", "--handoff"],
            env=unmeasured(),
            stdin=listening.fileno(),
            capture_output=True,
            text=True,
            cwd=place.hosts,
            timeout=PATIENCE,
        )
    assert done.returncode == 100
    assert "SO_REUSEPORT" in done.stderr


# --- What it sees and changes


@needs_network
def test_it_sees_the_interfaces(place: Place) -> None:
    with place.handed() as (_, backend):
        assert set(_list(backend("interfaces"))) == {LOOPBACK, ADDRESS}


@needs_network
def test_it_chooses_the_interface(place: Place) -> None:
    with place.handed() as (client, backend):
        backend("bind_to_device", "lo")
        backend("send", "hello")
        assert client.recv(5) == b"hello"


# Of those that take a right: CAP_NET_ADMIN, or one of those with less in it.
OPTIONS: Final = (
    (socket.SOL_SOCKET, SO_MARK, 1),
    (socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 16),
    (socket.SOL_SOCKET, socket.SO_PRIORITY, 7),
    (socket.IPPROTO_IP, IP_TRANSPARENT, 1),
)


@needs_network
@pytest.mark.parametrize("right", [Right.NONE, Right.USER_NAMESPACE])
def test_it_can_t_change_anything(place: Place, right: Right) -> None:
    with place.handed(right) as (_, backend):
        calls = [
            *(("set", *option) for option in OPTIONS),
            ("shut_interface", "lo"),
            ("namespace",),
        ]
        for what, *arguments in calls:
            with pytest.raises(PermissionError):
                backend(str(what), *arguments)
        # On a socket that is not connected, where it would be possible.
        backend("disconnect")
        # An address that is not the machine's can be had, but no packet has it.
        backend("set", socket.IPPROTO_IP, IP_FREEBIND, 1)
        backend("bind", "203.0.113.1", FREE)
        # Which of them depends on the kernel.
        with pytest.raises(OSError, match=r"Invalid argument|unreachable"):
            backend("connect", ADDRESS, FREE)
        with pytest.raises(PermissionError):
            backend("set", socket.IPPROTO_TCP, TCP_REPAIR, 1)


@needs_network
def test_root_is_root_there_too(place: Place) -> None:
    with place.handed(Right.ROOT) as (_, backend):
        for option in OPTIONS:
            backend("set", *option)
        assert backend("namespace") == os.stat(place.machine.place).st_ino
        backend("disconnect")
        backend("set", socket.IPPROTO_TCP, TCP_REPAIR, 1)
        backend("bind", ADDRESS, 1023)


# --- The daemon


@needs_network
def test_too_many_unfetched(place: Place) -> None:
    """Under a low limit, of a user who has nothing else on the way."""
    limit = 64
    under = ("prlimit", f"--nofile={limit}")
    with (
        place.daemon("--log=connections", user=USER + 1, under=under) as daemon,
        place.backend() as backend,
        contextlib.ExitStack() as clients,
    ):
        with place.listen_unix("lazy.example", backlog=2 * limit):
            for _ in range(limit + 1):
                clients.enter_context(place.connect(name="lazy.example"))
            eventually(lambda: sum("handed_over" in line for line in daemon.log()) > limit)
            with place.connect() as client:
                assert client.recv(1) == b"\x15"
                daemon.wait_for_log("reason=backend_failed")
        # Who listened there has gone, and with him what was on the way.
        with place.connect():
            backend("take")


@contextmanager
def handler_kept(number: signal.Signals) -> Iterator[None]:
    """Restore what handles a signal."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, handler)


@needs_network
def test_the_daemon_is_not_held_up(place: Place) -> None:
    """In this process, for in two it is a race who is the last to close the socket."""
    with (
        place.listen(PORT) as listening,
        place.backend() as backend,
        place.machine.do(socket.socket) as client,
        socket.socket(socket.AF_UNIX) as unix,
        handler_kept(signal.SIGALRM),
    ):
        hand_over = HandOver(listening)
        # It takes little, and then nobody reads.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect((ADDRESS, PORT))
        client.sendall(hello_bytes(NAME))
        accepted, _ = listening.accept()
        with accepted:
            unix.connect(str(place.path))
            assert hand_over.give(accepted, unix, 0) is None
            backend("take_fill_and_close")
            # For hours, else.
            hand_over.close_each([hand_over.kept(accepted, 0)])


# --- What is against it


@contextmanager
def rule_of_the_page(place: Place) -> Iterator[None]:
    """Have it in force, and one that drops what is the backend's user's."""
    [rule] = re.findall(r"```\n(table .+?)```", PAGE.read_text(), re.DOTALL)
    of_backend = f"meta skuid {NOBODY} drop"
    rule = rule.replace("meta skuid sniproxy", f"{of_backend}; meta skuid {USER}")
    place.machine.run("nft", "-f", "-", stdin=rule)
    try:
        yield
    finally:
        place.machine.run("nft", "flush", "ruleset")


@needs_network
def test_the_rule_of_the_page(place: Place) -> None:
    with (
        rule_of_the_page(place),
        place.daemon(),
        place.backend() as backend,
        place.connect() as client,
        place.listen(FREE),
        capture(place) as packets,
    ):
        backend("take")
        backend("send", "hello")
        assert client.recv(5) == b"hello"
        backend("disconnect")
        with contextlib.suppress(OSError):
            backend("connect_with_data", ADDRESS, FREE, "secret")
        assert next_to(packets, (ADDRESS, FREE)) is None


@needs_network
def test_the_rule_in_the_place_of_the_guard(place: Place) -> None:
    with (
        rule_of_the_page(place),
        place.handed(guarded=False) as (client, backend),
        place.listen(FREE) as other,
    ):
        backend("send", "hello")
        assert client.recv(5) == b"hello"
        backend("disconnect")
        with pytest.raises((PermissionError, TimeoutError)):
            backend("connect", ADDRESS, FREE)
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()
        backend("disconnect")
        port = _list(backend("listen"))[1]
        assert isinstance(port, int)
        assert not place.is_open(port)
