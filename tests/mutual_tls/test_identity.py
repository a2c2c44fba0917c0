"""Identities: what is loaded, what is noticed, what is kept out, and what goes over the wire."""

import _ssl
import errno
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from mutual_tls import identity as module
from mutual_tls.identity import Files, Identities, Identity, IdentityError, system_authorities

NAME = "peer.example"
END = datetime(2100, 1, 1, tzinfo=UTC)
ISO = "2100-01-01T00:00:00Z"
USER = 54321
ROOT = Path(__file__).parents[2]
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


# --- support


class Clock:
    """A time of day that stands still. Certificates of the tests end in 2100."""

    def __init__(self) -> None:
        self.now = END.timestamp() - 10 * 86400

    def __call__(self) -> float:
        return self.now


class Case:
    """A directory, the identity in it, and what it has told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.events: list[tuple[str, str]] = []
        self.clock = Clock()
        self.identity = Identity(
            directory, lambda word, detail: self.events.append((word, detail)), clock=self.clock
        )

    def words(self) -> list[str]:
        return [word for word, _ in self.events]

    def issue(self, name: str = NAME) -> trustme.LeafCert:
        return self.authority.issue_cert(name, not_after=END)

    def write(
        self, names: tuple[str, str, str] = ("cert.pem", "key.pem", "ca.pem")
    ) -> trustme.LeafCert:
        leaf = self.issue()
        write_files(self.directory, leaf, self.authority, names)
        return leaf


def write_files(
    directory: Path,
    leaf: trustme.LeafCert,
    authority: trustme.CA,
    names: tuple[str, str, str] = ("cert.pem", "key.pem", "ca.pem"),
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / names[0]).write_bytes(b"".join(each.bytes() for each in leaf.cert_chain_pems))
    (directory / names[1]).write_bytes(leaf.private_key_pem.bytes())
    (directory / names[2]).write_bytes(authority.cert_pem.bytes())


def der(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


class Handshake:
    """Two ends over memory BIOs."""

    def __init__(
        self,
        client: ssl.SSLContext,
        server: ssl.SSLContext,
        name: str = NAME,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.up, self.down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self.down, self.up, server_hostname=name, session=session)
        self.server = server.wrap_bio(self.up, self.down, server_side=True)

    def finish(self) -> "Handshake":
        # TLS 1.2 has four flights, two a round. In the third the client reads the last one.
        for _ in range(3):
            step(self.client)
            step(self.server)
        # A session of TLS 1.3 arrives with the first bytes.
        self.server.write(b"x")
        assert self.client.read(1) == b"x"
        return self

    def shown(self) -> tuple[bytes | None, bytes | None]:
        """Return the certificate of the server and that of the client."""
        return self.client.getpeercert(True), self.server.getpeercert(True)


def step(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def shown_by(context: ssl.SSLContext) -> bytes | None:
    """Return the certificate that a server's context shows, to a client who trusts nobody."""
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    handshake = Handshake(anyone, context)
    step(handshake.client)
    step(handshake.server)
    assert step(handshake.client)
    return handshake.client.getpeercert(True)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "identity")


# --- what is loaded


@pytest.mark.parametrize("version", VERSIONS)
def test_both_sides_show_and_verify_certificates(case: Case, version: ssl.TLSVersion) -> None:
    leaf = case.write()
    client, server = case.identity.client_context(), case.identity.server_context()
    client.maximum_version = version
    handshake = Handshake(client, server).finish()
    assert handshake.shown() == (der(leaf), der(leaf))
    assert (
        handshake.client.version()
        == {
            ssl.TLSVersion.TLSv1_2: "TLSv1.2",
            ssl.TLSVersion.TLSv1_3: "TLSv1.3",
        }[version]
    )
    assert case.events == []


def test_contexts_are_strict(case: Case) -> None:
    case.write()
    identity = case.identity
    contexts = [
        identity.client_context(),
        identity.client_context(check_hostname=False),
        identity.server_context(),
    ]
    for context in contexts:
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
    assert [each.check_hostname for each in contexts] == [True, False, False]
    assert contexts[2].num_tickets == 1


