"""How tls-tproxy starts, what it refuses to start with, and what is left when it has ended."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import authority, write, write_identity
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.network import why_no_network
from tests.support.wrapping import (
    AT_ONCE,
    CLIENT,
    COMMAND,
    TAKEN,
    End,
    Name,
    Site,
    is_reset,
    options,
    receive_all,
    server_context,
    works,
)

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

LISTENING: Final = 8000
NOBODY: Final = 65534

ETH_P_ALL: Final = 3  # linux/if_ether.h

# linux/capability.h
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13

# The program without some rights of root's, and root's files all the same.
RIGHTS: Final = ("setpriv", "--inh-caps=-all", "--ambient-caps=-all")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may search; pytest's are root's alone."""
    with tempfile.TemporaryDirectory(prefix="tls-tproxy-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(autouse=True)
def nothing_is_left(site: Site) -> Iterator[None]:
    """No table stays, and if one does, it does not trouble the next test."""
    yield
    left = site.tables()
    site.here.run("nft", "flush", "ruleset")
    assert left == []


@contextmanager
def plain_server(site: Site, name: Name) -> Iterator[socket.socket]:
    """Listen on the very port that is taken: where plaintext would arrive."""
    with site.router.do(socket.create_server, (name.address, TAKEN)) as listening:
        listening.settimeout(PATIENCE)
        yield listening


@contextmanager
def sniffer(site: Site) -> Iterator[Callable[[], list[bytes]]]:
    """See what the server's machine receives; what is yielded returns the packets so far."""
    with site.router.do(
        socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)
    ) as sock:
        sock.setblocking(False)

        def packets() -> list[bytes]:
            seen = []
            with suppress(BlockingIOError):
                while True:
                    seen.append(sock.recv(1 << 16))
            return seen

        yield packets


def hears_nothing(listening: socket.socket) -> bool:
    """Tell whether nobody has connected."""
    return select.select([listening], (), (), 0)[0] == []


def reaches(site: Site, name: Name, listening: socket.socket) -> bool:
    """Tell whether a client is not redirected."""
    with site.connect(name.address), listening.accept()[0]:
        return True


def children(pid: int) -> dict[str, int]:
    """Return the processes that a process has started, by their programs."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {Path(f"/proc/{each}/comm").read_text().strip(): int(each) for each in pids}


def workers_of(daemon: Daemon) -> list[int]:
    """Return the workers, without nft."""
    return [pid for pid in daemon.workers() if pid != children(daemon.process.pid)["nft"]]


def is_running(pid: int) -> bool:
    """Tell whether a process has not ended, be it that nobody has waited for it yet."""
    try:
        return not status(pid)["State"].startswith("Z")
    except OSError:
        return False


def status(pid: int) -> dict[str, str]:
    """Return what proc_pid_status(5) says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def rights(pid: int) -> set[int]:
    """Return a process's capabilities, those that it could have included."""
    bits = int(status(pid)["CapEff"], 16) | int(status(pid)["CapPrm"], 16)
    return {number for number in range(64) if bits >> number & 1}


