"""tls-tproxy with programs that know nothing of it, and little of TLS: curl, redis-cli, MQTT."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import foreign
from tests.support.bridge import write, write_identity
from tests.support.daemon import Daemon
from tests.support.network import why_no_network
from tests.support.wrapping import AT_ONCE, CLIENT, End, Site, server_context

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

# An exit code, curl(1): "Operation timeout."
TIMEOUT: Final = 28

# Each program's own, in plaintext; and where they lead.
HTTP, REDIS, MQTT = 80, 6379, 1883
PORTS: Final = {HTTP: "443\n", REDIS: "", MQTT: "8883\n"}


@pytest.fixture(scope="module")
def wrap(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    place = tmp_path_factory.mktemp("programs")
    for port, leads_to in PORTS.items():
        write(place / f"run/wrap/ports/{port}", leads_to)
    (place / "run/wrap/names/_.example").mkdir(parents=True)
    write_identity(place / "run/identity", CLIENT)
    with site.start(place, "--log=connections") as daemon:
        yield daemon


def skip_without(program: str) -> None:
    if (why := foreign.why_not(program)) is not None:
        pytest.skip(why)


def serve_page(end: End) -> None:
    """Be a web server."""
    while b"\r\n\r\n" not in end.received:
        assert end.receive()
    end.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello\n")
    end.end_half()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("user", [0, 1000])
def test_curl(site: Site, wrap: Daemon, tmp_path: Path, version: int, user: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (Debian package curl)")
    name = site.new_name()
    curl = ("curl", "-sS", f"-{version}", "--max-time", "20")
    context = server_context(name.name)
    with site.serve(name.addresses[version], context, serve_page) as server:
        done = site.command(tmp_path, *curl, f"http://{name.name}/page", user=user)
        assert (done.stdout, done.stderr) == ("hello\n", "")
        assert server.end().received.startswith(b"GET /page HTTP/1.1\r\n")
        # By its address, nobody knows whom it means; and it is told at once.
        stranger = site.new_name().addresses[version]
        host = f"[{stranger}]" if version == 6 else stranger
        in_time = ("--max-time", str(AT_ONCE))
        done = site.command(tmp_path, "curl", "-sS", *in_time, f"http://{host}/", user=user)
        assert done.returncode not in {0, TIMEOUT}, done.stderr


def test_redis(site: Site, wrap: Daemon, tmp_path: Path) -> None:
    skip_without("redis")
    name = site.new_name()
    write_identity(tmp_path / "identity", name.other)
    cli = (*foreign.unpacked("redis-cli"), "-h", name.other, "-p", str(REDIS))
    with foreign.redis(tmp_path, site.router, name.address, REDIS):
        for command, answer in (
            (("set", "key", "value"), "OK\n"),
            (("get", "key"), "value\n"),
            (("eval", "return string.rep('x', 100000)", "0"), "x" * 100_000 + "\n"),
        ):
            done = site.command(tmp_path, *cli, *command)
            assert (done.stdout, done.stderr) == (answer, "")


def test_mqtt(site: Site, wrap: Daemon, tmp_path: Path) -> None:
    """A subscriber waits for what a publisher says."""
    skip_without("mosquitto")
    name = site.new_name()
    write_identity(tmp_path / "identity", name.other)
    topic = ("-h", name.other, "-p", str(MQTT), "-t", "rooms/kitchen", "-q", "1")
    subscribe = (*foreign.unpacked("mosquitto_sub"), *topic, "-C", "1", "-d")
    publish = (*foreign.unpacked("mosquitto_pub"), *topic, "-m", "21.5")
    with foreign.mosquitto(tmp_path, site.router, name.address, 8883) as said:
        subscriber = subprocess.Popen(
            ["stdbuf", "-oL", *site.under(tmp_path), *subscribe],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        with subscriber:
            assert subscriber.stdout is not None
            try:
                for line in subscriber.stdout:
                    if line.startswith("Subscribed"):
                        break
                assert site.command(tmp_path, *publish).returncode == 0
                assert "21.5\n" in subscriber.stdout.read()
            finally:
                subscriber.kill()
        # It knows who speaks, by the certificate.
        assert f"u'{CLIENT}'" in said.read_text()