def test_contexts_are_kept_while_the_files_are(case: Case) -> None:
    case.write()
    identity = case.identity
    assert identity.client_context() is identity.client_context()
    assert identity.client_context() is not identity.client_context(check_hostname=False)
    assert identity.server_context() is identity.server_context()


def test_a_client_refuses_another_name(case: Case) -> None:
    case.write()
    identity = case.identity
    handshake = Handshake(identity.client_context(), identity.server_context(), "other.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake.finish()


def test_a_common_name_is_no_hostname(case: Case) -> None:
    case.write()
    leaf = case.authority.issue_cert("else.example", common_name=NAME)
    write_files(case.directory, leaf, case.authority)
    handshake = Handshake(case.identity.client_context(), case.identity.server_context())
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake.finish()


def test_a_server_refuses_a_client_without_certificate(case: Case) -> None:
    case.write()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    case.authority.configure_trust(client)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        Handshake(client, case.identity.server_context()).finish()


def test_text_around_the_certificates_is_passed_over(case: Case) -> None:
    case.write()
    for name in "cert.pem", "ca.pem":
        path = case.directory / name
        path.write_bytes("# Zertifikat für uns\n".encode() + path.read_bytes())
    identity = case.identity
    Handshake(identity.client_context(), identity.server_context()).finish()


def test_kubernetes_names(case: Case) -> None:
    leaf = case.write(("tls.crt", "tls.key", "ca.crt"))
    assert shown_by(case.identity.server_context()) == der(leaf)


def test_our_names_win(case: Case) -> None:
    case.write(("tls.crt", "tls.key", "ca.crt"))
    leaf = case.write()
    assert shown_by(case.identity.server_context()) == der(leaf)


def test_a_link_is_an_identity(case: Case, tmp_path: Path) -> None:
    leaf = case.issue()
    write_files(tmp_path / "there", leaf, case.authority)
    case.directory.symlink_to("there")
    assert shown_by(case.identity.server_context()) == der(leaf)


# --- the system's authorities


@pytest.fixture
def own_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A system that trusts whom a test wants: a file that is not there yet."""
    file = tmp_path / "system.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "system"))
    system_authorities.cache_clear()
    yield file
    system_authorities.cache_clear()


def test_without_authorities_the_system_s_are_trusted(case: Case, own_system: Path) -> None:
    case.write()
    (case.directory / "ca.pem").unlink()
    own_system.write_bytes(case.authority.cert_pem.bytes())
    system_authorities()
    own_system.unlink()  # as chroot(2) does
    identity = case.identity
    Handshake(identity.client_context(), identity.server_context()).finish()


def test_the_system_s_authorities_in_a_directory(case: Case, own_system: Path) -> None:
    directory = own_system.with_name("system")
    directory.mkdir()
    (directory / "0a1b2c3d.0").write_bytes(case.authority.cert_pem.bytes())
    (directory / "01234567.1").write_bytes(b"damaged")
    (directory / "README").write_bytes(trustme.CA().cert_pem.bytes())
    expected = ssl.PEM_cert_to_DER_cert(case.authority.cert_pem.bytes().decode())
    assert system_authorities() == expected


@pytest.mark.usefixtures("own_system")
def test_nobody_is_trusted_by_a_system_without_authorities(case: Case) -> None:
    case.write()
    (case.directory / "ca.pem").unlink()
    with pytest.raises(IdentityError, match=r"there is no ca\.pem, and the system has no"):
        case.identity.client_context()


def test_a_dangling_link_does_not_stand_for_the_system(case: Case) -> None:
    case.write()
    (case.directory / "ca.pem").unlink()
    (case.directory / "ca.pem").symlink_to("nowhere")
    with pytest.raises(IdentityError, match=r"ca\.pem: No such file"):
        case.identity.client_context()


# --- files that are named one by one


class NamedCase(Case):
    """The files of a case, by names of their own, and in two directories."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.write(("mine.crt", "mine.key", "theirs.crt"))
        self.key = directory / "keys" / "mine.key"
        self.key.parent.mkdir()
        (directory / "mine.key").rename(self.key)
        self.certificate, self.trusted = directory / "mine.crt", directory / "theirs.crt"
        self.name(str(self.trusted))

    def name(self, trusted: str | None) -> None:
        self.files = Files(str(self.certificate), str(self.key), trusted)
        self.identity = Identity(
            self.files, lambda word, detail: self.events.append((word, detail)), clock=self.clock
        )


@pytest.fixture
def named(tmp_path: Path) -> NamedCase:
    return NamedCase(tmp_path / "files")


def test_named_files_are_an_identity(named: NamedCase) -> None:
    identity = named.identity
    Handshake(identity.client_context(), identity.server_context()).finish()
    assert identity.client_context() is identity.client_context()
    assert named.events == []


def test_one_file_may_hold_the_key_too(named: NamedCase) -> None:
    both = named.directory / "both.pem"
    both.write_bytes(named.key.read_bytes() + named.certificate.read_bytes())
    identity = Identity(Files(str(both), str(both), str(named.trusted)), lambda *_: None)
    Handshake(identity.client_context(), identity.server_context()).finish()


def test_swapped_named_files_serve_the_next_connection(named: NamedCase) -> None:
    before = named.identity.server_context()
    leaf = named.issue()
    named.certificate.write_bytes(leaf.cert_chain_pems[0].bytes())
    assert named.identity.server_context() is before
    named.key.write_bytes(leaf.private_key_pem.bytes())
    assert shown_by(named.identity.server_context()) == der(leaf)
    shown = ", ".join(map(str, named.files))
    assert named.events == [
        ("identity_broken", f"{shown}: {named.key} is not the key of {named.certificate}"),
        ("identity_loaded", shown),
    ]


def test_named_files_that_are_absent_are_no_identity(named: NamedCase) -> None:
    named.key.unlink()
    with pytest.raises(IdentityError, match=r"mine\.key: No such file"):
        named.identity.client_context()


def test_without_a_file_of_authorities_the_system_s_are_trusted(
    named: NamedCase, own_system: Path
) -> None:
    named.name(None)
    with pytest.raises(IdentityError, match="there is no file of authorities, and the system has"):
        named.identity.client_context()
    system_authorities.cache_clear()
    own_system.write_bytes(named.authority.cert_pem.bytes())
    named.name(None)
    Handshake(named.identity.client_context(), named.identity.server_context()).finish()


def test_authorities_that_are_named_and_absent_are_not_the_system_s(
    named: NamedCase, own_system: Path
) -> None:
    own_system.write_bytes(named.authority.cert_pem.bytes())
    named.trusted.unlink()
    with pytest.raises(IdentityError, match=r"theirs\.crt: No such file"):
        named.identity.client_context()
    with pytest.raises(ValueError, match="the path of a file is empty"):
        named.name("")


def test_identities_are_made_once(named: NamedCase) -> None:
    identities = Identities(lambda *_: None)
    assert identities(named.files) is identities(Files(*named.files))
    assert identities(named.files) is not identities(named.files._replace(authorities=None))
    assert identities("a") is identities("a")


# --- what is noticed


def test_swapped_files_serve_the_next_connection(case: Case) -> None:
    case.write()
    before = case.identity.server_context()
    leaf = case.write()
    after = case.identity.server_context()
    assert after is not before
    assert shown_by(after) == der(leaf)
    assert case.events == [("identity_loaded", str(case.directory))]


def test_other_authorities_are_noticed(case: Case) -> None:
    case.write()
    old = case.identity.client_context()
    (case.directory / "ca.pem").write_bytes(trustme.CA().cert_pem.bytes())
    identity = case.identity
    with pytest.raises(ssl.SSLCertVerificationError):
        Handshake(identity.client_context(), identity.server_context()).finish()
    assert identity.client_context() is not old


def test_all_kinds_are_of_the_same_files(case: Case) -> None:
    case.write()
    old = case.identity.client_context()
    case.identity.server_context()
    leaf = case.write()
    assert shown_by(case.identity.server_context()) == der(leaf)
    assert case.identity.client_context() is not old
    assert case.words() == ["identity_loaded"]


def test_a_file_of_the_same_size_and_time_is_noticed(case: Case) -> None:
    case.write()
    before = case.identity.server_context()
    for name in "cert.pem", "key.pem":
        path = case.directory / name
        times = path.stat()
        shutil.copyfile(path, case.directory / "new")
        os.utime(case.directory / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        (case.directory / "new").rename(path)
        assert path.stat().st_size == times.st_size
        assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert case.identity.server_context() is not before


def test_kubernetes_swaps_a_link(case: Case, tmp_path: Path) -> None:
    names = ("tls.crt", "tls.key", "ca.crt")
    case.directory.mkdir()
    leaves = [case.issue(), case.issue()]
    for number, leaf in enumerate(leaves):
        write_files(case.directory / f"..{number}", leaf, case.authority, names)
    (case.directory / "..data").symlink_to("..0")
    for name in names:
        (case.directory / name).symlink_to(f"..data/{name}")
    assert shown_by(case.identity.server_context()) == der(leaves[0])
    (case.directory / "..data_tmp").symlink_to("..1")
    (case.directory / "..data_tmp").rename(case.directory / "..data")
    assert shown_by(case.identity.server_context()) == der(leaves[1])
    assert case.words() == ["identity_loaded"]


def test_a_link_to_another_directory_is_noticed(case: Case, tmp_path: Path) -> None:
    leaves = [case.issue(), case.issue()]
    for number, leaf in enumerate(leaves):
        write_files(tmp_path / str(number), leaf, case.authority)
    case.directory.symlink_to("0")
    assert shown_by(case.identity.server_context()) == der(leaves[0])
    case.directory.unlink()
    case.directory.symlink_to("1")
    assert shown_by(case.identity.server_context()) == der(leaves[1])


def change_while_read(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], None], times: int
) -> list[None]:
    """Call `change` after a certificate was read and before its key is, so many times."""
    read_file = module._read_file
    calls: list[None] = []

    def changed(path: Path) -> bytes:
        if path.name == "key.pem" and len(calls) < times:
            calls.append(None)
            change()
        return read_file(path)

    monkeypatch.setattr(module, "_read_file", changed)
    return calls