# --- The end


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_rules_end_with_it(
    site: Site, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """Observed: they stayed, and connections went nowhere."""
    name = site.new_name()
    arguments = (*options(tmp_path), f"--workers={workers}")
    with site.start(tmp_path, *arguments) as daemon, plain_server(site, name) as plain:
        assert len(site.tables()) == 1
        assert is_reset(lambda: site.visit(name))
        served = daemon.workers()
        daemon.signal(number)
        assert daemon.wait() == (-number if number == signal.SIGKILL else 0)
        # After SIGKILL, nft and workers take a moment to notice.
        eventually(lambda: site.tables() == [])
        eventually(lambda: not any(map(is_running, served)))
        assert hears_nothing(plain)
        assert reaches(site, name, plain)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_fail_closed(site: Site, tmp_path: Path, number: signal.Signals) -> None:
    name = site.new_name()
    port = f"--port={LISTENING}"
    with (
        plain_server(site, name) as plain,
        sniffer(site) as packets,
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), port, "--fail-closed") as daemon,
        site.visit(name) as client,
    ):
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        daemon.signal(number)
        if number == signal.SIGTERM:
            # Who is there may go on; nobody else comes in.
            daemon.wait_for_log("draining")
            with pytest.raises(ConnectionRefusedError):
                site.connect(name.address)
            client.sendall(b"more")
            assert client.recv(100) == b"more"
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
        daemon.wait()
        eventually(lambda: site.tables() == [f"tls_tproxy_refuse_{LISTENING}"])
        with pytest.raises(ConnectionRefusedError):
            site.connect(name.address)
        if number == signal.SIGKILL:
            client.settimeout(AT_ONCE)
            with pytest.raises(OSError, match=r"reset|Broken pipe"):
                while True:
                    client.sendall(b"in plaintext")
                    client.recv(1)
        # The next start takes it over.
        with site.start(tmp_path, *options(tmp_path), port, "--fail-closed"):
            assert works(site.visit(name))
        with pytest.raises(ConnectionRefusedError):
            site.connect(name.address)
        assert hears_nothing(plain)
        assert not any(b"plaintext" in packet for packet in packets())
        # As an administrator would say it, wherever he is.
        nothing = tmp_path / "nothing"
        nothing.mkdir()
        done = site.run(nothing, port, "--stop-refusing")
        assert (done.returncode, done.stderr) == (0, "")
        assert site.tables() == []
        with site.connect(name.address) as client, plain.accept()[0] as server:
            client.sendall(b"plaintext")
            assert server.recv(100) == b"plaintext"
            # So it would have been seen.
            assert any(b"plaintext" in packet for packet in packets())


def test_a_drain_lets_connections_go_on(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path)) as daemon,
        site.visit(name) as client,
    ):
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        daemon.signal(signal.SIGTERM)
        assert "open=1" in daemon.wait_for_log("draining")
        # Nobody else is taken.
        with plain_server(site, name) as plain:
            assert reaches(site, name, plain)
        client.sendall(b"after")
        assert client.recv(100) == b"after"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        assert daemon.wait() == 0
        assert "cut=0" in daemon.wait_for_log("drained")


def test_a_drain_does_not_wait_forever(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), "--drain=0.1") as daemon,
        site.visit(name) as client,
    ):
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        daemon.signal(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            receive_all(client)
        assert daemon.wait() == 0
        assert "cut=1" in daemon.wait_for_log("drained")


def test_sigint_cuts_connections_off(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)) as server,
        site.start(tmp_path, *options(tmp_path)) as daemon,
        site.visit(name) as client,
    ):
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        daemon.signal(signal.SIGINT)
        with pytest.raises(ConnectionResetError):
            receive_all(client)
        assert daemon.wait() == 0
        assert "cut=1" in daemon.wait_for_log("drained")
        eventually(lambda: server.end().failure)


@pytest.mark.parametrize("workers", [1, 2])
def test_nft_is_killed(site: Site, tmp_path: Path, workers: int) -> None:
    with site.start(tmp_path, *options(tmp_path), f"--workers={workers}") as daemon:
        os.kill(children(daemon.process.pid)["nft"], signal.SIGKILL)
        assert daemon.wait() == 111
        why = "tls-tproxy: fatal: unable to redirect connections: nft has ended"
        assert why in daemon.log()


# --- The start


def test_nft_is_missing(site: Site, tmp_path: Path) -> None:
    nft = shutil.which("nft")
    hidden = f'mount --bind /dev/null {nft} && exec "$@"'
    done = site.run(tmp_path, *options(tmp_path), before=("sh", "-euc", hidden, "sh"))
    why = "unable to run nft: nft is not installed (Debian package nftables)"
    assert done.stderr == f"tls-tproxy: fatal: unable to redirect connections: {why}\n"
    assert done.returncode == 111


def test_a_second_one_on_the_same_port(site: Site, tmp_path: Path) -> None:
    """It ends, and the first one goes on."""
    name = site.new_name()
    arguments = (*options(tmp_path), f"--port={LISTENING}", "--fail-closed")
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *arguments),
    ):
        before = site.tables()
        done = site.run(tmp_path, *arguments)
        assert done.stderr == (
            f"tls-tproxy: fatal: unable to listen on port {LISTENING} of the loopback addresses: "
            "Address already in use\n"
        )
        assert done.returncode == 111
        assert site.tables() == before
        assert works(site.visit(name))
    assert site.run(tmp_path, f"--port={LISTENING}", "--stop-refusing").returncode == 0


