"""Programs that put TLS on connections, or take it off: how each is configured and started.

All demand and show certificates, and verify chain and name. One worker, no access log, and nothing
else of their own choice. Two sides are measured:

- ingress: plaintext in, TLS out. Ours, HAProxy in its HTTP mode, and Apache Traffic Server with its
  plugin tls_bridge (ATS) read the client's CONNECT and pass it on; the others move bytes.
- peer: TLS in, plaintext out. Ours and ATS read the CONNECT inside and answer it; the others pass
  it to the service.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load import BENCH
from peers import NGINX_MISSING, Peer, package, start, start_haproxy, start_nginx

sys.path.insert(0, str(BENCH.parent))

from tests.support import foreign

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
        path.write_text(text + "\n")
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
    return start_haproxy(
        setup.directory,
        f"""
            mode {mode}
        frontend in
            bind 127.0.0.1:{setup.port} backlog 4096 {bind}
            default_backend out
        backend out
            server one 127.0.0.1:{setup.behind} {server}
        """,
    )


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
    return start_nginx(
        setup.directory,
        f"""
            server {{
                listen 127.0.0.1:{setup.port}{listen} backlog=4096;
                proxy_pass 127.0.0.1:{setup.behind};
                tcp_nodelay on;{tls}
            }}
        """,
    )


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


def _traffic_server(setup: TLSSetup) -> subprocess.Popen[bytes]:
    identity = setup.identity
    service = f"127.0.0.1:{setup.behind}"
    records: dict[str, str | int]
    if setup.is_ingress:
        port = f"{setup.port}:ip-in=127.0.0.1"
        peer = f"{SERVER_NAME}:{setup.behind}"
        plugin = f"tls_bridge.so .* {peer}\n"
        remap = f"map https://{peer} https://{service}\n"
        records = {
            "proxy.config.ssl.client.verify.server.policy": "ENFORCED",
            # The name that it says, and wants to see.
            "proxy.config.ssl.client.sni_policy": f"@{SERVER_NAME}",
            "proxy.config.ssl.client.CA.cert.filename": str(identity / "ca.pem"),
            "proxy.config.ssl.client.cert.path": str(identity),
            "proxy.config.ssl.client.cert.filename": "cert.pem",
            "proxy.config.ssl.client.private_key.path": str(identity),
            "proxy.config.ssl.client.private_key.filename": "key.pem",
            "proxy.config.http.connect_ports": f"443 {setup.behind}",
        }
    else:
        port = f"{setup.port}:ssl:ip-in=127.0.0.1"
        plugin = ""
        # What a CONNECT asks for has this scheme when the rules are looked up.
        remap = f"map https://{SERVICE} https://{service}\n"
        records = {
            "proxy.config.ssl.server.cert.path": str(identity),
            "proxy.config.ssl.server.private_key.path": str(identity),
            "proxy.config.ssl.CA.cert.path": str(identity),
            "proxy.config.ssl.CA.cert.filename": "ca.pem",
            "proxy.config.ssl.client.certification_level": 2,  # demanded
            "proxy.config.http.connect_ports": f"443 {setup.behind}",
        }
    # Its own directory has a file named log already.
    place = setup.directory / "root"
    argv = foreign.configure_traffic_server(place, port, records, plugin=plugin, remap=remap)
    return start(setup.directory, *foreign.command(*argv))


OURS, WRAPS, POD = "tls-bridge", "tls-tproxy", "tproxy-pod"

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
        NGINX_MISSING,
    ),
    Peer("stunnel", _stunnel, ["stunnel4", "-version"], package("stunnel4", "stunnel4")),
    Peer(
        "ATS",
        _traffic_server,
        [*foreign.command(foreign.TRAFFIC_SERVER, "--version")],
        foreign.why_not("traffic_server") or "",
    ),
]

# Of the same, those that do nothing more for a connection than tls-tproxy does.
TPROXY_PEERS = [
    Peer(
        WRAPS,
        _tproxy,
        [sys.executable, "-m", "tls_tproxy", "--version"],
        package("nft", "nftables") or ("" if os.geteuid() == 0 else "root is needed"),
    ),
    *(peer for peer in TLS_PEERS if peer.name in {"HAProxy", "nginx", "stunnel"}),
]