def test_files_that_change_while_they_are_read_are_read_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write()
    leaves: list[trustme.LeafCert] = []
    change_while_read(monkeypatch, lambda: leaves.append(case.write()), 2)
    assert shown_by(case.identity.server_context()) == der(leaves[1])
    assert case.events == []


def test_files_that_change_all_the_time_are_broken_until_they_do_not(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write()
    case.identity.server_context()
    case.write()
    leaves: list[trustme.LeafCert] = []
    change_while_read(monkeypatch, lambda: leaves.append(case.write()), 3)
    case.identity.server_context()
    assert case.events == [
        ("identity_broken", f"{case.directory}: the files change while they are read")
    ]
    assert shown_by(case.identity.server_context()) == der(leaves[2])
    assert case.words() == ["identity_broken", "identity_loaded"]


def test_nothing_is_read_while_nothing_changes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.write()
    context = case.identity.server_context()
    monkeypatch.setattr(module, "_read_file", None)
    looks: list[str] = []
    look = os.stat

    def counted(path: str, **options: Any) -> os.stat_result:
        looks.append(str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", counted)
    assert case.identity.server_context() is context
    assert len(looks) == 3


# --- what is kept out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def encrypt(path: Path) -> None:
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )


def encrypt_the_old_way(path: Path) -> None:
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret")
        )
    )


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def second_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes() + path.read_bytes()[:-40])


