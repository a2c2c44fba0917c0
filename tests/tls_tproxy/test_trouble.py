"""tls-tproxy in trouble: floods, silent servers, too many clients, and what else goes wrong."""

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

from mutual_tls.netfilter.table import NftError
from sniproxy.engine.tcp import LINGER_0
from tests.support.bridge import write, write_identity
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.dns import answering, packet
from tests.support.network import why_no_network
from tests.support.wrapping import (
    CLIENT,
    HERE,
    PORT,
    ROUTER,
    TAKEN,
    End,
    Server,
    Site,
    is_reset,
    options,
    receive_all,
    server_context,
    works,
)
from tls_tproxy.serve import Watch

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


@pytest.fixture
def simple(site: Site, tmp_path: Path) -> Iterator[Daemon]:
    """One that serves all names, by options alone.

    For one test: of two that take the same port, either may get a connection.
    """
    with site.start(tmp_path, *options(tmp_path)) as daemon:
        yield daemon


# --- Silence


@pytest.mark.parametrize("version", [4, 6])
def test_a_late_answer_to_a_half_closed_connection_arrives(
    site: Site, tmp_path: Path, version: int
) -> None:
    """By itself the kernel forgets after a minute where such a connection was to go."""
    name = site.new_name()
    states = "close_wait", "fin_wait"
    paths = [f"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{each}" for each in states]
    before = [site.here.run("cat", path).strip() for path in paths]

    def remember(*seconds: str) -> None:
        for path, each in zip(paths, seconds, strict=True):
            site.here.run("sh", "-c", f"echo {each} >{path}")

    def answer_late(end: End) -> None:
        while end.receive():
            pass
        time.sleep(1.5)  # longer than is remembered here
        end.send(b"a late answer")
        end.end_half()

    remember("1", "1")
    try:
        with (
            site.serve(name.addresses[version], server_context(name.name), answer_late),
            site.start(tmp_path, *options(tmp_path)),
            site.visit(name, version=version) as client,
        ):
            client.settimeout(PATIENCE)
            client.sendall(b"a question")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"a late answer"
    finally:
        remember(*before)


# --- Names


def test_a_flood_of_forged_answers(site: Site, simple: Daemon) -> None:
    """Nobody is wrapped under their name, and who looks up another one is served meanwhile."""
    name, beside = site.new_name(), site.new_name()
    forger = site.router.do(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    is_over = threading.Event()
    sent = count()

    def forge() -> None:
        # 10,000 a second, if all goes well: as many as the queue of the packet socket holds.
        while not is_over.wait(0.02):
            for n in (next(sent) for _ in range(200)):
                message = answering("evil.example", name.address, number=n % 65536)
                port = 1024 + n * 7919 % 64512
                forger.sendto(packet(ROUTER[4], 53, HERE[4], port, message), (HERE[4], 0))

    thread = threading.Thread(target=forge)
    with (
        forger,
        site.serve(name.address, server_context("evil.example")) as evil,
        site.serve(beside.address, server_context(beside.name)),
    ):
        thread.start()
        try:
            for _ in range(5):
                assert works(site.visit(beside))
                assert is_reset(lambda: site.connect(name.address))
        finally:
            is_over.set()
            thread.join()
        assert evil.ends == []
    assert next(sent) > 1000
    assert not any("name=evil" in line for line in simple.log())


def test_addresses_of_this_machine(site: Site, tmp_path: Path) -> None:
    """And lines of /etc/hosts that are none."""
    hosts = {"127.0.0.1": "lo.example", "::1": "lo6.example", HERE[4]: "own.example"}
    lines = [f"{address} {name}" for address, name in hosts.items()]
    strange = ["fe80::1%cable a.example", "999.1.1.1 b.example", "10.0.0.1", "\0 c", "y" * 5000]
    text = "\n".join([*strange, *lines, f"::ffff:{HERE[4]} mapped.example", "# end"])
    with site.start(tmp_path, *options(tmp_path), hosts=text):
        for address, name in hosts.items():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listening = site.here.do(socket.create_server, (address, PORT), family=family)
            server = Server(listening, server_context(name))
            try:
                assert works(site.connect(address))
                if family == socket.AF_INET:
                    assert works(site.connect(f"::ffff:{address}"))
                assert server.end().sni == name
            finally:
                server.close()


def is_stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def test_each_worker_learns_names(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), "--workers=3") as daemon,
    ):
        for worker in 1, 2, 3:
            daemon.wait_for_log(f"worker={worker}")
        site.look_up(name.name)
        served: set[str] = set()
        workers = daemon.workers()
        # All but one are stopped, so that it is known who serves. nft is a child, too.
        for chosen in workers:
            others = [pid for pid in workers if pid != chosen]
            if Path(f"/proc/{chosen}/comm").read_text() == "nft\n":
                continue
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
            try:
                # One that has not stopped yet could take the client first.
                eventually(lambda pids=others: all(map(is_stopped, pids)))  # type: ignore[misc]
                assert works(site.connect(name.address))
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
        lines = [line for line in daemon.log() if " connection " in line]
        served = {line.split("worker=")[1].split()[0] for line in lines}
        assert served == {"1", "2", "3"}


