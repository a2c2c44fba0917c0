"""What an ingress and a peer count, and whom they tell."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bridge import SERVICE, Bridge, ask, bridge, connect, write
from tests.support.daemon import eventually
from tests.support.sockets import receive_all, receive_exactly
from tests.support.status import Line, hosts_in, processes, read_status, total

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as several users")

TARGET = f"{SERVICE}:80"


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    with bridge(tmp_path) as made:
        yield made


def talk(client: socket.socket) -> None:
    client.sendall(b"hello")
    assert receive_exactly(client, 5) == b"hello"


def closed(path: Path) -> list[Line]:
    """Return what is told when no connection is open any more."""
    eventually(lambda: total(read_status(path), "open") == 0)
    return read_status(path)


def test_both_sides_count(it: Bridge, tmp_path: Path) -> None:
    paths = tmp_path / "ingress-status", tmp_path / "peer-status"
    it.start_peer("--status-socket", str(paths[1]))
    ingress = it.start_ingress("--status-socket", str(paths[0]))
    client, _ = ask(ingress, connect())
    with client:
        talk(client)
        for path in paths:
            host = hosts_in(read_status(path))[TARGET]
            assert (host["open"], host["up"], host["down"]) == (1, 5, 5)
            assert total(read_status(path), "up") == 5
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
    refused, _ = ask(ingress, connect("nowhere.internal:80"))
    refused.close()
    write(it.peer_place / "allow" / SERVICE / "81", "127.0.0.1:1")
    refused, _ = ask(ingress, connect(f"{SERVICE}:81"))
    refused.close()
    for path, program in zip(paths, ("tls-bridge", "tls-bridge-peer"), strict=True):
        lines = closed(path)
        [process] = processes(lines)
        assert process["program"] == program
        assert (process["served"], process["up"], process["down"]) == (1, 5, 5)
        assert process["seconds"]["setup"]["count"] == 1
        found = hosts_in(lines)
        assert set(found) == {TARGET, f"{SERVICE}:81"}  # and no name that a client made up
        assert found[TARGET]["owner"] == os.geteuid()
        [last] = found[f"{SERVICE}:81"]["last"]
        assert last["reason"] == ("peer_refused" if program == "tls-bridge" else "refused")
    assert processes(read_status(paths[0]))[0]["reasons"] == {"no_route": 1, "peer_refused": 1}


def test_workers_together(it: Bridge, tmp_path: Path) -> None:
    path = tmp_path / "status"
    it.start_peer()
    ingress = it.start_ingress("--workers", "2", "--status-socket", str(path))
    for _ in range(10):
        client, _ = ask(ingress, connect())
        with client:
            talk(client)
    lines = closed(path)
    assert len(processes(lines)) == 2
    assert total(lines, "served") == hosts_in(lines)[TARGET]["served"] == 10
    assert total(lines, "up") == 50


@needs_root
def test_the_owner_of_a_host_s_directory_may_know(it: Bridge, tmp_path: Path) -> None:
    path = tmp_path / "status"
    os.chown(it.ingress_place / "hosts" / SERVICE, 4001, 4001)
    write(it.ingress_place / "hosts/other.internal/peer", "p\n")
    it.start_peer()
    ingress = it.start_ingress("--status-socket", str(path))
    for target in TARGET, "other.internal:80":
        client, _ = ask(ingress, connect(target))
        client.close()
    closed(path)
    assert set(hosts_in(read_status(path, 4001))) == {TARGET}
    assert hosts_in(read_status(path, 4002)) == {}
    assert set(hosts_in(read_status(path))) == {TARGET, "other.internal:80"}


def test_who_is_refused_after_the_handshake_is_kept(it: Bridge, tmp_path: Path) -> None:
    path = tmp_path / "status"
    (it.peer_place / "clients" / "ingress.example").unlink()
    it.start_peer()
    ingress = it.start_ingress("--status-socket", str(path))
    client, _ = ask(ingress, connect())
    client.close()
    [last] = hosts_in(closed(path))[TARGET]["last"]
    assert last["reason"] in {"peer_refused", "rejected", "tls_closed", "peer_closed"}
    assert last["client"].startswith("127.0.0.1:")
