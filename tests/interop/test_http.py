"""curl, and what people do with it."""

import hashlib
import random
from functools import partial
from pathlib import Path

from tests.interop.clients import NAME, Visit, curl
from tests.support.backends import TlsBackend
from tests.support.certificates import Certificates


def test_a_large_body_up_and_down(
    visit: partial[Visit], tls_socket: Path, certificates: Certificates, tmp_path: Path
) -> None:
    # Far more than the buffers of all the sockets between the two.
    body = random.Random(1).randbytes(16 << 20)
    up, down = tmp_path / "up", tmp_path / "down"
    up.write_bytes(body)
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        # With "Expect: 100-continue" curl would wait a second for leave to send.
        outcome = curl(
            visit(NAME), "--header", "Expect:", "--data-binary", f"@{up}", "--output", str(down)
        )
        assert outcome.code == 0, outcome.output
        assert backend.connection().requests == ["POST / HTTP/1.1"]
    assert hashlib.sha256(down.read_bytes()).digest() == hashlib.sha256(body).digest()


def test_several_requests_on_one_connection(
    visit: partial[Visit], tls_socket: Path, certificates: Certificates
) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME)) as backend:
        there = visit(NAME)
        more = [f"https://{NAME}:{there.address[1]}/{number}" for number in (1, 2)]
        outcome = curl(there, "--write-out", "connects=%{num_connects}\n", *more)
        assert outcome.code == 0, outcome.output
        assert len(backend.connection().requests) == 3
    connects = [line for line in outcome.output.splitlines() if line.startswith("connects=")]
    assert connects == ["connects=1", "connects=0", "connects=0"]


def test_http2(visit: partial[Visit], tls_socket: Path, certificates: Certificates) -> None:
    with TlsBackend(tls_socket, certificates.server_context(NAME, ["h2"])) as backend:
        outcome = curl(
            visit(NAME, protocols=["h2"]), "--write-out", "HTTP %{http_version} %{http_code}\n"
        )
        assert outcome.code == 0, outcome.output
        assert backend.connection().requests == ["HTTP/2 stream 1"]
    assert "HTTP 2 200" in outcome.output
