"""Hosts whose backends get the connections of clients themselves: what is said of both sockets."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from sniproxy.service.privileges import Identity
from sniproxy_check.client import Clients
from sniproxy_check.entries import Listing
from sniproxy_check.finding import CheckReason, Finding, Result
from sniproxy_check.report import find_hidden, is_served, show_table
from sniproxy_check.walk import Walk
from sniproxy_hostname import directory_namer
from tests.support.backends import TlsBackend, host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, start_daemon, unmeasured
from tests.support.sockets import unix_pair

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "two.example"
HANDOFF, TLS = "handoff-socket", "tls-socket"
BOTH: Final = [HANDOFF, TLS]
WORDS: Final = {HANDOFF: CheckReason.NOT_HANDED_OVER, TLS: CheckReason.NOT_RELAYED}
NOBODY, TENANT, OTHER = 4000, 4001, 4002

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")


@pytest.fixture(autouse=True)
def _in_hosts_directory(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in hosts.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    monkeypatch.chdir(hosts)


@pytest.fixture
def place(hosts: Path) -> Path:
    """The directory of the host."""
    return host_directory(hosts, NAME)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Path]:
    """Where somebody listens."""
    path = tmp_path / "backend"
    with listen_unix(path):
        path.chmod(0o666)
        yield path


def look(
    *,
    hands_over: bool = True,
    handshake: bool = False,
    identity: Identity | None = None,
    chroot: bool = False,
) -> Result:
    here = Walk(
        directory_namer(False),
        hashed=False,
        check_owner=True,
        hands_over=hands_over,
        identity=identity,
        user="4000",
        chroot=chroot,
        seconds=PATIENCE,
        listing=Listing.of(()),
    )
    try:
        return here.look(NAME, handshake=handshake)
    finally:
        here.close()


def words(result: Result) -> list[str]:
    return [finding.word for finding in result.findings]


def mend(finding: Finding, backend: Path) -> None:
    """Do what is said to mend it, with what is in capitals filled in."""
    command = re.sub("^# .* is meant: ", "", finding.mend).replace("SOCKET", str(backend))
    subprocess.run(["sh", "-euc", command], check=True)


# --- Which of the two counts


def test_one_socket_is_enough(place: Path, backend: Path) -> None:
    (place / HANDOFF).symlink_to(backend)
    result = look()
    assert result.findings == ()
    assert is_served(result)
    assert result.is_handed_over
    assert result.listener == (os.getpid(), os.geteuid())


def test_without_the_option_it_is_none(place: Path, backend: Path) -> None:
    (place / HANDOFF).symlink_to(backend)
    result = look(hands_over=False)
    assert words(result) == [CheckReason.HANDOFF_IS_OFF, "no_socket"]
    assert not is_served(result)
    first, second = result.findings
    assert first.mend == "# start the daemon with --handoff"
    mend(second, backend)
    assert look(hands_over=False).findings == ()


def test_who_has_both_is_served_either_way(place: Path, backend: Path) -> None:
    """The one socket is there for when the option is."""
    for name in BOTH:
        (place / name).symlink_to(backend)
    without, result = look(hands_over=False), look()
    assert (without.findings, result.findings) == ((), ())
    assert (without.is_handed_over, result.is_handed_over) == (False, True)
    assert (without.has_idle_handoff, result.has_idle_handoff) == (True, False)


def test_who_has_none_hears_of_the_usual_one(place: Path, backend: Path) -> None:
    [finding] = look().findings
    assert finding.detail == f"socket: there is no {NAME}/{TLS}"


def test_a_name_that_is_misspelt(place: Path, backend: Path) -> None:
    (place / TLS).symlink_to(backend)
    (place / "handoff_socket").symlink_to(backend)
    assert look(hands_over=False).findings == ()
    [finding] = look().findings
    assert finding.word is CheckReason.MISSPELT
    mend(finding, backend)
    result = look()
    assert result.findings == ()
    assert result.is_handed_over


@pytest.mark.parametrize("hands_over", [False, True])
def test_a_socket_that_a_link_leads_to_is_not_misspelt(place: Path, hands_over: bool) -> None:
    with listen_unix(place / "backend"):
        (place / HANDOFF).symlink_to("backend")
        assert CheckReason.MISSPELT not in words(look(hands_over=hands_over))


# --- One that can't be used


def stale(path: Path) -> None:
    listen_unix(path).close()


# What is at the path, and the reason that this is.
BROKEN: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "file": (lambda path: path.touch(), "not_listening"),
    "directory": (lambda path: path.mkdir(), "not_listening"),
    "nothing": (lambda path: path.symlink_to("nowhere"), "no_socket"),
    "through a file": (lambda path: path.symlink_to("/dev/null/socket"), "no_socket"),
    "loop": (lambda path: path.symlink_to(path.name), "link_loop"),
    "stale": (stale, "not_listening"),
}

every_fault = pytest.mark.parametrize(("make", "reason"), BROKEN.values(), ids=BROKEN)


def repair(finding: Finding, path: Path, backend: Path) -> None:
    """Do what is said, and have somebody listen where it says that."""
    mend(finding, backend)
    if not os.path.lexists(path):
        path.symlink_to(backend)


@pytest.mark.parametrize("broken", BOTH)
@every_fault
def test_the_other_one_serves(
    place: Path, backend: Path, broken: str, make: Callable[[Path], None], reason: str
) -> None:
    [other] = {*BOTH} - {broken}
    (place / other).symlink_to(backend)
    make(place / broken)
    result = look()
    [finding] = result.findings
    assert finding.word == WORDS[broken]
    assert finding.detail.startswith(f"{broken} can't be used ({reason}): socket: {NAME}/{broken}")
    assert is_served(result)
    assert result.is_handed_over is (other == HANDOFF)
    repair(finding, place / broken, backend)
    assert look().findings == ()
    assert (place / other).readlink() == backend


@every_fault
def test_there_is_no_other(
    place: Path, backend: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(place / HANDOFF)
    result = look()
    finding = result.findings[0]
    if make is BROKEN["nothing"][0]:
        # For the daemon a link to nothing is no socket, and so the refusal is about the usual one.
        assert finding.detail == f"socket: there is no {NAME}/{TLS}"
        finding = result.findings[1]
        assert finding.word is CheckReason.NOT_HANDED_OVER
    else:
        assert finding.word == reason
        assert len(result.findings) == 1
    assert f"{NAME}/{HANDOFF}" in finding.detail
    assert not is_served(result)
    repair(finding, place / HANDOFF, backend)
    assert look().findings == ()
    assert look().is_handed_over


@every_fault
def test_neither_serves(
    place: Path, backend: Path, make: Callable[[Path], None], reason: str
) -> None:
    for name in BOTH:
        make(place / name)
    result = look()
    assert len(result.findings) == 2
    assert not is_served(result)
    for finding in result.findings:
        name = HANDOFF if HANDOFF in finding.detail else TLS
        assert finding.word in (reason, WORDS[name])
        repair(finding, place / name, backend)
    assert look().findings == ()


@pytest.mark.parametrize("broken", BOTH)
def test_a_datagram_socket(place: Path, backend: Path, broken: str) -> None:
    [other] = {*BOTH} - {broken}
    (place / other).symlink_to(backend)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(place / broken))
        [finding] = look().findings
    assert finding.word == WORDS[broken]
    assert finding.detail.endswith("is no stream socket")
    mend(finding, backend)
    assert look().findings == ()


def test_a_full_backlog_is_looked_at_again(
    place: Path, backend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / TLS).symlink_to(backend)
    with (
        listen_unix(place / HANDOFF, backlog=0) as listening,
        socket.socket(socket.AF_UNIX) as filling,
    ):
        filling.connect(str(place / HANDOFF))

        def make_room(_: float) -> None:
            listening.accept()[0].close()

        monkeypatch.setattr("sniproxy_check.walk.time.sleep", make_room)
        assert look().findings == ()
        monkeypatch.setattr("sniproxy_check.walk.time.sleep", lambda seconds: None)
        [finding] = look().findings  # whose own connection, the last one, is still in the queue
    assert finding.detail.startswith(f"{HANDOFF} can't be used (backend_busy): ")


def test_an_absolute_link_where_the_root_directory_is_another(place: Path, backend: Path) -> None:
    (place / TLS).symlink_to(os.path.relpath(backend, place))
    (place / HANDOFF).symlink_to(backend)
    assert look(hands_over=False, chroot=True).findings == ()
    [finding] = look(chroot=True).findings
    assert finding.word is CheckReason.ABSOLUTE_IN_CHROOT
    assert f"{NAME}/{HANDOFF} -> " in finding.detail


def test_what_is_here_and_hidden_there_leaves_the_host_served(tmp_path: Path) -> None:
    (tmp_path / "socket").touch()
    for word in WORDS.values():
        finding = Finding(word, "why", "do", str(tmp_path / "socket"))
        result = Result("a.example", "a.example", 0, (5, 0), findings=(finding,))
        for chroot in False, True:
            found = find_hidden(result, chroot=chroot)
            [hidden] = found.findings
            assert (hidden.word, is_served(found)) == (word, True)
            assert "but " in hidden.detail
            assert hidden.mend != "do"


@needs_root
class TestSeveralUsers:
    """Whose the sockets are, and what the daemon may do with them."""

    def test_the_listener_of_somebody_else(self, place: Path) -> None:
        os.chown(place, TENANT, TENANT)
        with ExitStack() as stack:
            stack.enter_context(listen_unix(place / HANDOFF, uid=OTHER))
            [alone] = look().findings
            assert alone.word == "wrong_owner"
            assert f"if uid {OTHER} is meant: chown {OTHER} {NAME}" in alone.mend
            stack.enter_context(listen_unix(place / TLS, uid=TENANT))
            result = look()
            [finding] = result.findings
            assert finding.detail.startswith(f"{HANDOFF} can't be used (wrong_owner): owner: ")
            assert is_served(result)

    def test_a_directory_that_others_may_write_in_is_said_once(
        self, place: Path, backend: Path
    ) -> None:
        for name in BOTH:
            (place / name).symlink_to(backend)
        place.chmod(0o777)
        [finding] = look().findings
        assert finding.word == "writable_by_others"

    @pytest.mark.parametrize("closed", BOTH)
    @pytest.mark.parametrize("is_tried", [True, False])
    def test_a_socket_that_is_closed(
        self, place: Path, backend: Path, closed: str, is_tried: bool
    ) -> None:
        def look_as_nobody() -> Result:
            if not is_tried:
                return look(identity=Identity(NOBODY, NOBODY, []))
            os.seteuid(NOBODY)
            try:
                return look()
            finally:
                os.seteuid(0)

        [other] = {*BOTH} - {closed}
        with listen_unix(place / closed):
            (place / closed).chmod(0o600)
            assert words(look_as_nobody()) == ["permission_denied"]
            (place / other).symlink_to(backend)
            result = look_as_nobody()
            [finding] = result.findings
            assert finding.word == WORDS[closed]
            assert finding.mend == f"setfacl --modify user:4000:rw {NAME}/{closed}"
            assert is_served(result)
            mend(finding, backend)
            assert look_as_nobody().findings == ()
            # And if it is the same with the other one, the host is not served.
            backend.chmod(0o600)
            (place / closed).chmod(0o600)
            result = look_as_nobody()
            assert len(result.findings) == 2
            assert not is_served(result)


# --- Handshakes


class Taking(TlsBackend):
    """Takes connections of clients, and serves them."""

    def __init__(self, path: Path, context: ssl.SSLContext, *, proxy: bool = False) -> None:
        super().__init__(path, context, proxy=proxy)
        self._wants_header = proxy
        self.found: list[bytes] = []

    def serve(self, connection: socket.socket) -> None:
        with connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        for descriptor in descriptors:  # none is somebody who has only looked
            client = socket.socket(fileno=descriptor)
            first = client.recv(6, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            self.found.append(first)
            if self._wants_header and first != b"PROXY ":
                client.close()
            else:
                super().serve(client)


def test_hands_are_shaken_over_a_connection_that_was_handed_over(
    place: Path, certificates: Certificates
) -> None:
    with Taking(place / HANDOFF, certificates.server_context(NAME)) as backend:
        result = look(handshake=True)
    assert result.findings == ()
    assert result.is_asked
    assert result.expires is not None
    # A handshake record with a ClientHello, as early as that.
    assert {(data[0], data[5]) for data in backend.found} == {(22, 1)}


def test_the_certificate_of_another_host(place: Path, certificates: Certificates) -> None:
    with Taking(place / HANDOFF, certificates.server_context("other.example")):
        [finding] = look(handshake=True).findings
    assert finding.word == "certificate_for_others"


def test_who_takes_no_descriptors(place: Path, certificates: Certificates) -> None:
    with TlsBackend(place / HANDOFF, certificates.server_context(NAME)):
        [finding] = look(handshake=True).findings
    assert finding.word == "closes_at_once"
    assert "it is for tls-socket" in finding.mend


def test_who_waits_for_a_header(place: Path, certificates: Certificates) -> None:
    """There is none, whatever else is in the directory."""
    (place / "send-proxy-v1").touch()
    with Taking(place / HANDOFF, certificates.server_context(NAME), proxy=True):
        [finding] = look(handshake=True).findings
    assert finding.word == "wants_proxy_header"
    assert finding.mend.startswith("# have the backend expect no header")


def test_clients_are_those_of_ours() -> None:
    clients = Clients(PATIENCE)
    stranger = socket.create_connection(clients._listening.getsockname())
    backend, far = unix_pair()
    with stranger, far, clients.connect() as client:
        client.sendall(b"hello")
        clients.give(backend, 0)
        assert backend.fileno() == -1
        _, [descriptor], _, _ = socket.recv_fds(far, 1, 1)
        assert far.recv(1) == b""
        with socket.socket(fileno=descriptor) as given:
            assert given.getpeername() == client.getsockname()
            assert given.recv(5) == b"hello"
        assert stranger.recv(1) == b""
    clients.close()


def test_a_backend_that_has_gone_is_told_of() -> None:
    clients = Clients(PATIENCE)
    backend, far = unix_pair()
    far.close()
    with clients.connect() as client:
        client.sendall(b"hello")
        with pytest.raises(BrokenPipeError):
            clients.give(backend, 0)
        with pytest.raises(ConnectionResetError):
            client.recv(1)  # since nobody has read what it has said
    clients.close()


def test_what_is_never_said_is_not_waited_for() -> None:
    clients = Clients(0.01)
    backend, far = unix_pair()
    with far, clients.connect(), pytest.raises(TimeoutError):
        clients.give(backend, 0)
    with clients.connect() as client:  # of which nobody has the other end any more
        clients.close()
        assert client.recv(1) == b""


# --- The command


def run(hosts: Path, *arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run it in the hosts directory; return the exit code, and what it says."""
    done = subprocess.run(
        [*before, sys.executable, "-P", "-m", "sniproxy_check", *arguments],
        cwd=hosts,
        env=unmeasured() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_option_is_that_of_the_daemon(hosts: Path, place: Path, backend: Path) -> None:
    (place / HANDOFF).symlink_to(backend)
    code, out = run(hosts)
    assert code == 1
    assert "handoff_is_off" in out
    code, out = run(hosts, "--handoff")
    assert code == 0
    assert out.splitlines()[0].split() == [NAME, "served", "handed", "over", "(no", "handshake)"]
    [host] = json.loads(run(hosts, "--handoff", "--json")[1])["hosts"]
    assert (host["served"], host["handed_over"]) == (True, True)


def test_it_is_taken_over_from_a_running_daemon(hosts: Path, place: Path, backend: Path) -> None:
    (place / HANDOFF).symlink_to(backend)
    with start_daemon(hosts, measured=False) as daemon:
        assert run(hosts, "--pid", str(daemon.process.pid))[0] == 1
    with start_daemon(hosts, "--handoff", measured=False) as daemon:
        assert run(hosts, "--pid", str(daemon.process.pid))[0] == 0


def test_who_is_served_without_it_gets_a_note(hosts: Path, place: Path, backend: Path) -> None:
    names = [f"{number}.example" for number in range(5)]
    for name in names:
        for path in BOTH:
            (host_directory(hosts, name) / path).symlink_to(backend)
    (place / TLS).symlink_to(backend)
    code, out = run(hosts)
    assert code == 0
    assert "6 hosts: 6 served, 0 with something to mend" in out
    [note] = re.findall("^note: handoff-socket .*", out, re.MULTILINE)
    assert note.endswith(": 0.example, 1.example, 2.example and 2 more")
    assert "handoff" not in run(hosts, "--handoff")[1]


@needs_root
def test_where_there_is_no_loopback_it_is_said(
    hosts: Path, place: Path, certificates: Certificates
) -> None:
    with Taking(place / HANDOFF, certificates.server_context(NAME)):
        code, out = run(hosts, "--handoff", NAME, before=("unshare", "--net"))
    assert code == 0
    assert f"{NAME}  served" in out
    assert "(no handshake)" in out
    assert re.search("^note: no handshakes .* over loopback", out, re.MULTILINE)


def test_what_is_known_of_one_that_is_handed_over() -> None:
    result = Result("a.example", "a.example", 0, (5, 0), True, 1.5e9, is_handed_over=True)
    [line, *_] = show_table([result], [], is_coloured=False)
    assert line.endswith("handed over, certificate until 2017-07-14")
