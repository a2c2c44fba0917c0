"""tls-tproxy in trouble: floods, silent servers, too many clients, and what else goes wrong."""

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from mutual_tls.netfilter.table import NftError
from tests.support.bridge import write, write_identity
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.network import why_no_network
from tests.support.wrapping import (
    CLIENT,
    TAKEN,
    Site,
    is_reset,
    options,
    server_context,
    works,
)
from tls_tproxy.serve import Watch

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


@pytest.fixture(scope="module")
def simple(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that serves all names, by options alone."""
    place = tmp_path_factory.mktemp("simple")
    with site.start(place, *options(place)) as daemon:
        yield daemon


# --- Servers


def test_a_silent_server_leaves_time_for_the_next_candidate(site: Site, tmp_path: Path) -> None:
    """Observed: the first one had all of the ten seconds."""
    name = site.new_name()
    run = tmp_path / "run"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    write(run / f"wrap/names/other-{name.name}/ports/{TAKEN}", "4430\n")
    (run / "wrap/names" / name.name).mkdir()
    write_identity(run / "identity", CLIENT)
    silent = site.router.do(socket.create_server, (name.address, 4430))
    with (
        site.start(tmp_path),
        silent,
        site.serve(name.address, server_context(name.name)),
    ):
        site.look_up(name.name)
        site.look_up(f"other-{name.name}")
        assert works(site.connect(name.address))


# --- The directory


def test_the_directory_is_moved_away_and_comes_back(site: Site, tmp_path: Path) -> None:
    """Observed: the ports were given up, so that connections left in plaintext meanwhile."""
    name = site.new_name()
    wrap = tmp_path / "run/wrap"
    write(wrap / f"ports/{TAKEN}", "443\n")
    (wrap / f"names/{name.name}").mkdir(parents=True)
    write_identity(tmp_path / "run/identity", CLIENT)
    plain = site.router.do(socket.create_server, (name.address, TAKEN))
    with (
        plain,
        site.start(tmp_path) as daemon,
        site.serve(name.address, server_context(name.name)),
    ):
        assert works(site.visit(name))
        wrap.rename(wrap.with_name("away"))
        daemon.wait_for_log("unreadable")
        assert is_reset(lambda: site.visit(name))
        wrap.with_name("away").rename(wrap)
        assert works(site.visit(name))
        plain.setblocking(False)
        with pytest.raises(BlockingIOError):
            plain.accept()


# --- nftables


def test_what_refuses_comes_back_when_others_have_flushed_it(site: Site, tmp_path: Path) -> None:
    """Observed: after a restart of nftables.service and a SIGKILL, all left in plaintext."""
    name = site.new_name()
    port = 8600
    opts = *options(tmp_path), f"--port={port}"
    table = f"tls_tproxy_refuse_{port}"
    plain = site.router.do(socket.create_server, (name.address, TAKEN))
    try:
        with plain, site.start(tmp_path, *opts, "--fail-closed") as daemon:
            site.here.run("nft", "flush", "ruleset")
            eventually(lambda: table in site.tables())
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            eventually(lambda: site.tables() == [table])
            with pytest.raises(ConnectionRefusedError):
                site.visit(name)
    finally:
        site.run(tmp_path, f"--port={port}", "--stop-refusing")


def test_ports_that_nft_has_refused_are_tried_again() -> None:
    """Observed: a port that was added while a control group was away was never redirected."""
    ports = {1}
    asked: list[set[int]] = []
    told: list[str] = []

    def replace(ports: set[int]) -> None:
        asked.append(ports)
        if len(asked) < 4:
            raise NftError("nft: cgroupv2 path fails: No such file or directory")

    watch = Watch(
        SimpleNamespace(ports=lambda: frozenset(ports)),  # type: ignore[arg-type]
        SimpleNamespace(has_ended=lambda: False),  # type: ignore[arg-type]
        SimpleNamespace(  # type: ignore[arg-type]
            ports=frozenset(ports),
            listening_port=3,
            replace_ports=replace,
            look_after=lambda: None,
        ),
        SimpleNamespace(problem=told.append, ports=told.append),  # type: ignore[arg-type]
    )
    ports.add(2)
    for _ in range(6):
        watch.look()
    assert asked == [{1, 2}] * 4
    assert told == ["nft: cgroupv2 path fails: No such file or directory", "1,2"]


# --- The end


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("fail_closed", [False, True], ids=["", "fail-closed"])
def test_a_drain(site: Site, tmp_path: Path, workers: int, *, fail_closed: bool) -> None:
    """Who is connected goes on; a new one is left alone as a whole, or refused."""
    name = site.new_name()
    opts = [*options(tmp_path), "--port=8600", f"--workers={workers}"]
    if fail_closed:
        opts.append("--fail-closed")
    plain = site.router.do(socket.create_server, (name.address, TAKEN))
    plain.settimeout(PATIENCE)
    try:
        with (
            plain,
            site.serve(name.address, server_context(name.name)) as server,
            site.start(tmp_path, *opts) as daemon,
            site.visit(name) as before,
        ):
            before.sendall(b"before")
            assert before.recv(100) == b"before"
            daemon.signal(signal.SIGTERM)
            # The sockets are closed first, and then nothing is redirected any more.
            daemon.wait_for_log("draining")
            if fail_closed:
                eventually(lambda: _is_refused(lambda: site.connect(name.address)))
            else:
                eventually(lambda: not _is_refused(lambda: site.connect(name.address)))
                with site.connect(name.address) as client:
                    client.sendall(b"plain")
                    while True:
                        sock, _ = plain.accept()
                        with sock:
                            if sock.recv(100) == b"plain":
                                break
            before.sendall(b"after")
            assert before.recv(100) == b"after"
            assert len(server.ends) == 1
    finally:
        site.run(tmp_path, "--port=8600", "--stop-refusing")


def _is_refused(connect: Callable[[], socket.socket]) -> bool:
    try:
        connect().close()
    except ConnectionRefusedError:
        return True
    return False
