"""PROXY headers for the programs of a pod: the client's address and port, and who it is."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write
from tests.support.daemon import PATIENCE
from tests.support.network import why_no_network
from tests.support.pods import Pod, Pods, Running, client_context, running
from tests.support.sockets import receive_exactly

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

VERSIONS: Final = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module")
def there(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("there")
    write(place / "pod/ingress/8080/send-proxy-v1")
    write(place / "pod/ingress/8081/send-proxy-v1")
    write(place / "pod/ingress/8081/send-proxy-v2")
    write(place / "pod/ingress/8082/send-proxy-v1")
    write(place / "pod/ingress/8082/mode", "permissive")
    with running(pods.pod(), place) as there:
        yield there


@pytest.fixture(scope="module")
def client(pods: Pods) -> Pod:
    return pods.pod()


@VERSIONS
def test_version_1(there: Running, client: Pod, tmp_path: Path, version: int) -> None:
    context = client_context(client, tmp_path)
    host = there.pod.addresses[version]
    with there.pod.listen(8080, version=version) as listening:
        plain = client.connect(host, 8080, version=version)
        name, port = plain.getsockname()[:2]
        with (
            context.wrap_socket(plain, server_hostname=host) as tls,
            listening.accept()[0] as program,
        ):
            program.settimeout(PATIENCE)
            tls.sendall(b"hello")
            expected = f"PROXY TCP{version} {name} {host} {port} 8080\r\nhello".encode()
            assert receive_exactly(program, len(expected)) == expected


@VERSIONS
def test_version_2_says_who_it_is(
    there: Running, client: Pod, tmp_path: Path, version: int
) -> None:
    spiffe_id = "spiffe://example/ns/one/sa/client"
    context = client_context(client, tmp_path, spiffe_id, "client.example")
    host = there.pod.addresses[version]
    with there.pod.listen(8081, version=version) as listening:
        plain = client.connect(host, 8081, version=version)
        name, port = plain.getsockname()[:2]
        with (
            context.wrap_socket(plain, server_hostname=host) as tls,
            listening.accept()[0] as program,
        ):
            program.settimeout(PATIENCE)
            start = receive_exactly(program, 16)
            assert start[:12] == b"\r\n\r\n\0\r\nQUIT\n"
            body = receive_exactly(program, int.from_bytes(start[14:]))
            family, size = (socket.AF_INET, 4) if version == 4 else (socket.AF_INET6, 16)
            packed = [socket.inet_pton(family, each) for each in (name, host)]
            ports = struct.pack("!HH", port, 8081)
            assert body[: 2 * size + 4] == b"".join(packed) + ports
            assert f"URI:{spiffe_id},DNS:client.example".encode() in body
            assert b"TLSv1.3" in body
            tls.sendall(b"hello")
            assert receive_exactly(program, 5) == b"hello"


def test_who_comes_in_plaintext_has_a_header_too(there: Running, client: Pod) -> None:
    with there.pod.listen(8082) as listening, client.connect(there.pod, 8082) as plain:
        name, port = plain.getsockname()
        plain.sendall(b"hello")
        with listening.accept()[0] as program:
            program.settimeout(PATIENCE)
            expected = f"PROXY TCP4 {name} {there.pod.address} {port} 8082\r\nhello".encode()
            assert receive_exactly(program, len(expected)) == expected


def test_a_unix_socket_is_told_of_the_client(there: Running, client: Pod, tmp_path: Path) -> None:
    context = client_context(client, tmp_path)
    write(there.place / "pod/ingress/8083/send-proxy-v1")
    write(there.place / "pod/ingress/8083/upstream", "./app.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.settimeout(PATIENCE)
        listening.bind(str(there.place / "app.sock"))
        listening.listen()
        plain = client.connect(there.pod, 8083)
        name, port = plain.getsockname()
        with (
            context.wrap_socket(plain, server_hostname=there.pod.address),
            listening.accept()[0] as program,
        ):
            program.settimeout(PATIENCE)
            expected = f"PROXY TCP4 {name} {there.pod.address} {port} 8083\r\n".encode()
            assert receive_exactly(program, len(expected)) == expected
