"""IPv6 all the way: the client, the peer and the service."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.bridge import (
    INGRESS,
    PEER,
    SERVICE,
    Bridge,
    Daemon,
    ask,
    connect,
    start,
    write,
    write_identity,
)
from tests.support.sockets import receive_all, receive_exactly

OK = b"HTTP/1.1 200 "


def listen() -> socket.socket:
    return socket.create_server(("::1", 0), family=socket.AF_INET6)


class IPv6(Bridge):
    """Both sides, with IPv6 alone, and a service that the test plays."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        super().__init__(place, stack)
        self._sockets = stack
        self.service_socket = stack.enter_context(listen())
        self.service = f"[::1]:{self.service_socket.getsockname()[1]}"
        peer_socket = stack.enter_context(listen())
        self.peer = f"[::1]:{peer_socket.getsockname()[1]}"
        write(self.ingress_place / "peers/p/address", self.peer)
        stack.enter_context(start(peer_socket, self.peer_place, "tls_bridge.peer"))

    def start_on_ipv6(self) -> Daemon:
        listening = self._sockets.enter_context(listen())
        return self._sockets.enter_context(
            start(listening, self.ingress_place, "tls_bridge", "--log", "connections")
        )

    def check(self, ingress: Daemon, target: str) -> bytes:
        """Check that a target is reached; return what the service heard."""
        client, header = ask(ingress, connect(target))
        with client:
            assert header.startswith(OK)
            service, _ = self.service_socket.accept()
            with service:
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                heard = receive_all(service)
                service.sendall(b"bye")
            assert receive_exactly(client, 4) == b"bye"
        return heard


@pytest.fixture
def it(tmp_path: Path) -> Iterator[IPv6]:
    try:
        listen().close()
    except OSError as error:
        pytest.skip(f"there is no IPv6 here: {error}")
    with ExitStack() as stack:
        yield IPv6(tmp_path, stack)


def test_a_name_whose_peer_and_service_have_ipv6_addresses(it: IPv6) -> None:
    write(it.peer_place / "allow" / SERVICE / "80", it.service)
    ingress = it.start_on_ipv6()
    assert it.check(ingress, f"{SERVICE}:80") == b"hello"
    assert " client=[::1]:" in ingress.wait_for_log("connection")


@pytest.mark.parametrize("target", ["[::1]", "[0:0:0::0:1]", "[0000::0001]"])
def test_an_address_is_a_host_under_its_shortest_name(it: IPv6, target: str) -> None:
    """Without brackets. An empty file means that very address and port."""
    port = it.service_socket.getsockname()[1]
    write(it.ingress_place / "hosts/::1/peer", "p")
    write(it.peer_place / "allow/::1" / str(port))
    ingress = it.start_on_ipv6()
    assert it.check(ingress, f"{target}:{port}") == b"hello"
    assert f" name=[::1]:{port} " in ingress.wait_for_log("connection")
    for other in "[::2]", "[::ffff:127.0.0.1]", "127.0.0.1":
        client, header = ask(ingress, connect(f"{other}:{port}"))
        client.close()
        assert header.startswith(b"HTTP/1.1 403 ")


def test_a_peer_by_its_address_has_a_certificate_for_it(it: IPv6) -> None:
    write(it.ingress_place / "hosts" / SERVICE / "peer", it.peer)
    write_identity(it.ingress_place / "identity", INGRESS)
    write_identity(it.peer_place / "identity", "::1")
    write(it.peer_place / "allow" / SERVICE / "80", it.service)
    ingress = it.start_on_ipv6()
    assert it.check(ingress, f"{SERVICE}:80") == b"hello"
    write_identity(it.peer_place / "identity", PEER)
    client, header = ask(ingress, connect())
    client.close()
    assert header.startswith(b"HTTP/1.1 502 ")
    ingress.wait_for_log("reason=wrong_name")


def test_a_service_is_told_the_address_of_the_client(it: IPv6) -> None:
    write(it.peer_place / "allow" / SERVICE / "80", it.service)
    write(it.peer_place / "allow" / SERVICE / "send-proxy-v1")
    heard = it.check(it.start_on_ipv6(), f"{SERVICE}:80")
    line, _, rest = heard.partition(b"\r\n")
    assert line.split()[:4] == [b"PROXY", b"TCP6", b"::1", b"::1"]
    assert rest == b"hello"
