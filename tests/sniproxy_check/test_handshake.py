"""Backends of every kind, and what is said of them."""

import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sniproxy_check.handshake import SOON, Answer, Probe, probe
from tests.support.certificates import Certificates
from tests.support.sockets import unix_pair

NAME = "www.example.org"
HEADER = b"PROXY TCP4 127.0.0.1 127.0.0.1 443 443\r\n"

# For backends that are not silent: never waited for, far above what a busy machine takes.
PATIENT = 30.0
# For those that are: waited for, two times.
SHORT = 0.05

Story = Callable[[socket.socket], None]


class Backend:
    """Runs a story for each connection, in a thread; it is closed at its end."""

    def __init__(self, *stories: Story) -> None:
        self._stories = stories
        self.connected: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def connect(self) -> socket.socket:
        """Connect; the last story is that of all further connections."""
        near, far = unix_pair()
        # As that of an event loop, of which a probe must know nothing.
        near.setblocking(False)
        story = self._stories[min(len(self.connected), len(self._stories) - 1)]
        self.connected.append(near)

        def run() -> None:
            # What the other side does to a story shows in what it says of it.
            with far, suppress(OSError):
                story(far)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return near

    def probe(self, *, proxy: int = 0, seconds: float = PATIENT) -> Probe:
        """Probe it, and look that nothing is left open."""
        try:
            return probe(self.connect, NAME, proxy=proxy, seconds=seconds)
        finally:
            assert all(sock.fileno() == -1 for sock in self.connected)
            for thread in self._threads:
                thread.join()


def tls(context: ssl.SSLContext) -> Story:
    """A server that stays until its client goes."""

    def story(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as server:
            while server.recv(1000):
                pass

    return story


def says(data: bytes) -> Story:
    """A server that says something to whatever comes."""

    def story(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(data)
        _until_gone(sock)

    return story


def silent(sock: socket.socket) -> None:
    """Read, and say nothing."""
    _until_gone(sock)


def closes(sock: socket.socket) -> None:
    """Read, and close."""
    sock.recv(1 << 16)


def after_header(story: Story) -> Story:
    """A server that demands a header, and closes if there is another beginning."""

    def wanting(sock: socket.socket) -> None:
        if sock.recv(len(HEADER), socket.MSG_PEEK | socket.MSG_WAITALL) == HEADER:
            sock.recv(len(HEADER))
            story(sock)

    return wanting


def _until_gone(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def days(count: float) -> datetime.datetime:
    """Return a time from now."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=count)


def self_signed(
    folder: Path,
    *names: x509.GeneralName,
    begins: float = -100,
    ends: float = 100,
    authority: bool = False,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
) -> ssl.SSLContext:
    """Return the context of a server with a certificate of its own, with these names or none."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(days(begins))
        .not_valid_after(days(ends))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = folder / "self-signed.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


@pytest.fixture
def good(certificates: Certificates) -> ssl.SSLContext:
    """What a server for NAME needs, from an authority that the probe does not know."""
    return certificates.server_context(NAME, ["h2", "http/1.1"])


def test_tls(good: ssl.SSLContext) -> None:
    found = Backend(tls(good)).probe()
    assert found[:3] == (Answer.SPEAKS_TLS, "TLSv1.3", "h2")
    assert found.expires
    assert found.expires > time.time()


def test_the_header_is_sent_first(good: ssl.SSLContext) -> None:
    found = Backend(after_header(tls(good))).probe(proxy=1)
    assert found[:3] == (Answer.SPEAKS_TLS, "TLSv1.3", "h2")


def test_a_server_without_alpn(certificates: Certificates) -> None:
    assert Backend(tls(certificates.server_context(NAME))).probe().protocol is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_2])
def test_old_versions_are_heard(good: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    good.set_ciphers("ALL:@SECLEVEL=0")
    good.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ours is not to use it, but to hear it
        good.maximum_version = version
    found = Backend(tls(good)).probe()
    assert found[:2] == (Answer.SPEAKS_TLS, version.name.replace("_", "."))


def test_the_name_is_sent(good: ssl.SSLContext) -> None:
    asked = []
    good.sni_callback = lambda _server, name, _context: asked.append(name)
    assert Backend(tls(good)).probe().answer is Answer.SPEAKS_TLS
    assert set(asked) == {NAME}


def test_an_alert_by_its_name(good: ssl.SSLContext) -> None:
    good.sni_callback = lambda *_: ssl.AlertDescription.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    assert Backend(tls(good)).probe()[:4] == (
        Answer.HANDSHAKE_FAILED, "alert unrecognized_name", None, None,
    )  # fmt: skip


def test_a_raw_alert() -> None:
    found = Backend(says(b"\x15\x03\x01\x00\x02\x02\x28")).probe()
    assert found[:2] == (Answer.HANDSHAKE_FAILED, "alert handshake_failure")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_client_certificates(certificates: Certificates, version: ssl.TLSVersion) -> None:
    context = certificates.server_context(NAME, asks_client=True)
    context.maximum_version = version
    found = Backend(tls(context)).probe()
    if version == ssl.TLSVersion.TLSv1_3:
        # It objects to what comes after the handshake.
        assert found[:2] == (Answer.SPEAKS_TLS, "TLSv1.3")
    else:
        assert found.answer is Answer.HANDSHAKE_FAILED
        assert found.detail.endswith("it may demand a client certificate")


@pytest.mark.parametrize(
    ("said", "answer", "detail"),
    [
        (b"HTTP/1.1 400 Bad\x1b Request\r\nServer: x\r\n\r\n", Answer.SPEAKS_PLAIN_HTTP,
         "it says HTTP/1.1 400 Bad\\x1b Request"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Answer.NOT_TLS, "it says SSH-2.0-OpenSSH_9.2"),
        (b"220 \xff" + b"m" * 100, Answer.NOT_TLS, "it says 220 \\xff" + "m" * 59),
        (b"\x16\x02\x00\x00\x00", Answer.NOT_TLS, "it says \\x16\\x02\\x00\\x00\\x00"),
    ],
)  # fmt: skip
def test_what_is_not_tls(said: bytes, answer: Answer, detail: str) -> None:
    assert Backend(says(said)).probe()[:4] == (answer, detail, None, None)


def test_a_greeting_from_who_reads_nothing_and_goes() -> None:
    # What was not read makes a reset of the end; the greeting is there before it.
    assert Backend(lambda sock: sock.sendall(b"no\n")).probe()[:4] == (
        Answer.NOT_TLS, "it says no", None, None,
    )  # fmt: skip


@pytest.mark.parametrize("story", [closes, lambda _: None], ids=["after_reading", "unread"])
def test_closing_at_once(story: Story) -> None:
    assert Backend(story).probe()[:4] == (Answer.CLOSES_AT_ONCE, "", None, None)


def test_silence() -> None:
    assert Backend(silent).probe(seconds=SHORT)[:4] == (Answer.SILENT, "", None, None)


def test_who_never_reads() -> None:
    def full() -> socket.socket:
        near, far = unix_pair()
        near.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 16))
        ends.append(far)
        return near

    ends: list[socket.socket] = []
    found = probe(full, NAME, proxy=0, seconds=SHORT)
    for end in ends:
        end.close()
    assert found[:4] == (Answer.SILENT, "", None, None)


