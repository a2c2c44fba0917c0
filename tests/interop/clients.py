"""Real clients. Each is a function that visits a host: it verifies the certificate, sends an HTTP
request, waits for the answer, and leaves.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.certificates import KeyPair
from tests.support.daemon import PATIENCE

# The host that they visit where any name will do.
NAME = "a.example"

_REQUEST = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"

# Their words are looked at, so they are to speak English; and curl takes UTF-8 on its command line.
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True)
class Visit:
    """Where to go, and with what.

    Attributes:
        address: Of the daemon.
        authority: Whose certificates are trusted.
        name: Of the host; None for no server_name extension.
        version: `TLSv1.2` or `TLSv1.3`, and no other; None for what the client likes best.
        protocols: What to offer by ALPN.
        shows: The client certificate.
    """

    address: tuple[str, int]
    authority: Path
    name: str | None
    version: str | None = None
    protocols: Sequence[str] = ()
    shows: KeyPair | None = None


@dataclass(frozen=True)
class Outcome:
    """The exit code, and what was said on standard output and error."""

    code: int
    output: str

    @property
    def protocol(self) -> str | None:
        """What the client takes for the result of ALPN."""
        said = re.search(
            r"(?:ALPN: server accepted|ALPN protocol:|ion protocol:) (\S+)", self.output
        )
        return said and said[1]


Client = Callable[[Visit], Outcome]


def curl(visit: Visit, *options: str) -> Outcome:
    host, port = visit.address
    arguments = ["--disable", "--noproxy", "*", "--verbose", "--silent", "--show-error"]
    arguments += ["--cacert", str(visit.authority)]
    if visit.version:
        number = visit.version.removeprefix("TLSv")
        arguments += [f"--tlsv{number}", "--tls-max", number]
    if not visit.protocols:
        arguments += ["--no-alpn"]
    elif "h2" not in visit.protocols:
        arguments += ["--http1.1"]
    if visit.shows:
        arguments += ["--cert", str(visit.shows.certificate), "--key", str(visit.shows.key)]
    if visit.name is None:
        url = f"https://{host}:{port}/"
    else:
        url = f"https://{visit.name}:{port}/"
        arguments += ["--connect-to", f"::{host if ':' not in host else f'[{host}]'}:{port}"]
    return _run("curl", "curl", *arguments, *options, url)


def openssl(visit: Visit, *options: str) -> Outcome:
    arguments = ["s_client", "-connect", _host_and_port(visit.address), "-verify_return_error"]
    arguments += ["-CAfile", str(visit.authority)]
    if visit.name is None:
        arguments += ["-noservername"]
    else:
        arguments += ["-servername", visit.name, "-verify_hostname", visit.name]
    if visit.version:
        arguments += ["-" + visit.version.lower().replace("v", "").replace(".", "_")]
    if visit.protocols:
        arguments += ["-alpn", ",".join(visit.protocols)]
    if visit.shows:
        arguments += ["-cert", str(visit.shows.certificate), "-key", str(visit.shows.key)]
    return _run("openssl", "openssl", *arguments, *options)


def gnutls_cli(visit: Visit, *options: str) -> Outcome:
    host, port = visit.address
    arguments = ["--port", str(port), "--x509cafile", str(visit.authority)]
    if visit.name is None:
        arguments += ["--disable-sni"]
    else:
        arguments += ["--sni-hostname", visit.name, "--verify-hostname", visit.name]
    if visit.version:
        arguments += ["--priority", f"NORMAL:-VERS-ALL:+VERS-{visit.version.replace('v', '')}"]
    for protocol in visit.protocols:
        arguments += ["--alpn", protocol]
    if visit.shows:
        arguments += ["--x509certfile", str(visit.shows.certificate)]
        arguments += ["--x509keyfile", str(visit.shows.key)]
    return _run("gnutls-cli", "gnutls-bin", *arguments, *options, host)


CLIENTS = (curl, openssl, gnutls_cli)


def _host_and_port(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _run(program: str, package: str, *arguments: str) -> Outcome:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian: apt install {package})")
    reader, writer = os.pipe()
    try:
        # The pipe stays open: at the end of their input some clients leave without the answer.
        os.write(writer, _REQUEST)
        done = subprocess.run(
            [path, *arguments],
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_ENVIRONMENT,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"))
