"""As root, into the hosts directory as the root directory, and no longer root.

The hosts directory of these tests holds hosts and nothing else: no library, no /dev, no /etc.
"""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blake3 import blake3

from sniproxy.wire import Alert, alert_record
from tests.support import hellos
from tests.support.backends import TlsBackend, host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, eventually, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask
from tests.support.sockets import receive_all
from tests.support.supervisor import Supervisor
from tests.test_command import only_line, run

NOBODY, NOGROUP = 65_534, 65_534
A_USER, A_GROUP = 20_001, 20_002
CONFINED = ("--chroot", "--user", "nobody")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root directory")


@pytest.fixture
def daemon(hosts: Path) -> Iterator[Daemon]:
    with start_daemon(hosts, *CONFINED, measured=False) as daemon:
        yield daemon


class OpenGreeter(Greeter):
    """A backend that lets anybody connect."""

    def __init__(self, path: Path, word: bytes, uid: int | None = None) -> None:
        super().__init__(path, word, uid)
        path.chmod(0o666)


def greeter(hosts: Path, name: str, word: bytes) -> OpenGreeter:
    return OpenGreeter(host_directory(hosts, name) / "tls-socket", word)


def status(pid: int) -> dict[str, list[str]]:
    """Return what proc(5) says of a process."""
    lines = Path("/proc", str(pid), "status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def assert_is(pid: int, uid: int, gid: int, groups: list[int]) -> None:
    """Real, effective, saved and file system ids; and no capability of any kind."""
    it = status(pid)
    assert it["Uid"] == [str(uid)] * 4
    assert it["Gid"] == [str(gid)] * 4
    assert sorted(map(int, it["Groups"])) == groups
    for kind in "CapInh", "CapPrm", "CapEff", "CapAmb":
        assert int(it[kind][0], 16) == 0


def test_what_it_is_then(daemon: Daemon) -> None:
    pid = daemon.process.pid
    assert_is(pid, NOBODY, NOGROUP, [NOGROUP])
    assert os.path.samestat(os.stat(f"/proc/{pid}/root"), daemon.hosts.stat())
    assert os.path.samestat(os.stat(f"/proc/{pid}/cwd"), daemon.hosts.stat())


def test_workers_are_what_it_is(hosts: Path) -> None:
    with (
        start_daemon(hosts, *CONFINED, "--workers", "2", measured=False) as daemon,
        greeter(hosts, "a.example", b"a"),
    ):
        eventually(lambda: len(daemon.workers()) == 2)
        for pid in daemon.process.pid, *daemon.workers():
            assert_is(pid, NOBODY, NOGROUP, [NOGROUP])
        assert ask(daemon, "a.example") == b"a"
        killed = daemon.workers()[0]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: len(set(daemon.workers()) - {killed}) == 2)
        assert ask(daemon, "a.example") == b"a"


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups"),
    [
        ("nobody", NOBODY, NOGROUP, [NOGROUP]),
        (str(NOBODY), NOBODY, NOGROUP, [NOGROUP]),
        ("nobody:daemon", NOBODY, 1, [1]),
        (f"{A_USER}:{A_GROUP}", A_USER, A_GROUP, [A_GROUP]),
    ],
)
def test_a_user_without_a_new_root(
    hosts: Path, user: str, uid: int, gid: int, groups: list[int]
) -> None:
    with start_daemon(hosts, "--user", user, measured=False) as daemon:
        assert_is(daemon.process.pid, uid, gid, groups)
        assert os.path.samestat(os.stat(f"/proc/{daemon.process.pid}/root"), os.stat("/"))
        with greeter(hosts, "a.example", b"a"):
            assert ask(daemon, "a.example") == b"a"


def test_real_tls(daemon: Daemon, certificates: Certificates) -> None:
    path = host_directory(daemon.hosts, "a.example") / "tls-socket"
    with TlsBackend(path, certificates.server_context("a.example")):
        path.chmod(0o666)
        page = subprocess.run(
            [
                *("curl", "--silent", "--show-error", "--write-out", "%{http_code}"),
                *("--cacert", str(certificates.authority)),
                *("--connect-to", f"a.example:443:127.0.0.1:{daemon.address[1]}"),
                "https://a.example/",
            ],
            capture_output=True,
            timeout=10,
        )
    assert (page.stdout, page.returncode) == (b"200", 0), page.stderr


