"""Handshakes between a client and a backend that holds the key. The daemon is not noticed."""

import re
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import CLIENTS, NAME, Client, Visit, curl, gnutls_cli, openssl
from tests.support.backends import TlsBackend
from tests.support.certificates import Certificates

each_client = pytest.mark.parametrize("client", CLIENTS)
each_version = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])


@each_client
@each_version
def test_the_client_gets_what_it_came_for(
    client: Client,
    version: str,
    visit: partial[Visit],
    tls_socket: Path,
    certificates: Certificates,
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        outcome = client(visit(NAME, version))
        assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert (seen.error, seen.server_name, seen.version) == (None, NAME, version)
    assert seen.requests == ["GET / HTTP/1.1"]
    assert outcome.protocol is seen.alpn is None


@each_client
def test_the_client_does_verify(
    client: Client, visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    # Else the tests above would say nothing of who answered.
    with TlsBackend(tls_socket, certificates.server_context("other.example")) as backend:
        assert client(visit(NAME)).code != 0
        assert backend.connection().requests == []


@each_client
@each_version
@pytest.mark.parametrize(
    ("offered", "known", "agreed"),
    [
        (["h2", "http/1.1"], ["h2", "http/1.1"], "h2"),
        (["h2", "http/1.1"], ["http/1.1"], "http/1.1"),
        (["http/1.1"], ["h2", "http/1.1"], "http/1.1"),
    ],
)
def test_client_and_backend_agree_on_a_protocol(
    client: Client,
    version: str,
    offered: list[str],
    known: list[str],
    agreed: str,
    visit: partial[Visit],
    tls_socket: Path,
    certificates: Certificates,
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME, known)) as backend:
        outcome = client(visit(NAME, version, offered))
        assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert (seen.error, seen.alpn, outcome.protocol) == (None, agreed, agreed)
    # curl speaks what was agreed upon; the others have one request only.
    answered = "HTTP/2 stream 1" if client is curl and agreed == "h2" else "GET / HTTP/1.1"
    assert seen.requests == [answered]


@each_client
@each_version
def test_the_backend_sees_the_client_certificate(
    client: Client,
    version: str,
    visit: partial[Visit],
    tls_socket: Path,
    certificates: Certificates,
) -> None:
    pair = certificates.for_client("someone@a.example")
    with TlsBackend(tls_socket, certificates.server_context(NAME, asks_client=True)) as backend:
        outcome = client(visit(NAME, version, shows=pair))
        assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert (seen.error, seen.client_certificate) == (None, pair.der())


@each_client
def test_the_client_hears_that_its_certificate_is_missing(
    client: Client, visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME, asks_client=True)) as backend:
        outcome = client(visit(NAME, "TLSv1.3"))
        assert backend.connection().error is not None
    # The backend's own alert, certificate_required(116).
    assert outcome.code != 0
    assert re.search("certificate required|alert number 116|alert .116.", outcome.output)


@each_version
def test_openssl_resumes_a_session(
    version: str,
    visit: partial[Visit],
    tls_socket: Path,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    session = str(tmp_path / "session")
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        first = openssl(visit(NAME, version), "-sess_out", session)
        second = openssl(visit(NAME, version), "-sess_in", session)
        assert [backend.connection().resumed, backend.connection().resumed] == [False, True]
    assert first.code == second.code == 0, second.output
    assert "New, TLSv1" in first.output
    assert "Reused, TLSv1" in second.output


@each_version
def test_gnutls_resumes_a_session(
    version: str, visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        # TLS 1.3 sends tickets after the handshake, RFC 8446 section 4.6.1.
        outcome = gnutls_cli(visit(NAME, version), "--resume", "--waitresumption")
        assert [backend.connection().resumed, backend.connection().resumed] == [False, True]
    assert outcome.code == 0, outcome.output
    assert "This is a resumed session" in outcome.output


def test_a_second_hello_goes_the_way_of_the_first(
    visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    # The client guesses a group that the backend does not know: HelloRetryRequest, RFC 8446
    # section 4.1.4. Only the first hello is the daemon's business.
    context = certificates.server_context(NAME)
    context.set_ecdh_curve("secp384r1")
    with TlsBackend(tls_socket, context) as backend:
        outcome = openssl(visit(NAME, "TLSv1.3"), "-groups", "X25519:P-384", "-msg")
        assert outcome.code == 0, outcome.output
        assert backend.connection().error is None
    assert outcome.output.count("ClientHello") == 2


def test_a_hello_of_several_records(
    visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    # 20 KB of protocols; OpenSSL cuts the message after 16 KB, the most that a record may have.
    protocols = [f"{number:03}".ljust(200, "-") for number in range(100)]
    with TlsBackend(tls_socket, certificates.server_context(NAME, protocols[-1:])) as backend:
        outcome = openssl(visit(NAME, "TLSv1.3", protocols))
        assert outcome.code == 0, outcome.output
        assert backend.connection().alpn == outcome.protocol == protocols[-1]
