"""tproxy-pod as a whole: programs in pods, and outside of them, on machines that are namespaces.

"Observed" are the faults of the first tproxy-pod that are not to be here.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from sniproxy.engine.tcp import LINGER_0
from tests.support.bridge import authority
from tests.support.daemon import PATIENCE
from tests.support.network import why_no_network
from tests.support.pods import (
    AT_ONCE,
    PUBLIC,
    Pod,
    Pods,
    Running,
    answer_400,
    ask,
    break_off,
    client_context,
    fails_soon,
    leave,
    running,
    say_it_back,
    say_nothing,
    serving,
    show,
    show_client,
    talk_plain,
)

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

VERSIONS: Final = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])

MEBIBYTE: Final = 1 << 20


# --- Out and in


@VERSIONS
def test_between_pods_is_mutual_tls(here: Running, there: Running, version: int) -> None:
    """Observed: IPv6 left in plaintext; and the program saw the pod's own address."""
    with there.pod.listen(8080, version=version) as listening:
        client = here.pod.connect(there.pod, 8080, version=version)
        name = client.getsockname()[:2]
        seen = ask(client, listening)
    # The client's proxy connects from another port; the address is the client's.
    assert seen[0] == name[0]
    line = here.line("connection", "direction=out", f"destination={show(there.pod, 8080, version)}")
    assert "tls=yes" in line.split()
    assert "up=5" in line.split()
    line = there.line("connection", "direction=in", f"destination={show(there.pod, 8080, version)}")
    assert f"client={show_client(seen)}" in line.split()


@VERSIONS
def test_what_leaves_is_encrypted(here: Running, outsider: Pod, version: int) -> None:
    """Observed: IPv6 left in plaintext."""
    with (
        outsider.listen(8443, version=version) as listening,
        here.pod.connect(outsider, 8443, version=version),
        listening.accept()[0] as server,
    ):
        server.settimeout(PATIENCE)
        # RFC 8446 §5.1: a record with a handshake message.
        assert server.recv(3)[:2] == b"\x16\x03"


@VERSIONS
@pytest.mark.parametrize("rp_filter", [0, 1])
def test_the_program_sees_the_address_of_the_client_and_its_port(
    pods: Pods, tmp_path: Path, outsider: Pod, version: int, rp_filter: int
) -> None:
    """The port, too, of whoever speaks TLS: here, of a client of TLS on another machine."""
    with running(pods.pod(rp_filter=rp_filter), tmp_path / "pod") as there:
        context = client_context(outsider, tmp_path / "client")
        with there.pod.listen(8080, version=version) as listening:
            plain = outsider.connect(there.pod, 8080, version=version)
            name = plain.getsockname()[:2]
            client = context.wrap_socket(plain, server_hostname=there.pod.addresses[version])
            with client, listening.accept()[0] as program:
                assert program.getpeername()[:2] == name
                assert program.getsockname()[:2] == (there.pod.addresses[version], 8080)
                program.settimeout(PATIENCE)
                client.sendall(b"hello")
                assert program.recv(100) == b"hello"
                program.sendall(b"there")
                assert client.recv(100) == b"there"


def test_a_port_that_is_taken_is_not_the_clients(pods: Pods, tmp_path: Path, outsider: Pod) -> None:
    """Something here listens on it; the address remains."""
    with running(pods.pod(), tmp_path / "pod") as there:
        context = client_context(outsider, tmp_path / "client")
        with there.pod.listen(8080) as listening:
            plain = outsider.connect(there.pod, 8080)
            name = plain.getsockname()[:2]
            with (
                there.pod.listen(name[1]),
                context.wrap_socket(plain, server_hostname=there.pod.address) as client,
                listening.accept()[0] as program,
            ):
                host, port = program.getpeername()
                assert host == name[0]
                assert port != name[1]
                program.sendall(b"there")
                assert client.recv(100) == b"there"


def test_a_port_that_takes_a_right_to_have_is_not_the_clients(
    there: Running, tmp_path: Path, outsider: Pod
) -> None:
    """One below 1024, ip(7); the address remains."""
    context = client_context(outsider, tmp_path / "client")
    with there.pod.listen(8084) as listening:
        plain = outsider.machine.do(connect_from, 1001, (there.pod.address, 8084))
        with (
            context.wrap_socket(plain, server_hostname=there.pod.address) as client,
            listening.accept()[0] as program,
        ):
            host, port = program.getpeername()
            assert host == outsider.address
            assert port >= 1024
            program.sendall(b"there")
            assert client.recv(100) == b"there"
    there.line(
        "connection", f"client={outsider.address}:1001", f"destination={show(there.pod, 8084)}"
    )