# --- Ports


def test_a_port_that_leads_to_itself(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    ports = f"--portMap={PORT}:{PORT},{TAKEN}:{PORT}"
    with (
        site.serve(name.address, server_context(name.name)) as server,
        site.start(tmp_path, *options(tmp_path)[:3], ports),
    ):
        assert works(site.visit(name, PORT))
        assert works(site.visit(name, TAKEN))
        assert [end.sni for end in server.ends] == [name.name] * 2


def test_a_port_that_leads_to_our_own(site: Site, tmp_path: Path) -> None:
    """We are not who has a certificate for that name; and there is no circle."""
    ports = "--portMap=8443:8600", "--port=8600"
    hosts = "127.0.0.1 lo.example\n"
    with site.start(tmp_path, *options(tmp_path)[:3], *ports, hosts=hosts) as daemon:
        assert is_reset(lambda: site.connect("127.0.0.1"))
        daemon.wait_for_log("reason=not_redirected")
        assert sum("refused" in line for line in daemon.log()) == 2


def test_two_instances_take_the_same_port(site: Site, tmp_path: Path) -> None:
    """One of them wraps, once."""
    name = site.new_name()
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with (
        site.serve(name.address, server_context(name.name)) as server,
        site.start(one, *options(one)) as first,
        site.start(other, *options(other)) as second,
    ):
        assert works(site.visit(name))
        assert len(server.ends) == 1
        eventually(lambda: sum(" connection " in line for line in first.log() + second.log()) == 1)


# --- Clients


def test_many_clients_and_few_places(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), "--max-connections=5"),
    ):
        site.look_up(name.name)
        with ThreadPoolExecutor(100) as pool:
            assert all(pool.map(lambda _: works(site.connect(name.address)), range(300)))


def test_clients_of_a_silent_server_do_not_keep_all_places(site: Site, tmp_path: Path) -> None:
    """Observed: they did for ten seconds, and so did those who had left long ago."""
    name, other = site.new_name(), site.new_name()
    silent = site.router.do(socket.create_server, (name.address, PORT))
    with (
        silent,
        site.serve(other.address, server_context(other.name)),
        site.start(tmp_path, *options(tmp_path), "--max-connections=2") as daemon,
    ):
        clients = [site.visit(name) for _ in range(2)]
        assert works(site.visit(other))
        assert is_reset(lambda: clients[0])
        clients[1].close()
        daemon.wait_for_log("reason=capacity")
        assert not any("server_silent" in line for line in daemon.log())