def test_names_of_every_kind(daemon: Daemon) -> None:
    longest = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    assert len(longest) == 253
    with ExitStack() as backends:
        for name in "one.example", "xn--sr8hvo.ws", longest:
            backends.enter_context(greeter(daemon.hosts, name, name[:3].encode()))
        assert ask(daemon, "one.example") == b"one"
        assert ask(daemon, "ONE.Example.") == b"one"
        assert ask(daemon, "xn--sr8hvo.ws") == b"xn-"
        assert ask(daemon, longest) == b"aaa"
        for name in "two.example", "192.0.2.1", "one.example/..", "..", "\N{SPIDER WEB}.ws":
            assert ask(daemon, name) == UNRECOGNIZED_NAME
    assert ask(daemon, "one.example") == UNRECOGNIZED_NAME  # nobody is left


def test_hashed_names(hosts: Path) -> None:
    with (
        start_daemon(hosts, *CONFINED, "--hashed", measured=False) as daemon,
        greeter(hosts, blake3(b"one.example").hexdigest(), b"one"),
        greeter(hosts, "two.example", b"two"),
    ):
        assert ask(daemon, "one.example") == b"one"
        assert ask(daemon, "two.example") == UNRECOGNIZED_NAME


def test_links_lead_nowhere_but_into_the_root(daemon: Daemon, tmp_path: Path) -> None:
    hosts = daemon.hosts
    with (
        greeter(hosts, "one.example", b"inside"),
        OpenGreeter(tmp_path / "tls-socket", b"outside"),
    ):
        (hosts / "relative.example").symlink_to("one.example")
        (hosts / "absolute.example").symlink_to("/one.example")
        (hosts / "above.example").symlink_to("../../../one.example")
        (hosts / "outside.example").symlink_to(tmp_path)
        (host_directory(hosts, "linked.example") / "tls-socket").symlink_to(
            "../one.example/tls-socket"
        )
        for name in "relative", "absolute", "above", "linked":
            assert ask(daemon, f"{name}.example") == b"inside"
        assert ask(daemon, "outside.example") == UNRECOGNIZED_NAME


def test_a_proxy_header(daemon: Daemon) -> None:
    with greeter(daemon.hosts, "one.example", b"one") as backend:
        (daemon.hosts / "one.example" / "send-proxy-v1").touch()
        assert ask(daemon, "one.example") == b"one"
        assert backend.heard[0].startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 ")


def test_each_alert(daemon: Daemon) -> None:
    flights = {
        Alert.UNEXPECTED_MESSAGE: b"GET / HTTP/1.1\r\n\r\n",
        Alert.RECORD_OVERFLOW: bytes([22, 3, 1, 0x40, 1]),
        Alert.DECODE_ERROR: bytes([22, 3, 1, 0, 0]),
        Alert.MISSING_EXTENSION: hellos.genuine_hello(None),
        Alert.INTERNAL_ERROR: hellos.record(hellos.handshake(b"", length=70_000)),
    }
    for alert, flight in flights.items():
        with daemon.connect() as client:
            client.sendall(flight)
            assert receive_all(client) == alert_record(alert)


def test_no_permission(daemon: Daemon) -> None:
    """It is not root any more who looks."""
    directory = host_directory(daemon.hosts, "one.example")
    with Greeter(directory / "tls-socket", b"one"):
        (directory / "tls-socket").chmod(0o600)
        assert ask(daemon, "one.example") == UNRECOGNIZED_NAME
        daemon.wait_for_log("reason=permission_denied")
        (directory / "tls-socket").chmod(0o666)
        directory.chmod(0o700)
        assert ask(daemon, "one.example") == UNRECOGNIZED_NAME


def test_a_drain(hosts: Path, supervisor: Supervisor) -> None:
    with start_daemon(hosts, *CONFINED, env=supervisor.environment, measured=False) as daemon:
        assert supervisor.hear("READY=1")
        path = host_directory(hosts, "one.example") / "tls-socket"
        with listen_unix(path) as listening, daemon.connect() as client:
            path.chmod(0o666)
            client.sendall(hellos.hello_bytes("one.example"))
            connection, _ = listening.accept()
            with connection:
                daemon.signal(signal.SIGHUP)
                assert supervisor.hear("STOPPING=1")
                with pytest.raises(ConnectionRefusedError):
                    daemon.connect()
                connection.sendall(b"late")
                assert client.recv(4) == b"late"
                client.shutdown(socket.SHUT_WR)
            assert daemon.wait() == 0
        assert "cut=0" in daemon.wait_for_log("drained")


def test_the_log_goes_on(daemon: Daemon) -> None:
    assert ask(daemon, "one.example") == UNRECOGNIZED_NAME
    line = daemon.wait_for_log("refused")
    assert "name=one.example reason=no_such_host alert=112" in line


