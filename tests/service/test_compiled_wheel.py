"""Compiled wheels, on machines where no compiler is: a Debian 12 and a Debian 13, new ones."""

import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.daemon import eventually
from tests.support.machine import Machine, why_no_machine
from tests.support.units import main_pid

ROOT: Final = Path(__file__).parents[2]
HOST: Final = "one.example"

# Prints the version, and whether there are the headers that a module is made with.
_LOOK: Final = """
import os, sys, sysconfig
print(*sys.version_info[:2], sep=".")
print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
"""

# A backend that greets whoever comes, once it has heard the hello.
_BACKEND: Final = """
import os, socket
os.chdir("/srv/hosts/one.example")
backend = socket.socket(socket.AF_UNIX)
backend.bind("tls-socket")
os.chmod("tls-socket", 0o666)
backend.listen()
print("listening", flush=True)
while True:
    connection, _ = backend.accept()
    connection.recv(1 << 16)
    connection.sendall(b"served")
    connection.close()
"""

_CLIENT: Final = """
import socket, ssl
hello = ssl.MemoryBIO()
context = ssl.create_default_context()
tls = context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="one.example")
try:
    tls.do_handshake()
except ssl.SSLWantReadError:
    pass
with socket.create_connection(("127.0.0.1", 443), 30) as client:
    client.sendall(hello.read())
    print(client.recv(100).decode())
"""


def find_python(version: str) -> str:
    """Return a Python of that version that can make modules; skip the test if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = ["/usr/bin/python3", sys.executable, *map(str, pyenv.glob("*/bin/python3"))]
    for candidate in candidates:
        done = subprocess.run([candidate, "-c", _LOOK], capture_output=True, text=True, check=False)
        if done.stdout.split() == [version, "True"]:
            return candidate
    pytest.skip(f"there is no Python {version} with its headers here, to make a wheel with")


@pytest.fixture(scope="module", params=[("bookworm", "3.11"), ("trixie", "3.13")], ids=" ".join)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    if missing := why_no_machine():
        pytest.skip(missing)
    suite, version = request.param
    python = find_python(version)
    faulthandler.cancel_dump_traceback_later()  # to compile takes half a minute
    made = tmp_path_factory.mktemp("wheel")
    environment = made / "environment"
    subprocess.run([python, "-m", "venv", environment], check=True)
    pip = (environment / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", made, ROOT],
        env=os.environ | {"SNIPROXY_COMPILE": "1"},
        check=True,
    )
    [wheel] = made.glob("sniproxy-*.whl")
    assert f"-cp{version.replace('.', '')}-" in wheel.name
    with Machine(suite=suite) as machine:
        machine.install_wheel(wheel=wheel)
        machine.run("useradd", "--system", "--user-group", "sniproxy")
        machine.run("mkdir", "-p", f"/srv/hosts/{HOST}")
        for kind in "socket", "service":
            machine.write(
                f"/etc/systemd/system/sniproxy.{kind}",
                (ROOT / f"systemd/sniproxy.{kind}").read_text(),
            )
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "sniproxy.socket")
        yield machine


def test_it_says_that_it_is_compiled(machine: Machine) -> None:
    said = machine.run("/opt/sniproxy/bin/sniproxy", "--version").stdout
    assert said.endswith(" (compiled)\n")


def test_it_serves(machine: Machine) -> None:
    with machine.start("python3", "-c", _BACKEND) as backend:
        assert backend.stdout is not None
        assert backend.stdout.readline() == "listening\n"
        assert machine.run("python3", "-c", _CLIENT).stdout == "served\n"
        pid = main_pid(machine)
        assert "/sniproxy/session.cpython-" in machine.run("cat", f"/proc/{pid}/maps").stdout
        # By the new copy, too, whose modules are loaded within the sandbox of the unit.
        machine.run("systemctl", "reload", "sniproxy.service")
        eventually(lambda: main_pid(machine) not in {pid, 0})
        assert machine.run("python3", "-c", _CLIENT).stdout == "served\n"
        backend.kill()