def test_nothing_is_left_of_connections(site: Site, simple: Daemon) -> None:
    refused, served = site.new_name(), site.new_name()
    with site.serve(served.address, server_context(served.name)):
        for name in refused, served:
            site.look_up(name.name)

        def connect(times: int) -> tuple[int, int]:
            for _ in range(times):
                # One leaves at once; the other waits for its end.
                with suppress(ConnectionResetError), site.connect(refused.address) as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
                with suppress(ConnectionResetError), site.connect(refused.address) as client:
                    client.recv(1)
            for _ in range(times // 10):
                assert works(site.connect(served.address))
            eventually(lambda: simple.descriptors() <= before)
            return simple.rss_peak(), len(simple.log())

        before = simple.descriptors()
        peak, lines = connect(500)
        later, more = connect(1000)
        # What is remembered of a name or a client is bounded; a leak of a kilobyte would show.
        assert later - peak < 2 << 20
        # Of connections that are served each has a line; of refusals twenty, and a few more.
        assert more - lines < 1000 // 10 + 50


def test_few_descriptors(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path), before=("prlimit", "--nofile=64")),
    ):
        site.look_up(name.name)
        clients = [site.connect(name.address) for _ in range(60)]
        assert all(works(client) for client in clients)


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_who_leaves_before_the_server_is_reached(
    site: Site, simple: Daemon, *, reset: bool
) -> None:
    """What was said before the end is delivered, and that it is the end; after a reset neither."""
    name = site.new_name()
    listening = site.router.do(socket.create_server, (name.address, PORT))
    listening.settimeout(PATIENCE)
    with listening:
        with site.visit(name) as client:
            client.sendall(b"hello")
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        sock, _ = listening.accept()
        end = End(sock, server_context(name.name))
        if reset:
            with pytest.raises(OSError, match=r"close_notify|reset"):
                converse(end)
        else:
            converse(end)
            assert end.received == b"hello"
        end.close()


def converse(end: End) -> None:
    """Receive until the end was announced; all else is an exception."""
    end.shake_hands()
    while end.receive():
        pass


def test_much_is_said_before_the_server_is_reached(site: Site, simple: Daemon) -> None:
    name = site.new_name()
    listening = site.router.do(socket.create_server, (name.address, PORT))
    listening.settimeout(PATIENCE)
    with listening, site.visit(name) as client:
        client.settimeout(0.2)
        said = 0
        # Until the kernel's buffers are full: nothing of it is read.
        with suppress(TimeoutError):
            while said < 10 << 20:
                said += client.send(bytes(1 << 16))
        assert said
        client.shutdown(socket.SHUT_WR)
        sock, _ = listening.accept()
        end = End(sock, server_context(name.name))
        converse(end)
        assert len(end.received) == said
        end.close()


def test_a_client_of_postgresql_that_is_silent(site: Site, tmp_path: Path) -> None:
    """Observed: its server was blamed, which nobody had asked yet."""
    name = site.new_name()
    run = tmp_path / "run"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    write(run / f"wrap/names/{name.name}/starttls", "postgres\n")
    write_identity(run / "identity", CLIENT)
    with site.start(tmp_path) as daemon, site.visit(name) as client:
        client.settimeout(2 * PATIENCE)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        daemon.wait_for_log("reason=client_silent")


# --- Confinement

# What it takes in there, and nothing else.
_WITH_PROC: Final = 'mkdir proc && mount --bind /proc proc && exec "$@"'


def test_another_root_directory(site: Site, tmp_path: Path) -> None:
    """Observed: without a ca.pem nobody was trusted, since the system's are out of reach."""
    name = site.new_name()
    run = tmp_path / "run"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    (run / "wrap/names/_default").mkdir(parents=True)
    write_identity(run / "identity", CLIENT)
    trusted = (run / "identity/ca.pem").rename(tmp_path / "ca.pem")
    for path in run, run / "identity/key.pem":
        path.chmod(0o755)  # for nobody
    write(run / "etc/hosts", f"{name.addresses[6]} {name.name}\n")
    before = "env", f"SSL_CERT_FILE={trusted}", "sh", "-euc", _WITH_PROC, "sh"
    context = server_context(name.name)
    with (
        site.serve(name.address, context),
        site.serve(name.addresses[6], context),
        site.start(tmp_path, "--chroot", "--user=nobody", before=before),
    ):
        assert works(site.visit(name))
        assert works(site.connect(name.addresses[6]))