@pytest.mark.parametrize(
    ("some", "why"),
    [
        ("-all", "unable to watch DNS answers (it takes CAP_NET_RAW): "),
        ("-all,+net_admin", "unable to watch DNS answers (it takes CAP_NET_RAW): "),
        ("-all,+net_raw", "unable to redirect connections: nft: "),
    ],
)
def test_privileges_are_missing(site: Site, tmp_path: Path, some: str, why: str) -> None:
    before = (*RIGHTS, f"--bounding-set={some}")
    done = site.run(tmp_path, *options(tmp_path), before=before)
    *before_it, line = done.stderr.splitlines()
    assert line.startswith(f"tls-tproxy: fatal: {why}")
    assert "Operation not permitted" in line
    assert all(each.startswith("tls-tproxy: sandbox ") for each in before_it)
    assert done.returncode == 111


def test_two_privileges_suffice(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    before = (*RIGHTS, "--bounding-set=-all,+net_admin,+net_raw")
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), before=before),
    ):
        assert works(site.visit(name))


def test_what_is_left_of_root(site: Site, tmp_path: Path) -> None:
    with site.start(tmp_path, *options(tmp_path)) as daemon:
        assert rights(daemon.process.pid) == {CAP_NET_RAW}


@pytest.mark.parametrize("workers", [1, 2])
def test_another_user(site: Site, place: Path, workers: int) -> None:
    name = site.new_name()
    arguments = (*options(place), "--user=nobody", f"--workers={workers}")
    for file in (place / "id").iterdir():
        os.chown(file, NOBODY, NOBODY)
        file.chmod(0o400)
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(place, *arguments) as daemon,
    ):
        assert works(site.visit(name))
        nft = children(daemon.process.pid)["nft"]
        assert rights(nft) == {CAP_NET_ADMIN}
        served = daemon.workers() if workers > 1 else [daemon.process.pid]
        for pid in daemon.process.pid, *served:
            if pid != nft:
                assert status(pid)["Uid"].split() == [str(NOBODY)] * 4
                assert rights(pid) == {CAP_NET_RAW}
        assert status(nft)["Uid"].split() == [str(NOBODY)] * 4
        # Another identity, while it runs.
        issued = authority().issue_cert("swapped.example", common_name="swapped.example")
        issued.cert_chain_pems[0].write_to_path(str(place / "id/cert.pem"))
        issued.private_key_pem.write_to_path(str(place / "id/key.pem"))
        assert works(site.visit(name))
    assert site.tables() == []


def test_an_identity_that_the_user_may_not_read(site: Site, place: Path) -> None:
    name = site.new_name()
    arguments = (*options(place), "--user=nobody")
    (place / "id/key.pem").chmod(0o600)
    with site.serve(name.address, server_context(name.name)) as server:
        with site.start(place, *arguments) as daemon:
            assert is_reset(lambda: site.visit(name))
            line = daemon.wait_for_log("reason=misconfigured")
            assert "key.pem" in line
            assert "Permission denied" in line
        assert server.ends == []


FILES: Final = ("--cert=identity/cert.pem", "--key=identity/key.pem", "--cacert=identity/ca.pem")


@pytest.mark.parametrize("arguments", [(), FILES], ids=["directory", "options"])
def test_another_root_directory(site: Site, place: Path, arguments: tuple[str, ...]) -> None:
    """Python encodes names by a codec, and rules by tables, that it loads late by itself."""
    name = site.new_name()
    run = place / "run"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    write(run / "wrap/names" / name.name / "servers", f"bücher.example\n{name.name}\n")
    write_identity(run / "identity", CLIENT)
    for file in (run / "identity").iterdir():
        os.chown(file, NOBODY, NOBODY)
    # What it takes: /proc.
    with_proc = 'mkdir proc && mount --bind /proc proc && exec "$@"'
    under = (*site.under(place), "sh", "-euc", with_proc, "sh")
    arguments = ("--chroot", "--user=nobody", *arguments)
    with (
        site.serve(name.address, server_context(name.name)),
        # It could not save what it measured.
        Daemon(None, run, arguments, under=under, module="tls_tproxy", measured=False) as daemon,
    ):
        daemon.wait_for_log("listening")
        assert works(site.visit(name))


