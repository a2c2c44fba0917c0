"""The benchmark program runs. What it measures is nobody's business here."""

import faulthandler
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.foreign import why_not
from tests.support.network import why_no_network

BENCH = Path(__file__).parent.parent / "bench"

# What makes a network namespace for a command: the ports are the same each time.
ALONE = (
    ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if why_no_network() is None
    else ()
)

# Seconds. Ten to thirty where nothing else runs.
_LONGEST = 300.0


def measure(program: str) -> list[str]:
    """Run one of the programs with small amounts, and return the lines that it prints."""
    faulthandler.cancel_dump_traceback_later()
    command = [*ALONE, sys.executable, str(BENCH / program), "--quick", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian package gcc)")
def test_it_measures_everything_once() -> None:
    lines = measure("run.py")
    for metric in (
        "connect: CPU, µs",
        "connect, 100 hosts: CPU, µs",
        "connect, PROXY header: CPU, µs",
        "connect beside idle: CPU, µs",
        "idle: private memory each, KB",
        "ping: round trip, µs",
        "500 busy: CPU, µs",
        "bulk down, 1 stream: time, s/GB",
        "bulk both, 8 streams: CPU, s/GB",
    ):
        assert any(line.startswith(metric) for line in lines), f"{metric} is missing"
    assert "sniproxy --workers 2" in "\n".join(lines)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian package gcc)")
@pytest.mark.skipif(
    not Path("/usr/include/openssl/ssl.h").exists(),
    reason="no headers of OpenSSL (Debian package libssl-dev)",
)
def test_it_measures_tls_once() -> None:
    lines = measure("tls.py")
    for metric in (
        "full handshake, ingress: CPU, µs",
        "resumed handshake, peer: CPU, µs",
        "bulk down, ingress: CPU, s/GB",
        "bulk up, peer: time, s/GB",
        "ping, peer: round trip, µs",
        "idle, ingress: private memory each, KB",
        "idle after bulk, peer: private memory each, KB",
    ):
        assert any(line.startswith(metric) for line in lines), f"{metric} is missing"
    if why := why_not("traffic_server"):
        assert f"bench: skipped ATS: {why}" in lines
    else:
        assert any(line.split()[-2:] == ["ATS", "ratio"] for line in lines)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian package gcc)")
@pytest.mark.skipif(
    not Path("/usr/include/openssl/ssl.h").exists(),
    reason="no headers of OpenSSL (Debian package libssl-dev)",
)
def test_it_measures_the_wrapping_once() -> None:
    if missing := why_no_network(("nft", "nftables")):
        pytest.skip(missing)
    # The rules are for a network namespace of its own.
    lines = measure("tproxy.py")
    for metric in (
        "full handshake, ingress: CPU, µs",
        "resumed handshake, ingress: time, µs",
        "bulk down, ingress: CPU, s/GB",
        "ping, ingress: round trip, µs",
        "idle after bulk, ingress: private memory each, KB",
    ):
        assert any(line.startswith(metric) for line in lines), f"{metric} is missing"
    assert "tls-tproxy" in "\n".join(lines)
    assert "direct TLS" in "\n".join(lines)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian package gcc)")
@pytest.mark.skipif(
    not Path("/usr/include/openssl/ssl.h").exists(),
    reason="no headers of OpenSSL (Debian package libssl-dev)",
)
def test_it_measures_pods_once() -> None:
    if missing := why_no_network(("nft", "nftables")):
        pytest.skip(missing)
    # The rules are for a network namespace of its own.
    lines = measure("pod.py")
    for metric in (
        "full handshake, ingress: CPU, µs",
        "resumed handshake, peer: time, µs",
        "bulk down, peer: CPU, s/GB",
        "idle after bulk, ingress: private memory each, KB",
        "connect, pod to pod: time, µs",
        "bulk up, pod to pod: time, s/GB",
        "ping, pod to pod: round trip, µs",
    ):
        assert any(line.startswith(metric) for line in lines), f"{metric} is missing"
    assert "tproxy-pod" in "\n".join(lines)
    assert "plaintext" in "\n".join(lines)