def other_key(path: Path) -> None:
    path.write_bytes(trustme.CA().issue_cert(NAME).private_key_pem.bytes())


def other_kind_of_key(path: Path) -> None:
    leaf = trustme.CA().issue_cert(NAME, key_type=trustme.KeyType.RSA)
    path.write_bytes(leaf.private_key_pem.bytes())


def directory(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent)


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("cert.pem", Path.unlink, "cert.pem: No such file or directory"),
    ("cert.pem", cut, "cert.pem is not a certificate in PEM"),
    ("cert.pem", second_cut, "cert.pem is cut off"),
    ("cert.pem", lambda path: path.write_bytes(b""), "cert.pem is not a certificate in PEM"),
    ("cert.pem", lambda path: path.write_bytes(b"\xff"), "cert.pem is not a certificate in PEM"),
    ("cert.pem", lambda path: path.write_bytes(bytes(1 << 21)), "cert.pem has more than"),
    ("cert.pem", fifo, "cert.pem is not a regular file"),
    ("cert.pem", directory, "cert.pem is not a regular file"),
    ("key.pem", Path.unlink, "key.pem: No such file or directory"),
    ("key.pem", cut, "key.pem is not a private key in PEM"),
    ("key.pem", lambda path: path.write_bytes(b""), "key.pem is not a private key in PEM"),
    ("key.pem", other_key, "key.pem is not the key of cert.pem"),
    ("key.pem", other_kind_of_key, "key.pem is not the key of cert.pem"),
    ("key.pem", encrypt, "the key is encrypted"),
    ("key.pem", encrypt_the_old_way, "the key is encrypted"),
    ("ca.pem", cut, "ca.pem is not a certificate in PEM"),
    ("ca.pem", second_cut, "ca.pem is cut off"),
    ("ca.pem", lambda path: path.write_bytes(b""), "ca.pem is not a certificate in PEM"),
]


