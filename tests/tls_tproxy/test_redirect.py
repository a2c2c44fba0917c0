"""Who is redirected, and who is not; on the real thing: two machines, their kernel, and nft."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from _socket import socket as Socket  # noqa: N812 - as the engine has them
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from mutual_tls.dial import Endpoint, dial
from mutual_tls.netfilter import mark
from mutual_tls.netfilter.command import Cgroup
from mutual_tls.netfilter.original import NotRedirectedError, original_destination
from mutual_tls.netfilter.table import Nft, NftError
from sniproxy.service import libc
from tests.support.daemon import PATIENCE, eventually
from tests.support.network import Machine, Network, why_no_network
from tests.support.story import told
from tls_tproxy.redirect import Redirection, stop_refusing

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

REPOSITORY: Final = Path(__file__).parents[2]

# The server is the router, here.
SERVER: Final = {4: "10.3.1.1", 6: "2001:db8::1"}
CLIENT: Final = {4: "10.3.1.2", 6: "2001:db8::2"}
LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}
FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
FAMILIES: Final = pytest.mark.parametrize("version", [4, 6])

PORT, OTHER_PORT = 8443, 5432
LISTENING, OTHER_LISTENING = 8000, 8001
ROOT, SOMEBODY = 0, 1000


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Machine, Machine]]:
    """A machine, and a server on another one, with both families."""
    with Network() as network:
        here, server = network.machine(CLIENT[4]), network.router
        here.run("ip", "address", "add", f"{CLIENT[6]}/64", "dev", "cable", "nodad")
        server.run("ip", "address", "add", f"{SERVER[6]}/64", "dev", "to1", "nodad")
        yield here, server


class Place:
    """The machine with clients and ours, and the server.

    Attributes:
        listening: All sockets that listen there, by what they are.
    """

    def __init__(self, here: Machine, server: Machine, stack: ExitStack) -> None:
        self.here = here
        self.server = server
        self._stack = stack
        self.listening: dict[str, socket.socket] = {}
        for version in 4, 6:
            for port in PORT, OTHER_PORT:
                self.listen(server, "server", version, SERVER[version], port)
            for port in LISTENING, OTHER_LISTENING:
                self.listen(here, f"ours {port}", version, LOOPBACK[version], port)

    def listen(self, machine: Machine, what: str, version: int, host: str, port: int) -> None:
        sock = machine.do(socket.create_server, (host, port), family=FAMILY[version])
        sock.setblocking(False)
        self._stack.enter_context(sock)
        self.listening[f"{what}, IPv{version}, {port}"] = sock

    def nft(self, user: tuple[int, int] | None = None) -> Nft:
        nft = self.here.do(Nft, user)
        self._stack.callback(nft.close)
        return nft

    def connect(
        self, host: str, port: int, uid: int = ROOT, *, fwmark: int = 0, source: str = ""
    ) -> socket.socket:
        """Connect as a program of that user would."""
        sock = self.here.do(_connect, host, port, uid, fwmark, source)
        return self._stack.enter_context(sock)

    def accept(self) -> tuple[str, socket.socket]:
        """Return who got the one connection that was made; nobody else got one."""
        found, _, _ = select.select(self.listening.values(), (), (), PATIENCE)
        assert len(found) == 1
        accepted = self._stack.enter_context(found[0].accept()[0])
        for name, sock in self.listening.items():
            with pytest.raises(BlockingIOError):
                sock.accept()
            if sock is found[0]:
                who = name
        return who, accepted

    def reached(
        self, host: str, port: int, uid: int = ROOT, *, fwmark: int = 0, source: str = ""
    ) -> str:
        """Return who gets a connection."""
        client = self.connect(host, port, uid, fwmark=fwmark, source=source)
        who, accepted = self.accept()
        if who.startswith("ours"):
            assert original_destination(accepted) == (host, port)
        # In both directions it goes where it seems to.
        client.sendall(b"?")
        assert accepted.recv(2) == b"?"
        accepted.sendall(b"!")
        assert client.recv(2) == b"!"
        assert client.getpeername()[:2] == (host, port)
        client.close()
        accepted.close()
        return who

    def tables(self) -> list[str]:
        """Return the names of all tables."""
        lines = self.here.run("nft", "list", "tables").splitlines()
        return sorted(line.split()[-1] for line in lines)


def _connect(host: str, port: int, uid: int, fwmark: int, source: str) -> socket.socket:
    # The file system's user id is that of a thread, setfsuid(2), and whose the socket is.
    libc.call("setfsuid", uid)
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    finally:
        libc.call("setfsuid", 0)
    try:
        sock.settimeout(PATIENCE)
        if fwmark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, fwmark)
        if source:
            sock.bind((source, 0))
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_from(source: tuple[str, int], address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in source[0] else socket.AF_INET)
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(source)
    sock.connect(address)
    return sock


@pytest.fixture
def place(network: tuple[Machine, Machine]) -> Iterator[Place]:
    with ExitStack() as stack:
        place = Place(*network, stack)
        yield place
    left = place.tables()
    place.here.run("nft", "flush", "ruleset")
    assert left == []


@contextmanager
def running(place: Place, text: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a program there, until it says that it is ready."""
    program = subprocess.Popen(
        [*place.here.under, sys.executable, "-X", "dev", "-c", textwrap.dedent(text)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "ready\n"
            yield program
        finally:
            program.kill()


# --- Who is redirected


@FAMILIES
@pytest.mark.parametrize("uid", [ROOT, SOMEBODY])
def test_clients_of_every_user_are_redirected(place: Place, version: int, uid: int) -> None:
    assert place.reached(SERVER[version], PORT, uid) == f"server, IPv{version}, {PORT}"
    Redirection(place.nft(), LISTENING, [PORT])
    ours = f"ours {LISTENING}, IPv{version}, {LISTENING}"
    assert place.reached(SERVER[version], PORT, uid) == ours
    # To itself, and from an address that was chosen.
    assert place.reached(LOOPBACK[version], PORT, uid) == ours
    assert place.reached(CLIENT[version], PORT, uid) == ours
    assert place.reached(SERVER[version], PORT, uid, source=CLIENT[version]) == ours
    # Another port is not.
    other = f"server, IPv{version}, {OTHER_PORT}"
    assert place.reached(SERVER[version], OTHER_PORT, uid) == other


def test_nobody_listens_in_one_family(place: Place) -> None:
    place.listening.pop(f"ours {LISTENING}, IPv6, {LISTENING}").close()
    Redirection(place.nft(), LISTENING, [PORT])
    with pytest.raises(ConnectionRefusedError):
        place.connect(SERVER[6], PORT)
    assert place.reached(SERVER[4], PORT).startswith("ours")


def test_one_socket_for_both_families(place: Place) -> None:
    for version in 4, 6:
        place.listening.pop(f"ours {LISTENING}, IPv{version}, {LISTENING}").close()
    sock = place.here.do(
        socket.create_server,
        ("::", LISTENING),
        family=socket.AF_INET6,
        dualstack_ipv6=True,
    )
    with sock:
        sock.setblocking(False)
        place.listening["ours, both"] = sock
        Redirection(place.nft(), LISTENING, [PORT])
        for version in 4, 6:
            assert place.reached(SERVER[version], PORT) == "ours, both"
            with place.connect(LOOPBACK[version], LISTENING):
                _, accepted = place.accept()
                with pytest.raises(NotRedirectedError):
                    original_destination(accepted)


@FAMILIES
def test_who_connects_to_our_own_port_was_not_redirected(place: Place, version: int) -> None:
    for is_tracked in False, True:
        if is_tracked:
            Redirection(place.nft(), LISTENING, [PORT])
        place.connect(LOOPBACK[version], LISTENING)
        _, accepted = place.accept()
        with pytest.raises(NotRedirectedError):
            original_destination(accepted)


def test_a_plain_socket_will_do(place: Place) -> None:
    Redirection(place.nft(), LISTENING, [PORT])
    place.connect(SERVER[4], PORT)
    _, accepted = place.accept()
    plain = Socket(socket.AF_INET, socket.SOCK_STREAM, 0, accepted.detach())
    assert original_destination(plain) == (SERVER[4], PORT)
    plain.close()


@FAMILIES
def test_only_chosen_users(place: Place, version: int) -> None:
    chosen = (SOMEBODY, SOMEBODY + 1)
    Redirection(place.nft(), LISTENING, [PORT], users=chosen, fail_closed=True)
    for uid in chosen:
        assert place.reached(SERVER[version], PORT, uid).startswith("ours")
    for uid in ROOT, SOMEBODY + 2:
        assert place.reached(SERVER[version], PORT, uid).startswith("server")
    stop_refusing(place.nft(), LISTENING)


@FAMILIES
def test_only_a_control_group(place: Place, version: int) -> None:
    root = Path("/sys/fs/cgroup")
    top = next(
        (each for each in (root, root / "unified") if (each / "cgroup.procs").exists()), root
    )
    outer = f"test_{os.getpid()}.slice"
    inner = top / outer / "inner.slice"
    if not (top / "cgroup.controllers").exists():
        pytest.skip("there are no control groups of version 2")
    try:
        inner.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    here = top / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    try:
        groups = [Cgroup.find(f"/{outer}/inner.slice"), Cgroup.find(f"/{outer}")]
        assert [group.level for group in groups] == [2, 1]
        for group in groups:
            nft = place.nft()
            Redirection(nft, LISTENING, [PORT], cgroup=group)
            assert place.reached(SERVER[version], PORT).startswith("server")
            (inner / "cgroup.procs").write_text(f"{os.getpid()}\n")
            assert place.reached(SERVER[version], PORT).startswith("ours")
            (here / "cgroup.procs").write_text(f"{os.getpid()}\n")
            nft.close()
    finally:
        (here / "cgroup.procs").write_text(f"{os.getpid()}\n")
        inner.rmdir()
        inner.parent.rmdir()


# --- Who is not


@FAMILIES
def test_our_own_connections_are_left_alone(place: Place, version: int) -> None:
    Redirection(place.nft(), LISTENING, [PORT], fail_closed=True)
    server = f"server, IPv{version}, {PORT}"
    assert place.reached(SERVER[version], PORT, fwmark=mark.MARK) == server
    # Bits that others have for themselves do not matter; a mark of theirs does not do.
    assert place.reached(SERVER[version], PORT, fwmark=mark.MARK | 0x4000) == server
    assert place.reached(SERVER[version], PORT, fwmark=1).startswith("ours")
    assert place.reached(SERVER[version], PORT, fwmark=0x4000).startswith("ours")
    stop_refusing(place.nft(), LISTENING)


def test_who_dials_with_the_mark_is_left_alone(place: Place) -> None:
    Redirection(place.nft(), LISTENING, [PORT])

    async def run() -> None:
        endpoint = Endpoint(SERVER[6], PORT)
        sock = await told(lambda story: dial(story, endpoint, options=(mark.OPTION,)))
        sock.close()

    place.here.do(trio.run, run)
    assert place.accept()[0].startswith("server")


def test_the_mark_is_not_to_be_had_without_rights() -> None:
    script = f"""
        import socket
        socket.socket().setsockopt{mark.OPTION}
        """
    cases = [("-all", "PermissionError: [Errno 1]"), ("-all,+net_admin", "")]
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 17):
        cases.append(("-all,+net_raw", ""))
    for capabilities, error in cases:
        rights = (f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}")
        command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *rights)
        done = subprocess.run(
            [*command, "/usr/bin/python3", "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert error in done.stderr
        assert done.returncode == bool(error)


# Connections that the kernel does not follow have no addresses translated.
NOT_TRACKED: Final = f"""
table inet others {{
    chain output {{
        type filter hook output priority raw
        tcp dport {PORT} notrack
    }}
}}
"""


def test_two_instances(place: Place) -> None:
    first, second = place.nft(), place.nft()
    Redirection(first, LISTENING, [PORT])
    Redirection(second, OTHER_LISTENING, [OTHER_PORT])
    assert len(place.tables()) == 2
    for version in 4, 6:
        assert place.reached(SERVER[version], PORT).startswith(f"ours {LISTENING}")
        assert place.reached(SERVER[version], OTHER_PORT).startswith(f"ours {OTHER_LISTENING}")
    first.close()
    assert place.reached(SERVER[4], PORT).startswith("server")
    assert place.reached(SERVER[4], OTHER_PORT).startswith(f"ours {OTHER_LISTENING}")


@FAMILIES
def test_what_is_not_tracked_is_refused(place: Place, version: int) -> None:
    Redirection(place.nft(), LISTENING, [PORT], fail_closed=True)
    place.here.run("nft", "-f", "-", stdin=NOT_TRACKED)
    try:
        with pytest.raises(ConnectionRefusedError):
            place.connect(SERVER[version], PORT)
        assert place.reached(SERVER[version], PORT, fwmark=mark.MARK).startswith("server")
    finally:
        place.here.run("nft", "flush", "ruleset")


def test_rules_of_others_stay(place: Place) -> None:
    if (reason := _no_iptables(place)) is not None:
        pytest.skip(reason)
    run = place.here.run
    nft = place.nft()
    try:
        # Another one's translation of the same destination must not come first, whoever began.
        for _ in range(2):
            redirection = Redirection(nft, LISTENING, [PORT], fail_closed=True)
            if "DNAT" not in run("iptables-nft-save"):
                to = ("--dport", str(PORT), "-j", "DNAT", "--to", f"{SERVER[4]}:{OTHER_PORT}")
                run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", *to)
                # Nor do another one's bits in our marks do harm.
                bits = ("-j", "MARK", "--set-xmark", "0x4000/0x4000")
                run("iptables-nft", "-t", "mangle", "-A", "OUTPUT", "-p", "tcp", *bits)
                before = _rules(run("iptables-nft-save"))
                assert len(before) == 2
            assert place.reached(SERVER[4], PORT).startswith("ours")
            assert place.reached(SERVER[4], OTHER_PORT, fwmark=mark.MARK).startswith("server")
            redirection.replace_ports([PORT])
            nft.close()
            # What would go to another port is refused, too.
            with pytest.raises(ConnectionRefusedError):
                place.connect(SERVER[4], PORT)
            nft = place.nft()
            stop_refusing(nft, LISTENING)
            assert _rules(run("iptables-nft-save")) == before
            assert place.reached(SERVER[4], PORT) == f"server, IPv4, {OTHER_PORT}"
    finally:
        run("nft", "flush", "ruleset")


def _no_iptables(place: Place) -> str | None:
    try:
        place.here.run("iptables-nft", "-t", "nat", "-S")
    except (AssertionError, FileNotFoundError):
        return "iptables-nft is not installed (Debian package iptables)"
    finally:
        place.here.run("nft", "flush", "ruleset")
    return None


def _rules(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if line.startswith("-A")]


# --- Changes


@FAMILIES
def test_ports_change(place: Place, version: int) -> None:
    redirection = Redirection(place.nft(), LISTENING, [])
    for ports in [PORT], [OTHER_PORT], [PORT, OTHER_PORT], []:
        redirection.replace_ports(ports)
        for port in PORT, OTHER_PORT:
            who = "ours" if port in ports else "server"
            assert place.reached(SERVER[version], port).startswith(who)


@FAMILIES
@pytest.mark.parametrize("fail_closed", [False, True])
def test_who_is_connected_stays(place: Place, version: int, *, fail_closed: bool) -> None:
    redirection = Redirection(place.nft(), LISTENING, [PORT], fail_closed=fail_closed)
    client = place.connect(SERVER[version], PORT)
    _, accepted = place.accept()
    accepted.settimeout(PATIENCE)

    def still_connected() -> bool:
        client.sendall(b"?")
        return accepted.recv(2) == b"?"

    redirection.replace_ports([OTHER_PORT])
    assert still_connected()
    assert place.reached(SERVER[version], PORT).startswith("server")
    redirection.replace_ports([PORT])
    redirection.stop()
    assert still_connected()
    if fail_closed:
        with pytest.raises(ConnectionRefusedError):
            place.connect(SERVER[version], PORT)
    else:
        assert place.reached(SERVER[version], PORT).startswith("server")
    stop_refusing(place.nft(), LISTENING)


def test_what_others_have_flushed_is_made_anew(place: Place) -> None:
    redirection = Redirection(place.nft(), LISTENING, [PORT], fail_closed=True)
    both = place.tables()
    assert len(both) == 2
    changes = partial(redirection.replace_ports, [PORT]), redirection.look_after, redirection.stop
    for change in changes:
        place.here.run("nft", "flush", "ruleset")
        assert len(place.tables()) == 1
        change()
        assert place.tables() == both
    with pytest.raises(ConnectionRefusedError):
        place.connect(SERVER[4], PORT)
    stop_refusing(place.nft(), LISTENING)


@pytest.mark.parametrize("ports", [[LISTENING], [PORT, LISTENING], [0], [65536], [-1]])
def test_ports_that_cannot_be(place: Place, ports: list[int]) -> None:
    nft = place.nft()
    with pytest.raises(ValueError, match=r"is no port|is the one that listens here"):
        Redirection(nft, LISTENING, ports)
    redirection = Redirection(nft, LISTENING, [PORT])
    with pytest.raises(ValueError, match=r"is no port|is the one that listens here"):
        redirection.replace_ports(ports)
    assert place.reached(SERVER[4], PORT).startswith("ours")
    for listening in 0, 65536:
        with pytest.raises(ValueError, match="is no port"):
            Redirection(nft, listening, [PORT])
        with pytest.raises(ValueError, match="is no port"):
            stop_refusing(nft, listening)


def test_text_is_no_port(place: Place) -> None:
    hostile: list[int] = ["8443 }; flush ruleset"]  # type: ignore[list-item]
    with pytest.raises(TypeError):
        Redirection(place.nft(), LISTENING, hostile)
    with pytest.raises(TypeError):
        Redirection(place.nft(), LISTENING, [PORT], users=hostile)


def test_the_same_one_twice_is_refused_and_nothing_changes(place: Place) -> None:
    nft = place.nft()
    Redirection(nft, LISTENING, [PORT])
    with pytest.raises(NftError, match="File exists"):
        Redirection(nft, LISTENING, [OTHER_PORT], fail_closed=True)
    assert len(place.tables()) == 1
    assert place.reached(SERVER[4], OTHER_PORT).startswith("server")


# --- The end

PROGRAM: Final = """
    import os, sys
    from mutual_tls.netfilter.table import Nft
    from tls_tproxy.redirect import Redirection
    nft = Nft({user})
    Redirection(nft, {listening}, [{port}], fail_closed={fail_closed})
    if {user}:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    if {workers} and not os.fork():
        sys.stdin.read()
        os._exit(0)
    print("ready", flush=True)
    sys.stdin.read()
    nft.close()
    """


def program(*, fail_closed: bool = False, user: object = None, workers: int = 0) -> str:
    return PROGRAM.format(
        listening=LISTENING, port=PORT, fail_closed=fail_closed, user=user, workers=workers
    )


@pytest.mark.parametrize("user", [None, (65534, 65534)])
def test_nothing_is_left_behind(place: Place, user: tuple[int, int] | None) -> None:
    with running(place, program(user=user)) as process:
        assert len(place.tables()) == 1
        assert place.reached(SERVER[6], PORT).startswith("ours")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
        assert place.tables() == []
    assert place.reached(SERVER[6], PORT).startswith("server")


@pytest.mark.parametrize("user", [None, (65534, 65534)])
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_left_behind_by_one_who_is_killed(
    place: Place, user: tuple[int, int] | None, workers: int
) -> None:
    with running(place, program(user=user, workers=workers)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        eventually(lambda: place.tables() == [])  # even while its worker lives
        assert place.reached(SERVER[6], PORT).startswith("server")


def test_the_next_copy_may_begin_before_the_end_of_the_last(place: Place) -> None:
    with running(place, program()) as process:
        Redirection(place.nft(), LISTENING, [PORT])
        assert len(place.tables()) == 2
        assert place.reached(SERVER[4], PORT).startswith("ours")
        process.kill()
        process.wait(PATIENCE)
        eventually(lambda: len(place.tables()) == 1)
        assert place.reached(SERVER[4], PORT).startswith("ours")


@FAMILIES
def test_fail_closed(place: Place, version: int) -> None:
    with running(place, program(fail_closed=True)) as process:
        assert place.reached(SERVER[version], PORT).startswith("ours")
        held = place.connect(SERVER[version], PORT)
        place.accept()
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    refusing = f"tls_tproxy_refuse_{LISTENING}"
    eventually(lambda: place.tables() == [refusing])
    for uid in ROOT, SOMEBODY:
        for host in SERVER[version], LOOPBACK[version]:
            with pytest.raises(ConnectionRefusedError):
                place.connect(host, PORT, uid)
    # Nor does one leave that was redirected before.
    with suppress(ConnectionResetError):
        held.sendall(b"secret")
        assert held.recv(1) == b""
    assert place.reached(SERVER[version], OTHER_PORT).startswith("server")
    assert place.reached(SERVER[version], PORT, fwmark=mark.MARK).startswith("server")
    # The next start takes it over, with its own ports.
    nft = place.nft()
    redirection = Redirection(nft, LISTENING, [PORT, OTHER_PORT], fail_closed=True)
    assert place.reached(SERVER[version], PORT).startswith("ours")
    assert len(place.tables()) == 2
    redirection.replace_ports([OTHER_PORT])
    nft.close()
    with pytest.raises(ConnectionRefusedError):
        place.connect(SERVER[version], OTHER_PORT)
    assert place.reached(SERVER[version], PORT).startswith("server")
    nft = place.nft()
    stop_refusing(nft, OTHER_LISTENING)  # which has none
    assert place.tables() == [refusing]
    stop_refusing(nft, LISTENING)
    assert place.tables() == []
    assert place.reached(SERVER[version], OTHER_PORT).startswith("server")


@FAMILIES
def test_what_is_connected_in_plaintext_is_reset(place: Place, version: int) -> None:
    client = place.connect(SERVER[version], PORT)
    _, accepted = place.accept()
    Redirection(place.nft(), LISTENING, [PORT], fail_closed=True)
    with pytest.raises(ConnectionResetError):
        client.sendall(b"secret")
        client.recv(1)
    accepted.setblocking(False)
    with pytest.raises(BlockingIOError):
        accepted.recv(1)
    stop_refusing(place.nft(), LISTENING)


@FAMILIES
def test_a_client_from_elsewhere_may_have_such_a_port(place: Place, version: int) -> None:
    Redirection(place.nft(), LISTENING, [PORT, OTHER_PORT], fail_closed=True)
    place.listen(place.here, "service", version, CLIENT[version], 2222)
    place.listening.pop(f"server, IPv{version}, {PORT}").close()
    client = place.server.do(_connect_from, (SERVER[version], PORT), (CLIENT[version], 2222))
    with client:
        who, accepted = place.accept()
        assert who.startswith("service")
        accepted.sendall(b"!")
        assert client.recv(2) == b"!"
    stop_refusing(place.nft(), LISTENING)
