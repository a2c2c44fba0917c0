"""The kubelet's probes: who may connect in plaintext; and whether we are ready ourselves."""

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write
from tests.support.daemon import PATIENCE, eventually
from tests.support.network import why_no_network
from tests.support.pods import Pod, Pods, Running, ask, fails_soon, running, serving

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

VERSIONS: Final = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])

READY: Final = 15021


@pytest.fixture(scope="module")
def kubelet(pods: Pods) -> Pod:
    return pods.pod()


@pytest.fixture(scope="module")
def somebody(pods: Pods) -> Pod:
    return pods.pod()


@pytest.fixture(scope="module")
def there(pods: Pods, kubelet: Pod, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("there")
    write(place / f"pod/probes/{kubelet.address}_32")
    options = f"--probe-address={kubelet.addresses[6]}", f"--ready-port={READY}"
    with running(pods.pod(), place, *options) as there:
        yield there


def answer_200(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def fetch(pod: Pod, host: str, port: int) -> tuple[int, bytes]:
    """Return the status, and the body."""
    client = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    client.sock = pod.connect(host, port)
    with contextlib.closing(client):
        client.request("GET", "/healthz")
        response = client.getresponse()
        return response.status, response.read()


@VERSIONS
def test_a_probe_by_http(there: Running, kubelet: Pod, somebody: Pod, version: int) -> None:
    host = there.pod.addresses[version]
    with serving(there.pod, 8080, answer_200, version=version):
        assert fetch(kubelet, host, 8080) == (200, b"")
        assert fails_soon(lambda: somebody.connect(host, 8080))


@VERSIONS
def test_a_probe_by_tcp(there: Running, kubelet: Pod, somebody: Pod, version: int) -> None:
    """It succeeds if the program listens, and fails if not, as without us."""
    host = there.pod.addresses[version]
    with there.pod.listen(8081, version=version) as listening:
        with kubelet.connect(host, 8081), listening.accept()[0] as program:
            assert program.getpeername()[0] == kubelet.addresses[version]
        # Of anybody else it says nothing; but it is no error, and no line.
        somebody.connect(host, 8081).close()
    with pytest.raises(ConnectionRefusedError):
        kubelet.connect(host, 8081)


def test_probes_are_allowed_and_forbidden_while_it_runs(there: Running, somebody: Pod) -> None:
    network = f"{somebody.address.rpartition('.')[0]}.0_24"
    there.change(f"pod/probes/{network}", "")
    with there.pod.listen(8082) as listening:
        client = somebody.connect(there.pod, 8082)
        name = client.getsockname()
        assert ask(client, listening) == name
    there.change(f"pod/probes/{network}", None)
    with there.pod.listen(8082):
        assert fails_soon(lambda: somebody.connect(there.pod, 8082))


def test_what_is_no_prefix_allows_nobody(there: Running, somebody: Pod) -> None:
    wrong = write(there.place / f"pod/probes/{somebody.address}")
    there.line("unreadable")
    with there.pod.listen(8083):
        assert fails_soon(lambda: somebody.connect(there.pod, 8083))
    wrong.unlink()


@VERSIONS
def test_it_says_that_it_is_ready(there: Running, somebody: Pod, version: int) -> None:
    assert fetch(somebody, there.pod.addresses[version], READY) == (200, b"ready\n")
    # To whoever only connects, too.
    somebody.connect(there.pod.addresses[version], READY).close()


def test_it_is_not_ready_without_an_identity(pods: Pods, somebody: Pod, tmp_path: Path) -> None:
    pod, identity = pods.pod(), tmp_path / "pod/identity"
    identity.mkdir(parents=True)
    with running(pod, tmp_path, f"--ready-port={READY}"):
        status, body = fetch(somebody, pod.address, READY)
        assert status == 503
        assert body.startswith(b"no identity in pod/identity: ")
        pod.issue(identity)
        eventually(lambda: fetch(somebody, pod.address, READY) == (200, b"ready\n"))
