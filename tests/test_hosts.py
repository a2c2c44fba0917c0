"""The lookup: what is found, what is not, and whom it trusts."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.hosts import (
    HOLD_SECONDS,
    MOST_HOLD_SECONDS,
    HostError,
    HostReason,
    HostsDirectory,
    HostsState,
)
from sniproxy.log import Log
from sniproxy.serve import watch_hosts
from sniproxy_hostname import Hostname, InvalidHostname, directory_namer
from tests.support.backends import host_directory, listen_unix
from tests.support.faults import no_way_back
from tests.support.handing_over import places_left

NAME = Hostname(b"example.com")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")

TENANT, OTHER = 54321, 54322


@pytest.fixture
def directory(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostsDirectory]:
    hosts.chmod(0o755)
    monkeypatch.chdir(hosts)
    directory = HostsDirectory(directory_namer(hashed=False))
    yield directory
    assert Path.cwd() == hosts
    directory.close()


# --- whether it is still where it was


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostsDirectory]:
    """A hosts directory that may be moved: the working directory of another path."""
    (tmp_path / "apart").mkdir()
    monkeypatch.chdir(tmp_path / "apart")
    directory = HostsDirectory(directory_namer(hashed=False))
    yield directory
    directory.close()
    os.chdir("/")


def test_a_directory_is_in_place(apart: HostsDirectory, tmp_path: Path) -> None:
    assert apart.path == os.fsencode(tmp_path / "apart")
    (tmp_path / "apart/new.example").mkdir()
    assert apart.state() is HostsState.IN_PLACE


def test_a_directory_is_moved_replaced_and_back(apart: HostsDirectory, tmp_path: Path) -> None:
    (tmp_path / "apart").rename(tmp_path / "old")
    assert apart.state() is HostsState.MOVED
    (tmp_path / "apart").mkdir()
    assert apart.state() is HostsState.REPLACED
    (tmp_path / "apart").rmdir()
    (tmp_path / "apart").touch()
    assert apart.state() is HostsState.REPLACED
    (tmp_path / "apart").unlink()
    (tmp_path / "old").rename(tmp_path / "apart")
    assert apart.state() is HostsState.IN_PLACE


def test_a_directory_is_removed(apart: HostsDirectory, tmp_path: Path) -> None:
    (tmp_path / "apart").rmdir()
    assert apart.state() is HostsState.REMOVED


@needs_root
def test_where_it_cannot_be_looked_for_nothing_is_known(
    apart: HostsDirectory, tmp_path: Path
) -> None:
    (tmp_path / "apart").rename(tmp_path / "old")
    tmp_path.chmod(0o700)
    os.seteuid(TENANT)
    try:
        assert apart.state() is None
    finally:
        os.seteuid(0)


@trio_test
async def test_the_log_tells_of_it_once(
    clock: MockClock,
    apart: HostsDirectory,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied")

    log = Log()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_hosts, apart, log)
        await trio.sleep(20)
        assert capfd.readouterr().err == ""
        (tmp_path / "apart").rename(tmp_path / "old")
        await trio.sleep(20)
        told = f"hosts_directory path={tmp_path}/apart state="
        assert capfd.readouterr().err == f"sniproxy: {told}moved\n"
        with monkeypatch.context() as patch:
            patch.setattr("sniproxy.hosts.os.stat", refuse)
            await trio.sleep(20)
            assert capfd.readouterr().err == ""
        await trio.sleep(20)
        assert capfd.readouterr().err == ""
        (tmp_path / "old").rename(tmp_path / "apart")
        await trio.sleep(20)
        assert capfd.readouterr().err == f"sniproxy: {told}in_place\n"
        nursery.cancel_scope.cancel()


def listen_at(path: Path) -> socket.socket:
    return listen_unix(path)


def listen_as(uid: int, path: Path) -> socket.socket:
    """Listen as another user: SO_PEERCRED is about who called listen(2)."""
    os.seteuid(uid)
    try:
        return listen_unix(path)
    finally:
        os.seteuid(0)


def check_connects(directory: HostsDirectory, host: Hostname | None = NAME) -> int:
    backend, proxy, *_ = directory.connect(host)
    backend.close()
    return proxy


def reason(directory: HostsDirectory, host: Hostname | None = NAME) -> HostReason:
    with pytest.raises(HostError) as caught:
        directory.connect(host)
    return caught.value.reason


def test_the_words_of_the_log_are_the_names_of_the_reasons() -> None:
    assert all(reason == reason.name.lower() for reason in HostReason)


def test_an_error_says_in_more_words_what_it_is(directory: HostsDirectory) -> None:
    with pytest.raises(HostError, match=r"^No such file or directory$"):
        directory.connect(NAME)


def test_a_host_is_found_at_the_moment_it_is_there(directory: HostsDirectory, hosts: Path) -> None:
    assert reason(directory) is HostReason.NO_SUCH_HOST
    home = host_directory(hosts, NAME)
    assert reason(directory) is HostReason.NO_SOCKET
    with listen_at(home / "tls-socket"):
        assert not check_connects(directory)
        (home / "send-proxy-v1").touch()
        assert check_connects(directory)
        (home / "send-proxy-v1").unlink()
        assert not check_connects(directory)
    assert reason(directory) is HostReason.NOT_LISTENING
    home.rename(hosts / "elsewhere")
    assert reason(directory) is HostReason.NO_SUCH_HOST


def test_who_wants_both_headers_gets_version_2(directory: HostsDirectory, hosts: Path) -> None:
    home = host_directory(hosts, NAME)
    with listen_at(home / "tls-socket"):
        (home / "send-proxy-v1").touch()
        assert check_connects(directory) == 1
        (home / "send-proxy-v2").symlink_to("anything")
        assert check_connects(directory) == 2
        (home / "send-proxy-v1").unlink()
        assert check_connects(directory) == 2


# --- How long clients are kept


def held_for(directory: HostsDirectory) -> float:
    with pytest.raises(HostError) as caught:
        directory.connect(NAME)
    return caught.value.hold


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30\n", 30),
        (" 2.5 ", 2.5),
        ("0", 0),
        ("000000001", 1),
        ("999999999", MOST_HOLD_SECONDS),
        # What is no number of seconds.
        *((text, HOLD_SECONDS) for text in ("", "ten", "-1", "1e3", "5 s", "1,5", "\u0663", "nan")),
        ("1" * 10, HOLD_SECONDS),
        (" " * 100 + "5", HOLD_SECONDS),
    ],
)
def test_a_file_or_a_link_says_how_long(
    directory: HostsDirectory, hosts: Path, text: str, seconds: float
) -> None:
    home = host_directory(hosts, NAME)
    assert held_for(directory) == 0
    (home / "hold").write_text(text)
    assert held_for(directory) == seconds
    if text:
        (home / "hold").unlink()
        (home / "hold").symlink_to(text)
        assert held_for(directory) == seconds


def test_what_is_no_file_is_not_waited_for(directory: HostsDirectory, hosts: Path) -> None:
    home = host_directory(hosts, NAME)
    hold = home / "hold"
    makes: list[Callable[[], None]] = [
        hold.mkdir,
        lambda: os.mkfifo(hold),
        lambda: hold.symlink_to("/dev/zero"),
    ]
    for make in makes:
        make()
        assert held_for(directory) == HOLD_SECONDS
        hold.rename(hosts / f"old{len(list(hosts.iterdir()))}")


def test_what_may_pass_is_waited_for_and_nothing_else(
    directory: HostsDirectory, hosts: Path
) -> None:
    home = host_directory(hosts, NAME)
    path = home / "tls-socket"
    (home / "hold").write_text("30")
    assert held_for(directory) == 30  # no_socket
    listen_at(path).close()
    assert held_for(directory) == 30  # not_listening
    path.unlink()
    with listen_unix(path, backlog=0):
        directory.connect(NAME)[0].close()
        assert held_for(directory) == 30  # backend_busy
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(path))
        assert held_for(directory) == 0
    path.unlink()
    path.symlink_to(path)
    assert held_for(directory) == 0
    path.unlink()
    with listen_at(path):
        backend, _, holds, *_ = directory.connect(NAME)
        backend.close()
        assert holds


# --- Names that no host has


def served_by(directory: HostsDirectory, host: Hostname | None) -> str:
    backend, *_, entry = directory.connect(host)
    backend.close()
    return entry


BELOW = Hostname(b"deep.www.example.com")


def test_names_below_that_of_a_host(directory: HostsDirectory, hosts: Path) -> None:
    with ExitStack() as stack:
        for entry in "_.com", "_.example.com", "_.www.example.com", "deep.www.example.com":
            stack.enter_context(listen_at(host_directory(hosts, entry) / "tls-socket"))
            assert served_by(directory, BELOW) == entry
        # It is for those below, and not for the name itself.
        assert served_by(directory, Hostname(b"www.example.com")) == "_.example.com"
        assert reason(directory, Hostname(b"com")) is HostReason.NO_SUCH_HOST
        assert reason(directory, Hostname(b"xexample.org")) is HostReason.NO_SUCH_HOST


def test_a_host_that_is_there_and_out_of_order_is_not_served_by_another(
    directory: HostsDirectory, hosts: Path
) -> None:
    with ExitStack() as stack:
        for entry in "_.example.com", "_unknown":
            stack.enter_context(listen_at(host_directory(hosts, entry) / "tls-socket"))
        host_directory(hosts, "www.example.com")
        assert reason(directory, Hostname(b"www.example.com")) is HostReason.NO_SOCKET
        (hosts / "gone.example.com").symlink_to("nowhere")
        assert reason(directory, Hostname(b"gone.example.com")) is HostReason.NO_SUCH_HOST
        # Nor is the nearest one of those by one farther away.
        host_directory(hosts, "_.www.example.com")
        assert reason(directory, BELOW) is HostReason.NO_SOCKET


def test_any_name_and_no_name(directory: HostsDirectory, hosts: Path) -> None:
    for host in BELOW, None:
        assert reason(directory, host) is HostReason.NO_SUCH_HOST
    with (
        listen_at(host_directory(hosts, "_unknown") / "tls-socket"),
        listen_at(host_directory(hosts, "_no-name") / "tls-socket"),
    ):
        assert served_by(directory, BELOW) == "_unknown"
        assert served_by(directory, None) == "_no-name"
        assert directory.is_here()
    for host in BELOW, None:
        assert reason(directory, host) is HostReason.NOT_LISTENING


@pytest.mark.parametrize(
    "name", ["_unknown", "_no-name", "_.example.com", "_.com", "_x.example.com", "a._.example.com"]
)
def test_no_name_begins_with_an_underscore(name: str) -> None:
    with pytest.raises(InvalidHostname):
        Hostname(name.encode())


def test_a_hash_says_nothing_of_what_its_name_is_below(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hosts)
    hashed = HostsDirectory(directory_namer(hashed=True))
    with ExitStack() as stack:
        stack.enter_context(listen_at(host_directory(hosts, "_.example.com") / "tls-socket"))
        assert reason(hashed, BELOW) is HostReason.NO_SUCH_HOST
        stack.enter_context(listen_at(host_directory(hosts, "_unknown") / "tls-socket"))
        assert served_by(hashed, BELOW) == "_unknown"
    hashed.close()


def test_hosts_sockets_and_options_may_be_links(directory: HostsDirectory, hosts: Path) -> None:
    away = hosts.parent / "away"
    away.mkdir(mode=0o755)
    home = host_directory(away, "home")
    (hosts / NAME).symlink_to(home)
    (home / "tls-socket").symlink_to(away / "listening")
    (home / "send-proxy-v1").symlink_to("anything")
    with listen_at(away / "listening"):
        assert check_connects(directory)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda path: path.touch(), HostReason.NOT_LISTENING),
        (lambda path: path.mkdir(), HostReason.NOT_LISTENING),
        (lambda path: os.mkfifo(path), HostReason.NOT_LISTENING),
        (lambda path: path.symlink_to("nowhere"), HostReason.NO_SOCKET),
        (lambda path: path.symlink_to("tls-socket"), HostReason.LINK_LOOP),
        (lambda path: path.symlink_to("x" * 300), HostReason.NAME_TOO_LONG),
        (lambda path: path.symlink_to("file/x"), HostReason.NO_SOCKET),
    ],
    ids=["file", "directory", "fifo", "dangling", "loop", "too long", "through a file"],
)
def test_what_is_no_listening_socket(
    directory: HostsDirectory,
    hosts: Path,
    prepare: Callable[[Path], None],
    expected: HostReason,
) -> None:
    home = host_directory(hosts, NAME)
    (home / "file").touch()
    prepare(home / "tls-socket")
    assert reason(directory) is expected


def test_a_datagram_socket(directory: HostsDirectory, hosts: Path) -> None:
    home = host_directory(hosts, NAME)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.bind(str(home / "tls-socket"))
        assert reason(directory) is HostReason.NOT_A_STREAM_SOCKET


def test_a_host_that_is_a_file_or_a_link_loop(directory: HostsDirectory, hosts: Path) -> None:
    (hosts / NAME).touch()
    assert reason(directory) is HostReason.NO_SUCH_HOST
    (hosts / NAME).unlink()
    (hosts / NAME).symlink_to(NAME)
    assert reason(directory) is HostReason.LINK_LOOP


def test_a_full_backlog(directory: HostsDirectory, hosts: Path) -> None:
    with listen_unix(host_directory(hosts, NAME) / "tls-socket", backlog=0):
        first, *_ = directory.connect(NAME)
        assert reason(directory) is HostReason.BACKEND_BUSY
        first.close()


def test_out_of_descriptors(directory: HostsDirectory, hosts: Path) -> None:
    host_directory(hosts, NAME)
    with places_left(0):
        assert reason(directory) is HostReason.BACKEND_FAILED


def test_a_name_of_253_bytes_needs_no_short_path(directory: HostsDirectory, hosts: Path) -> None:
    host = Hostname(b".".join([b"a" * 63] * 3 + [b"b" * 61]))
    assert len(host) == 253
    with listen_unix(host_directory(hosts, host) / "tls-socket"):
        check_connects(directory, host)


def test_hashed_names_only(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hosts)
    name = directory_namer(hashed=True)
    hashed = HostsDirectory(name)
    with listen_unix(host_directory(hosts, NAME) / "tls-socket"):
        assert reason(hashed) is HostReason.NO_SUCH_HOST
    (hosts / NAME).rename(hosts / name(NAME))
    (hosts / name(NAME) / "tls-socket").unlink()
    with listen_unix(hosts / name(NAME) / "tls-socket"):
        check_connects(hashed)
    hashed.close()


def test_if_there_is_no_way_back_nothing_is_looked_up_elsewhere(
    directory: HostsDirectory, hosts: Path
) -> None:
    # A tenant may have made anything in a directory of theirs, even hosts.
    home = host_directory(hosts, NAME)
    trap = Hostname(b"trap.example")
    with listen_unix(host_directory(home, trap) / "tls-socket"):
        with no_way_back(directory):
            for host in NAME, trap:
                assert reason(directory, host) is HostReason.HOSTS_NOT_SEARCHABLE
        assert reason(directory, trap) is HostReason.NO_SUCH_HOST


@pytest.mark.parametrize("listens", [False, True])
def test_after_the_way_back_was_barred_the_next_name_is_one_of_the_hosts_directory(
    directory: HostsDirectory, hosts: Path, listens: bool
) -> None:
    home = host_directory(hosts, NAME)
    trap = Hostname(b"trap.example")
    with ExitStack() as stack:
        stack.enter_context(listen_unix(host_directory(home, trap) / "tls-socket"))
        if listens:
            stack.enter_context(listen_unix(home / "tls-socket"))
        with no_way_back(directory):
            before = os.listdir("/proc/self/fd")
            with pytest.raises(HostError) as caught:
                directory.connect(NAME)
            assert caught.value.reason is HostReason.HOSTS_NOT_SEARCHABLE
            # Closed at once, and not when nothing refers to it any more, as the traceback does.
            assert os.listdir("/proc/self/fd") == before
        # The daemon is still in the tenant's directory, where a host of that name is.
        assert Path.cwd() == home
        assert reason(directory, trap) is HostReason.NO_SUCH_HOST


@needs_root
class TestTrust:
    """Whose socket may answer for whose directory."""

    @pytest.fixture(autouse=True)
    def _reachable(self, tmp_path: Path) -> None:
        for path in [tmp_path, *tmp_path.parents]:
            if path.stat().st_mode & 0o001 == 0:
                path.chmod(path.stat().st_mode | 0o011)

    @pytest.mark.parametrize("entry", ["_.example.com", "_unknown", "_no-name"])
    def test_names_without_a_host_are_not_a_tenants(
        self, directory: HostsDirectory, hosts: Path, entry: str
    ) -> None:
        """Where tenants may add hosts, these names would be everybody's."""
        host = None if entry == "_no-name" else BELOW
        home = host_directory(hosts, entry)
        os.chown(home, TENANT, TENANT)
        with listen_as(TENANT, home / "tls-socket"):
            assert reason(directory, host) is HostReason.WRONG_OWNER
            if entry != "_.example.com":
                return
            # Only to whom the name belongs that these are below.
            os.chown(host_directory(hosts, "example.com"), OTHER, OTHER)
            assert reason(directory, host) is HostReason.WRONG_OWNER
            os.chown(hosts / "example.com", TENANT, TENANT)
            assert served_by(directory, host) == entry

    @pytest.mark.parametrize("entry", ["_.example.com", "_unknown", "_no-name"])
    def test_a_link_that_a_tenant_made_is_not_the_administrators(
        self, directory: HostsDirectory, hosts: Path, entry: str
    ) -> None:
        """Though it leads to a directory that is."""
        host = None if entry == "_no-name" else BELOW
        with listen_at(host_directory(hosts, "site.example") / "tls-socket"):
            (hosts / entry).symlink_to("site.example")
            assert served_by(directory, host) == entry
            os.lchown(hosts / entry, TENANT, TENANT)
            assert reason(directory, host) is HostReason.WRONG_OWNER

    def test_a_link_of_the_administrator_to_a_tenants_directory_serves_no_other_names(
        self, directory: HostsDirectory, hosts: Path, tenants: Path
    ) -> None:
        (hosts / "_unknown").symlink_to(tenants)
        with listen_as(TENANT, tenants / "tls-socket"):
            assert reason(directory, BELOW) is HostReason.WRONG_OWNER

    @pytest.fixture
    def tenants(self, hosts: Path) -> Path:
        """The directory of a tenant's host, made by the tenant."""
        home = host_directory(hosts, NAME)
        os.chown(home, TENANT, TENANT)
        return home

    def test_a_tenants_own(self, directory: HostsDirectory, tenants: Path) -> None:
        with listen_as(TENANT, tenants / "tls-socket"):
            check_connects(directory)
            tenants.chmod(0o777)  # their own business
            check_connects(directory)

    @pytest.mark.parametrize("owner", [0, OTHER])
    def test_not_a_tenants_link_to_another_ones(
        self, directory: HostsDirectory, hosts: Path, tenants: Path, owner: int
    ) -> None:
        other = host_directory(hosts, "other.example")
        os.chown(other, owner, owner)
        with listen_as(owner, other / "tls-socket"):
            (tenants / "tls-socket").symlink_to(other / "tls-socket")
            assert reason(directory) is HostReason.WRONG_OWNER
            check_connects(directory, Hostname(b"other.example"))

    def test_a_tenants_link_to_another_ones_directory_is_that_directory(
        self, directory: HostsDirectory, hosts: Path
    ) -> None:
        other = host_directory(hosts, "other.example")
        os.chown(other, OTHER, OTHER)
        (hosts / NAME).symlink_to("other.example")
        os.chown(hosts / NAME, TENANT, TENANT, follow_symlinks=False)
        with listen_as(OTHER, other / "tls-socket"):
            check_connects(directory)

    @pytest.mark.parametrize("uid", [0, TENANT, OTHER])
    def test_an_administrators_directory_takes_any(
        self, directory: HostsDirectory, hosts: Path, uid: int
    ) -> None:
        home = host_directory(hosts, NAME)
        listening = hosts.parent / "listening"
        listening.mkdir()
        listening.chmod(0o777)
        with listen_as(uid, listening / "socket"):
            (home / "tls-socket").symlink_to(listening / "socket")
            check_connects(directory)

    @pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
    @pytest.mark.parametrize("uid", [0, TENANT])
    def test_not_roots_directory_that_others_may_write(
        self, directory: HostsDirectory, hosts: Path, mode: int, uid: int
    ) -> None:
        home = host_directory(hosts, NAME)
        home.chmod(0o777)
        with listen_as(uid, home / "tls-socket"):
            home.chmod(mode)
            assert reason(directory) is HostReason.WRITABLE_BY_OTHERS

    def test_the_owner_of_the_hosts_directory_is_an_administrator(
        self, directory: HostsDirectory, hosts: Path, tenants: Path
    ) -> None:
        away = hosts.parent / "away"
        away.mkdir()
        away.chmod(0o777)
        with listen_as(OTHER, away / "socket"):
            (tenants / "tls-socket").symlink_to(away / "socket")
            assert reason(directory) is HostReason.WRONG_OWNER
            os.chown(hosts, TENANT, TENANT)
            check_connects(directory)
            tenants.chmod(0o775)
            assert reason(directory) is HostReason.WRONG_OWNER
        os.chown(hosts, 0, 0)

    def test_a_hosts_directory_that_cannot_be_searched(
        self, hosts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(hosts)
        hosts.chmod(0o600)
        os.seteuid(OTHER)
        try:
            with pytest.raises(PermissionError):
                HostsDirectory(directory_namer(hashed=False))
        finally:
            os.seteuid(0)
            hosts.chmod(0o755)

    def test_a_directory_without_search_permission(
        self, directory: HostsDirectory, tenants: Path
    ) -> None:
        tenants.chmod(0o600)
        with listen_unix(tenants / "tls-socket"):
            os.seteuid(OTHER)
            try:
                assert reason(directory) is HostReason.PERMISSION_DENIED
            finally:
                os.seteuid(0)

    def test_a_socket_without_write_permission(
        self, directory: HostsDirectory, tenants: Path
    ) -> None:
        """It is waited for, as long as that may be read: a server is about to change its mode."""
        hold = tenants / "hold"
        hold.write_text("30")
        with listen_as(TENANT, tenants / "tls-socket"):
            (tenants / "tls-socket").chmod(0o600)
            for mode, seconds in (0o644, 30), (0o600, HOLD_SECONDS):
                hold.chmod(mode)
                os.seteuid(OTHER)
                try:
                    assert reason(directory) is HostReason.PERMISSION_DENIED
                    assert held_for(directory) == seconds
                finally:
                    os.seteuid(0)