def test_hosts_it_may_not_search(hosts: Path) -> None:
    hosts.chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = only_line(run(*CONFINED, stdin=listening.fileno(), cwd=hosts), 100)
    assert "unable to search the hosts directory" in line
    assert line.endswith("Permission denied")


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("no-such-user", "there is no user 'no-such-user'"),
        ("nobody:no-such-group", "there is no group 'no-such-group'"),
        ("", "there is no user ''"),
        ("nobody:", "there is no group ''"),
        ("4294967295:1", "there is no user '4294967295'"),
        (str(A_USER), "number 20001 is no known user"),
        ("root", "root would keep its privileges"),
        ("0:1", "root would keep its privileges"),
        ("nobody:root", "root's group would keep its permissions"),
    ],
)
def test_a_user_that_is_none_is_refused(hosts: Path, user: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = only_line(run("--user", user, stdin=listening.fileno(), cwd=hosts), 100)
    assert f"unable to become the user {user!a}: {reason}" in line


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--chroot"], "make the working directory the root directory"),
        (["--user", "daemon"], "become the user 'daemon'"),
    ],
)
def test_only_root_can(hosts: Path, options: list[str], what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        result = run(
            *options,
            stdin=listening.fileno(),
            cwd=hosts,
            under=("setpriv", "--reuid", "nobody", "--clear-groups"),
        )
    line = only_line(result, 111)
    assert line == f"sniproxy: fatal: unable to {what}: Operation not permitted"


@pytest.mark.parametrize(
    ("securebits", "capabilities"),
    [("+no_setuid_fixup", ""), ("-noroot", "+sys_chroot,+setuid,+setgid,+dac_override")],
    ids=["securebits", "ambient capabilities"],
)
def test_no_capability_outlives_the_change_of_the_user(
    hosts: Path, securebits: str, capabilities: str
) -> None:
    """Those, too, that who started us has made to."""
    under = ["setpriv", "--securebits", securebits]
    if capabilities:
        under += ["--inh-caps", capabilities, "--ambient-caps", capabilities]
    with start_daemon(hosts, *CONFINED, under=tuple(under), measured=False) as daemon:
        assert_is(daemon.process.pid, NOBODY, NOGROUP, [NOGROUP])


def test_an_ordinary_user_may_be_allowed_to_change_the_root(hosts: Path) -> None:
    """By CAP_SYS_CHROOT, which would lead out again, and so does not stay."""
    capability = "+sys_chroot"
    under = (
        *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
        *("--inh-caps", capability, "--ambient-caps", capability),
    )
    with start_daemon(hosts, "--chroot", under=under, measured=False) as daemon:
        assert_is(daemon.process.pid, NOBODY, NOGROUP, [])
        assert os.path.samestat(os.stat(f"/proc/{daemon.process.pid}/root"), hosts.stat())


def test_root_keeps_what_it_needs_to_enter_the_directories_of_tenants(hosts: Path) -> None:
    """With --chroot alone: capabilities go with the user, not with the root directory."""
    directory = host_directory(hosts, "a.example")
    with (
        start_daemon(hosts, "--chroot", "--no-owner-check", measured=False) as daemon,
        Greeter(directory / "tls-socket", b"a"),
    ):
        (directory / "tls-socket").chmod(0o600)
        directory.chmod(0o700)
        for path in directory / "tls-socket", directory:
            os.chown(path, A_USER, A_GROUP)
        assert ask(daemon, "a.example") == b"a"
        assert int(status(daemon.process.pid)["CapEff"][0], 16) != 0


def test_no_open_directory_leads_out(hosts: Path, tmp_path: Path) -> None:
    """One that a supervisor has left open. What is not a directory may stay, such as a lock."""
    (tmp_path / "lock").touch()
    under = ("sh", "-c", 'exec 7</ 8<"$1"; shift; exec "$@"', "sh", str(tmp_path / "lock"))
    with start_daemon(hosts, *CONFINED, under=under, measured=False) as daemon:
        found = [fd.stat() for fd in Path(f"/proc/{daemon.process.pid}/fd").iterdir()]
    directories = [each for each in found if stat.S_ISDIR(each.st_mode)]
    assert all(os.path.samestat(each, hosts.stat()) for each in directories)
    assert any(os.path.samestat(each, (tmp_path / "lock").stat()) for each in found)


def test_no_capability_outlives_it_in_the_old_root_directory_either(hosts: Path) -> None:
    under = ("setpriv", "--securebits", "+no_setuid_fixup")
    with start_daemon(hosts, "--user", "nobody", under=under, measured=False) as daemon:
        assert_is(daemon.process.pid, NOBODY, NOGROUP, [NOGROUP])
