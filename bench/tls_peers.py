"""Programs that put TLS on connections, or take it off: how each is configured and started.

All demand and show certificates, and verify chain and name. One worker, no access log, and nothing
else of their own choice. Two sides are measured:

- ingress: plaintext in, TLS out. Ours and HAProxy in its HTTP mode read the client's CONNECT and
  pass it on; the others move bytes.
- peer: TLS in, plaintext out. Ours reads the CONNECT inside and answers it; the others pass it to
  the service.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers import NGINX_STREAM, Peer, package, start

SERVICE = "service.example"
SERVER_NAME = "peer.example"


@dataclass(frozen=True)
class TLSSetup:
    """What a program is to do.

    Attributes:
        directory: A new one, for files of its own.
        port: Where to listen, on 127.0.0.1.
        behind: The port of the service, on 127.0.0.1.
        identities: Where client/ and server/ are, each with cert.pem, key.pem and ca.pem.
        is_ingress: Which side it is.
    """

    directory: Path
    port: int
    behind: int
    identities: Path
    is_ingress: bool

    @property
    def identity(self) -> Path:
        """Its own."""
        return self.identities / ("client" if self.is_ingress else "server")

    def write(self, name: str, text: str) -> Path:
        """Write a file of the program's own; return its path."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")  # HAProxy insists on it
        return path


Start = Callable[[TLSSetup], subprocess.Popen[bytes]]


def _ours(setup: TLSSetup) -> subprocess.Popen[bytes]:
    address = f"127.0.0.1:{setup.behind}"
    if setup.is_ingress:
        program = "tls_bridge"
        setup.write(f"hosts/{SERVICE}/peer", "one")
        setup.write("peers/one/address", address)
        setup.write("peers/one/server-name", SERVER_NAME)
        identity = setup.directory / "peers" / "one" / "identity"
    else:
        program = "tls_bridge.peer"
        setup.write(f"allow/{SERVICE}/443", address)
        (setup.directory / "clients").mkdir()
        (setup.directory / "clients" / "client.example").touch()
        identity = setup.directory / "identity"
    identity.symlink_to(setup.identity)
    with (
        socket.create_server(("127.0.0.1", setup.port), backlog=4096) as listening,
        (setup.directory / "log").open("wb") as log,
    ):
        command = [sys.executable, "-m", program]
        return subprocess.Popen(command, stdin=listening.fileno(), stderr=log, cwd=setup.directory)


def _tproxy(setup: TLSSetup) -> subprocess.Popen[bytes]:
    # The kernel redirects connections to the port; they leave to that of the service.
    setup.write(f"wrap/ports/{setup.port}", str(setup.behind))
    setup.write(f"wrap/names/{SERVER_NAME}/addresses", "127.0.0.1")
    (setup.directory / "identity").symlink_to(setup.identity)
    with (setup.directory / "log").open("wb") as log:
        command = [sys.executable, "-m", "tls_tproxy"]
        return subprocess.Popen(command, stderr=log, cwd=setup.directory)


def _haproxy(setup: TLSSetup, *, mode: str) -> subprocess.Popen[bytes]:
    both = setup.write(
        "both.pem",
        (setup.identity / "cert.pem").read_text() + (setup.identity / "key.pem").read_text(),
    )
    tls = f"ssl crt {both} ca-file {setup.identity / 'ca.pem'} verify required"
    bind, server = tls, ""
    if setup.is_ingress:
        bind, server = "", f"{tls} sni str({SERVER_NAME}) verifyhost {SERVER_NAME}"
    config = setup.write(
        "haproxy.cfg",
        f"""
        global
            nbthread 1
        defaults
            mode {mode}
            timeout connect 10s
            timeout client 1h
            timeout server 1h
        frontend in
            bind 127.0.0.1:{setup.port} backlog 4096 {bind}
            default_backend out
        backend out
            server one 127.0.0.1:{setup.behind} {server}
        """,
    )
    return start(setup.directory, "haproxy", "-db", "-f", str(config))


def _nginx(setup: TLSSetup) -> subprocess.Popen[bytes]:
    identity = setup.identity
    if setup.is_ingress:
        listen = ""
        tls = f"""
                proxy_ssl on;
                proxy_ssl_certificate {identity}/cert.pem;
                proxy_ssl_certificate_key {identity}/key.pem;
                proxy_ssl_trusted_certificate {identity}/ca.pem;
                proxy_ssl_verify on;
                proxy_ssl_verify_depth 2;
                proxy_ssl_protocols TLSv1.2 TLSv1.3;
                proxy_ssl_server_name on;
                proxy_ssl_name {SERVER_NAME};"""
    else:
        listen = " ssl"
        tls = f"""
                ssl_certificate {identity}/cert.pem;
                ssl_certificate_key {identity}/key.pem;
                ssl_client_certificate {identity}/ca.pem;
                ssl_protocols TLSv1.2 TLSv1.3;
                ssl_verify_client on;"""
    config = setup.write(
        "nginx.conf",
        f"""
        load_module {NGINX_STREAM};
        daemon off;
        pid {setup.directory}/pid;
        error_log stderr crit;
        worker_processes 1;
        events {{ worker_connections 30000; }}
        stream {{
            server {{
                listen 127.0.0.1:{setup.port}{listen} backlog=4096;
                proxy_pass 127.0.0.1:{setup.behind};
                tcp_nodelay on;{tls}
            }}
        }}
        """,
    )
    return start(setup.directory, "nginx", "-p", str(setup.directory), "-c", str(config))


def _stunnel(setup: TLSSetup) -> subprocess.Popen[bytes]:
    identity = setup.identity
    client = f"client = yes\nsni = {SERVER_NAME}\ncheckHost = {SERVER_NAME}"
    config = setup.write(
        "stunnel.conf",
        f"""
foreground = yes
pid =
debug = err
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[one]
{client if setup.is_ingress else ""}
accept = 127.0.0.1:{setup.port}
connect = 127.0.0.1:{setup.behind}
cert = {identity}/cert.pem
key = {identity}/key.pem
CAfile = {identity}/ca.pem
verifyChain = yes
""",
    )
    return start(setup.directory, "stunnel4", str(config))


OURS, WRAPS = "tls-bridge", "tls-tproxy"

TLS_PEERS = [
    Peer(OURS, _ours, [sys.executable, "-m", "tls_bridge", "--version"], ""),
    Peer(
        "HAProxy",
        lambda setup: _haproxy(setup, mode="tcp"),
        ["haproxy", "-v"],
        package("haproxy", "haproxy"),
    ),
    Peer(
        "HAProxy, HTTP",
        lambda setup: _haproxy(setup, mode="http"),
        ["haproxy", "-v"],
        package("haproxy", "haproxy"),
    ),
    Peer(
        "nginx",
        _nginx,
        ["nginx", "-v"],
        package("nginx", "nginx-light") or ("" if NGINX_STREAM.exists() else "libnginx-mod-stream"),
    ),
    Peer("stunnel", _stunnel, ["stunnel4", "-version"], package("stunnel4", "stunnel4")),
]

# Of the same, those that do nothing more for a connection than tls-tproxy does.
TPROXY_PEERS = [
    Peer(
        WRAPS,
        _tproxy,
        [sys.executable, "-m", "tls_tproxy", "--version"],
        package("nft", "nftables") or ("" if os.geteuid() == 0 else "(root is needed)"),
    ),
    *(peer for peer in TLS_PEERS if peer.name in {"HAProxy", "nginx", "stunnel"}),
]