def test_files_that_are_links(site: Site, tmp_path: Path) -> None:
    """As certbot has them: in the sandbox they can be read where they lead."""
    name = site.new_name()
    arguments = options(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in sorted((tmp_path / "id").iterdir()):
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *arguments) as daemon,
    ):
        assert works(site.visit(name)), daemon.log()


@pytest.mark.parametrize(
    "entry", ["wrap", "wrap/ports", "wrap/names", "NAME", "NAME/servers", "NAME/ports", "NAME/also"]
)
def test_entries_that_are_links(site: Site, tmp_path: Path, entry: str) -> None:
    """A directory may be shared by several names, or be kept elsewhere."""
    name = site.new_name()
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    common = run / "wrap/names/common.example"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    write(common / f"ports/{TAKEN}", "443\n")
    write(common / "servers", f"{name.name}\n")
    write(common / "also" / name.name)
    write_identity(run / "identity", CLIENT)
    path = run / entry.replace("NAME", "wrap/names/common.example")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with (
        site.serve(name.address, server_context(name.name)) as server,
        site.start(tmp_path, "--log=connections"),
    ):
        assert works(site.visit(name))
        assert server.end().sni == name.name


def test_a_machine_without_ipv6(tmp_path: Path) -> None:
    """As many an administrator has it, by sysctl(8)."""
    with Site() as site:
        name = site.new_name()
        site.here.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        with (
            site.serve(name.address, server_context(name.name)),
            site.start(tmp_path, *options(tmp_path)),
        ):
            assert works(site.visit(name))
            with pytest.raises(OSError, match=r"Network is unreachable|Cannot assign"):
                site.visit(name, version=6)


def test_etc_hosts(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    hosts = f"{name.address} {name.name}\n"
    with site.start(tmp_path, *options(tmp_path), hosts=hosts) as daemon:
        with site.serve(name.address, server_context(name.name)) as server:
            assert works(site.connect(name.address))
            assert server.end().sni == name.name
        # Too large a one names nobody, and the log says so.
        write(tmp_path / "hosts", hosts + "#" * (2 << 20))
        assert is_reset(lambda: site.connect(name.address))
        line = daemon.wait_for_log("reason=no_name")
        assert "unable to read /etc/hosts: there are more than" in line


def test_only_a_user(site: Site, tmp_path: Path) -> None:
    """Observed: the promise was not kept."""
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        plain_server(site, name) as plain,
        site.start(tmp_path, *options(tmp_path), "--user-only=nobody", "--user-only=1000"),
    ):
        for user in NOBODY, 1000:
            assert works(site.visit(name, user=user))
        assert hears_nothing(plain)
        assert reaches(site, name, plain)


@pytest.mark.parametrize("version", [4, 6])
def test_workers(site: Site, tmp_path: Path, version: int) -> None:
    """Each of them knows the names."""
    name = site.new_name()
    with (
        site.serve(name.addresses[version], server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), "--workers=2") as daemon,
    ):
        site.visit(name, version=version).close()
        for _ in range(20):
            assert works(site.connect(name.addresses[version]))

        def who() -> set[str]:
            lines = [line for line in daemon.log() if " ending=finished" in line]
            return {word for line in lines for word in line.split() if word.startswith("worker=")}

        eventually(lambda: len(who()) == 2)
        # One that has died is replaced, and the rules stay.
        first, *_ = served = workers_of(daemon)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(set(workers_of(daemon)) - set(served)) == 1)
        assert len(site.tables()) == 1
        for _ in range(10):
            assert works(site.visit(name, version=version))


def test_no_more_connections_than_that(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), "--max-connections=2"),
    ):
        clients = [site.visit(name) for _ in range(3)]
        for client in clients:
            client.sendall(b"hello")
        for client in clients[:2]:
            assert client.recv(100) == b"hello"
        # The third one waits for a place.
        assert select.select([clients[2]], (), (), 0.2)[0] == []
        clients[0].close()
        assert clients[2].recv(100) == b"hello"
        for client in clients:
            client.close()


