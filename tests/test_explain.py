"""What stood in the way of a lookup, in words: step, path, mode, owner, and where links lead."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sniproxy.explain import Cause, Fault, explain, go
from sniproxy.hosts import HostError, HostReason, HostsDirectory, Step
from sniproxy_hostname import Hostname, directory_namer
from tests.support.backends import host_directory, listen_unix

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")

NAME = Hostname(b"a.example")
NOBODY, TENANT, OTHER = 4000, 4001, 4002


@pytest.fixture
def directory(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostsDirectory]:
    for parent in hosts.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    monkeypatch.chdir(hosts)
    directory = HostsDirectory(directory_namer(hashed=False))
    yield directory
    directory.close()


def fault(directory: HostsDirectory, uid: int | None = None) -> Fault:
    """Look the host up, as a user, and say what stood in the way."""
    before = os.geteuid()
    if uid is not None:
        os.seteuid(uid)
    try:
        with pytest.raises(HostError) as caught:
            directory.connect(NAME)
        return explain(directory, caught.value)
    finally:
        os.seteuid(before)


def described(path: Path) -> str:
    """Return mode and owner as they are to be told."""
    status = path.lstat()
    return f"mode {status.st_mode & 0o7777:04o}, uid {status.st_uid}, gid {status.st_gid}"


def test_no_such_host(directory: HostsDirectory) -> None:
    found = fault(directory)
    assert (found.step, found.cause) == (Step.HOST, Cause.MISSING)
    assert found.owner is None
    assert found.detail == "host: No such file or directory"


def test_a_host_that_is_a_file(directory: HostsDirectory, hosts: Path) -> None:
    (hosts / NAME).touch(0o640)
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NO_SUCH_HOST, Cause.NOT_A_DIRECTORY)
    described_file = described(hosts / NAME)
    assert found.detail == f"host: a.example (regular file, {described_file}) is no directory"


def test_a_host_that_leads_to_nothing(
    directory: HostsDirectory, hosts: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (hosts / NAME).symlink_to(tmp_path / "home" / "gone" / "site")
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NO_SUCH_HOST, Cause.DANGLING)
    home = tmp_path / "home"
    assert found.detail == (f"host: a.example -> {home}/gone/site: there is no {home}/gone")
    assert found.owner == home.stat().st_uid


def test_links_that_lead_on_are_all_told(directory: HostsDirectory, hosts: Path) -> None:
    for number in range(5):
        (hosts / f"link{number}").symlink_to(f"link{number + 1}")
    (hosts / NAME).symlink_to("link0")
    found = fault(directory)
    assert found.detail == (
        "host: a.example -> link0, link0 -> link1, link1 -> link2, ...: there is no such entry"
    )


def test_a_loop_of_links(directory: HostsDirectory, hosts: Path) -> None:
    (hosts / NAME).symlink_to(NAME)
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.LINK_LOOP, Cause.LINK_LOOP)
    assert found.detail.startswith("host: a.example -> a.example, a.example -> a.example, ")


@needs_root
def test_a_directory_on_the_way_that_may_not_be_searched(
    directory: HostsDirectory, hosts: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / "site").mkdir(parents=True)
    os.chown(home, TENANT, OTHER)
    home.chmod(0o700)
    (hosts / NAME).symlink_to(home / "site")
    found = fault(directory, NOBODY)
    assert (found.reason, found.cause) == (HostReason.PERMISSION_DENIED, Cause.NOT_SEARCHABLE)
    assert found.culprit is not None
    assert found.culprit.path == str(home)
    assert found.owner == TENANT
    assert found.detail == (
        f"host: a.example -> {home}/site: {home} (directory, {described(home)}) may not be searched"
    )
    assert found.detail_for_owner == found.detail


@needs_root
def test_a_host_that_may_not_be_searched(directory: HostsDirectory, hosts: Path) -> None:
    home = host_directory(hosts, NAME)
    os.chown(home, TENANT, TENANT)
    home.chmod(0o700)
    found = fault(directory, NOBODY)
    assert (found.reason, found.cause) == (HostReason.PERMISSION_DENIED, Cause.NOT_SEARCHABLE)
    assert found.owner == TENANT
    assert found.detail == f"host: a.example (directory, {described(home)}) may not be searched"


@needs_root
def test_a_hosts_directory_that_may_not_be_searched(directory: HostsDirectory, hosts: Path) -> None:
    host_directory(hosts, NAME)
    hosts.chmod(0o700)
    found = fault(directory, NOBODY)
    assert (found.reason, found.step) == (HostReason.HOSTS_NOT_SEARCHABLE, Step.HOSTS)
    assert found.detail == "hosts: unable to search the hosts directory: Permission denied"


@needs_root
def test_a_socket_that_may_not_be_written(directory: HostsDirectory, hosts: Path) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    with listen_unix(path):
        path.chmod(0o600)
        os.chown(path, TENANT, OTHER)
        found = fault(directory, NOBODY)
    assert (found.reason, found.cause) == (HostReason.PERMISSION_DENIED, Cause.NOT_WRITABLE)
    assert found.detail == (
        f"socket: a.example/tls-socket (socket, {described(path)}) may not be written"
    )


def test_no_socket(directory: HostsDirectory, hosts: Path) -> None:
    host_directory(hosts, NAME)
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NO_SOCKET, Cause.MISSING)
    assert found.detail == "socket: there is no a.example/tls-socket"
    assert found.owner == hosts.stat().st_uid


def test_a_socket_that_leads_to_nothing(directory: HostsDirectory, hosts: Path) -> None:
    (host_directory(hosts, NAME) / "tls-socket").symlink_to("/run/nowhere/socket")
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NO_SOCKET, Cause.DANGLING)
    assert found.detail == (
        "socket: a.example/tls-socket -> /run/nowhere/socket: there is no /run/nowhere"
    )


def test_a_socket_behind_a_file(directory: HostsDirectory, hosts: Path) -> None:
    (hosts / "file").touch()
    (host_directory(hosts, NAME) / "tls-socket").symlink_to("../file/socket")
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NO_SOCKET, Cause.NOT_A_DIRECTORY)
    assert "is no directory" in found.detail


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.touch(), "regular file"),
        (lambda path: path.mkdir(), "directory"),
        (os.mkfifo, "FIFO"),
    ],
)
def test_what_is_no_socket(
    directory: HostsDirectory, hosts: Path, make: Callable[[Path], None], what: str
) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    make(path)
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NOT_LISTENING, Cause.NOT_A_SOCKET)
    assert found.detail == f"socket: a.example/tls-socket ({what}, {described(path)}) is no socket"


@needs_root
def test_what_is_no_socket_and_may_not_be_written_either(
    directory: HostsDirectory, hosts: Path
) -> None:
    """The kernel looks at the mode first, and says no more."""
    path = host_directory(hosts, NAME) / "tls-socket"
    path.touch(0o644)
    found = fault(directory, NOBODY)
    assert (found.reason, found.cause) == (HostReason.PERMISSION_DENIED, Cause.NOT_A_SOCKET)
    assert found.detail == (
        f"socket: a.example/tls-socket (regular file, {described(path)}) is no socket, "
        "and may not be written"
    )


def test_nobody_listens(directory: HostsDirectory, hosts: Path, tmp_path: Path) -> None:
    listen_unix(tmp_path / "stale").close()
    path = host_directory(hosts, NAME) / "tls-socket"
    path.symlink_to(tmp_path / "stale")
    found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.NOT_LISTENING, Cause.NOBODY_LISTENS)
    stale = tmp_path / "stale"
    assert found.detail == (
        f"socket: a.example/tls-socket -> {stale} (socket, {described(stale)}): nobody listens"
    )


def test_a_datagram_socket(directory: HostsDirectory, hosts: Path) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        found = fault(directory)
    assert (found.reason, found.cause) == (
        HostReason.NOT_A_STREAM_SOCKET,
        Cause.NOT_A_STREAM_SOCKET,
    )
    assert found.detail.endswith("is no stream socket")


@needs_root
def test_a_listener_of_somebody_else(directory: HostsDirectory, hosts: Path) -> None:
    home = host_directory(hosts, NAME)
    os.chown(home, TENANT, TENANT)
    with listen_unix(home / "tls-socket"):
        found = fault(directory)
    assert (found.reason, found.cause) == (HostReason.WRONG_OWNER, Cause.OTHER_OWNER)
    assert found.detail == (
        f"owner: a.example (directory, {described(home)}): the directory belongs to uid {TENANT}, "
        "the listener to uid 0"
    )


@needs_root
def test_a_directory_of_root_in_which_others_may_write(
    directory: HostsDirectory, hosts: Path
) -> None:
    home = host_directory(hosts, NAME)
    home.chmod(0o777)
    with listen_unix(home / "tls-socket"):
        found = fault(directory)
    assert (found.reason, found.cause) == (
        HostReason.WRITABLE_BY_OTHERS,
        Cause.WRITABLE_BY_OTHERS,
    )
    assert "mode 0777" in found.detail


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o770])
def test_what_is_behind_a_door_of_somebody_else_the_owner_does_not_hear(
    directory: HostsDirectory, hosts: Path, tmp_path: Path, mode: int
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    os.chown(closed, OTHER, OTHER)
    closed.chmod(mode)
    home = host_directory(hosts, NAME)
    os.chown(home, TENANT, TENANT)
    (home / "tls-socket").symlink_to(closed / "secret")
    found = fault(directory)  # root sees what is there
    assert found.reason is HostReason.NO_SOCKET
    assert found.reason_for_owner is HostReason.PERMISSION_DENIED
    assert found.detail_for_owner == (
        f"socket: a.example/tls-socket leads through {closed}, which is closed to you"
    )
    os.chown(closed, TENANT, TENANT)  # their own
    assert fault(directory).detail_for_owner == fault(directory).detail


def test_the_way_is_that_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "up").symlink_to("../a/./b//..")
    (tmp_path / "a" / "b" / "file").touch()
    way = go("a/up/b/file")
    assert way.missing is None
    assert way.last is not None
    assert os.path.samestat(way.last.status, os.stat("a/up/b/file"))
    assert way.links == [("a/up", "../a/./b//..")]


def test_no_more_links_are_followed_than_the_kernel_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(50):
        (tmp_path / str(number)).symlink_to(str(number + 1))
    way = go("0")
    assert len(way.links) == 40
    assert way.missing == "40"


@pytest.mark.parametrize("target", ["a/../" * 800, "./" * 1900 + "a/../" * 19, "a/" * 2000])
def test_a_way_that_means_nothing_is_not_gone_to_its_end(
    directory: HostsDirectory, hosts: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant could have the daemon look at components for seconds, again and again."""
    home = host_directory(hosts, NAME)
    (home / "a").mkdir()
    for number in range(30):
        (home / f"{number}").symlink_to(f"{target}{number + 1}")
    (home / "tls-socket").symlink_to("0")
    looks = 0
    look = os.lstat

    def count(path: str) -> os.stat_result:
        nonlocal looks
        looks += 1
        return look(path)

    with monkeypatch.context() as patch:
        patch.setattr("sniproxy.explain.os.lstat", count)
        found = fault(directory)
    assert looks <= 200
    if looks > 99:
        # What is farther on nobody has looked at.
        assert found.reason_for_owner is HostReason.PERMISSION_DENIED
        assert found.detail_for_owner == "socket: a.example/tls-socket leads too far"


def test_what_is_missing_behind_a_link_is_missing_and_the_link_not_dangling(
    directory: HostsDirectory, hosts: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir(mode=0o755)
    (hosts / NAME).symlink_to(tmp_path / "site")
    found = fault(directory)
    assert found.cause is Cause.MISSING
    site = tmp_path / "site"
    assert found.detail == (
        f"socket: a.example/tls-socket, a.example -> {site}: there is no {site}/tls-socket"
    )


@pytest.mark.parametrize("target", ["/proc/self/cwd/x", "/proc/self/exe", "/proc/self/fd/0"])
def test_what_procfs_shows_of_us_is_not_told(
    directory: HostsDirectory, hosts: Path, target: str
) -> None:
    (host_directory(hosts, NAME) / "tls-socket").symlink_to(target)
    found = fault(directory)
    assert found.reason_for_owner is HostReason.PERMISSION_DENIED
    assert found.detail_for_owner == "socket: a.example/tls-socket leads too far"
    assert str(hosts) not in found.detail
