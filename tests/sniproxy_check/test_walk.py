"""Each finding is provoked, named, and mended by the command that comes with it."""

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from sniproxy.hosts import HostReason
from sniproxy.service.privileges import Identity
from sniproxy_check.entries import Listing
from sniproxy_check.finding import CheckReason, Finding, Result, one_line
from sniproxy_check.report import is_served
from sniproxy_check.walk import Walk, find_shared
from sniproxy_hostname import Hostname, directory_namer
from tests.support.backends import TlsBackend, host_directory, listen_unix
from tests.support.certificates import Certificates

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")

NAME = "two.example"
NOBODY, TENANT, OTHER = 4000, 4001, 4002


@pytest.fixture(autouse=True)
def _in_hosts_directory(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in hosts.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    monkeypatch.chdir(hosts)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Path]:
    """Where somebody listens."""
    path = tmp_path / "backend"
    with listen_unix(path):
        path.chmod(0o666)
        yield path


def walk(
    *,
    hashed: bool = False,
    check_owner: bool = True,
    identity: Identity | None = None,
    chroot: bool = False,
) -> Walk:
    return Walk(
        directory_namer(hashed),
        hashed=hashed,
        check_owner=check_owner,
        identity=identity,
        user="4000",
        chroot=chroot,
        seconds=5.0,
        listing=Listing.of(()),
    )


def look(entry: str = NAME, uid: int | None = None, *, hashed: bool = False) -> Result:
    """Look at an entry, as a user."""
    before = os.geteuid()
    here = walk(hashed=hashed)
    if uid is not None:
        os.seteuid(uid)
    try:
        return here.look(entry, handshake=False)
    finally:
        os.seteuid(before)
        here.close()


def mend(finding: Finding, backend: Path, name: str = NAME) -> None:
    """Do what is said to mend it, with what is in capitals filled in."""
    command = (
        re.sub("^# .* is meant: ", "", finding.mend)
        .replace("SOCKET", str(backend))
        .replace("RELATIVE_PATH", "../../backend")
    )
    command = command.replace("DIRECTORY", str(backend.parent / "site")).replace("NAME", name)
    subprocess.run(["sh", "-euc", command], check=True)


class Mistake(NamedTuple):
    """Something that somebody did, and what it is called."""

    make: Callable[[Path, Path], object]
    word: str
    says: str
    entry: str = NAME


def _link(place: Path, target: Path | str, name: str = "tls-socket") -> None:
    place.mkdir(exist_ok=True)
    place.chmod(0o755)
    (place / name).symlink_to(target)


def _stale(hosts: Path, _: Path) -> None:
    listen_unix(host_directory(hosts, NAME) / "tls-socket").close()


def _lead(hosts: Path, backend: Path, target: str) -> None:
    """Have the host lead somewhere, and make a directory elsewhere that is fit to be a host's."""
    _link(backend.parent / "site", backend)
    (hosts / NAME).symlink_to(target)


HASH = "0123456789abcdef" * 4