def test_drops_of_tls_do_not_prolong_it() -> None:
    def drips(sock: socket.socket) -> None:
        sock.sendall(b"\x16\x03\x03\x40\x00")
        while True:  # until it is closed
            sock.sendall(b"\x00")
            time.sleep(SHORT / 10)

    found = Backend(drips).probe(seconds=SHORT)
    assert found[:2] == (Answer.HANDSHAKE_FAILED, "not at its end after 0.05 seconds")


def test_floods_are_bounded() -> None:
    def floods(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        # A record of type handshake with a Certificate of 16 MB, which never ends.
        sock.sendall(b"\x16\x03\x03\x40\x00\x0b\xff\xff\xff" + bytes(0x4000 - 4))
        while True:
            sock.sendall(b"\x16\x03\x03\x40\x00" + bytes(0x4000))

    assert Backend(floods).probe().answer is Answer.HANDSHAKE_FAILED
    assert Backend(says(bytes(1 << 16))).probe().answer is Answer.NOT_TLS


def test_the_end_within_the_handshake() -> None:
    def breaks_off(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"\x16\x03\x03\x40\x00")

    assert Backend(breaks_off).probe()[:2] == (
        Answer.HANDSHAKE_FAILED, "it closed before the end",
    )  # fmt: skip


def test_a_header_is_wanted(good: ssl.SSLContext) -> None:
    found = Backend(after_header(tls(good))).probe()
    assert found[:4] == (Answer.WANTS_PROXY_HEADER, "without a header closes_at_once", "h2", None)


def test_a_header_is_refused(good: ssl.SSLContext) -> None:
    found = Backend(tls(good)).probe(proxy=1)
    assert found[0] is Answer.REFUSES_PROXY_HEADER
    assert found.detail.startswith("with a header ")
    assert found.protocol == "h2"


def test_failures_of_both_ways_are_told_by_the_first() -> None:
    assert Backend(closes, says(b"SSH-2.0-x\r\n")).probe().answer is Answer.CLOSES_AT_ONCE


class _OddError(Exception):
    """What only this `connect` raises."""


def test_the_first_connection_fails() -> None:
    def connect() -> socket.socket:
        raise _OddError

    with pytest.raises(_OddError):
        probe(connect, NAME, proxy=0)


def test_a_later_connection_fails(good: ssl.SSLContext) -> None:
    def once(backend: Backend) -> Callable[[], socket.socket]:
        def connect() -> socket.socket:
            if backend.connected:
                raise _OddError("no more")
            return backend.connect()

        return connect

    assert probe(once(Backend(closes)), NAME, proxy=0).answer is Answer.CLOSES_AT_ONCE
    found = probe(once(Backend(tls(good))), NAME, proxy=0)
    assert found[:4] == (
        Answer.SPEAKS_TLS, "TLSv1.3; its certificate could not be judged: no more", "h2", None,
    )  # fmt: skip


def test_a_name_that_is_none() -> None:
    backend = Backend(silent)
    with pytest.raises(ValueError, match="label"):
        probe(backend.connect, "a" * 64, proxy=0)
    assert not backend.connected


@pytest.mark.parametrize("authority", [False, True])
@pytest.mark.parametrize("name", [NAME, "*.example.org"])
def test_self_signed(tmp_path: Path, name: str, authority: bool) -> None:
    context = self_signed(tmp_path, x509.DNSName(name), authority=authority)
    assert Backend(tls(context)).probe()[:2] == (Answer.SPEAKS_TLS, "TLSv1.3")


def test_a_labels(certificates: Certificates) -> None:
    name = "xn--mnchen-3ya.example"
    backend = Backend(tls(certificates.server_context(name)))
    found = probe(backend.connect, name, proxy=0, seconds=PATIENT)
    assert found[:2] == (Answer.SPEAKS_TLS, "TLSv1.3")


def test_names_of_others(tmp_path: Path) -> None:
    names = [x509.DNSName("a.example"), x509.DNSName("b\n.example")]
    address = x509.IPAddress(ipaddress.ip_address("192.0.2.1"))
    found = Backend(tls(self_signed(tmp_path, *names, address))).probe()
    assert found[:2] == (
        Answer.CERTIFICATE_FOR_OTHERS,
        "TLSv1.3; its certificate is for a.example, b\\n.example, 192.0.2.1",
    )
    assert found.expires


def test_very_many_names_of_others(tmp_path: Path) -> None:
    names = [x509.DNSName(f"{number}.example") for number in range(10)]
    found = Backend(tls(self_signed(tmp_path, *names))).probe()
    assert found.detail.endswith("6.example, 7.example and 2 more")


def test_the_common_name_is_no_name(tmp_path: Path) -> None:
    found = Backend(tls(self_signed(tmp_path))).probe()
    assert found.answer is Answer.CERTIFICATE_FOR_OTHERS
    assert "no subjectAltName" in found.detail


@pytest.mark.parametrize(
    ("begins", "ends", "answer", "word"),
    [
        (-100, -1, Answer.CERTIFICATE_EXPIRED, "it ended "),
        (1, 100, Answer.CERTIFICATE_NOT_YET_VALID, "it begins "),
        (-100, 13.9, Answer.CERTIFICATE_EXPIRES_SOON, "it ends "),
        (-100, 14.1, Answer.SPEAKS_TLS, ""),
    ],
)
def test_dates(tmp_path: Path, begins: float, ends: float, answer: Answer, word: str) -> None:
    context = self_signed(tmp_path, x509.DNSName(NAME), begins=begins, ends=ends)
    found = Backend(tls(context)).probe()
    assert found.answer is answer
    assert word in found.detail
    assert found.expires == pytest.approx(days(ends).timestamp(), abs=60)


def test_an_expired_one_of_an_authority() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert(NAME, not_after=days(-1)).configure_cert(context)
    assert Backend(tls(context)).probe().answer is Answer.CERTIFICATE_EXPIRED


def test_the_name_comes_before_the_date(tmp_path: Path) -> None:
    context = self_signed(tmp_path, x509.DNSName("a.example"), ends=-1)
    found = Backend(tls(context)).probe()
    assert found.answer is Answer.CERTIFICATE_FOR_OTHERS
    assert "is for a.example; it ended " in found.detail


def test_another_objection_to_a_certificate_is_told(tmp_path: Path) -> None:
    client = ExtendedKeyUsageOID.CLIENT_AUTH
    found = Backend(tls(self_signed(tmp_path, x509.DNSName(NAME), purpose=client))).probe()
    assert found.answer is Answer.SPEAKS_TLS
    assert "clients refuse its certificate: " in found.detail
    assert "purpose" in found.detail


def test_soon_is_two_weeks() -> None:
    assert datetime.timedelta(seconds=SOON) == datetime.timedelta(weeks=2)


@contextmanager
def running(*command: str | Path, path: Path) -> Iterator[Callable[[], socket.socket]]:
    """Run a real server, and give the way to connect to it."""

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            raise
        return sock

    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + PATIENT
        while True:
            assert server.poll() is None, f"{command[0]} has ended"
            with suppress(OSError):
                connect().close()
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield connect
    finally:
        server.kill()
        server.communicate()


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
def test_haproxy(tmp_path: Path) -> None:
    self_signed(tmp_path, x509.DNSName(NAME))
    path = tmp_path / "socket"
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(f"""
defaults
    mode http
    timeout client 30s
frontend tls
    bind unix@{path} accept-proxy ssl crt {tmp_path}/self-signed.pem alpn h2
    http-request return status 200
""")
    with running("haproxy", "-db", "-f", configuration, path=path) as connect:
        header = probe(connect, NAME, proxy=1, seconds=PATIENT)
        plain = probe(connect, NAME, proxy=0, seconds=PATIENT)
    assert header[:3] == (Answer.SPEAKS_TLS, "TLSv1.3", "h2")
    assert plain.answer is Answer.WANTS_PROXY_HEADER
