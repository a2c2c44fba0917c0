"""tls-bridge and tls-bridge-peer, as processes: what a client gets to see, and the log."""

import contextlib
import http.client
import os
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import pytest

from tests.support import hellos
from tests.support.bridge import (
    INGRESS,
    PEER,
    SERVICE,
    Bridge,
    ask,
    authority,
    bridge,
    connect,
    read_header,
    start,
    write,
    write_identity,
)
from tests.support.daemon import COVERAGE, PATIENCE, Daemon, eventually, start_daemon
from tests.support.sockets import Noise, receive_all, receive_exactly

OK = b"HTTP/1.1 200 Connection established\r\n"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    with bridge(tmp_path) as made:
        yield made


def status(header: bytes) -> int:
    return int(header.split()[1])


def error(header: bytes) -> str:
    """Return the type of error in the first Proxy-Status."""
    [line] = [line for line in header.splitlines() if line.lower().startswith(b"proxy-status:")]
    return line.partition(b"error=")[2].partition(b";")[0].decode()


def check_echo(client: socket.socket) -> None:
    client.sendall(b"hello")
    assert receive_exactly(client, 5) == b"hello"
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b""


# --- The main job --------------------------------------------------------------------------------


def test_connect_reaches_a_service_that_only_the_peer_knows(it: Bridge) -> None:
    peer, ingress = it.start_peer("--log", "connections"), it.start_ingress("--log", "connections")
    client, header = ask(ingress, connect())
    with client:
        assert header.startswith(OK)
        check_echo(client)
    assert "name=web.internal:80 peer=p up=5 down=5" in ingress.wait_for_log("connection")
    assert "ending=finished" in peer.wait_for_log("connection")