def test_limits_of_time(site: Site, tmp_path: Path) -> None:
    idle, half = site.new_name(), site.new_name()

    def end_first(end: End) -> None:
        end.end_half()
        while end.receive():
            pass

    limits = ("--idle-timeout=0.5", "--half-closed-timeout=0.1")
    with (
        site.serve(idle.address, server_context(idle.name)) as one,
        site.serve(half.address, server_context(half.name), end_first) as other,
        site.start(tmp_path, *options(tmp_path), *limits) as daemon,
        site.visit(idle) as first,
        site.visit(half) as second,
    ):
        for client in first, second:
            client.settimeout(PATIENCE)
        assert receive_all(second) == b""
        assert "ending=half_closed" in daemon.wait_for_log(f"name={half.name}")
        with pytest.raises(ConnectionResetError):
            receive_all(first)
        assert "ending=idle" in daemon.wait_for_log(f"name={idle.name}")
        # The servers have not been told that all was said.
        eventually(lambda: one.end().failure and other.end().failure)


@pytest.mark.parametrize("level", ["info", "error"])
def test_log_levels(site: Site, tmp_path: Path, level: str) -> None:
    """The first tls-tproxy's."""
    name = site.new_name()
    arguments = (*options(tmp_path)[:-1], f"--logLevel={level}")
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *arguments) as daemon,
    ):
        assert works(site.visit(name))
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("drained")
        assert any(" ending=" in line for line in daemon.log()) == (level == "info")


# --- Certificate checkers


def test_the_example_of_a_plugin(site: Site, tmp_path: Path, installed: Path) -> None:
    brief, lasting = site.new_name(), site.new_name()
    now = datetime.now(UTC)
    before = ("env", f"PYTHONPATH={installed}")
    arguments = (*options(tmp_path), "--certCheckerPlugin=short-lived")
    with site.start(tmp_path, *arguments, before=before) as daemon:
        for name, days in (brief, 90), (lasting, 101):
            end = now + timedelta(days=days)
            leaf = authority().issue_cert(name.name, not_before=now, not_after=end)
            with site.serve(name.address, server_context(certificate=leaf)) as server:
                if name is brief:
                    assert works(site.visit(name))
                    continue
                assert is_reset(lambda: site.visit(lasting))
                assert not server.end().is_certificate_seen
        line = daemon.wait_for_log("reason=certificate_rejected")
        assert "short-lived: the certificate for" in line
        assert "is valid for 101 days" in line


# --- Options


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=2 * PATIENCE)


CERT: Final = ("--cert=c.pem", "--key=k.pem")


BAD_OPTIONS: Final[list[tuple[tuple[str, ...], str]]] = [
    ((), "there is no --portMap, and no directory wrap"),
    (("--portMap",), "--portMap: expected one argument"),
    (("--portMap=8443",), "'8443' is not FROM:TO, two ports"),
    (("--portMap=8443:443,",), "'' is not FROM:TO, two ports"),
    (("--portMap=0:443",), "--portMap: unable to understand '0:443'"),
    (("--portMap=8443:65536",), "--portMap: unable to understand '8443:65536'"),
    (("--portMap=1:2,1:3",), "port 1 is there twice"),
    (("--portMap=8443:443", "--cert=c.pem"), "--cert and --key go together"),
    (("--portMap=8443:443", "--key=k.pem"), "--cert and --key go together"),
    (("--portMap=8443:443", "--cacert=a.pem"), "--cacert goes with --cert and --key"),
    (("--user-only=no-such-user",), "there is no user 'no-such-user'"),
    (("--user-only=4294967295",), "there is no user '4294967295'"),
    (("--cgroup=/no/such.slice",), "--cgroup: "),
    (("--cgroup=..",), "--cgroup: "),
    (("--port=0",), "'0' is no port"),
    (("--port=65536",), "'65536' is no port"),
    (("--port=x",), "'x' is no port"),
    (("--fail-closed",), "--fail-closed needs --port"),
    (("--stop-refusing",), "--stop-refusing needs --port"),
    (("--logLevel=loud",), "--logLevel: invalid choice: 'loud'"),
    (("--log=loud",), "--log: invalid choice: 'loud'"),
    (("--workers=0",), "--workers: '0' is not a number from 1 to"),
    (("--max-connections=0",), "--max-connections: '0' is not a number from 1 to"),
    (("--max-connections=1", "--workers=2"), "is less than one for each of 2 workers"),
    (("--drain=x",), "--drain: 'x' is not a number of seconds"),
    (("--idle-timeout=-1",), "--idle-timeout: '-1' is not a number of seconds"),
    (("--half-closed-timeout=1h",), "--half-closed-timeout: '1h' is not a number of seconds"),
    (("--portMap=8443:443", "--user=no-such-user"), "unable to become the user"),
    (("--worker=2",), "unknown option '--worker"),
    (("x",), "unknown argument 'x'"),
]