# What is mended by one command.
MISTAKES = {
    "no host": Mistake(lambda hosts, backend: None, "no_such_host", "No such file"),
    "a host that is a file": Mistake(
        lambda hosts, backend: (hosts / NAME).touch(), "no_such_host", "is no directory"
    ),
    "a host that leads to nothing": Mistake(
        lambda hosts, backend: _lead(hosts, backend, "/nowhere/site"),
        "no_such_host",
        "two.example -> /nowhere/site: there is no /nowhere",
    ),
    "a loop": Mistake(
        lambda hosts, backend: _lead(hosts, backend, NAME),
        "link_loop",
        "two.example -> two.example",
    ),
    "no socket": Mistake(
        lambda hosts, backend: host_directory(hosts, NAME),
        "no_socket",
        "there is no two.example/tls-socket",
    ),
    "a socket that leads to nothing": Mistake(
        lambda hosts, backend: _link(hosts / NAME, "../nowhere"), "no_socket", "../nowhere"
    ),
    "a file": Mistake(
        lambda hosts, backend: (host_directory(hosts, NAME) / "tls-socket").touch(),
        "not_listening",
        "(regular file, ",
    ),
    "a directory": Mistake(
        lambda hosts, backend: (host_directory(hosts, NAME) / "tls-socket").mkdir(),
        "not_listening",
        "(directory, ",
    ),
    "a FIFO": Mistake(
        lambda hosts, backend: os.mkfifo(host_directory(hosts, NAME) / "tls-socket"),
        "not_listening",
        "(FIFO, ",
    ),
    "an underscore": Mistake(
        lambda hosts, backend: _link(hosts / NAME, backend, "tls_socket"),
        "misspelt",
        "has to be called tls-socket",
    ),
    "capitals in the file": Mistake(
        lambda hosts, backend: _link(hosts / NAME, backend, "TLS-Socket"),
        "misspelt",
        "has to be called tls-socket",
    ),
    "capitals": Mistake(
        lambda hosts, backend: _link(hosts / "Two.Example", backend),
        "not_canonical",
        "it should be two.example",
        "Two.Example",
    ),
    "a dot at the end": Mistake(
        lambda hosts, backend: _link(hosts / "two.example.", backend),
        "not_canonical",
        "it should be two.example",
        "two.example.",
    ),
    "a hash that nobody asks for": Mistake(
        lambda hosts, backend: _link(hosts / HASH, backend),
        "never_matches",
        "without --hashed",
        HASH,
    ),
    "no hostname": Mistake(
        lambda hosts, backend: _link(hosts / "two example", backend),
        "never_matches",
        "is no hostname",
        "two example",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_mended(mistake: Mistake, hosts: Path, backend: Path) -> None:
    mistake.make(hosts, backend)
    first, *_ = look(mistake.entry).findings
    assert first.word == mistake.word
    assert mistake.says in first.detail
    mend(first, backend)
    # A directory that is made in the place of a file has yet to be filled.
    for finding in look().findings:
        mend(finding, backend)
    assert look().findings == ()
    assert look().listener == (os.getpid(), os.geteuid())


def mended(finding: Finding) -> str:
    """Return the command as it is shown."""
    [shown] = Result(NAME, NAME, findings=(finding,)).to_json()["findings"]
    return str(shown["mend"])


def test_a_name_that_cannot_be_shown_is_in_no_command() -> None:
    """Escaped it would be another name, which a tenant could have made, too."""
    assert mended(Finding("x", "y", "rm 'a\nb'")) == "# rm 'a?b' (with names that can't be typed)"
    assert mended(Finding("x", "y", "rm '\udcff'")).startswith("# ")
    assert mended(Finding("x", "y", "rm a  # b")) == "rm a  # b"


def test_a_datagram_socket(hosts: Path, backend: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(host_directory(hosts, NAME) / "tls-socket"))
        [finding] = look().findings
    assert finding.word == "not_a_stream_socket"
    assert finding.detail.endswith("is no stream socket")
    mend(finding, backend)
    assert look().findings == ()


def test_nobody_listens(hosts: Path, backend: Path) -> None:
    _stale(hosts, backend)
    [finding] = look().findings
    assert finding.word == "not_listening"
    assert finding.detail.endswith("nobody listens")
    mend(finding, backend)
    with listen_unix(hosts / NAME / "tls-socket"):
        assert look().findings == ()


def test_a_name_in_unicode(hosts: Path, backend: Path) -> None:
    _link(hosts / "zwei.例え", backend)
    [finding] = look("zwei.例え").findings
    assert finding.word is CheckReason.NOT_CANONICAL
    mend(finding, backend)
    assert look("zwei.xn--r8jz45g").findings == ()


@pytest.mark.parametrize("plain", [NAME, "Two.Example"])
def test_a_plain_name_where_names_are_hashed(hosts: Path, backend: Path, plain: str) -> None:
    _link(hosts / plain, backend)
    [finding] = look(plain, hashed=True).findings
    assert finding.word is CheckReason.NEVER_MATCHES
    assert "--hashed" in finding.detail
    mend(finding, backend)
    entry = directory_namer(True)(Hostname(NAME.encode()))
    assert look(entry, hashed=True).findings == ()


@pytest.mark.parametrize(
    ("change", "says"), [(str.upper, "small letters"), (lambda entry: entry[:63], "has 63")]
)
def test_a_hash_that_is_none(
    hosts: Path, backend: Path, change: Callable[[str], str], says: str
) -> None:
    entry = directory_namer(True)(Hostname(NAME.encode()))
    _link(hosts / change(entry), backend)
    [finding] = look(change(entry), hashed=True).findings
    assert finding.word is CheckReason.NEVER_MATCHES
    assert says in finding.detail
    mend(finding, backend)
    assert look(entry, hashed=True).findings == ()


def test_a_file_that_another_version_knows(hosts: Path, backend: Path) -> None:
    _link(hosts / NAME, backend)
    (hosts / NAME / "send-proxy").touch()
    [finding] = look().findings
    assert finding.word is CheckReason.UNKNOWN_FILE
    mend(finding, backend)
    assert look().findings == ()
    assert (hosts / NAME / "send-proxy-v1").exists()


def test_two_headers(hosts: Path, backend: Path) -> None:
    _link(hosts / NAME, backend)
    for version in 1, 2:
        (hosts / NAME / f"send-proxy-v{version}").touch()
    [finding] = look().findings
    assert finding.word is CheckReason.TWO_PROXY_HEADERS
    mend(finding, backend)
    assert look().findings == ()


@pytest.mark.parametrize(
    ("text", "says"), [("", "no number"), ("ten", "no number"), ("1000", "too many: 300")]
)
def test_a_hold_that_is_not_clear(hosts: Path, backend: Path, text: str, says: str) -> None:
    _link(hosts / NAME, backend)
    (hosts / NAME / "hold").write_text("30\n")
    assert look().findings == ()
    (hosts / NAME / "hold").write_text(text)
    found = look()
    [finding] = found.findings
    assert finding.word is CheckReason.UNCLEAR_HOLD
    assert says in finding.detail
    assert is_served(found)
    mend(finding, backend)
    assert look().findings == ()


def test_a_hold_that_the_sandbox_hides(hosts: Path, backend: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    _link(elsewhere, backend)
    (hosts / NAME).symlink_to(elsewhere)
    (elsewhere / "hold").write_text("30\n")
    [finding] = look().findings
    assert finding.word is CheckReason.UNCLEAR_HOLD
    assert "outside" in finding.detail
    mend(finding, backend)
    assert (elsewhere / "hold").readlink() == Path("30")
    assert look().findings == ()


@pytest.mark.parametrize("entry", ["_unknown", "_no-name", "_.example.com"])
def test_names_without_a_host(hosts: Path, backend: Path, entry: str) -> None:
    _link(hosts / entry, backend)
    result = look(entry)
    assert (result.findings, result.entry) == ((), entry)
    here = walk()
    served = here.look_named(Hostname(b"any.example.com"))
    assert served.entry == ("any.example.com" if entry == "_no-name" else entry)
    here.close()


@needs_root
def test_names_without_a_host_that_a_tenant_serves(hosts: Path) -> None:
    os.chown(host_directory(hosts, "_unknown"), TENANT, TENANT)
    with listen_unix(hosts / "_unknown" / "tls-socket", uid=TENANT):
        [finding] = look("_unknown").findings
    assert finding.word is HostReason.WRONG_OWNER
    assert "may not serve these names" in finding.detail
    assert finding.mend.startswith("# if an administrator means that: ")


@pytest.mark.parametrize("entry", ["_.Example.com", "_other", "_.", "_._unknown"])
def test_what_serves_no_names(hosts: Path, backend: Path, entry: str) -> None:
    _link(hosts / entry, backend)
    [finding] = look(entry).findings
    assert finding.word is CheckReason.NEVER_MATCHES


@pytest.mark.parametrize("name", ["tls.key", "tls-socket.old", "index.html", "send-mail", "sock"])
def test_other_files_are_nobody_s_business(hosts: Path, backend: Path, name: str) -> None:
    _link(hosts / NAME, backend)
    (hosts / NAME / name).touch()
    assert look().findings == ()


def test_whatever_the_only_socket_is_called_it_is_meant(hosts: Path) -> None:
    with listen_unix(host_directory(hosts, NAME) / "https.sock"):
        first, second = look().findings
        assert (first.word, second.word) == (CheckReason.MISSPELT, HostReason.NO_SOCKET)
        mend(first, Path())
        assert look().findings == ()


def test_what_was_put_aside_and_files_are_no_hosts(hosts: Path, backend: Path) -> None:
    for name in NAME, ".old":
        _link(hosts / name, backend)
    (hosts / "README").touch()
    assert Listing.of(()).hosts == [NAME]


def test_who_is_named_is_found_by_what_was_meant(hosts: Path, backend: Path) -> None:
    _link(hosts / "Two.Example", backend)
    here = walk()
    [finding] = here.look_named(Hostname(NAME.encode())).findings
    here.close()
    assert finding.word is CheckReason.NOT_CANONICAL


def test_an_absolute_link_where_the_root_directory_is_another(hosts: Path, backend: Path) -> None:
    _link(hosts / NAME, backend)
    here = walk(chroot=True)
    [finding] = here.look(NAME, handshake=False).findings
    assert finding.word is CheckReason.ABSOLUTE_IN_CHROOT
    mend(finding, backend)
    assert here.look(NAME, handshake=False).findings == ()
    here.close()


@needs_root
class TestPermissions:
    """What a user may do, tried by that user, or worked out by another."""

    @pytest.fixture(params=["tried", "worked out"])
    def look(self, request: pytest.FixtureRequest) -> Callable[[], Result]:
        if request.param == "tried":
            return lambda: look(uid=NOBODY)

        def work_out() -> Result:
            here = walk(identity=Identity(NOBODY, NOBODY, [NOBODY]))
            try:
                return here.look(NAME, handshake=False)
            finally:
                here.close()

        return work_out

    def test_a_home_that_is_closed(
        self, look: Callable[[], Result], hosts: Path, tmp_path: Path
    ) -> None:
        home = tmp_path / "home"
        (home / "site").mkdir(parents=True)
        for path in home, home / "site":
            os.chown(path, TENANT, TENANT)
        home.chmod(0o700)
        (hosts / NAME).symlink_to(home / "site")
        with listen_unix(home / "site" / "tls-socket", uid=TENANT):
            (home / "site" / "tls-socket").chmod(0o666)
            [finding] = look().findings
            assert finding.word is HostReason.PERMISSION_DENIED
            assert f"{home} (directory, mode 0700, uid {TENANT}, " in finding.detail
            assert "may not be searched" in finding.detail
            mend(finding, Path())
            assert look().findings == ()

    def test_a_home_of_somebody_else_is_not_to_be_opened(
        self, look: Callable[[], Result], hosts: Path, tmp_path: Path
    ) -> None:
        """A tenant's link may have led there so that somebody opens it."""
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        os.chown(home, OTHER, OTHER)
        os.chown(host_directory(hosts, NAME), TENANT, TENANT)
        with listen_unix(home / "socket", uid=TENANT):
            (home / "socket").chmod(0o666)
            (hosts / NAME / "tls-socket").symlink_to(home / "socket")
            [finding] = look().findings
        assert finding.word is HostReason.PERMISSION_DENIED
        assert finding.mend.startswith(f"# if uid {OTHER} means that: setfacl ")

    def test_a_socket_that_is_closed(
        self, look: Callable[[], Result], hosts: Path, backend: Path
    ) -> None:
        _link(hosts / NAME, backend)
        backend.chmod(0o600)
        [finding] = look().findings
        assert finding.word is HostReason.PERMISSION_DENIED
        assert "may not be written" in finding.detail
        mend(finding, backend)
        assert look().findings == ()

    def test_groups_count(self, hosts: Path, backend: Path) -> None:
        _link(hosts / NAME, backend)
        os.chown(backend, 0, OTHER)
        backend.chmod(0o660)
        for groups, is_barred in ([OTHER], False), ([], True):
            here = walk(identity=Identity(NOBODY, NOBODY, groups))
            assert bool(here.look(NAME, handshake=False).findings) is is_barred
            here.close()

    def test_a_hosts_directory_that_is_closed(self, hosts: Path, backend: Path) -> None:
        _link(hosts / NAME, backend)
        hosts.chmod(0o700)
        here = walk()
        os.seteuid(NOBODY)
        try:
            [finding] = here.look(NAME, handshake=False).findings
        finally:
            os.seteuid(0)
            here.close()
        assert finding.word is HostReason.HOSTS_NOT_SEARCHABLE
        mend(finding, backend)
        assert look(uid=NOBODY).findings == ()

    def test_a_listener_of_somebody_else(self, hosts: Path, tmp_path: Path) -> None:
        os.chown(host_directory(hosts, NAME), TENANT, TENANT)
        with listen_unix(hosts / NAME / "tls-socket", uid=OTHER):
            [finding] = look().findings
            assert finding.word is HostReason.WRONG_OWNER
            assert f"uid {TENANT}, the listener to uid {OTHER}" in finding.detail
            mend(finding, Path())
            assert look().findings == ()

    def test_a_directory_of_root_that_others_may_write_in(self, hosts: Path, backend: Path) -> None:
        _link(hosts / NAME, backend)
        (hosts / NAME).chmod(0o777)
        [finding] = look().findings
        assert finding.word is HostReason.WRITABLE_BY_OTHERS
        mend(finding, backend)
        assert look().findings == ()


def test_one_process_for_hosts_of_two_owners() -> None:
    results = [
        Result("one.example", "one.example", 1000, (77, 0)),
        Result("two.example", "two.example", 2000, (77, 0)),
        Result("three.example", "three.example", 1000, (78, 0)),
        Result("four.example", "four.example", 1000, (78, 0)),
        # systemd listens for others.
        Result("five.example", "five.example", 1000, (1, 0)),
        Result("six.example", "six.example", 2000, (1, 0)),
    ]
    found = find_shared(results)
    assert set(found) == {"one.example", "two.example"}
    assert found["one.example"].word is CheckReason.SHARED_PROCESS
    assert "two.example (uid 2000)" in found["one.example"].detail


@needs_root
def test_one_process_for_hosts_of_two_owners_is_seen(hosts: Path) -> None:
    names = {NAME: TENANT, "three.example": OTHER}
    with ExitStack() as stack:
        for name, uid in names.items():
            os.chown(host_directory(hosts, name), uid, uid)
            stack.enter_context(listen_unix(hosts / name / "tls-socket"))
        here = walk(check_owner=False)
        results = [here.look(name, handshake=False) for name in names]
        here.close()
    found = find_shared(results)
    assert {name: finding.word for name, finding in found.items()} == dict.fromkeys(
        names, CheckReason.SHARED_PROCESS
    )
    assert f"the process {os.getpid()} listens for " in found[NAME].detail


def test_a_full_backlog_is_looked_at_again(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    with listen_unix(host_directory(hosts, NAME) / "tls-socket", backlog=0) as listening:
        filling = socket.socket(socket.AF_UNIX)
        filling.connect(str(hosts / NAME / "tls-socket"))

        def wait(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                listening.accept()[0].close()

        monkeypatch.setattr("sniproxy_check.walk.time.sleep", wait)
        assert look().findings == ()
        assert len(pauses) == 3
        filling.close()
        result = look()  # whose own connection, the last one, is still in the queue
    [finding] = result.findings
    assert finding.word is HostReason.BACKEND_BUSY


@pytest.mark.parametrize("at_host", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "nothing", "stale", "open", "others"])
def test_no_command_changes_what_a_link_leads_to(
    hosts: Path, tmp_path: Path, backend: Path, kind: str, at_host: bool
) -> None:
    """The links are a tenant's, and whoever runs the command is root."""
    precious = tmp_path / "precious"
    if kind == "file":
        precious.touch()
    elif kind in ("directory", "open"):
        precious.mkdir()
        precious.chmod(0o777 if kind == "open" else 0o755)
    elif kind == "stale":
        listen_unix(precious).close()
    elif kind == "others":
        precious.mkdir(mode=0o755)
        (precious / "tls-socket").symlink_to(backend)
    if at_host:
        (hosts / NAME).symlink_to(precious)
    else:
        _link(hosts / NAME, precious)
    for finding in look().findings:
        assert str(precious) not in finding.mend.partition("#")[0]


@needs_root
def test_what_a_tenant_s_link_leads_to_is_not_listed(hosts: Path, tmp_path: Path) -> None:
    """Root would show what is in there, and move what is somebody else's."""
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    os.chown(home, OTHER, OTHER)
    (tmp_path / "site").symlink_to(home)
    os.lchown(tmp_path / "site", TENANT, TENANT)
    (hosts / NAME).symlink_to(tmp_path / "site")
    with listen_unix(home / "private.sock", uid=OTHER):
        [finding] = look().findings
    assert finding.word is HostReason.NO_SOCKET


@needs_root
def test_a_directory_that_a_tenant_s_link_leads_to_is_not_to_be_opened(
    hosts: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    (tmp_path / "site").symlink_to(closed / "inside")
    (hosts / NAME).symlink_to(tmp_path / "site")
    [finding] = look(uid=NOBODY).findings
    assert finding.mend.startswith("setfacl ")  # the administrator's own links
    os.lchown(tmp_path / "site", TENANT, TENANT)
    [finding] = look(uid=NOBODY).findings
    assert finding.mend.startswith("# if uid 0 means that: setfacl ")


def test_a_link_to_a_backend_that_is_down_is_left_alone(hosts: Path, tmp_path: Path) -> None:
    """Wherever the directory of the host is."""
    listen_unix(tmp_path / "backend").close()
    _link(tmp_path / "site", tmp_path / "backend")
    (hosts / NAME).symlink_to(tmp_path / "site")
    [finding] = look().findings
    assert finding.mend == "# start the backend, which is to listen there"


def test_behind_a_comment_is_no_other_command(hosts: Path, tmp_path: Path) -> None:
    assert "\n" not in one_line("# rm\nrm -r /\u2028x\x1b[")


def test_what_is_to_be_done_is_quoted(hosts: Path) -> None:
    entry = "a b;touch pwned"
    (hosts / entry).mkdir()
    [finding] = look(entry).findings
    assert shlex.quote(entry) in finding.mend


def test_certificates_are_seen(hosts: Path, certificates: Certificates, tmp_path: Path) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    here = walk()
    with TlsBackend(path, certificates.server_context(NAME)):
        result = here.look(NAME, handshake=True)
        assert result.findings == ()
        assert result.is_asked
        assert result.expires is not None
    path.unlink(missing_ok=True)
    with TlsBackend(path, certificates.server_context("other.example")):
        [finding] = here.look(NAME, handshake=True).findings
        assert finding.word == "certificate_for_others"
    here.close()


@pytest.mark.parametrize("wants", [False, True])
def test_the_proxy_header_is_mended(hosts: Path, certificates: Certificates, wants: bool) -> None:
    path = host_directory(hosts, NAME) / "tls-socket"
    if not wants:
        (hosts / NAME / "send-proxy-v1").touch()
    here = walk()
    with TlsBackend(path, certificates.server_context(NAME), proxy=wants):
        [finding] = here.look(NAME, handshake=True).findings
        assert finding.word == ("wants_proxy_header" if wants else "refuses_proxy_header")
        mend(finding, Path())
        assert here.look(NAME, handshake=True).findings == ()
    here.close()