def test_a_client_with_a_link_local_address_is_refused(
    there: Running, tmp_path: Path, pods: Pods
) -> None:
    """The program can't see its address, and is not to see another one without a word."""
    context = client_context(pods.router, tmp_path / "client")
    context.check_hostname = False
    run = there.pod.machine.run
    words = run("ip", "-6", "address", "show", "dev", "cable", "scope", "link").split()
    address = words[words.index("inet6") + 1].partition("/")[0]
    (device,) = {
        line.split()[line.split().index("dev") + 1]
        for line in pods.router.machine.run("ip", "route").splitlines()
        if line.startswith(f"{there.pod.address.rpartition('.')[0]}.")
    }
    with there.pod.listen(8085, version=6):
        plain = pods.router.connect(f"{address}%{device}", 8085)
        with context.wrap_socket(plain, suppress_ragged_eofs=False) as client:
            client.settimeout(PATIENCE)
            with pytest.raises((ConnectionError, ssl.SSLEOFError)):
                client.recv(1)
    there.line("refused", "direction=in", "reason=unreachable")


def test_a_client_that_uses_its_port_again_is_served(
    pods: Pods, tmp_path: Path, outsider: Pod
) -> None:
    """The connection before, from the same port, is still remembered here, by TIME_WAIT.

    Linux minds that only where packets have no time in them, RFC 7323.
    """
    pod = pods.pod()
    pod.machine.run("sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_timestamps")
    context = client_context(outsider, tmp_path / "client")
    seen = []
    port = 0
    with running(pod, tmp_path / "pod") as there, pod.listen(8081) as listening:
        for _ in range(2):
            plain = outsider.machine.do(connect_from, port, (pod.address, 8081))
            port = plain.getsockname()[1]
            with context.wrap_socket(plain, server_hostname=pod.address) as client:
                with listening.accept()[0] as program:
                    seen.append(program.getpeername())
                    client.sendall(b"hello")
                    assert program.recv(100) == b"hello"
                    client.settimeout(0)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        client.unwrap()  # ends first
                    assert program.recv(100) == b""
                # Only if the end has come back, nobody is reset, and it is remembered.
                client.settimeout(PATIENCE)
                with client.unwrap() as plain:
                    there.line("connection", f"client={outsider.address}:{port}", "ending=finished")
                    # The client itself remembers nothing.
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    assert seen[0] == (outsider.address, port)
    assert seen[1][0] == outsider.address
    assert seen[1][1] != port


def connect_from(port: int, address: tuple[str, int]) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("", port))
    client.settimeout(PATIENCE)
    client.connect(address)
    return client


# --- What is left alone


@VERSIONS
def test_public_addresses_are_left_alone(here: Running, pods: Pods, version: int) -> None:
    with pods.router.listen(8082, version=version) as listening:
        client = here.pod.connect(PUBLIC[version], 8082, version=version)
        name = client.getsockname()[:2]
        assert ask(client, listening) == name


@VERSIONS
def test_loopback_and_a_pod_that_talks_to_itself_are_left_alone(
    here: Running, version: int
) -> None:
    with here.pod.listen(8083, version=version) as listening:
        for host in here.pod.addresses[version], {4: "127.0.0.1", 6: "::1"}[version]:
            client = here.pod.connect(host, 8083, version=version)
            name = client.getsockname()[:2]
            assert ask(client, listening) == name


def test_udp_is_left_alone(here: Running, outsider: Pod) -> None:
    """It is out of scope, and the manual says so."""
    receiver = outsider.machine.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    sender = here.pod.machine.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(PATIENCE)
        receiver.bind((outsider.address, 5353))
        sender.sendto(b"hello", (outsider.address, 5353))
        data, source = receiver.recvfrom(100)
        assert (data, source[0]) == (b"hello", here.pod.address)


# --- Who is refused


def test_an_outsider_without_a_certificate_is_refused(there: Running, outsider: Pod) -> None:
    with there.pod.listen(8084):
        assert fails_soon(lambda: outsider.connect(there.pod, 8084))
    line = there.line("refused", "direction=in", f"destination={show(there.pod, 8084)}")
    assert "reason=not_tls" in line.split()


