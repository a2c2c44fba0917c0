"""The command `sniproxy-check`: as whom it looks, what it says, and how it ends."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sniproxy.service.privileges import Identity
from sniproxy_check.finding import CheckReason, Finding, Result
from sniproxy_check.report import find_hidden, name_users, printable, show_table
from sniproxy_check.view import SEARCH, WRITE, may
from tests.support.backends import TlsBackend, accepted, host_directory, listen_unix
from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, start_daemon, unmeasured
from tests.support.others import TENANT, needs_python_for_all

ROOT = Path(__file__).parents[2]
NAME = "two.example"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")


@pytest.fixture(autouse=True)
def _reachable(hosts: Path) -> None:
    for parent in hosts.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)


@pytest.fixture
def backend(hosts: Path) -> Iterator[socket.socket]:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket") as listening:
        (hosts / NAME / "tls-socket").chmod(0o666)
        yield listening


def run(hosts: Path, *arguments: str, uid: int | None = None) -> tuple[int, str, str]:
    """Run it in the hosts directory; return the exit code, and what it says on both outputs."""
    user = None if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sniproxy_check", *arguments],
        cwd=hosts,
        env=unmeasured() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **(user or {}),  # type: ignore[call-overload]
    )
    return done.returncode, done.stdout, done.stderr


def found(hosts: Path, *arguments: str) -> dict[str, Any]:
    """Return what it says of each host, as JSON."""
    _, out, _ = run(hosts, "--json", *arguments)
    return {each["directory"]: each for each in json.loads(out)["hosts"]}


def test_all_is_well(hosts: Path, backend: socket.socket) -> None:
    code, out, error = run(hosts)
    assert (code, error) == (0, "")
    assert out.splitlines()[0].split() == [NAME, "served", "(no", "handshake)"]
    assert "1 hosts: 1 served, 0 with something to mend" in out


def test_what_is_wrong_and_what_mends_it(hosts: Path, backend: socket.socket) -> None:
    (hosts / "Three.Example").mkdir()
    code, out, _ = run(hosts)
    assert code == 1
    assert "not_canonical" in out
    assert "mv -- Three.Example three.example" in out
    assert "2 hosts: 1 served, 1 with something to mend" in out


def test_named_hosts_shake_hands(hosts: Path, certificates: Certificates) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    with TlsBackend(path, certificates.server_context(NAME)):
        code, out, _ = run(hosts, "TWO.example.", "gone.example")
        assert code == 1
        assert "certificate until 3000-01-01" in out
        assert "gone.example" in out
        assert found(hosts, NAME)[NAME]["handshake"] is True
        assert found(hosts)[NAME]["handshake"] is False
        assert found(hosts, "--handshake")[NAME]["handshake"] is True


def test_hashed(hosts: Path) -> None:
    _, out, _ = run(hosts, "--hashed", NAME)
    [entry] = [word for word in out.split() if len(word) == 64]
    with listen_unix(host_directory(hosts, entry) / "tls-socket"):
        assert found(hosts, "--hashed")[entry]["served"] is True
        assert found(hosts, "--hashed")[entry]["host"] is None
        assert found(hosts)[entry]["findings"][0]["reason"] == "never_matches"


def test_another_directory(hosts: Path, backend: socket.socket, tmp_path: Path) -> None:
    assert run(tmp_path, "-C", str(hosts))[0] == 0
    code, out, error = run(tmp_path, "-C", "nowhere")
    assert (code, out) == (100, "")
    assert "unable to search the hosts directory 'nowhere': No such file" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--colour"], "--colour"),
        (["--as", "nobody-at-all"], "there is no user 'nobody-at-all'"),
        (["--as", "root"], "root would keep its privileges"),
        (["--pid", "x"], "'x' is no process id"),
        (["--pid", "1"], "it is no sniproxy"),
        (["--pid", "4194305"], "unable to look at the process 4194305: No such file"),
    ],
)
def test_who_calls_it_wrongly_hears_how(hosts: Path, arguments: list[str], says: str) -> None:
    code, out, error = run(hosts, *arguments)
    assert (code, out) == (100, "")
    assert says in error
    assert error.startswith("sniproxy-check: fatal: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(hosts: Path, option: str) -> None:
    code, out, error = run(hosts, option)
    assert (code, error) == (0, "")
    assert "sniproxy-check" in out


@pytest.mark.parametrize("name", ["../hosts", ".", "..", "a/b", "*.example", "192.0.2.1", "a b"])
def test_what_is_no_name(hosts: Path, name: str) -> None:
    code, out, _ = run(hosts, "--", name)
    assert code == 1
    assert "invalid_name" in out


def test_a_closed_output_is_an_error(hosts: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sniproxy_check"],
            cwd=hosts,
            env=unmeasured() | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 111
    assert "unable to write standard output: No space left" in done.stderr


@needs_root
class TestAs:
    """Root looks as the daemon does; others are told where their sight ends."""

    def test_as_a_user(self, hosts: Path, backend: socket.socket) -> None:
        (hosts / NAME / "tls-socket").chmod(0o600)
        assert run(hosts, NAME)[1].count("permission_denied") == 0
        code, out, _ = run(hosts, "--as", f"{TENANT}:{TENANT}")
        assert code == 1
        assert "may not be written" in out
        assert f"setfacl --modify user:{TENANT}:rw two.example/tls-socket" in out

    def test_what_the_daemon_may_not_list_is_listed_by_root(self, hosts: Path) -> None:
        """The daemon needs no right to list anything."""
        host_directory(hosts, "Three.Example")
        (host_directory(hosts, NAME) / "tls_socket").touch()
        for path in hosts, hosts / NAME:
            path.chmod(0o711)
        _, out, _ = run(hosts, "--as", f"{TENANT}:{TENANT}")
        assert "two.example/tls_socket does nothing: it has to be called tls-socket" in out
        assert "it should be three.example" in out
        _, out, _ = run(hosts, "--as", f"{TENANT}:{TENANT}", "three.example")
        assert "it should be three.example" in out

    def test_root_is_told_that_it_sees_more(self, hosts: Path) -> None:
        assert "looked as root" in run(hosts)[1]
        assert "looked as root" not in run(hosts, "--as", "nobody")[1]

    @needs_python_for_all
    def test_a_tenant_is_told_what_the_daemon_may_do(
        self, hosts: Path, backend: socket.socket
    ) -> None:
        os.chown(hosts / NAME, TENANT, TENANT)
        (hosts / NAME).chmod(0o700)
        code, out, _ = run(hosts, "--no-owner-check", "--as", "nobody", uid=TENANT)
        assert code == 1
        assert "may not be searched by nobody, by its mode" in out
        assert "was worked out from modes, and not tried" in out
        code, out, _ = run(hosts, "--no-owner-check", uid=TENANT)
        assert "only root can see" in out

    @needs_python_for_all
    def test_a_tenant_who_can_t_list_names_their_hosts(
        self, hosts: Path, backend: socket.socket
    ) -> None:
        hosts.chmod(0o711)
        code, out, error = run(hosts, uid=TENANT)
        assert (code, out) == (111, "")
        assert "name your hosts" in error
        os.chown(hosts / NAME, 0, 0)
        assert "served" not in run(hosts, NAME, uid=TENANT)[2]

    def test_users_are_named(self, hosts: Path) -> None:
        os.chown(host_directory(hosts, NAME), TENANT, TENANT)
        with listen_unix(hosts / NAME / "tls-socket", uid=65534):
            _, out, _ = run(hosts)
        assert f"uid {TENANT}, the listener to uid 65534 (nobody)" in out

    @needs_python_for_all
    def test_as_a_running_daemon(self, hosts: Path, backend: socket.socket) -> None:
        (hosts / NAME / "tls-socket").chmod(0o600)
        with start_daemon(hosts, "--user", "nobody:nogroup", measured=False) as daemon:
            pid = str(daemon.process.pid)
            code, out, _ = run(Path("/"), "--pid", pid)
            assert code == 1
            assert "setfacl --modify user:nobody:rw two.example/tls-socket" in out
            # Another may see as whom it runs.
            code, out, _ = run(hosts, "--pid", pid, "--no-owner-check", uid=TENANT)
            assert code == 1

    def test_in_the_root_directory_of_a_running_daemon(self, hosts: Path, tmp_path: Path) -> None:
        with listen_unix(tmp_path / "outside"):
            (host_directory(hosts, NAME) / "tls-socket").symlink_to(tmp_path / "outside")
            with start_daemon(hosts, "--chroot", "--hashed", measured=False) as daemon:
                pid = str(daemon.process.pid)
                assert found(hosts, "--pid", pid)[NAME]["findings"][0]["reason"] == "never_matches"
            with start_daemon(hosts, "--chroot", measured=False) as daemon:
                pid = str(daemon.process.pid)
                [finding] = found(hosts, "--pid", pid)[NAME]["findings"]
                assert finding["reason"] == "hidden"
                [finding] = found(hosts, "--pid", pid, "--chroot")[NAME]["findings"]
                assert finding["reason"] == "absolute_in_chroot"
            [finding] = found(hosts, "--chroot")[NAME]["findings"]
            assert finding["reason"] == "absolute_in_chroot"

    def test_what_a_backend_says_is_read_by_the_user(self, hosts: Path) -> None:
        """Not by root, whom a fault in a library would hand everything."""
        uids: list[int] = []

        def note() -> None:
            for connection in accepted(listening):
                pid = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                uids.append(int.from_bytes(pid[4:8], sys.byteorder))
                connection.close()

        with listen_unix(host_directory(hosts, NAME) / "tls-socket") as listening:
            (hosts / NAME / "tls-socket").chmod(0o666)
            thread = threading.Thread(target=note)
            thread.start()
            _, out, _ = run(hosts, "--as", f"{TENANT}:{TENANT}", NAME)
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            thread.join()
        assert "closes_at_once" in out
        assert set(uids) == {TENANT}


def test_many_hosts(tmp_path: Path) -> None:
    hosts = tmp_path / "many"
    hosts.mkdir()
    with listen_unix(tmp_path / "backend") as listening:
        stop = threading.Event()

        def drop() -> None:
            for connection in accepted(listening):
                connection.close()
            stop.set()

        thread = threading.Thread(target=drop)
        thread.start()
        for number in range(2_000):
            host_directory(hosts, f"{number}.example")
            (hosts / f"{number}.example" / "tls-socket").symlink_to(tmp_path / "backend")
        code, out, _ = run(hosts)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert code == 0
    assert "2000 hosts: 2000 served, 0 with something to mend" in out


# The parts.


def test_no_escape_sequence_reaches_a_terminal() -> None:
    finding = Finding("never_matches", "\x1b[31m'\udcff'", "mv -- '\x1b]0;x\x07' NAME")
    result = Result("\x1b[2J.example", None, findings=(finding,))
    shown = "\n".join(show_table([result], [], is_coloured=False))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert printable("a\udcff例") == "a\\xff例"


def test_colours() -> None:
    served = Result("a.example", "a.example", 0, (5, 0))
    shown = list(show_table([served], [], is_coloured=True))
    assert "\x1b[32mserved" in shown[0]


def test_what_is_here_and_not_there_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "socket").touch()
    missing = str(tmp_path / "socket")
    finding = Finding("no_socket", "why", "ln -s SOCKET x", missing)
    result = Result("a.example", "a.example", findings=(finding,))
    [hidden] = find_hidden(result, chroot=False).findings
    assert hidden.word is CheckReason.HIDDEN
    assert f"BindReadOnlyPaths={tmp_path}" in hidden.mend
    [absolute] = find_hidden(result, chroot=True).findings
    assert absolute.word is CheckReason.ABSOLUTE_IN_CHROOT
    (tmp_path / "socket").unlink()
    assert find_hidden(result, chroot=False) == result


def test_users_without_a_name_stay_numbers() -> None:
    assert name_users("uid 0, uid 4294967290, gid 0") == "uid 0 (root), uid 4294967290, gid 0"


def test_a_result_survives_the_pipe() -> None:
    finding = Finding("no_socket", "why", "do", "/missing")
    result = Result("a.example", None, 1000, (5, 0), True, 1.5, (finding,))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    nothing = Result("a.example", "a.example")
    assert Result.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


@needs_root
@pytest.mark.parametrize(
    ("rules", "identity", "expected"),
    [
        ([], Identity(4001, 4001, []), False),
        (["u:4001:x"], Identity(4001, 4001, []), True),
        (["u:4001:-"], Identity(4001, 4001, []), False),
        (["g:4002:x"], Identity(4001, 4002, []), True),
        (["g:4002:x"], Identity(4001, 4001, [4002]), True),
        (["u:4001:x", "m::-"], Identity(4001, 4001, []), False),
        (["g:4002:-", "g:4009:x", "o::x"], Identity(4001, 4002, []), False),
        # Where the mask has nothing, the kernel does not look at the list.
        (["g:4002:-", "o::x"], Identity(4001, 4002, []), True),
        (["u:4001:-", "o::x"], Identity(4005, 4005, []), True),
        ([], Identity(4003, 4001, []), True),  # the owner
        ([], Identity(0, 0, []), True),
    ],
)
def test_rights_are_worked_out_as_the_kernel_does(
    tmp_path: Path, rules: list[str], identity: Identity, expected: bool
) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    os.chown(directory, 4003, 4004)
    directory.chmod(0o700)
    for rule in rules:
        subprocess.run(["setfacl", "--modify", rule, str(directory)], check=True)
    status = directory.lstat()
    assert may(identity, str(directory), status, SEARCH) is expected
    # And the kernel's own word, by a child that has become that user.
    tried = subprocess.run(
        ["test", "-x", str(directory)],
        user=identity.uid,
        group=identity.gid,
        extra_groups=identity.groups,
        check=False,
    )
    assert (tried.returncode == 0) is expected
    assert may(identity, str(directory), status, WRITE) is (identity.uid in (0, 4003))


def test_daemons_are_known_by_their_command_line(daemon: Daemon, hosts: Path) -> None:
    assert run(hosts, "--pid", str(daemon.process.pid))[0] == 0
