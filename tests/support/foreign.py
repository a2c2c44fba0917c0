"""Proxies and servers of others, as processes with directories of their own.

Apache httpd is one that is installed. Apache Traffic Server, squid, redis and mosquitto would start
services where they are installed, so they are unpacked only; scripts/foreign-peers does it.

bench/tls_peers.py measures one of them, and has none of what tests have besides Python.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.daemon import eventually
from tests.support.network import Machine

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sniproxy-tests")
UNPACKED = _CACHE / "foreign-peers"

_LIBRARIES = ("usr/lib/trafficserver", "usr/lib/*-linux-gnu", "lib/*-linux-gnu")
TRAFFIC_SERVER = UNPACKED / "usr/bin/traffic_server"
_PLUGINS = UNPACKED / "usr/lib/trafficserver/modules"
_ETC = UNPACKED / "etc/trafficserver"
_SQUID = UNPACKED / "usr/sbin/squid"
_APACHE_MODULES = Path("/usr/lib/apache2/modules")

_PROGRAMS = ("usr/bin", "usr/sbin")

# They refuse to be root. In a user namespace root is nobody, and its files are still its own.
_AS_NOBODY = ("unshare", "--user", "--map-user=65534", "--map-group=65534")


def why_not(program: str) -> str | None:
    """Return what is missing here for a program, in words for people; None if nothing is."""
    if program == "apache":
        return None if shutil.which("apache2") else "apache2 is not installed (apache2-bin)"
    needed = {
        "squid": _SQUID,
        "redis": UNPACKED / "usr/bin/redis-server",
        "mosquitto": UNPACKED / "usr/bin/mosquitto_pub",
    }.get(program, _PLUGINS / "tls_bridge.so")
    if not needed.exists():
        return f"{needed} is not there (scripts/foreign-peers unpacks it)"
    if os.geteuid() == 0 and subprocess.run([*_AS_NOBODY, "true"], capture_output=True).returncode:
        return "it refuses to be root, and no user namespace is to be had here"
    return None


def unpacked(program: str) -> tuple[str, ...]:
    """Return the command that is an unpacked program, with the libraries that it needs."""
    found = next(path for each in _PROGRAMS if (path := UNPACKED / each / program).exists())
    return "env", f"LD_LIBRARY_PATH={_libraries()}", str(found)


def _libraries() -> str:
    return ":".join(str(found) for each in _LIBRARIES for found in UNPACKED.glob(each))


def free_port() -> int:
    """Return a port for a program that takes no listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def command(*argv: str | Path) -> tuple[str, ...]:
    """Return what runs a program, in the same process: unpacked, and as nobody in particular."""
    whole = ("env", f"LD_LIBRARY_PATH={_libraries()}", *map(str, argv))
    return (*_AS_NOBODY, *whole) if os.geteuid() == 0 else whole


@contextmanager
def _running(
    place: Path,
    port: int,
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
    machine: Machine | None = None,
) -> Iterator[Path]:
    """Run a program that listens on `port`; yield the file with what it says.

    Args:
        place: its directory.
        port: where it listens.
        argv: it.
        env: what to add to the environment.
        address: where it listens.
        machine: where it runs; None for this one.
    """
    said = place / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            (*(machine.under if machine else ()), *command(*argv)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=place,
            env={**os.environ, **(env or {})},
            # Whatever it starts ends with it.
            start_new_session=True,
        )

    def listens() -> bool:
        assert process.poll() is None, said.read_text()
        with machine.do(socket.socket) if machine else socket.socket() as attempt:
            return attempt.connect_ex((address, port)) == 0

    try:
        eventually(listens)
        yield said
    finally:
        # Nothing of it is needed any more, and some take seconds to end in order.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # pytest shows it if the test fails.
        sys.stdout.write(said.read_text(errors="replace"))


@contextmanager
def apache(place: Path, port: int, allowed: str, client: str) -> Iterator[Path]:
    """Run httpd as a peer with the identity in `place`.

    Args:
        place: Its directory.
        port: Where it listens.
        allowed: The ports that may be asked for.
        client: The common name of who may ask.
    """
    modules = ("mpm_event", "authz_core", "ssl", "proxy", "proxy_connect")
    lines = [f"LoadModule {name}_module {_APACHE_MODULES}/mod_{name}.so" for name in modules]
    (place / "apache.conf").write_text(
        "\n".join(lines)
        + f"""
ServerRoot {place}
ServerName peer.example
PidFile {place}/pid
DefaultRuntimeDir {place}
ErrorLog /dev/stderr
Listen 127.0.0.1:{port}
SSLEngine on
SSLCertificateFile {place}/identity/cert.pem
SSLCertificateKeyFile {place}/identity/key.pem
SSLCACertificateFile {place}/identity/ca.pem
SSLVerifyClient require
ProxyRequests On
AllowCONNECT {allowed}
<Proxy *>
    Require expr %{{SSL_CLIENT_S_DN_CN}} == '{client}'
</Proxy>
""",
    )
    with _running(place, port, "apache2", "-DFOREGROUND", "-f", f"{place}/apache.conf") as said:
        yield said