def test_a_client_of_tls_without_a_certificate_is_refused(there: Running, outsider: Pod) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    began = time.monotonic()
    with there.pod.listen(8085), pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        plain = outsider.connect(there.pod, 8085)
        with context.wrap_socket(plain, server_hostname=there.pod.address) as client:
            client.recv(1)
    assert time.monotonic() - began < AT_ONCE
    line = there.line("refused", "direction=in", f"destination={show(there.pod, 8085)}")
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in line


OTHER: Final = authority("others")
PAST: Final = datetime.now(UTC) - timedelta(days=1)


@pytest.mark.parametrize(
    ("how", "names", "reason"),
    [
        ({"ca": OTHER}, (), "untrusted"),
        ({"not_before": PAST - timedelta(days=1), "not_after": PAST}, (), "expired"),
        ({}, ("192.0.2.1",), "wrong_name"),
        ({}, ("pod.example",), "wrong_name"),
    ],
    ids=["wrong authority", "expired", "another address", "a name"],
)
def test_a_pod_with_the_wrong_certificate_is_refused_by_its_client(
    pods: Pods,
    tmp_path: Path,
    here: Running,
    how: dict[str, Any],
    names: tuple[str, ...],
    reason: str,
) -> None:
    """Observed: the first tproxy-pod let servers of any authority pass."""
    pod = pods.pod()
    pod.issue(tmp_path / "pod/identity", *names, **how)
    with running(pod, tmp_path) as there, there.pod.listen(8080):
        assert fails_soon(lambda: here.pod.connect(there.pod, 8080))
        here.line(
            *(
                "refused",
                "direction=out",
                f"destination={show(there.pod, 8080)}",
                f"reason={reason}",
            )
        )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"ca": OTHER}, "untrusted"),
        ({"not_before": PAST - timedelta(days=1), "not_after": PAST}, "expired"),
    ],
    ids=["wrong authority", "expired"],
)
def test_a_pod_with_the_wrong_certificate_is_refused_by_its_server(
    pods: Pods, tmp_path: Path, there: Running, how: dict[str, Any], reason: str
) -> None:
    pod = pods.pod()
    pod.issue(tmp_path / "pod/identity", **how)
    with running(pod, tmp_path) as here, there.pod.listen(8086):
        assert fails_soon(lambda: here.pod.connect(there.pod, 8086))
        where = f"destination={show(there.pod, 8086)}"
        assert "reason=rejected" in here.line("refused", "direction=out", where).split()
    there.line(
        "refused", "direction=in", f"destination={show(there.pod, 8086)}", f"reason={reason}"
    )


@VERSIONS
def test_a_closed_port_is_an_error_at_once(here: Running, there: Running, version: int) -> None:
    """Observed: the client hung."""
    assert fails_soon(lambda: here.pod.connect(there.pod, 9, version=version))
    where = f"destination={show(there.pod, 9, version)}"
    assert "reason=refused" in there.line("refused", "direction=in", where).split()


@VERSIONS
def test_a_closed_port_of_an_outsider_is_an_error_at_once(
    here: Running, outsider: Pod, version: int
) -> None:
    assert fails_soon(lambda: here.pod.connect(outsider, 9, version=version))
    where = f"destination={show(outsider, 9, version)}"
    assert "reason=refused" in here.line("refused", "direction=out", where).split()


PLAIN_PEERS: Final = pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (talk_plain, "not_tls"),
        (answer_400, "not_tls"),
        (say_it_back, "tls_failed"),
        (leave, "tls_closed"),
        (break_off, "tls_reset"),
        (say_nothing, "no_tls_answer"),
    ],
)


@PLAIN_PEERS
def test_a_plain_peer_is_an_error_within_a_second(
    here: Running, outsider: Pod, behave: Callable[[socket.socket], None], reason: str
) -> None:
    """Observed: the client hung."""
    port = 7000 + ord(reason[-1]) + len(behave.__name__)
    with serving(outsider, port, behave):
        assert fails_soon(lambda: here.pod.connect(outsider, port))
    where = f"destination={show(outsider, port)}"
    assert f"reason={reason}" in here.line("refused", "direction=out", where).split()


def test_who_connects_to_our_own_ports_is_refused(here: Running, outsider: Pod) -> None:
    for host, port in (here.pod.address, 2), ("127.0.0.1", 2), ("127.0.0.1", 1):
        assert fails_soon(partial(here.pod.connect, host, port))
    assert fails_soon(lambda: outsider.connect(here.pod, 2))
    # The port of what leaves is not there for others.
    assert fails_soon(lambda: outsider.connect(here.pod, 1))
