"""PROXY protocol v1: who the client is, as the client itself knows."""

import socket
from pathlib import Path

import pytest

from tests.interop.clients import NAME, Visit, curl
from tests.support.backends import TlsBackend, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import start_daemon


def skip_if_missing(address: str) -> None:
    try:
        socket.create_server((address, 0), family=family_of(address)).close()
    except OSError as error:
        pytest.skip(f"{address} is no address of this machine: {error.strerror}")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.mark.parametrize(
    ("listening", "reached", "protocol"),
    [
        pytest.param("127.0.0.1", "127.0.0.1", "TCP4", id="IPv4"),
        pytest.param("::1", "::1", "TCP6", id="IPv6"),
        pytest.param("::", "127.0.0.1", "TCP4", id="dual-stack by IPv4"),
        pytest.param("::", "::1", "TCP6", id="dual-stack by IPv6"),
    ],
)
def test_the_header_comes_before_the_hello(
    listening: str, reached: str, protocol: str, tmp_path: Path, certificates: Certificates
) -> None:
    skip_if_missing(reached)
    host = host_directory(tmp_path, NAME)
    (host / "send-proxy-v1").touch()
    with (
        start_daemon(
            tmp_path,
            address=(listening, 0),
            family=family_of(listening),
            dual_stack=listening == "::",
        ) as daemon,
        TlsBackend(host / "tls-socket", certificates.server_context(NAME), proxy=True) as backend,
    ):
        port = daemon.address[1]
        outcome = curl(
            Visit((reached, port), certificates.authority, NAME),
            *("--write-out", "I was %{local_ip} %{local_port}\n"),
        )
        assert outcome.code == 0, outcome.output
        seen = backend.connection()
    assert seen.proxy_line is not None
    header = seen.proxy_line.decode()
    client_port = header.split()[4]
    assert header == f"PROXY {protocol} {reached} {reached} {client_port} {port}\r\n"
    assert f"I was {reached} {client_port}\n" in outcome.output
    # Nothing of it was taken for TLS, and the other way round.
    assert (seen.error, seen.requests) == (None, ["GET / HTTP/1.1"])
