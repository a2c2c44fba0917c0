"""PostgreSQL itself, and its psql: the one speaks plaintext, the other wants mutual TLS."""

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from mutual_tls.end import TLSEnd
from mutual_tls.refusal import Refusal
from tests.support.bridge import write, write_identity
from tests.support.daemon import eventually
from tests.support.foreign import free_port
from tests.support.network import why_no_network
from tests.support.sockets import plain
from tests.support.story import TrioStory, told
from tests.support.tls import NAME, authority, context, tls_bench
from tests.support.wrapping import CLIENT, Site
from tls_tproxy.refusal import WrapReason
from tls_tproxy.starttls import decline_encryption, request_encryption

# Debian has a directory for each version, and not on the PATH.
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql"))

# It refuses to be root. In a user namespace root is nobody, and its files are still its own.
AS_NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
UNDER = AS_NOBODY if os.geteuid() == 0 else ()

QUERY = "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()"


def why_not() -> str | None:
    """Return what is missing here, in words for people; None if nothing is."""
    for program in "initdb", "postgres", "psql":
        if not (PROGRAMS / program).exists():
            return f"{PROGRAMS / program} is not there (Debian package postgresql)"
    if UNDER and subprocess.run([*UNDER, "true"], capture_output=True).returncode:
        return "it refuses to be root, and no user namespace is to be had here"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a server that lets in who shows a certificate of our authority."""
    place = tmp_path_factory.mktemp("postgres")
    data = place / "data"
    command = [*UNDER, str(PROGRAMS / "initdb"), "--pgdata", str(data), "--username", "me"]
    command += ["--auth", "trust", "--no-sync", "--locale", "C", "--encoding", "UTF8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    issued = authority().issue_cert(NAME)
    issued.cert_chain_pems[0].write_to_path(str(data / "server.crt"))
    issued.private_key_pem.write_to_path(str(data / "server.key"))
    (data / "server.key").chmod(0o600)
    authority().cert_pem.write_to_path(str(data / "ca.crt"))
    write(data / "pg_hba.conf", "hostssl all all all trust clientcert=verify-ca\n")
    return data


@contextmanager
def running(
    data: Path, *, tls: bool, address: str = "127.0.0.1", under: Sequence[str] = ()
) -> Iterator[int]:
    """Run the server; yield its port."""
    port = free_port()
    settings = {
        "listen_addresses": address,
        "unix_socket_directories": "",
        "ssl": "on" if tls else "off",
        "ssl_ca_file": "ca.crt",
        "fsync": "off",
        "lc_messages": "C",
    }
    command = [*under, *UNDER, str(PROGRAMS / "postgres"), "-D", str(data), "-p", str(port)]
    for key, value in settings.items():
        command += ["-c", f"{key}={value}"]
    said = data.parent / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )

    def is_ready() -> bool:
        assert process.poll() is None, said.read_text()
        # It listens before.
        return "is ready to accept connections" in said.read_text()

    try:
        eventually(is_ready)
        yield port
    finally:
        process.send_signal(signal.SIGINT)  # "Fast Shutdown"
        process.wait(20)
        # pytest shows it if the test fails.
        print(said.read_text(errors="replace"))  # noqa: T201


def psql_command(host: str, port: int, mode: str) -> list[str]:
    where = f"host={host} port={port} user=me dbname=postgres connect_timeout=20 {mode}"
    arguments = ["--no-psqlrc", "--tuples-only", "--no-align", where, "-c", QUERY]
    return [str(PROGRAMS / "psql"), *arguments]


def psql(port: int, mode: str) -> subprocess.CompletedProcess[str]:
    command = psql_command("127.0.0.1", port, mode)
    return subprocess.run(command, capture_output=True, text=True, timeout=40)


async def ask(server: int, mode: str) -> subprocess.CompletedProcess[str]:
    """Let psql ask the server, by way of what we do between them."""
    results: list[subprocess.CompletedProcess[str]] = []
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()

    async def run(done: Callable[[], None]) -> None:
        port = listener.getsockname()[1]
        results.append(await trio.to_thread.run_sync(psql, port, mode))
        done()

    async with tls_bench() as bench:
        story = TrioStory(bench.loop)

        async def wrap(client: socket.socket) -> None:
            client.setblocking(False)
            inside = plain(client)
            said = await decline_encryption(story, inside)
            if not said:
                return inside.close()  # it is not content with plaintext
            near = plain(socket.create_connection(("127.0.0.1", server)))
            near.setblocking(False)
            await request_encryption(story, near)
            side = context(ssl.TLSVersion.TLSv1_3, server_side=False)
            end = TLSEnd(story, near, side, server_name=NAME)
            await end.shake_hands()
            bench.limit.add()
            bench.relay.join(inside, end, bench.left, to_tls=said)

        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, nursery.cancel_scope.cancel)
                while not results:
                    client, _ = await listener.accept()
                    nursery.start_soon(wrap, socket.socket(fileno=client.detach()))
        await bench.all_ended()
    listener.close()
    return results[0]


@pytest.fixture
def server(cluster: Path) -> Iterator[int]:
    with running(cluster, tls=True) as port:
        yield port


@pytest.mark.parametrize(
    "mode", ["", "sslmode=disable", "sslmode=allow", "sslmode=prefer", "gssencmode=disable"]
)
@trio_test
async def test_a_client_that_can_do_without_encryption_gets_it(server: int, mode: str) -> None:
    done = await ask(server, mode)
    assert (done.stdout, done.stderr) == ("t|TLSv1.3\n", "")


@trio_test
async def test_a_client_that_insists_is_told_that_there_is_none(server: int) -> None:
    done = await ask(server, "sslmode=require")
    assert done.returncode != 0
    assert "server does not support SSL, but SSL was required" in done.stderr


def test_the_server_lets_nobody_in_without_us(server: int) -> None:
    for mode in "sslmode=disable", "sslmode=require":
        done = psql(server, mode)
        assert done.returncode != 0
        assert "pg_hba.conf" in done.stderr or "certificate" in done.stderr


@trio_test
async def test_a_server_without_tls_says_so(cluster: Path) -> None:
    with running(cluster, tls=False) as port:
        near = plain(socket.create_connection(("127.0.0.1", port)))
        near.setblocking(False)
        with pytest.raises(Refusal, match="does not offer TLS") as caught:
            await told(lambda story: request_encryption(story, near))
        assert caught.value.reason is WrapReason.STARTTLS_DECLINED
        near.close()


_why_no_network = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))


@pytest.mark.skipif(_why_no_network is not None, reason=str(_why_no_network))
@pytest.mark.parametrize("tls", [True, False])
def test_the_whole_program(site: Site, cluster: Path, tmp_path: Path, tls: bool) -> None:
    name = site.new_name()
    place = tmp_path / "run/wrap/names" / name.other
    write(place / "starttls", "postgres\n")
    write(place / "servers", f"{NAME}\n")
    write_identity(place / "identity", CLIENT, authority())
    authority().cert_pem.write_to_path(str(place / "identity/ca.pem"))
    with running(cluster, tls=tls, address=name.address, under=site.router.under) as port:
        write(place / f"ports/{port}")
        with site.start(tmp_path, "--log=connections") as daemon:
            done = site.command(tmp_path, *psql_command(name.other, port, ""))
            if tls:
                assert (done.stdout, done.stderr) == ("t|TLSv1.3\n", "")
            else:
                assert done.returncode != 0
                daemon.wait_for_log("reason=starttls_declined")
