"""The proxies that are measured: how each is configured, started and stopped.

All do the same: read the server name of a ClientHello on a TCP port of loopback, and pass the
connection on to a Unix socket. One worker, no access log, and nothing else of their own choice.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

_NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"


class AnySetup(Protocol):
    """What every setup says: a new directory for the program, and the port to listen on."""

    @property
    def directory(self) -> Path: ...  # noqa: D102
    @property
    def port(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Setup:
    """What a proxy is to do.

    Attributes:
        directory: A new one, for files of its own.
        port: Where to listen, on 127.0.0.1.
        backend: The Unix socket behind it.
        names: The server names, all of which lead there.
        header: Whether connections begin with a PROXY protocol v1 header.
    """

    directory: Path
    port: int
    backend: Path
    names: list[str]
    header: bool = False

    def write(self, name: str, text: str) -> Path:
        """Write a file of the proxy's own; return its path."""
        path = self.directory / name
        path.write_text(text)
        return path


@dataclass(frozen=True)
class Peer:
    """A proxy.

    Attributes:
        name: What the tables call it.
        start: Starts it, for a setup; it may take its time to listen.
        version: Prints its version.
        missing: Why it can't be run here, for people; empty if it can.
        header: Whether it can send PROXY headers to a Unix socket.
    """

    name: str
    start: Callable[[Any], subprocess.Popen[bytes]]
    version: list[str]
    missing: str
    header: bool = True

    @contextmanager
    def running(self, setup: AnySetup) -> Iterator["Running"]:
        """Run it; it listens from the beginning, and is gone at the end."""
        setup.directory.mkdir()
        process = self.start(setup)
        try:
            if not _listens(setup.port, process):
                log = (setup.directory / "log").read_text("utf-8", "replace")
                raise RuntimeError(f"{self.name} does not start:\n{log}")
            yield Running(process.pid)
        finally:
            # nginx takes SIGQUIT for a drain and SIGTERM for the end; the others don't mind.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def show_version(self) -> str:
        """Return its version as a person would write it."""
        done = subprocess.run(self.version, capture_output=True, text=True, check=False)
        found = re.search(r"\d+\.[\d.]+\d", done.stdout + done.stderr)
        return found[0] if found else "unknown"


class Running:
    """A running proxy and what it has used so far, all of its processes together."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def processor_seconds(self) -> float:
        """Return the processor time, system calls included."""
        # The clock of another process, clock_getcpuclockid(3): ~pid << 3, and 2 for all threads.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._pids())

    def private_bytes(self) -> int:
        """Return the memory that no other process shares."""
        return sum(_private_bytes(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        pids = [self._pid]
        for pid in pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pids.extend(map(int, children))
        return pids


def _private_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE)))


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until `process` listens; False if it has ended, or ten seconds have passed."""
    for _ in range(500):
        if process.poll() is not None:
            return False
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return True
    return False


# Where scripts/bench has put the compiled build, if it could.
_COMPILED = os.environ.get("SNIPROXY_COMPILED_TREE", "")


def _ours(
    setup: Setup, *options: str, is_handed_over: bool = False, tree: str = ""
) -> subprocess.Popen[bytes]:
    hosts = setup.directory / "hosts"
    hosts.mkdir()
    for name in setup.names:
        (hosts / name).mkdir()
        # As a backend would have bound it, there; a symbolic link would be one more to follow.
        if is_handed_over:
            (hosts / name / "handoff-socket").hardlink_to(f"{setup.backend}.handoff")
        else:
            (hosts / name / "tls-socket").hardlink_to(setup.backend)
        if setup.header:
            (hosts / name / "send-proxy-v1").touch()
    with (
        socket.create_server(("127.0.0.1", setup.port), backlog=4096) as listening,
        (setup.directory / "log").open("wb") as log,
    ):
        program = [sys.executable, "-m", "sniproxy", *options]
        environment = os.environ | {"PYTHONPATH": tree} if tree else None
        return subprocess.Popen(
            program, stdin=listening.fileno(), stderr=log, cwd=hosts, env=environment
        )


def _haproxy(setup: Setup, *, splice: bool) -> subprocess.Popen[bytes]:
    names = setup.write("names", "".join(f"{name} hosts\n" for name in setup.names))
    return start_haproxy(
        setup.directory,
        f"""
            mode tcp
            {"option splice-auto" if splice else ""}
        frontend tls
            bind 127.0.0.1:{setup.port} backlog 4096
            tcp-request inspect-delay 10s
            tcp-request content accept if {{ req.ssl_hello_type 1 }}
            use_backend %[req.ssl_sni,lower,map({names})]
        backend hosts
            server one unix@{setup.backend} {"send-proxy" if setup.header else ""}
        """,
    )