# --- Signals


def test_a_program_that_is_stopped_and_goes_on(site: Site, tmp_path: Path) -> None:
    name = site.new_name()
    with (
        site.serve(name.address, server_context(name.name)),
        site.start(tmp_path, *options(tmp_path)) as daemon,
    ):
        daemon.signal(signal.SIGSTOP)
        site.look_up(name.name)
        client = site.connect(name.address)
        daemon.signal(signal.SIGCONT)
        assert works(client)


@pytest.mark.parametrize("workers", [1, 3])
def test_nft_is_killed(site: Site, tmp_path: Path, workers: int) -> None:
    with site.start(tmp_path, *options(tmp_path), f"--workers={workers}") as daemon:
        (nft,) = [
            pid for pid in daemon.workers() if Path(f"/proc/{pid}/comm").read_text() == "nft\n"
        ]
        os.kill(nft, signal.SIGKILL)
        assert daemon.wait() == 111
        assert any("nft has ended" in line for line in daemon.log())


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


def record(kind: int, content: bytes) -> bytes:
    """Return a record of TLS, RFC 8446 §5.1."""
    return struct.pack("!BHH", kind, 0x0303, len(content)) + content


# A Certificate message, RFC 8446 §4.4.2, of the largest length that there can be.
_HUGE: Final = b"\x0b\xff\xff\xff" + bytes(16_380)


@pytest.mark.parametrize(
    ("said", "times"),
    [
        (b"", 1),
        (bytes(1 << 16), 16),
        (record(22, _HUGE) + record(22, bytes(1 << 14)) * 99, 10),
        (record(22, b"") * 1000, 100),
        (record(20, b"\x01") * 1000, 100),
        (record(21, b"\x01\x5a") * 1000, 100),
    ],
    ids=["nothing", "zeros", "a huge chain", "empty records", "ChangeCipherSpec", "warnings"],
)
def test_a_server_that_speaks_nonsense(site: Site, simple: Daemon, said: bytes, times: int) -> None:
    """The client is reset, and what others want does not wait."""
    name, beside = site.new_name(), site.new_name()
    listening = site.router.do(socket.create_server, (name.address, PORT))
    listening.settimeout(PATIENCE)
    with (
        listening,
        site.serve(beside.address, server_context(beside.name)),
        site.visit(name) as client,
    ):
        sock, _ = listening.accept()
        with sock:
            assert sock.recv(1)
            with suppress(OSError):
                for _ in range(times):
                    sock.sendall(said)
            assert works(site.visit(beside))
        assert is_reset(lambda: client)
    # Less than the chain that was announced, and the program itself.
    assert simple.rss_peak() < 64 << 20


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


def test_a_drain_amid_handshakes(site: Site, tmp_path: Path) -> None:
    """Each connection is served as a whole, or not at all."""
    name = site.new_name()
    context = server_context(name.name)
    with (
        site.serve(name.address, context) as server,
        site.start(tmp_path, *options(tmp_path)) as daemon,
    ):
        site.look_up(name.name)

        def connect_until_refused() -> int:
            for times in count():
                try:
                    assert works(site.connect(name.address))
                # Reset: it was in the queue of the socket when that was closed.
                except (ConnectionRefusedError, ConnectionResetError):
                    return times
            raise AssertionError

        with ThreadPoolExecutor(10) as pool:
            clients = [pool.submit(connect_until_refused) for _ in range(10)]
            eventually(lambda: len(server.ends) > 20)
            daemon.signal(signal.SIGHUP)
            served = sum(client.result() for client in clients)
        assert daemon.wait() == 0
        assert len(server.ends) == served > 20
        assert f"served={served}" in daemon.log()[-1].split()


def _is_refused(connect: Callable[[], socket.socket]) -> bool:
    try:
        connect().close()
    except ConnectionRefusedError:
        return True
    return False
