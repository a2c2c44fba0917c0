"""What tproxy-pod counts, with TLS and without."""

from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write
from tests.support.daemon import eventually
from tests.support.network import why_no_network
from tests.support.pods import Pods, ask, running, show
from tests.support.status import hosts_in, processes, read_status, total

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


def test_both_directions_are_counted(pods: Pods, tmp_path: Path) -> None:
    paths = tmp_path / "status-out", tmp_path / "status-in"
    with (
        running(pods.pod(), tmp_path / "here", "--status-socket", str(paths[0])) as here,
        running(pods.pod(), tmp_path / "there", "--status-socket", str(paths[1])) as there,
        there.pod.listen(8080) as listening,
    ):
        ask(here.pod.connect(there.pod, 8080), listening)
        destination = show(there.pod, 8080, 4)
        for path, name in zip(paths, (f"out {destination}", f"in {destination}"), strict=True):
            eventually(lambda path=path: total(read_status(path), "open") == 0)  # type: ignore[misc]
            [process] = processes(read_status(path))
            assert (process["program"], process["served"]) == ("tproxy-pod", 1)
            host = hosts_in(read_status(path))[name]
            assert (host["served"], host["up"], host["down"]) == (1, 5, 5)


def test_connections_without_tls_are_counted_while_they_are_open(
    pods: Pods, tmp_path: Path
) -> None:
    path = tmp_path / "status"
    place = tmp_path / "here"
    outsider = pods.pod()
    write(place / "pod/ingress/8080/mode", "permissive\n")
    with (
        running(pods.pod(), place, "--status-socket", str(path)) as here,
        here.pod.listen(8080) as listening,
        outsider.connect(here.pod, 8080) as client,
    ):
        client.sendall(b"hello")
        server, _ = listening.accept()
        with server:
            assert server.recv(100) == b"hello"
            host = hosts_in(read_status(path))[f"in {show(here.pod, 8080, 4)}"]
            assert (host["open"], host["up"], host["down"]) == (1, 5, 0)