def _nginx(setup: Setup) -> subprocess.Popen[bytes]:
    names = "".join(f"{name} unix:{setup.backend};\n" for name in setup.names)
    return start_nginx(
        setup.directory,
        f"""
            map_hash_max_size 100000;
            map_hash_bucket_size 128;
            map $ssl_preread_server_name $backend {{
                {names}
            }}
            server {{
                listen 127.0.0.1:{setup.port} backlog=4096;
                ssl_preread on;
                proxy_pass $backend;
                proxy_protocol {"on" if setup.header else "off"};
                tcp_nodelay on;
            }}
        """,
        "user root;" if os.geteuid() == 0 else "",
    )


def _c_sniproxy(setup: Setup) -> subprocess.Popen[bytes]:
    names = "".join(f"    {name} unix:{setup.backend}\n" for name in setup.names)
    config = setup.write(
        "sniproxy.conf",
        f"""
pidfile {setup.directory}/pid
error_log {{
    filename /dev/null
}}
listener 127.0.0.1:{setup.port} {{
    protocol tls
    table hosts
}}
table hosts {{
{names}}}
""",
    )
    return start(setup.directory, "/usr/sbin/sniproxy", "-f", "-n", "40000", "-c", str(config))


def start(directory: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a program; what it prints goes to a log in its directory."""
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def start_haproxy(directory: Path, rest: str) -> subprocess.Popen[bytes]:
    """Start HAProxy with one thread; `rest` of its configuration goes on with the defaults."""
    config = directory / "haproxy.cfg"
    # It insists on an end of the last line.
    config.write_text(
        f"""
        global
            nbthread 1
        defaults
            timeout connect 10s
            timeout client 1h
            timeout server 1h
        {rest}
"""
    )
    return start(directory, "haproxy", "-db", "-f", str(config))


def start_nginx(directory: Path, stream: str, main: str = "") -> subprocess.Popen[bytes]:
    """Start nginx with one worker; `stream` and `main` are what stands in these contexts."""
    config = directory / "nginx.conf"
    config.write_text(
        f"""
        load_module {_NGINX_STREAM};
        daemon off;
        pid {directory}/pid;
        error_log stderr crit;
        worker_processes 1;
        {main}
        events {{ worker_connections 30000; }}
        stream {{
            {stream}
        }}
        """
    )
    return start(directory, "nginx", "-p", str(directory), "-c", str(config))


def package(program: str, package: str) -> str:
    """Tell that the package of a program, or of a file, is not installed; "" if it is."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") or Path(program).is_file():
        return ""
    return f"the package {package} is not installed"


NGINX_MISSING = package("nginx", "nginx-light") or package(_NGINX_STREAM, "libnginx-mod-stream")

OURS = Peer("sniproxy", _ours, [sys.executable, "-m", "sniproxy", "--version"], "")

_NOT_COMPILED = "" if _COMPILED else "scripts/bench could not compile it"

# The same, with the rooms compiled that every connection passes.
COMPILED = Peer("sniproxy, compiled", partial(_ours, tree=_COMPILED), OURS.version, _NOT_COMPILED)

# The backend has the connections themselves.
HANDING_OVER = Peer(
    "sniproxy, handed over",
    lambda setup: _ours(setup, "--handoff", is_handed_over=True),
    OURS.version,
    "",
    header=False,
)
COMPILED_HANDING_OVER = Peer(
    "sniproxy, compiled, handed over",
    lambda setup: _ours(setup, "--handoff", is_handed_over=True, tree=_COMPILED),
    OURS.version,
    _NOT_COMPILED,
    header=False,
)

TWO_WORKERS = Peer(
    "sniproxy --workers 2", lambda setup: _ours(setup, "--workers", "2"), OURS.version, ""
)

# Every connection is counted for its host, and nobody asks for the figures.
COUNTING = Peer(
    "sniproxy --status-socket",
    lambda setup: _ours(setup, "--status-socket", str(setup.directory / "status")),
    OURS.version,
    "",
)

PEERS = [
    OURS,
    Peer(
        "HAProxy",
        lambda setup: _haproxy(setup, splice=False),
        ["haproxy", "-v"],
        package("haproxy", "haproxy"),
    ),
    Peer(
        "HAProxy, splice",
        lambda setup: _haproxy(setup, splice=True),
        ["haproxy", "-v"],
        package("haproxy", "haproxy"),
    ),
    Peer(
        "nginx stream",
        _nginx,
        ["nginx", "-v"],
        NGINX_MISSING,
    ),
    Peer(
        "sniproxy in C",
        _c_sniproxy,
        ["/usr/sbin/sniproxy", "-V"],
        package("/usr/sbin/sniproxy", "sniproxy"),
        header=False,
    ),
]