# To start Python takes longer than all of them.
ALL_IN_TURN: Final = """
import json, sys
from tls_tproxy.__main__ import main
for arguments in json.loads(sys.argv[1]):
    print(main(arguments), flush=True)
"""


def test_bad_options(tmp_path: Path) -> None:
    """Observed: exit code 0."""
    command = (*COMMAND[:-2], "-c", ALL_IN_TURN, json.dumps([each for each, _ in BAD_OPTIONS]))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=2 * PATIENCE
    )
    assert done.stdout.split() == ["100"] * len(BAD_OPTIONS), done.stderr
    for (arguments, why), line in zip(BAD_OPTIONS, done.stderr.splitlines(), strict=True):
        assert line.startswith("tls-tproxy: fatal: ")
        assert why in line, arguments


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--certCheckerPlugin=x",), "unable to check certificates: there is no certificate"),
        (
            ("--port=8443",),
            "unable to redirect connections: port 8443 is the one that listens here",
        ),
    ],
)
def test_what_is_found_wrong_later(
    site: Site, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    done = site.run(tmp_path, *options(tmp_path), *arguments)
    assert done.returncode == 100
    assert done.stderr.splitlines()[-1].startswith(f"tls-tproxy: fatal: {why}")
    assert site.tables() == []


def test_a_directory_in_which_nothing_is_said_yet(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    wrap = tmp_path / "run/wrap"
    wrap.mkdir(parents=True)
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path) as daemon,
    ):
        assert "ports=none" in daemon.wait_for_log("redirecting")
        write_identity(tmp_path / "run/identity", CLIENT)
        (wrap / "names/_default").mkdir(parents=True)
        write(wrap / f"ports/{TAKEN}", "443\n")
        daemon.wait_for_log(f"ports={TAKEN}")
        assert works(site.visit(name))


def test_our_own_port_among_others(site: Site, tmp_path: Path) -> None:
    """What is wrong with one entry keeps no other port from being redirected."""
    name = site.new_name()
    ports = tmp_path / "run/wrap/ports"
    with site.serve(name.address, server_context(name.name)):
        arguments = (*options(tmp_path), f"--port={LISTENING}")
        with site.start(tmp_path, *arguments) as daemon:
            write(ports / str(LISTENING), "443\n")
            write(ports / "8445", "443\n")
            daemon.wait_for_log(f"ports={TAKEN},8445")
            assert works(site.visit(name, 8445))
            line = daemon.wait_for_log("unreadable")
            assert f"port {LISTENING} is the one that listens here" in line


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(tmp_path: Path, option: str) -> None:
    """Observed: it panicked."""
    done = run(option, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: tls-tproxy " in done.stdout
    assert "tls-tproxy --cert cert.pem --key key.pem" in done.stdout


def test_options_that_are_right(tmp_path: Path) -> None:
    done = run("--check-options", "--portMap=8443:443", *CERT, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("package", ["dnslib", "cryptography"])
def test_a_package_is_missing(tmp_path: Path, package: str) -> None:
    script = f"import sys; sys.modules['{package}'] = None; "
    script += "from tls_tproxy.command import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 100
    assert done.stderr.startswith(
        f"tls-tproxy: fatal: unable to start: the Python package {package} is missing"
    )
    assert "sniproxy[tproxy]" in done.stderr