def test_both_sides_count_what_the_client_says_as_up(it: Bridge) -> None:
    peer, ingress = it.start_peer("--log", "connections"), it.start_ingress("--log", "connections")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(it.peer_place / "allow/web.internal/80", f"127.0.0.1:{listening.getsockname()[1]}")
        client, _ = ask(ingress, connect())
        service, _ = listening.accept()
        with client, service:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(service) == b"question"
            service.sendall(b"no")
    for daemon in ingress, peer:
        assert " up=8 down=2 " in daemon.wait_for_log("connection")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["x"], "'x' is a REGEX without a PEER"),
        (["(", "p"], "'(' is no regular expression"),
        (["x", "../p"], "'../p' is no name of a peer"),
        (["x", "host:0"], "there is no port 0"),
    ],
)
def test_wrong_pairs_are_told_of(words: list[str], why: str) -> None:
    for options in [], ["--check-options"]:
        done = subprocess.run(
            [sys.executable, "-m", "tls_bridge", *options, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 100
        assert why in done.stderr


def test_what_comes_with_the_connect_is_not_lost(it: Bridge) -> None:
    it.start_peer()
    early = b"".join(Noise().blocks(100_000))
    with it.start_ingress().connect() as client:
        client.sendall(connect() + early)
        assert read_header(client).startswith(OK)
        assert receive_exactly(client, len(early)) == early


def test_what_comes_with_the_answer_is_not_lost(it: Bridge) -> None:
    """A service that speaks first."""
    banner = b"220 mail.example ESMTP\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(it.peer_place / "allow/mail.internal/25", f"127.0.0.1:{listening.getsockname()[1]}")
        write(it.ingress_place / "hosts/_.internal/peer", "p")
        it.start_peer()
        client = it.start_ingress().connect()
        with client:
            client.sendall(connect("mail.internal:25"))
            service, _ = listening.accept()
            with service:
                service.sendall(banner)
                service.shutdown(socket.SHUT_WR)
                assert read_header(client).startswith(OK)
                assert receive_all(client) == banner
                client.sendall(b"QUIT")
                client.shutdown(socket.SHUT_WR)
                assert receive_all(service) == b"QUIT"


@pytest.mark.parametrize("size", [100_000_000])
def test_much_in_both_directions_is_intact(it: Bridge, size: int) -> None:
    it.start_peer()
    client, header = ask(it.start_ingress(), connect())
    assert header.startswith(OK)
    block = b"".join(Noise().blocks(1_000_000))
    pid = os.fork()
    if pid == 0:
        for _ in range(size // len(block)):
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)
        os._exit(0)
    with client:
        for _ in range(size // len(block)):
            assert receive_exactly(client, len(block)) == block
        assert receive_all(client) == b""
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_stalled_reader_costs_little_memory(it: Bridge) -> None:
    """200 MB are offered, and nobody reads: what can't be sent is not read."""
    peer, ingress = it.start_peer(), it.start_ingress()
    client, header = ask(ingress, connect())
    with client:
        assert header.startswith(OK)
        client.setblocking(False)
        block = bytes(1 << 20)
        sent, deadline = 0, time.monotonic() + 2
        while sent < 200_000_000 and time.monotonic() < deadline:
            try:
                sent += client.send(block)
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 100_000_000
        for daemon in peer, ingress:
            assert daemon.rss_peak() < 80_000_000


def test_the_server_name_leads_to_a_site_on_another_machine(it: Bridge, tmp_path: Path) -> None:
    """A browser's whole check of the certificate; the key of the site never leaves its machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("site.example").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        write(it.peer_place / "allow/site.example/443", f"127.0.0.1:{port}")
        write(it.peer_place / "allow/site.example/send-proxy-v1")
        write(it.ingress_place / "hosts/site.example/peer", "p")
        it.start_peer()
        path = tmp_path / "tls-socket"
        it.start_ingress("--sni", unix=path)
        browser = ssl.create_default_context()
        authority().configure_trust(browser)
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(PATIENCE)
        raw.connect(str(path))
        raw.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 443\r\n")
        pid = os.fork()
        if pid == 0:
            service, _ = listening.accept()
            line = receive_exactly(service, len("PROXY TCP4 192.0.2.7 127.0.0.1 50000 "))
            with context.wrap_socket(_after_line(service), server_side=True) as served:
                served.sendall(line)
                served.recv(100)
            os._exit(0)
        with browser.wrap_socket(raw, server_hostname="site.example") as client:
            assert client.recv(100).startswith(b"PROXY TCP4 192.0.2.7 127.0.0.1 50000")
            client.sendall(b"thanks")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _after_line(service: socket.socket) -> socket.socket:
    while service.recv(1) != b"\n":
        pass
    return service


# --- What the directory says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("WEB.internal.:80", 200),  # one name, however it is written
        ("other.internal:80", 403),
        ("web.internal.evil:80", 403),
        ("xweb.internal:80", 403),
        ("web.internal:81", 403),
        ("127.0.0.1:80", 403),
        ("[::1]:80", 403),
        ("../peers/p:80", 400),
        ("web.internal:0", 400),
        ("web.internal:65536", 400),
        ("web.internal", 400),
        (":80", 400),
        ("_.internal:80", 400),
    ],
)
def test_only_what_is_named_is_reached(it: Bridge, target: str, expected: int) -> None:
    it.start_peer()
    client, header = ask(it.start_ingress(), connect(target))
    client.close()
    assert status(header) == expected


def test_rules_of_all_kinds_in_their_order(it: Bridge) -> None:
    port = it.peer_socket.getsockname()[1]
    shutil.rmtree(it.ingress_place / "hosts")
    for name in "a.one", "b.two", "c.three", "d.four":
        write(it.peer_place / "allow" / name / "80", f"127.0.0.1:{it.echo.port}")
    write_identity(it.ingress_place / "id", INGRESS)
    file = write(it.ingress_place / "more", rf".*\.two 127.0.0.1:{port}")
    write(it.ingress_place / "rules.d/10", "# nothing\n(a+)+\\.three p\n[ wrong p\nno-peer\n")
    write(it.ingress_place / "rules.d/20", ".*\\.four  p  # the last\n.*\\.one nobody\n")
    it.start_peer()
    options = ("--identity", "id", "--server-name", PEER, "--file", str(file))
    ingress = it.start_ingress(*options, r".*\.one", f"127.0.0.1:{port}")
    expected = {
        "a.one": 200,
        "A.ONE": 200,
        "b.two": 200,
        "d.four": 200,
        "a.one.evil": 403,
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab.three": 403,
        "c.five": 403,
    }
    for name, wanted in expected.items():
        client, header = ask(ingress, connect(f"{name}:80"))
        client.close()
        assert (name, status(header)) == (name, wanted)
    assert "line=3" in ingress.wait_for_log("bad_line")


def test_a_change_of_the_directory_counts_for_the_next_connection(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress()
    for change, expected in (
        (lambda: None, 200),
        (lambda: write(it.ingress_place / "hosts/web.internal/ports/443"), 403),
        (lambda: write(it.ingress_place / "hosts/web.internal/ports/80"), 200),
        (lambda: write(it.ingress_place / "hosts/web.internal/peer", "one\ntwo\n"), 500),
        (lambda: (it.ingress_place / "hosts/web.internal/peer").unlink(), 500),
        (lambda: shutil.rmtree(it.ingress_place / "hosts/web.internal"), 403),
    ):
        change()
        client, header = ask(ingress, connect())
        client.close()
        assert status(header) == expected


@pytest.mark.parametrize(
    "path",
    [
        "ingress/hosts/web.internal/ports",
        "ingress/peers/p/servers",
        "ingress/peers/p/server-name",
        "peer/allow/web.internal/clients",
    ],
)
def test_a_link_that_leads_nowhere_allows_nothing(it: Bridge, tmp_path: Path, path: str) -> None:
    """It was a list of whom or what to allow, and if it is absent more is allowed."""
    (tmp_path / path).unlink(missing_ok=True)
    (tmp_path / path).symlink_to("nowhere")
    it.start_peer()
    client, header = ask(it.start_ingress(), connect())
    client.close()
    assert (status(header), error(header)) == (500, "proxy_configuration_error")


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"GET http://web.internal/ HTTP/1.1\r\nHost: web.internal\r\n\r\n", 405),
        (b"HEAD http://web.internal/ HTTP/1.1\r\nHost: web.internal\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP\r\n\r\n", 400),
        (connect("web.internal:80", "X: " + 17_000 * "x"), 431),
        (connect("web.internal:80", "Content-Length: 5") + b"hello", 400),
    ],
    ids=["method", "head", "not-http", "too-large", "content"],
)
def test_what_is_no_connect(it: Bridge, request_bytes: bytes, expected: int) -> None:
    ingress = it.start_ingress()
    client, header = ask(ingress, request_bytes)
    client.close()
    assert status(header) == expected
    assert error(header).startswith("http_request_")
    ingress.wait_for_log(f"status={expected}")


def fails(it: Bridge, expected: tuple[int, str, str]) -> None:
    ingress = it.start_ingress()
    began = time.monotonic()
    client, header = ask(ingress, connect())
    with client:
        assert (status(header), error(header)) == expected[:2]
        receive_all(client)
    assert time.monotonic() - began < PATIENCE / 2
    assert f"{expected[2]} status={expected[0]} " in ingress.wait_for_log("refused")


def test_nobody_listens(it: Bridge) -> None:
    it.peer_socket.close()
    fails(it, (502, "connection_refused", "reason=refused"))


def test_a_name_without_an_address(it: Bridge) -> None:
    write(it.ingress_place / "peers/p/address", "no-such-name.invalid:443")
    fails(it, (502, "dns_error", "reason=unresolved"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", (502, "tls_protocol_error", "reason=not_tls")),
        (b"", (502, "connection_terminated", "reason=tls_closed")),
    ],
    ids=["http", "nothing"],
)
def test_the_peer_speaks_no_tls(it: Bridge, said: bytes, expected: tuple[int, str, str]) -> None:
    pid = os.fork()
    if pid == 0:
        connection, _ = it.peer_socket.accept()
        connection.recv(1 << 16)
        connection.sendall(said)
        connection.close()
        os._exit(0)
    fails(it, expected)
    os.waitpid(pid, 0)


class Impostor:
    """A TLS server of a wrong kind, and whether it was shown a certificate."""

    def __init__(self, it: Bridge, context: ssl.SSLContext) -> None:
        context.verify_mode = ssl.CERT_OPTIONAL
        authority().configure_trust(context)
        self._it = it
        self._context = context
        self._reader, self._writer = os.pipe()

    def __enter__(self) -> Self:
        if (pid := os.fork()) == 0:
            shown = b"nothing"
            try:
                connection, _ = self._it.peer_socket.accept()
                connection.settimeout(PATIENCE)
                with self._context.wrap_socket(connection, server_side=True) as served:
                    if served.getpeercert():
                        shown = b"certificate"
                    served.recv(100)
                    if served.getpeercert():
                        shown = b"certificate"
            except OSError:
                pass
            os.write(self._writer, shown)
            os._exit(0)
        self._pid = pid
        return self

    def __exit__(self, *args: object) -> None:
        os.waitpid(self._pid, 0)
        self.was_shown = os.read(self._reader, 100).decode()
        for end in self._reader, self._writer:
            os.close(end)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("stranger", (502, "tls_certificate_error", "reason=untrusted")),
        ("wrong name", (502, "tls_certificate_error", "reason=wrong_name")),
        ("wrong by rules", (502, "tls_certificate_error", "reason=wrong_name")),
    ],
)
def test_a_rogue_peer_is_not_shown_our_certificate(
    it: Bridge, kind: str, expected: tuple[int, str, str], version: ssl.TLSVersion
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    ca = authority("strangers") if kind == "stranger" else authority()
    ca.issue_cert(PEER if kind == "stranger" else "other.example").configure_cert(context)
    if kind == "wrong by rules":
        write(it.ingress_place / "peers/p/servers" / "spiffe", "spiffe://example.org/peer")
    with Impostor(it, context) as impostor:
        fails(it, expected)
    assert impostor.was_shown == "nothing"


def test_rules_for_the_peer_replace_its_name(it: Bridge) -> None:
    write(it.ingress_place / "peers/p/server-name", "another.example")
    write(it.ingress_place / "peers/p/servers" / PEER)
    it.start_peer()
    client, header = ask(it.start_ingress(), connect())
    with client:
        assert header.startswith(OK)
        check_echo(client)


def test_a_session_that_cannot_be_resumed_is_no_failure(it: Bridge) -> None:
    """Squid hands out such sessions if certificates are demanded and it has no sslcontext=."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(PEER).configure_cert(context)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as served:
            read_header(served)
            served.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            served.recv(1)

    def run() -> None:
        for resumes in False, True, False:
            connection, _ = it.peer_socket.accept()
            connection.settimeout(PATIENCE)
            if resumes:
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(bytes.fromhex("15 0303 0002 02 50"))  # internal_error
                    receive_all(connection)
            else:
                serve(connection)

    server = threading.Thread(target=run)
    server.start()
    ingress = it.start_ingress()
    for _ in range(2):
        client, header = ask(ingress, connect())
        client.close()
        assert header.startswith(OK)
    server.join(PATIENCE)
    assert not server.is_alive()


def test_our_certificate_is_rejected(it: Bridge) -> None:
    write_identity(it.ingress_place / "peers/p/identity", INGRESS, authority("strangers"))
    peer = it.start_peer()
    fails(it, (502, "tls_alert_received", "reason=rejected"))
    peer.wait_for_log("reason=untrusted")


def test_a_client_whom_the_peer_does_not_know(it: Bridge) -> None:
    (it.peer_place / "clients" / INGRESS).rename(it.peer_place / "clients/cn:somebody")
    it.start_peer()
    fails(it, (403, "http_request_denied", "reason=peer_refused"))


def test_nobody_may_connect_where_nobody_is_named(it: Bridge) -> None:
    shutil.rmtree(it.peer_place / "clients")
    it.start_peer()
    fails(it, (403, "http_request_denied", "reason=peer_refused"))


def test_a_service_that_does_not_listen_is_no_200(it: Bridge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        write(it.peer_place / "allow/web.internal/80", f"127.0.0.1:{closed.getsockname()[1]}")
    it.start_peer()
    fails(it, (502, "connection_refused", "reason=peer_refused"))


def test_a_name_that_leads_to_the_peer_itself_is_refused(it: Bridge) -> None:
    write(it.peer_place / "allow/localhost/80")
    write(it.ingress_place / "hosts/localhost/peer", "p")
    it.start_peer()
    client, header = ask(it.start_ingress(), connect("localhost:80"))
    client.close()
    assert (status(header), error(header)) == (403, "destination_ip_prohibited")


def test_a_unix_socket_is_a_service_too(it: Bridge, tmp_path: Path) -> None:
    path = tmp_path / "service"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        write(it.peer_place / "allow/web.internal/80", str(path))
        it.start_peer()
        client, header = ask(it.start_ingress(), connect())
        service, _ = listening.accept()
        with client, service:
            assert header.startswith(OK)
            client.sendall(b"hello")
            assert receive_exactly(service, 5) == b"hello"


def test_a_silent_peer_is_answered_for(it: Bridge) -> None:
    ingress = it.start_ingress()
    began = time.monotonic()
    client, header = ask(ingress, connect(), timeout=20)
    client.close()
    assert (status(header), error(header)) == (504, "connection_timeout")
    assert 8 < time.monotonic() - began < 12
    assert "reason=peer_silent" in ingress.wait_for_log("refused")


def test_a_peer_that_sends_and_does_not_answer_stops_nobody(it: Bridge) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(PEER).configure_cert(context)
    block = 1000 * b"HTTP/1.1 100 Continue\r\n\r\n"
    if (pid := os.fork()) == 0:
        with contextlib.suppress(OSError):
            connection, _ = it.peer_socket.accept()
            with context.wrap_socket(connection, server_side=True) as served:
                read_header(served)
                while True:
                    served.sendall(block)
        os._exit(0)
    fails(it, (502, "http_protocol_error", "reason=peer_not_http"))
    os.waitpid(pid, 0)


def test_the_next_address_is_tried(it: Bridge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"127.0.0.1:{closed.getsockname()[1]}"
    alive = f"127.0.0.1:{it.peer_socket.getsockname()[1]}"
    write(it.ingress_place / "peers/p/address", f"{dead}\n{alive}\n")
    it.start_peer()
    client, header = ask(it.start_ingress(), connect())
    with client:
        assert header.startswith(OK)


def test_who_comes_round_again_is_refused(it: Bridge) -> None:
    """A peer whose service is the ingress, of the same host."""
    it.start_peer()
    ingress = it.start_ingress()
    client, header = ask(ingress, connect())
    client.close()
    [via] = [line for line in header.splitlines() if line.lower().startswith(b"via:")]
    client, header = ask(ingress, connect(f"{SERVICE}:80", via.decode()))
    client.close()
    assert (status(header), error(header)) == (502, "proxy_loop_detected")


def test_the_proxys_own_fields_stay_here(it: Bridge) -> None:
    """Credentials are for this proxy, and Connection names what else is."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority().issue_cert(PEER).configure_cert(context)
        port = listening.getsockname()[1]
        write(it.ingress_place / "peers/p/address", f"127.0.0.1:{port}")
        ingress = it.start_ingress()
        fields = (
            *("Proxy-Authorization: Basic eDp5", "Connection: X-Private", "X-Private: 1"),
            *("X-Public: 2", "Forwarded: for=198.51.100.1"),
        )
        with ingress.connect() as client:
            client.sendall(connect(f"{SERVICE}:80", *fields))
            connection, _ = listening.accept()
            with context.wrap_socket(connection, server_side=True) as served:
                heard = read_header(served).decode().lower()
                served.sendall(b"HTTP/1.1 418 Teapot\r\nContent-Length: 4\r\n\r\ntea\n")
            header = read_header(client)
            assert status(header) == 418
            assert b"418 Teapot" in header
            assert receive_exactly(client, 4) == b"tea\n"
    assert "x-public: 2" in heard
    assert 'forwarded: for="127.0.0.1:' in heard
    for absent in "proxy-authorization", "x-private", "198.51.100.1":
        assert absent not in heard


# --- Identities ----------------------------------------------------------------------------------


def test_an_identity_is_swapped_and_a_broken_one_kept_out(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress()
    identity = it.ingress_place / "peers/p/identity"

    def served() -> bool:
        client, header = ask(ingress, connect())
        client.close()
        return header.startswith(OK)

    assert served()
    (identity / "key.pem").write_text("-----BEGIN")
    assert served()
    assert served()
    assert "key.pem" in ingress.wait_for_log("identity_broken")
    assert sum(" identity_broken " in line for line in ingress.log()) == 1
    write_identity(identity, "somebody.example")
    assert not served()
    ingress.wait_for_log("identity_loaded")
    write_identity(identity, INGRESS)
    assert served()


def test_an_identity_may_be_a_link_to_anywhere(it: Bridge, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, place in enumerate((it.ingress_place / "peers" / "p", it.peer_place)):
        (place / "identity").rename(elsewhere / str(number))
        (place / "identity").symlink_to(elsewhere / str(number))
    it.start_peer()
    client, header = ask(it.start_ingress(), connect())
    client.close()
    assert header.startswith(OK)


def test_what_options_name_may_be_links_to_anywhere(it: Bridge, tmp_path: Path) -> None:
    given, elsewhere = tmp_path / "given", tmp_path / "elsewhere"
    given.mkdir()
    (it.ingress_place / "peers/p/identity").rename(elsewhere)
    (given / "id").mkdir()
    for each in elsewhere.iterdir():
        (given / "id" / each.name).symlink_to(each)
    lists = tmp_path / "lists"
    lists.mkdir()
    host, port = it.peer_socket.getsockname()[:2]
    (lists / "rules").write_text(f"web[.]internal {host}:{port}\n")
    (given / "rules").symlink_to(lists / "rules")
    shutil.rmtree(it.ingress_place / "hosts")
    it.start_peer()
    options = ("--identity", str(given / "id"), "--server-name", PEER, "--file")
    client, header = ask(it.start_ingress(*options, str(given / "rules")), connect())
    client.close()
    assert header.startswith(OK)


def test_an_identity_that_expires_soon_is_told_of_once(it: Bridge) -> None:
    end = datetime.now(UTC) + timedelta(hours=20)
    write_identity(it.ingress_place / "peers/p/identity", INGRESS, not_after=end)
    write_identity(it.peer_place / "identity", PEER, not_after=end)
    peer, ingress = it.start_peer(), it.start_ingress()
    for _ in range(2):
        client, header = ask(ingress, connect())
        client.close()
        assert header.startswith(OK)
    for daemon in peer, ingress:
        line = daemon.wait_for_log("identity_expires")
        assert f"the certificate expires at {end:%Y-%m-%dT%H:%M:%SZ}" in line
        assert sum(" identity_expires " in each for each in daemon.log()) == 1


@pytest.mark.parametrize("days", [(-2, -1), (1, 2)], ids=["no more", "not yet"])
def test_the_certificate_of_the_peer_is_not_valid_now(it: Bridge, days: tuple[int, int]) -> None:
    begin, end = (datetime.now(UTC) + timedelta(days=each) for each in days)
    write_identity(it.peer_place / "identity", PEER, not_before=begin, not_after=end)
    peer = it.start_peer()
    fails(it, (502, "tls_certificate_error", "reason=expired"))
    peer.wait_for_log("reason=rejected")
    if end < datetime.now(UTC):
        assert "the certificate has expired at" in peer.wait_for_log("identity_expires")


def test_our_own_certificate_has_expired(it: Bridge) -> None:
    end = datetime.now(UTC) - timedelta(days=1)
    write_identity(it.ingress_place / "peers/p/identity", INGRESS, not_after=end)
    peer, ingress = it.start_peer(), it.start_ingress()
    client, header = ask(ingress, connect())
    client.close()
    assert (status(header), error(header)) == (502, "tls_alert_received")
    # The alert says it, too; with another one that would be another story.
    assert "ALERT_CERTIFICATE_EXPIRED" in ingress.wait_for_log("reason=rejected")
    assert "the certificate has expired at" in ingress.wait_for_log("identity_expires")
    peer.wait_for_log("reason=expired")


def test_without_an_identity_nobody_is_served(it: Bridge) -> None:
    shutil.rmtree(it.ingress_place / "peers/p/identity")
    it.start_peer()
    fails(it, (500, "proxy_configuration_error", "reason=misconfigured"))


# --- The service ---------------------------------------------------------------------------------


def test_a_drain_waits_for_the_tunnel(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress()
    client, _ = ask(ingress, connect())
    with client:
        ingress.signal(signal.SIGTERM)
        ingress.wait_for_log("draining")
        check_echo(client)
    assert ingress.wait() == 0
    assert "served=1 refused=0 cut=0" in ingress.wait_for_log("drained")


def test_who_is_being_set_up_at_the_end_is_reset(it: Bridge) -> None:
    """Nobody is to take the end of the program for an answer without a word."""
    ingress = it.start_ingress()
    with ingress.connect() as silent, ingress.connect() as waiting:
        waiting.sendall(connect())
        peer, _ = it.peer_socket.accept()  # and it does not answer
        with peer:
            ingress.signal(signal.SIGINT)
            for client in silent, waiting:
                with pytest.raises(ConnectionResetError):
                    receive_all(client)
    assert "cut=2" in ingress.wait_for_log("drained")


def test_a_thousand_tunnels_beside_three_thousand_unfinished_handshakes(it: Bridge) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 6000:
        pytest.skip(f"RLIMIT_NOFILE allows {hard} descriptors, and this takes 6000")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Where coverage is measured a connection takes many times as long.
    number_of_tunnels = 200 if COVERAGE in os.environ else 1000
    peer = it.start_peer()
    ingress = it.start_ingress()
    with ExitStack() as stack:
        for _ in range(3000):
            silent = stack.enter_context(peer.connect())
            silent.sendall(b"\x16\x03\x01")
        tunnels = []
        for _ in range(number_of_tunnels):
            client, header = ask(ingress, connect())
            stack.enter_context(client)
            assert header.startswith(OK)
            tunnels.append(client)
        for number, client in enumerate(tunnels):
            client.sendall(b"%04d" % number)
        for number, client in enumerate(tunnels):
            assert receive_exactly(client, 4) == b"%04d" % number


def test_at_the_limit_those_who_say_nothing_give_way(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress("--max-connections", "20")
    silent = [ingress.connect() for _ in range(100)]
    client, header = ask(ingress, connect())
    with client:
        assert header.startswith(OK)
    for each in silent:
        each.close()


def test_a_client_that_breaks_off_is_not_kept(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress("--log", "connections")
    before = ingress.descriptors()
    client, _ = ask(ingress, connect())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert "ending=plain_reset" in ingress.wait_for_log("connection")
    eventually(lambda: ingress.descriptors() == before)


@pytest.mark.parametrize("who", ["ingress", "peer"])
@pytest.mark.parametrize("how", ["end", "reset"])
def test_who_leaves_without_a_word_is_no_refusal(it: Bridge, who: str, how: str) -> None:
    """A supervisor, or a load balancer, looks whether somebody listens."""
    daemon = it.start_peer() if who == "peer" else it.start_ingress()
    for _ in range(3):
        with daemon.connect() as client:
            if how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with daemon.connect() as client:  # by then those before have had their turn
        client.sendall(b"no TLS, and no HTTP\r\n\r\n")
        receive_all(client)
    daemon.signal(signal.SIGTERM)
    assert "served=0 refused=1 cut=0" in daemon.wait_for_log("drained")
    assert sum(" refused " in line for line in daemon.log()) == 1


def test_who_leaves_without_a_word_does_not_have_to_be_let_go(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress("--max-connections", "5")
    before = ingress.descriptors()
    silent = [ingress.connect() for _ in range(5)]
    eventually(lambda: ingress.descriptors() == before + 5)
    ingress.signal(signal.SIGSTOP)
    with ingress.connect() as client:  # it is heard of first
        for each in silent:
            each.close()
        ingress.signal(signal.SIGCONT)
        client.sendall(connect())
        assert read_header(client).startswith(OK)
    assert not [line for line in ingress.log() if " refused " in line]


def test_a_service_that_resets_at_once_is_told_of(it: Bridge) -> None:
    """Whether that is noticed when it is connected, or when it is sent the PROXY header."""
    write(it.peer_place / "allow/web.internal/send-proxy-v1")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(it.peer_place / "allow/web.internal/80", f"127.0.0.1:{listening.getsockname()[1]}")

        def reset() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    connection.close()

        service = threading.Thread(target=reset)
        service.start()
        peer, ingress = it.start_peer(), it.start_ingress()
        answers = []
        for _ in range(30):
            client, header = ask(ingress, connect())
            client.close()
            answers.append(status(header))
        listening.shutdown(socket.SHUT_RDWR)
        service.join(PATIENCE)
    peer.signal(signal.SIGTERM)
    assert set(answers) <= {200, 502}
    told = f"served={answers.count(200)} refused={answers.count(502)} "
    assert told in peer.wait_for_log("drained")


def test_whoever_has_heard_the_alert_finds_the_line(it: Bridge) -> None:
    peer = it.start_peer()
    with peer.connect() as client:
        client.sendall(bytes.fromhex("16 0301 0005 02 000001 00"))  # a ServerHello
        assert receive_exactly(client, 7) == bytes.fromhex("15 0303 0002 02 0a")
        # It is still here: what it has heard is to arrive.
        assert "reason=tls_failed" in peer.wait_for_log("refused", timeout=0)


def test_who_hears_an_alert_gives_way_at_the_limit(it: Bridge) -> None:
    peer, ingress = it.start_peer("--max-connections", "5"), it.start_ingress()
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(peer.connect()).sendall(b"GET / HTTP/1.1\r\n\r\n")
        client, header = ask(ingress, connect())
        stack.enter_context(client)
        assert header.startswith(OK)
    assert not [line for line in peer.log() if "reason=capacity" in line]


def test_with_workers(it: Bridge) -> None:
    it.start_peer("--workers", "2")
    ingress = it.start_ingress("--workers", "2")
    for _ in range(20):
        client, header = ask(ingress, connect())
        with client:
            assert header.startswith(OK)
            check_echo(client)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_resumes_a_session_is_still_who_it_was(it: Bridge, version: ssl.TLSVersion) -> None:
    peer = it.start_peer()
    context = ssl.create_default_context()
    context.maximum_version = version
    authority().configure_trust(context)
    authority().issue_cert(INGRESS).configure_cert(context)
    session = None
    for expected in 200, 200, 403:
        if expected == 403:
            shutil.rmtree(it.peer_place / "clients")
        with context.wrap_socket(
            peer.connect(), server_hostname=PEER, session=session
        ) as connection:
            connection.sendall(connect())
            assert status(read_header(connection)) == expected
            assert connection.session_reused == (session is not None)
            session = connection.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_with_the_identity_that_they_were_made_with(
    it: Bridge, version: ssl.TLSVersion
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    authority().issue_cert(PEER).configure_cert(context)
    write(it.ingress_place / "peers/p/servers" / PEER)  # rules are held against it, too
    ingress = it.start_ingress()

    def is_resumed() -> bool:
        with ingress.connect() as client:
            client.sendall(connect())
            connection, _ = it.peer_socket.accept()
            with context.wrap_socket(connection, server_side=True) as served:
                read_header(served)
                served.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                assert status(read_header(client)) == 200
                return served.session_reused or False

    assert [is_resumed() for _ in range(3)] == [False, True, True]
    write_identity(it.ingress_place / "peers/p/identity", INGRESS)
    assert [is_resumed() for _ in range(2)] == [False, True]


# --- Foreign clients -----------------------------------------------------------------------------


def test_pythons_http_client(it: Bridge) -> None:
    it.start_peer()
    ingress = it.start_ingress()
    client = http.client.HTTPConnection(*ingress.address, timeout=PATIENCE)
    client.set_tunnel(SERVICE, 80)
    client.connect()
    assert client.sock is not None
    check_echo(client.sock)
    client.close()


def run_with_input(it: Bridge, ingress: Daemon, *command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    host, port = ingress.address
    words = [word.replace("HOST", host).replace("PORT", str(port)) for word in command]
    done = subprocess.run(
        words, input=b"hello\n", capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == b"hello\n", done.stderr
    # The service hears the end when the client has long gone.
    eventually(lambda: it.echo.heard == [b"hello\n"])


def test_socat(it: Bridge) -> None:
    it.start_peer()
    address = "PROXY:HOST:web.internal:80,proxyport=PORT"
    run_with_input(it, it.start_ingress(), "socat", "-t5", "-", address)


def test_a_hello_that_cannot_be_read_gets_its_alert(it: Bridge, tmp_path: Path) -> None:
    path = tmp_path / "tls-socket"
    ingress = it.start_ingress("--sni", unix=path)
    for sent, alert in ((b"GET / HTTP/1.1\r\n\r\n", None), (hellos.hello_bytes("x.example"), 112)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            client.sendall(sent)
            answer = receive_all(client)
            assert answer[:1] == b"\x15"
            assert alert is None or answer[-1] == alert
    ingress.wait_for_log("reason=bad_hello")
    ingress.wait_for_log("reason=no_route")


def test_curl(it: Bridge) -> None:
    """As it is told to use a proxy for all that it does."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(it.peer_place / "allow/web.internal/80", f"127.0.0.1:{listening.getsockname()[1]}")
        it.start_peer()
        host, port = it.start_ingress().address
        command = ["curl", "--silent", "--show-error", "--proxytunnel", "--max-time", "10"]
        with subprocess.Popen(
            [*command, "--proxy", f"http://{host}:{port}", "http://web.internal/"],
            stdout=subprocess.PIPE,
        ) as curl:
            connection, _ = listening.accept()
            with connection:
                assert b"Host: web.internal" in read_header(connection)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi\n")
                assert curl.communicate(timeout=PATIENCE)[0] == b"hi\n"


@pytest.mark.parametrize(
    "command",
    [
        ("openssl", "s_client", "-quiet", "-verify_quiet", "-proxy", "HOST:PORT"),
        ("ncat", "--proxy", "HOST:PORT", "--proxy-type", "http", "--ssl", "--ssl-verify"),
    ],
    ids=["openssl", "ncat"],
)
def test_tls_inside_of_the_tunnel(it: Bridge, tmp_path: Path, command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("site.example").configure_cert(context)
    authority().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        write(it.peer_place / "allow/site.example/443", f"127.0.0.1:{port}")
        write(it.ingress_place / "hosts/site.example/peer", "p")
        it.start_peer()
        host, proxy_port = it.start_ingress().address
        words = [word.replace("HOST", host).replace("PORT", str(proxy_port)) for word in command]
        if command[0] == "openssl":
            words += ["-connect", "site.example:443", "-servername", "site.example"]
            words += ["-CAfile", str(tmp_path / "ca.pem"), "-verify_return_error"]
        else:
            words += ["--ssl-trustfile", str(tmp_path / "ca.pem"), "site.example", "443"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            connection, _ = listening.accept()
            with context.wrap_socket(connection, server_side=True) as served:
                served.sendall(b"welcome\n")
                assert client.stdout is not None
                assert client.stdout.readline() == b"welcome\n"
            client.kill()


def test_the_peer_behind_the_sni_router(it: Bridge, tmp_path: Path, hosts: Path) -> None:
    """hosts/peer.example/tls-socket is the peer's socket; the router passes TLS through."""
    place = hosts / PEER
    place.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "tls-socket"))
        (place / "tls-socket").chmod(0o666)
        listening.listen()
        with (
            start_daemon(hosts) as router,
            start(listening, it.peer_place, "tls_bridge.peer"),
        ):
            write(it.ingress_place / "peers/p/address", f"127.0.0.1:{router.address[1]}")
            client, header = ask(it.start_ingress(), connect())
            with client:
                assert header.startswith(OK)
                check_echo(client)