@contextmanager
def squid(place: Path, port: int, allowed: str, client: str) -> Iterator[Path]:
    """Run squid as a peer; the arguments are those of `apache`."""
    identity, share = place / "identity", UNPACKED / "usr/share/squid"
    (place / "squid.conf").write_text(
        f"""
https_port 127.0.0.1:{port} tls-cert={identity}/cert.pem tls-key={identity}/key.pem \
clientca={identity}/ca.pem tls-cafile={identity}/ca.pem
acl known user_cert CN {client}
acl service port {allowed}
acl CONNECT method CONNECT
http_access allow known CONNECT service
http_access deny all
visible_hostname peer.example
pid_filename none
netdb_filename none
coredump_dir {place}
cache_log {place}/log
access_log none
cache deny all
pinger_enable off
unlinkd_program {UNPACKED}/usr/lib/squid/unlinkd
mime_table {share}/mime.conf
icon_directory {share}/icons
error_directory {UNPACKED}/usr/share/squid-langpack/templates
hosts_file none
shutdown_lifetime 0 seconds
""",
    )
    # Its name is that of its files in /dev/shm, too, which another one must not find.
    name = f"tests{os.getpid()}x{port}"
    argv = (_SQUID, "-N", "-n", name, "-d1", "-f", f"{place}/squid.conf")
    try:
        with _running(place, port, *argv) as said:
            yield said
    finally:
        for left in Path("/dev/shm").glob(f"{name}-*"):  # noqa: S108 - it has no other
            left.unlink()


def configure_traffic_server(
    place: Path,
    port: str,
    records: Mapping[str, str | int],
    *,
    plugin: str = "",
    remap: str = "",
) -> tuple[str, ...]:
    """Configure Apache Traffic Server in a directory of its own; return its command line.

    It has one thread for events, and keeps nothing and logs nothing.

    Args:
        place: That directory; it has `identity/` if `port` has `ssl`.
        port: Where it listens, as in `proxy.config.http.server_ports`.
        records: What else is to be in records.config.
        plugin: The file plugin.config.
        remap: The file remap.config.
    """
    configuration = place / "config"
    for directory in configuration, place / "run", place / "log", place / "cache":
        directory.mkdir(parents=True, exist_ok=True)
    where = {
        "prefix": place,
        "exec_prefix": place,
        "bindir": UNPACKED / "usr/bin",
        "sbindir": UNPACKED / "usr/bin",
        "sysconfdir": configuration,
        "datadir": place,
        "includedir": place,
        "libdir": UNPACKED / "usr/lib/trafficserver",
        "libexecdir": _PLUGINS,
        "localstatedir": place / "run",
        "runtimedir": place / "run",
        "logdir": place / "log",
        "cachedir": place / "cache",
    }
    every: dict[str, str | int] = {
        "proxy.config.http.server_ports": port,
        "proxy.config.admin.user_id": "#-1",
        "proxy.config.http.cache.http": 0,
        "proxy.config.exec_thread.autoconfig": 0,
        "proxy.config.exec_thread.limit": 1,
        "proxy.config.crash_log_helper": "",
        "proxy.config.body_factory.template_sets_dir": str(_ETC / "body_factory"),
        "proxy.config.log.logging_enabled": 0,
        "proxy.config.diags.output.error": "E",
        **records,
    }
    lines = [
        f"CONFIG {key} {'INT' if isinstance(value, int) else 'STRING'} {value}\n"
        for key, value in every.items()
    ]
    certificate = "dest_ip=* ssl_cert_name=cert.pem ssl_key_name=key.pem\n"
    for name, text in (
        ("records.config", "".join(lines)),
        ("plugin.config", plugin),
        ("remap.config", remap),
        ("storage.config", ""),
        ("ssl_multicert.config", certificate if "ssl" in port else ""),
    ):
        (configuration / name).write_text(text)
    shutil.copy(_ETC / "ip_allow.yaml", configuration)
    run_root = place / "runroot.yaml"
    run_root.write_text("".join(f"{key}: {path}\n" for key, path in where.items()))
    return str(TRAFFIC_SERVER), f"--run-root={run_root}"


@contextmanager
def traffic_server(
    place: Path,
    port: str,
    records: Mapping[str, str | int],
    *,
    plugin: str = "",
    remap: str = "",
) -> Iterator[Path]:
    """Run it; the arguments are those of `configure_traffic_server`."""
    argv = configure_traffic_server(place, port, records, plugin=plugin, remap=remap)
    with _running(place, int(port.partition(":")[0]), *argv) as said:
        yield said


@contextmanager
def redis(place: Path, machine: Machine, address: str, port: int) -> Iterator[Path]:
    """Run redis on a machine, for clients of the authority in `place`, by TLS only."""
    settings = {
        "--bind": address,
        "--port": "0",
        "--protected-mode": "no",
        "--tls-port": str(port),
        "--tls-cert-file": f"{place}/identity/cert.pem",
        "--tls-key-file": f"{place}/identity/key.pem",
        "--tls-ca-cert-file": f"{place}/identity/ca.pem",
        "--tls-auth-clients": "yes",
        "--save": "",
    }
    arguments = [word for setting in settings.items() for word in setting]
    command = (*unpacked("redis-server"), *arguments)
    with _running(place, port, *command, address=address, machine=machine) as said:
        yield said


@contextmanager
def mosquitto(place: Path, machine: Machine, address: str, port: int) -> Iterator[Path]:
    """Run mosquitto on a machine, for clients of the authority in `place`, by TLS only."""
    (place / "mosquitto.conf").write_text(
        f"""
listener {port} {address}
cafile {place}/identity/ca.pem
certfile {place}/identity/cert.pem
keyfile {place}/identity/key.pem
require_certificate true
use_identity_as_username true
log_dest stderr
"""
    )
    command = (*unpacked("mosquitto"), "-c", f"{place}/mosquitto.conf")
    with _running(place, port, *command, address=address, machine=machine) as said:
        yield said