@pytest.mark.parametrize(("name", "spoil", "why"), BROKEN)
def test_broken_files_keep_the_old_identity(
    case: Case, name: str, spoil: Callable[[Path], object], why: str
) -> None:
    leaf = case.write()
    contexts = case.identity.client_context(), case.identity.server_context()
    good = (case.directory / name).read_bytes()
    spoil(case.directory / name)
    for _ in range(3):
        assert (case.identity.client_context(), case.identity.server_context()) == contexts
    [(word, detail)] = case.events
    assert word == "identity_broken"
    assert detail.startswith(f"{case.directory}: {why}")

    (case.directory / name).unlink(missing_ok=True)
    (case.directory / name).write_bytes(good)
    assert case.identity.server_context() is not contexts[1]
    assert shown_by(case.identity.server_context()) == der(leaf)
    assert case.words() == ["identity_broken", "identity_loaded"]


@pytest.mark.parametrize(("name", "spoil", "why"), BROKEN)
def test_broken_files_are_no_identity(
    case: Case, name: str, spoil: Callable[[Path], object], why: str
) -> None:
    case.write()
    spoil(case.directory / name)
    for _ in range(2):
        with pytest.raises(IdentityError) as caught:
            case.identity.client_context()
        assert str(caught.value).startswith(f"no identity in {case.directory}: {why}")
    assert case.words() == ["identity_broken"]


def test_each_broken_state_is_told(case: Case) -> None:
    case.write()
    case.identity.server_context()
    for _ in range(2):
        other_key(case.directory / "key.pem")
        case.identity.server_context()
        case.identity.server_context()
    assert case.words() == ["identity_broken"] * 2


def test_a_vanished_directory_keeps_the_old_identity(case: Case) -> None:
    case.write()
    context = case.identity.server_context()
    shutil.rmtree(case.directory)
    assert case.identity.server_context() is context
    assert case.words() == ["identity_broken"]


def test_an_absent_directory_is_no_identity_until_it_is_there(case: Case) -> None:
    with pytest.raises(IdentityError, match=r"cert\.pem: No such file"):
        case.identity.client_context()
    leaf = case.write()
    assert shown_by(case.identity.server_context()) == der(leaf)
    assert case.words() == ["identity_broken", "identity_loaded"]


def fail_with(number: int) -> Callable[..., bytes]:
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    return fail


def test_what_is_no_fault_of_the_files_is_tried_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read_file", fail_with(errno.EIO))
        for _ in range(2):
            with pytest.raises(IdentityError, match="Input/output error"):
                case.identity.client_context()
    assert case.words() == ["identity_broken"]
    case.identity.client_context()
    assert case.words() == ["identity_broken", "identity_loaded"]


