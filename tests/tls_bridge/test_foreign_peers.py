"""tls-bridge and the proxies of others, on the other side of mutual TLS.

Apache httpd, squid and Apache Traffic Server take CONNECT inside TLS, as tls-bridge-peer does.
Traffic Server has a plugin, tls_bridge, that is an ingress, too. When one side of a tunnel ends, it
may leave the other side open (seen with 9.2.9), so the ends are not looked at here.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import pytest

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
    write,
    write_identity,
)
from tests.support.daemon import PATIENCE, Daemon
from tests.support.foreign import apache, free_port, squid, traffic_server, why_not
from tests.support.sockets import Noise, receive_all, receive_exactly

_SIZE = 1_000_000


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    with bridge(tmp_path) as made:
        yield made


def status(header: bytes) -> int:
    return int(header.split()[1])


def check_echo(client: socket.socket) -> None:
    """Send much, and hear all of it again, at the same time."""
    block = b"".join(Noise().blocks(_SIZE))
    sending = threading.Thread(target=client.sendall, args=(block,))
    sending.start()
    try:
        assert receive_exactly(client, len(block)) == block
    finally:
        sending.join(PATIENCE)


# --- Their peers ---------------------------------------------------------------------------------


def traffic_server_peer(
    place: Path, port: int, allowed: str, client: str
) -> AbstractContextManager[Path]:
    """Run it as a peer. Whom of those with a certificate it serves can't be said."""
    identity = str(place / "identity")
    records: dict[str, str | int] = {
        "proxy.config.ssl.server.cert.path": identity,
        "proxy.config.ssl.server.private_key.path": identity,
        "proxy.config.ssl.CA.cert.path": identity,
        "proxy.config.ssl.CA.cert.filename": "ca.pem",
        "proxy.config.ssl.client.certification_level": 2,  # demanded
        "proxy.config.http.connect_ports": allowed,
        "proxy.config.url_remap.remap_required": 0,
    }
    return traffic_server(place, f"{port}:ssl:ip-in=127.0.0.1", records)


_PEERS: dict[str, Callable[[Path, int, str, str], AbstractContextManager[Path]]] = {
    "apache": apache,
    "squid": squid,
    "traffic_server": traffic_server_peer,
}


class Foreign:
    """Our ingress, and a peer of theirs, by which the echo can be reached."""

    def __init__(self, it: Bridge, stack: ExitStack, program: str) -> None:
        self.ours = it
        self.program = program
        write(it.ingress_place / "hosts/127.0.0.1/peer", "p\n")
        write_identity(it.peer_place / "identity", PEER)
        port, self.closed = free_port(), free_port()
        write(it.ingress_place / "peers/p/address", f"127.0.0.1:{port}\n")
        allowed = f"{it.echo.port} {self.closed}"
        stack.enter_context(_PEERS[program](it.peer_place, port, allowed, INGRESS))
        self.ingress = it.start_ingress("--log", "connections")

    def ask(self, port: int | None = None) -> tuple[socket.socket, bytes]:
        return ask(self.ingress, connect(f"127.0.0.1:{port or self.ours.echo.port}"))


@pytest.fixture(params=list(_PEERS))
def foreign(it: Bridge, request: pytest.FixtureRequest) -> Iterator[Foreign]:
    if why := why_not(request.param):
        pytest.skip(why)
    with ExitStack() as stack:
        yield Foreign(it, stack, request.param)


def test_their_peer_carries_bytes_both_ways(foreign: Foreign) -> None:
    # The second time a session is resumed, if they can do it.
    for _ in range(2):
        client, header = foreign.ask()
        with client:
            assert status(header) == 200
            check_echo(client)
    line = foreign.ingress.wait_for_log("connection")
    assert f"up={_SIZE} down={_SIZE} " in line


def test_their_peer_is_refused_if_it_has_the_wrong_name(foreign: Foreign) -> None:
    write(foreign.ours.ingress_place / "peers/p/server-name", "another.example\n")
    client, header = foreign.ask()
    client.close()
    assert status(header) == 502
    assert "reason=wrong_name" in foreign.ingress.wait_for_log("refused")


def test_their_peer_refuses_a_stranger(foreign: Foreign) -> None:
    """TLS with any certificate is not enough: ours has to be of the authority they trust."""
    identity = foreign.ours.ingress_place / "peers/p/identity"
    write_identity(identity, INGRESS, authority("strangers"))
    client, header = foreign.ask()
    client.close()
    assert status(header) == 502
    assert "reason=rejected" in foreign.ingress.wait_for_log("refused")


