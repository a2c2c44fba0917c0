"""What the directory says counts from the next connection on: addresses, ports, identities."""

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import authority, write
from tests.support.daemon import PATIENCE
from tests.support.network import why_no_network
from tests.support.pods import (
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


@pytest.fixture
def here(pods: Pods, tmp_path: Path) -> Iterator[Running]:
    """A pod whose programs connect."""
    with running(pods.pod(), tmp_path / "here") as pod:
        yield pod


@pytest.fixture
def there(pods: Pods, tmp_path: Path) -> Iterator[Running]:
    """A pod whose programs are connected to."""
    with running(pods.pod(), tmp_path / "there") as pod:
        yield pod


def is_wrapped(one: Running, other: Running, port: int, *, version: int = 4) -> bool:
    """Tell whether a connection is, which is served in either case."""
    with other.pod.listen(port, version=version) as listening:
        seen = ask(one.pod.connect(other.pod, port, version=version), listening)
    where = f"destination={show(other.pod, port, version)}"
    return "tls=yes" in other.line("connection", where, f"client={show_client(seen)}").split()


def is_plain(one: Pod, other: Pod | str, listens: Pod, port: int, *, version: int = 4) -> bool:
    """Tell whether the client is connected with the server itself."""
    with listens.listen(port, version=version) as listening:
        client = one.connect(other, port, version=version)
        name = client.getsockname()[:2]
        return bool(ask(client, listening) == name)


# --- Out: prefixes and their modes


def test_a_prefix_is_plain_and_then_not(here: Running, outsider: Pod) -> None:
    for version, prefix in (4, f"{outsider.address}_32"), (6, f"{outsider.addresses[6]}_128"):
        here.change(f"pod/egress/{prefix}", "plain\n")
        assert is_plain(here.pod, outsider, outsider, 8080, version=version)
        here.change(f"pod/egress/{prefix}", "mtls\n")
        with outsider.listen(8080, version=version) as listening:
            here.pod.connect(outsider, 8080, version=version).close()
            listening.accept()[0].close()
        here.line("refused", "direction=out", f"destination={show(outsider, 8080, version)}")


def test_the_longest_prefix_counts(here: Running, there: Running, outsider: Pod) -> None:
    write(here.place / "pod/egress/10.0.0.0_8", "mtls")
    here.change(f"pod/egress/{outsider.address}_32", "plain")
    assert is_plain(here.pod, outsider, outsider, 8080)
    assert is_wrapped(here, there, 8080)


def test_a_public_address_that_is_taken(here: Running, pods: Pods) -> None:
    here.change(f"pod/egress/{PUBLIC[4]}_32", "mtls")
    with serving(pods.router, 8080, talk_plain):
        assert fails_soon(lambda: here.pod.connect(PUBLIC[4], 8080))
    here.line("refused", "reason=not_tls", f"destination={PUBLIC[4]}:8080")
    # The private ones are not, since there is a directory that does not have them.
    here.change(f"pod/egress/{PUBLIC[4]}_32", "plain")
    assert is_plain(here.pod, PUBLIC[4], pods.router, 8080)


def test_connections_stay_as_they_are(here: Running, there: Running) -> None:
    prefix = f"pod/egress/{there.pod.address}_32"
    with (
        there.pod.listen(8080) as listening,
        here.pod.connect(there.pod, 8080) as client,
        listening.accept()[0] as program,
    ):
        client.sendall(b"one")
        assert program.recv(100) == b"one"
        here.change(prefix, "plain")
        there.change("pod/ingress/8080/mode", "plain")
        client.settimeout(PATIENCE)
        program.sendall(b"two")
        assert client.recv(100) == b"two"
    assert is_plain(here.pod, there.pod, there.pod, 8080)


@pytest.mark.parametrize("word", ["", "mTLS", "mtls plain", "#"])
def test_what_is_not_understood_is_refused(here: Running, outsider: Pod, word: str) -> None:
    """And never leaves in plaintext."""
    here.change(f"pod/egress/{outsider.address}_32", word)
    with outsider.listen(8080):
        assert fails_soon(lambda: here.pod.connect(outsider, 8080))
    here.line("refused", "reason=misconfigured", f"destination={show(outsider, 8080)}")


def test_an_entry_that_is_no_prefix_refuses_what_it_may_have_meant(
    here: Running, there: Running, pods: Pods
) -> None:
    write(here.place / f"pod/egress/{there.pod.address}_32", "mtls")
    here.change(f"pod/egress/{PUBLIC[4]}", "plain")
    with pods.router.listen(8080):
        assert fails_soon(lambda: here.pod.connect(PUBLIC[4], 8080))
    here.line("refused", "reason=misconfigured", f"destination={PUBLIC[4]}:8080")
    here.line("unreadable")
    assert is_wrapped(here, there, 8080)


# --- Out: who the server may be


@pytest.mark.parametrize(
    ("rule", "is_served"),
    [
        ("spiffe://example/ns/*/sa/web", True),
        ("spiffe://example/**", True),
        ("spiffe://example/ns/other/sa/web", False),
        ("web.example", True),
        ("other.example", False),
    ],
)
def test_servers_may_be_named(
    pods: Pods, tmp_path: Path, here: Running, rule: str, is_served: bool
) -> None:
    """Its certificate is for no address: a service of Kubernetes has another one than its pods."""
    pod = pods.pod()
    pod.issue(tmp_path / "there/pod/identity", "spiffe://example/ns/one/sa/web", "web.example")
    prefix = f"pod/egress/{pod.address}_32"
    write(here.place / f"{prefix}/servers/rules", f"{rule}\n")
    here.change(f"{prefix}/mode", "mtls")
    with running(pod, tmp_path / "there") as there:
        if is_served:
            assert is_wrapped(here, there, 8080)
        else:
            with pod.listen(8080):
                assert fails_soon(lambda: here.pod.connect(pod, 8080))
            here.line("refused", "reason=wrong_name", f"destination={show(pod, 8080)}")


@pytest.mark.parametrize(
    ("rule", "is_served"),
    [
        ("spiffe://example/ns/*/sa/client", True),
        ("spiffe://example/ns/one/sa/*", True),
        ("spiffe://example/ns/two/**", False),
        ("spiffe://other/ns/one/sa/client", False),
    ],
)
def test_clients_may_be_named(
    pods: Pods, tmp_path: Path, there: Running, rule: str, is_served: bool
) -> None:
    pod = pods.pod()
    pod.issue(tmp_path / "one/pod/identity", "spiffe://example/ns/one/sa/client", pod.address)
    write(there.place / "pod/ingress/8080/clients/rules", rule)
    with running(pod, tmp_path / "one") as here:
        if is_served:
            assert is_wrapped(here, there, 8080)
            assert "spiffe://example/ns/one/sa/client" in there.line("connection")
        else:
            with there.pod.listen(8080):
                assert fails_soon(lambda: here.pod.connect(there.pod, 8080))
            line = there.line("refused", "reason=client_not_allowed")
            assert "spiffe://example/ns/one/sa/client" in line


# --- In: ports and their modes


def test_ports_that_are_not_there_are_refused(here: Running, there: Running) -> None:
    there.change("pod/ingress/8080/mode", "mtls")
    assert is_wrapped(here, there, 8080)
    with there.pod.listen(8081):
        assert fails_soon(lambda: here.pod.connect(there.pod, 8081))
    there.line("refused", "reason=port_not_allowed", f"destination={show(there.pod, 8081)}")
    write(there.place / "pod/ingress/_default/mode", "mtls")
    assert is_wrapped(here, there, 8081)


def test_a_port_is_plain_and_then_not(there: Running, outsider: Pod) -> None:
    there.change("pod/ingress/8080/mode", "plain")
    assert is_plain(outsider, there.pod, there.pod, 8080)
    there.change("pod/ingress/8080/mode", "mtls")
    with there.pod.listen(8080):
        assert fails_soon(lambda: outsider.connect(there.pod, 8080))
    # All but one.
    write(there.place / "pod/ingress/8080/mode", "plain")
    there.change("pod/ingress/_default/mode", "plain")
    assert is_plain(outsider, there.pod, there.pod, 8090)
    there.change("pod/ingress/8080/mode", "mtls")
    assert is_plain(outsider, there.pod, there.pod, 8090)
    with there.pod.listen(8080):
        assert fails_soon(lambda: outsider.connect(there.pod, 8080))


@pytest.mark.parametrize("version", [4, 6])
def test_a_permissive_port_serves_both(
    here: Running, there: Running, outsider: Pod, version: int
) -> None:
    write(there.place / "pod/ingress/8080/mode", "permissive")
    assert is_wrapped(here, there, 8080, version=version)
    # Whoever speaks first in plaintext, and whoever waits for the server to.
    with there.pod.listen(8080, version=version) as listening:
        seen = ask(outsider.connect(there.pod, 8080, version=version), listening)
        assert seen[0] == outsider.addresses[version]
        with (
            outsider.connect(there.pod, 8080, version=version) as client,
            listening.accept()[0] as program,
        ):
            program.sendall(b"220 ready")
            assert client.recv(100) == b"220 ready"
    there.line("connection", "tls=no", "direction=in")


def test_a_permissive_port_still_asks_for_a_certificate(
    there: Running, outsider: Pod, tmp_path: Path
) -> None:
    write(there.place / "pod/ingress/8080/mode", "permissive")
    context = client_context(outsider, tmp_path / "client", ca=authority("others"))
    with (
        there.pod.listen(8080),
        outsider.connect(there.pod, 8080) as plain,
        pytest.raises(ssl.SSLError, match="UNKNOWN_CA"),
        context.wrap_socket(plain, server_hostname=there.pod.address) as client,
    ):
        client.recv(1)
    there.line("refused", "reason=untrusted", f"destination={show(there.pod, 8080)}")


# --- Out: permissive


@pytest.mark.parametrize(
    "behave", [talk_plain, answer_400, say_it_back, leave, break_off, say_nothing]
)
def test_permissive_reaches_plain_servers(
    here: Running, outsider: Pod, behave: Callable[[socket.socket], None]
) -> None:
    """However they take our hello; and the next time they see none."""
    here.change(f"pod/egress/{outsider.address}_32", "permissive")
    seen: list[bytes] = []

    def note(connection: socket.socket) -> None:
        first = connection.recv(1 << 16) if behave is not talk_plain else b""
        if first[:1] == b"\x16":
            return behave_with(first, connection)
        seen.append(first)
        connection.sendall(b"plain")

    def behave_with(first: bytes, connection: socket.socket) -> None:
        if behave is say_it_back:
            connection.sendall(first)
        elif behave is answer_400:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        elif behave is break_off:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif behave is say_nothing:
            connection.recv(1)

    with serving(outsider, 8080, note):
        for _ in range(2):
            with here.pod.connect(outsider, 8080) as client:
                client.settimeout(PATIENCE)
                client.sendall(b"hello")
                assert client.recv(100) == b"plain"
    here.line("connection", "direction=out", "tls=no")


def test_permissive_is_no_way_around_a_certificate(
    pods: Pods, tmp_path: Path, here: Running
) -> None:
    """Whoever shows one speaks TLS, and is not spoken to in plaintext."""
    pod = pods.pod()
    pod.issue(tmp_path / "there/pod/identity", ca=authority("others"))
    here.change(f"pod/egress/{pod.address}_32", "permissive")
    with running(pod, tmp_path / "there"), pod.listen(8080):
        assert fails_soon(lambda: here.pod.connect(pod, 8080))
    here.line("refused", "reason=untrusted", f"destination={show(pod, 8080)}")


def test_who_has_spoken_tls_is_not_talked_into_plaintext(
    pods: Pods, tmp_path: Path, here: Running
) -> None:
    pod = pods.pod()
    here.change(f"pod/egress/{pod.address}_32", "permissive")
    with running(pod, tmp_path / "there") as there:
        assert is_wrapped(here, there, 8080)
    with serving(pod, 8080, answer_400):
        assert fails_soon(lambda: here.pod.connect(pod, 8080))
    here.line("refused", "reason=not_tls", f"destination={show(pod, 8080)}")


# --- Where it leads


def test_another_port_and_another_place(here: Running, there: Running, tmp_path: Path) -> None:
    upstream = there.place / "pod/ingress/8080/upstream"
    with there.pod.listen(9090) as listening:
        write(upstream, "9090")
        seen = ask(here.pod.connect(there.pod, 8080), listening)
        assert seen[0] == here.pod.address
        # Of another address of this machine, the program sees ours.
        write(upstream, "127.0.0.1:9090")
        seen = ask(here.pod.connect(there.pod, 8080), listening)
        assert seen[0] == "127.0.0.1"
        keep_source = write(there.place / "pod/ingress/8080/keep-source", "yes")
        assert fails_soon(lambda: here.pod.connect(there.pod, 8080))
        there.line("refused", "reason=misconfigured")
        keep_source.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(there.place / "app.sock"))
        listening.listen()
        listening.settimeout(PATIENCE)
        write(upstream, "./app.sock")
        with here.pod.connect(there.pod, 8080) as client, listening.accept()[0] as program:
            client.sendall(b"hello")
            assert program.recv(100) == b"hello"