def test_no_descriptor_is_no_broken_identity(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.write()
    for where, name in (
        (module, "_read_file"),
        (os, "memfd_create"),  # for the first kind
        (os, "memfd_create"),  # for another
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail_with(errno.EMFILE))
            with pytest.raises(OSError, match="Too many open files"):
                case.identity.server_context()
        if name == "memfd_create":
            case.identity.client_context()
    case.identity.server_context()
    assert case.events == []


def test_no_descriptor_is_no_lack_of_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    system_authorities.cache_clear()
    expected = system_authorities()
    system_authorities.cache_clear()

    class Context:
        def __init__(self, protocol: int) -> None:
            self.load_verify_locations = fail_with(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(ssl, "SSLContext", Context)
        with pytest.raises(OSError, match="Too many open files"):
            system_authorities()
    assert system_authorities() == expected


def test_no_descriptor_is_left_open(case: Case) -> None:
    case.write()
    before = sorted(os.listdir("/proc/self/fd"))
    case.identity.server_context()
    for spoil in encrypt, directory:
        spoil(case.directory / "key.pem")
        case.identity.server_context()
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_root
def test_files_that_the_user_cannot_read_keep_the_old_identity() -> None:
    # Not in pytest's directories: those are for the user who runs it.
    with TemporaryDirectory() as home:
        os.chmod(home, 0o711)  # noqa: S103  # the user has to get there
        case = Case(Path(home, "identity"))
        case.write()
        key = case.directory / "key.pem"
        os.chown(key, USER, -1)
        key.chmod(0o400)
        with as_user(USER):
            context = case.identity.server_context()
        os.chown(key, 0, -1)
        with as_user(USER):
            for _ in range(2):
                assert case.identity.server_context() is context
        assert case.events == [("identity_broken", f"{case.directory}: key.pem: Permission denied")]
        os.chown(key, USER, -1)
        with as_user(USER):
            assert case.identity.server_context() is not context
        assert case.words() == ["identity_broken", "identity_loaded"]


def test_another_kind_is_made_in_a_sandbox(case: Case) -> None:
    case.write()
    program = """
import sys
from pathlib import Path
from mutual_tls.identity import Identity
from sniproxy.service import sandbox
identity = Identity(Path(sys.argv[1]), print)
identity.client_context()
sandbox.enter()
identity.server_context()
"""
    command = [sys.executable, "-c", program, str(case.directory)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert done.stdout == b""


# --- the end of a certificate


def test_an_end_within_a_day_is_told_once_an_hour(case: Case) -> None:
    case.write()
    end, clock = END.timestamp(), case.clock
    for now in (
        *(end - 86400, end - 86399, end - 86398, end - 82800, end - 82799),
        *(end + 1, end + 2),
    ):
        clock.now = now
        case.identity.server_context()
        case.identity.client_context()
    expires = ("identity_expires", f"{case.directory}: the certificate expires at {ISO}")
    expired = ("identity_expires", f"{case.directory}: the certificate has expired at {ISO}")
    assert case.events == [expires, expires, expired]


def test_an_expired_certificate_is_used(case: Case) -> None:
    case.write()
    leaf = case.authority.issue_cert(NAME, not_after=datetime.now(UTC) - timedelta(days=1))
    write_files(case.directory, leaf, case.authority)
    case.clock.now = datetime.now(UTC).timestamp()
    assert shown_by(case.identity.server_context()) == der(leaf)
    assert case.words() == ["identity_expires"]


# --- the chain


def chain_sent(case: Case) -> int:
    """Return how many certificates our server sends."""
    handshake = Handshake(case.identity.client_context(), case.identity.server_context()).finish()
    inner: Any = handshake.client._sslobj  # type: ignore[attr-defined]
    return len(inner.get_unverified_chain())


@pytest.mark.parametrize(
    ("depth", "in_file", "sent"),
    [
        (0, 1, 2),  # the root has issued it: not alone, or OpenSSL looks for the root each time
        (1, 1, 2),
        (1, 2, 2),
        (2, 1, 3),
        (2, 2, 3),
        (2, 3, 3),
    ],
)
def test_the_chain_is_completed_but_for_the_root(
    case: Case, depth: int, in_file: int, sent: int
) -> None:
    authorities = [case.authority]
    for _ in range(depth):
        authorities.append(authorities[-1].create_child_ca())
    leaf = authorities[-1].issue_cert(NAME)
    case.directory.mkdir()
    pems = [each.bytes() for each in leaf.cert_chain_pems]
    (case.directory / "cert.pem").write_bytes(b"".join(pems[:in_file]))
    (case.directory / "key.pem").write_bytes(leaf.private_key_pem.bytes())
    known = b"".join(each.cert_pem.bytes() for each in authorities)
    (case.directory / "ca.pem").write_bytes(known)
    assert chain_sent(case) == sent
    material = case.identity._loaded.material  # type: ignore[union-attr]
    # What OpenSSL was given is what it sends: it has looked for nothing.
    assert material.chain.count(b"BEGIN") == sent


def test_a_namesake_is_not_appended(case: Case) -> None:
    case.write()
    namesakes = [trustme.CA(organization_name="o", organization_unit_name="u") for _ in range(2)]
    leaf = namesakes[1].issue_cert(NAME)
    write_files(case.directory, leaf, namesakes[0])
    both = b"".join(each.cert_pem.bytes() for each in namesakes)
    (case.directory / "ca.pem").write_bytes(both)
    case.identity.server_context()
    material = case.identity._loaded.material  # type: ignore[union-attr]
    assert material.chain.endswith(namesakes[1].cert_pem.bytes())


# --- sessions


@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_are_resumed_with_client_certificates(case: Case, version: ssl.TLSVersion) -> None:
    leaf = case.write()
    client, server = case.identity.client_context(), case.identity.server_context()
    client.maximum_version = version
    first = Handshake(client, server).finish()
    again = Handshake(client, server, session=first.client.session).finish()
    assert again.client.session_reused
    assert again.server.session_reused
    assert again.shown() == (der(leaf), der(leaf))


@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_do_not_outlive_a_swap(case: Case, version: ssl.TLSVersion) -> None:
    leaf = case.write()
    client = case.identity.client_context()
    client.maximum_version = version
    session = Handshake(client, case.identity.server_context()).finish().client.session
    # The same files once more: they could be others.
    write_files(case.directory, leaf, case.authority)
    again = Handshake(client, case.identity.server_context(), session=session).finish()
    assert not again.client.session_reused


# --- the server is checked by rules: what `client_context` says of the moment for it


def leaf_shown(client: ssl.SSLObject) -> bytes | None:
    inner: Any = client
    if not hasattr(client, "get_unverified_chain"):  # before Python 3.13
        inner = client._sslobj  # type: ignore[attr-defined]
    chain = inner.get_unverified_chain()
    if not chain:
        return None
    first = chain[0]
    shown: bytes = first if isinstance(first, bytes) else first.public_bytes(_ssl.ENCODING_DER)
    return shown


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_sent", [False, True])
def test_our_certificate_waits_for_the_check(
    case: Case, version: ssl.TLSVersion, is_sent: bool
) -> None:
    leaf = case.write()
    client = case.identity.client_context(check_hostname=False)
    client.maximum_version = version
    handshake = Handshake(client, case.identity.server_context(), "other.example")
    assert not step(handshake.client)
    assert leaf_shown(handshake.client) is None
    assert not step(handshake.server)
    is_done = step(handshake.client)
    # The moment: the server's certificate is verified and known, ours is ready and not sent.
    assert leaf_shown(handshake.client) == der(leaf)
    assert handshake.up.pending > len(der(leaf))
    assert is_done == (version is ssl.TLSVersion.TLSv1_3)
    if not is_sent:
        handshake.up.read()
    assert step(handshake.server) == is_sent
    assert (leaf_shown(handshake.server) is not None) == is_sent


def test_a_server_that_is_not_trusted_is_refused_before_the_check(case: Case) -> None:
    case.write()
    stranger = Case(case.directory.with_name("stranger"))
    stranger.write()
    client = case.identity.client_context(check_hostname=False)
    handshake = Handshake(client, stranger.identity.server_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake.finish()
    assert handshake.up.pending < 100  # an alert