def test_what_their_peer_does_not_allow_is_passed_back(foreign: Foreign) -> None:
    client, header = foreign.ask(9)
    client.close()
    assert status(header) == 403
    assert "reason=peer_refused" in foreign.ingress.wait_for_log("refused")


def test_their_peer_cannot_reach_the_service(foreign: Foreign) -> None:
    client, header = foreign.ask(foreign.closed)
    with client:
        if foreign.program == "traffic_server":
            # It answers before it has tried.
            assert status(header) == 200
            with suppress(ConnectionResetError):
                assert receive_all(client) == b""
        else:
            assert status(header) == 503
            assert "reason=peer_refused" in foreign.ingress.wait_for_log("refused")


# --- Their ingress -------------------------------------------------------------------------------


class ForeignIngress:
    """Traffic Server with its plugin, and our peer."""

    def __init__(self, it: Bridge, stack: ExitStack, place: Path) -> None:
        self._stack = stack
        self._place = place
        self.ours = it
        self.peer: Daemon = it.start_peer("--log", "connections")
        self.identity = place / "identity"
        write_identity(self.identity, INGRESS)

    def start(self) -> None:
        self.port = free_port()
        peer = f"{PEER}:{self.peer.address[1]}"
        records: dict[str, str | int] = {
            # `verify.server`, which the manual names, is unknown to 9.x and changes nothing.
            "proxy.config.ssl.client.verify.server.policy": "ENFORCED",
            "proxy.config.ssl.client.CA.cert.filename": str(self.identity / "ca.pem"),
            "proxy.config.ssl.client.cert.path": str(self.identity),
            "proxy.config.ssl.client.cert.filename": "cert.pem",
            "proxy.config.ssl.client.private_key.path": str(self.identity),
            "proxy.config.ssl.client.private_key.filename": "key.pem",
            # What it says, and what the certificate has to show: a name that is nowhere looked up.
            "proxy.config.ssl.client.sni_policy": f"@{PEER}",
            # Of the services, and of the peer.
            "proxy.config.http.connect_ports": f"80 81 {self.peer.address[1]}",
        }
        self._stack.enter_context(
            traffic_server(
                self._place,
                f"{self.port}:ip-in=127.0.0.1",
                records,
                plugin=f"tls_bridge.so .*[.]internal {peer}\n",
                remap=f"map https://{peer} https://127.0.0.1:{self.peer.address[1]}\n",
            )
        )

    def ask(self, target: str = f"{SERVICE}:80") -> tuple[socket.socket, bytes]:
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        client.sendall(connect(target))
        return client, read_header(client)


@pytest.fixture
def theirs(it: Bridge, tmp_path: Path) -> Iterator[ForeignIngress]:
    if why := why_not("traffic_server"):
        pytest.skip(why)
    with ExitStack() as stack:
        yield ForeignIngress(it, stack, tmp_path / "theirs")


def test_our_peer_carries_what_their_ingress_brings(theirs: ForeignIngress) -> None:
    theirs.start()
    for _ in range(2):
        client, header = theirs.ask()
        with client:
            assert status(header) == 200
            check_echo(client)


def test_our_peer_refuses_their_ingress_if_it_is_a_stranger(theirs: ForeignIngress) -> None:
    write_identity(theirs.identity, INGRESS, authority("strangers"))
    theirs.start()
    client, header = theirs.ask()
    client.close()
    assert status(header) == 502
    assert "reason=untrusted" in theirs.peer.wait_for_log("refused")


def test_our_peer_refuses_their_ingress_if_nobody_knows_it(theirs: ForeignIngress) -> None:
    (theirs.ours.peer_place / "clients" / INGRESS).rename(
        theirs.ours.peer_place / "clients/another.example"
    )
    theirs.start()
    client, header = theirs.ask()
    client.close()
    assert status(header) == 403
    assert "reason=client_not_allowed" in theirs.peer.wait_for_log("refused")


@pytest.mark.parametrize("wrong", ["name", "authority"])
def test_their_ingress_refuses_a_wrong_peer(theirs: ForeignIngress, wrong: str) -> None:
    name, ca = ("another.example", None) if wrong == "name" else (PEER, authority("strangers"))
    write_identity(theirs.ours.peer_place / "identity", name, ca)
    theirs.start()
    client, header = theirs.ask()
    client.close()
    assert status(header) == 502
    assert theirs.peer.wait_for_log("refused")


def test_what_our_peer_does_not_allow_is_passed_back(theirs: ForeignIngress) -> None:
    theirs.start()
    client, header = theirs.ask(f"{SERVICE}:81")
    client.close()
    assert status(header) == 403
    assert "reason=port_not_allowed" in theirs.peer.wait_for_log("refused")