def test_the_address_is_not_kept_where_it_is_not_wanted(here: Running, there: Running) -> None:
    write(there.place / "pod/ingress/8080/keep-source", "no")
    with there.pod.listen(8080) as listening:
        seen = ask(here.pod.connect(there.pod, 8080), listening)
    assert seen[0] == there.pod.address


# --- Identities


def test_an_identity_is_swapped_as_kubernetes_does(
    pods: Pods, tmp_path: Path, here: Running
) -> None:
    """By a link, `..data`, which a new one replaces; a broken one leaves the old one in use."""
    pod, place = pods.pod(), tmp_path / "there/pod/identity"
    place.mkdir(parents=True)
    swap(pod, place, "1", pod.address)
    for name in "tls.crt", "tls.key", "ca.crt":
        (place / name).symlink_to(f"..data/{name}")
    with running(pod, tmp_path / "there") as there:
        assert is_wrapped(here, there, 8080)
        swap(pod, place, "2", "192.0.2.1")
        with pod.listen(8080):
            assert fails_soon(lambda: here.pod.connect(pod, 8080))
        here.line("refused", "reason=wrong_name", f"destination={show(pod, 8080)}")
        swap(pod, place, "3", pod.address)
        assert is_wrapped(here, there, 8080)
        there.line("identity_loaded")
        broken = place / "..4"
        broken.mkdir()
        write(broken / "tls.crt", "half a certif")
        link(place, "..4")
        assert is_wrapped(here, there, 8080)
        there.line("identity_broken")


def swap(pod: Pod, place: Path, version: str, name: str) -> None:
    pod.issue(place / f"..{version}", name)
    link(place, f"..{version}")


def link(place: Path, target: str) -> None:
    new = place / "..new"
    new.symlink_to(target)
    os.replace(new, place / "..data")


def test_without_an_identity_all_is_refused(pods: Pods, tmp_path: Path, outsider: Pod) -> None:
    (tmp_path / "pod/identity").mkdir(parents=True)
    with running(pods.pod(), tmp_path) as there, there.pod.listen(8080), outsider.listen(8080):
        assert fails_soon(lambda: outsider.connect(there.pod, 8080))
        assert fails_soon(lambda: there.pod.connect(outsider, 8080))
        there.line("refused", "direction=in", "reason=misconfigured")
        there.line("refused", "direction=out", "reason=misconfigured")
