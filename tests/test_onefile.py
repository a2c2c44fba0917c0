"""The one file of scripts/onefile: every program, on every Python at hand, at its real work."""

import ast
import faulthandler
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sniproxy
from tests.support.backends import TlsBackend, host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import PATIENCE, Daemon, eventually, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, ask

ROOT = Path(__file__).parents[1]
# The others need packages that are compiled.
OWN_PACKAGES = {"sniproxy", "sniproxy_check", "sniproxy_hostname", "sniproxy_status"}
PROGRAMS = {
    *("sniproxy", "sniproxy-check", "sniproxy-hostname", "sniproxy-listen", "sniproxy-status")
}
NAME = "a.example"

# Seconds: packages come over a network.
BUILD = 300.0

# Becomes the program $PROGRAM in place of the daemon that `Daemon` would start from the sources.
INSTEAD = (
    "sh",
    "-c",
    'until [ "$1" = sniproxy ]; do shift; done; shift; exec "$PROGRAM" "$@"',
    "sh",
)

# What a hosts directory might hold to be imported in place of the real thing.
EVIL = (
    *("argparse", "blake3", "encodings", "idna", "json", "os", "sdnotify", "sitecustomize", "ssl"),
    *("socket", "trio", "usercustomize", "zipimport", "zlib"),
    *OWN_PACKAGES,
)


def pythons() -> dict[tuple[int, ...], Path]:
    """Return the system's Python and those that pyenv keeps, by version, the oldest first."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found: dict[tuple[int, ...], Path] = {}
    for python in Path("/usr/bin/python3"), *sorted(kept.glob("*/bin/python3")):
        if python.exists():
            code = "import sys; print(*sys.version_info[:3])"
            version = subprocess.check_output([python, "-I", "-c", code], text=True)
            found.setdefault(tuple(map(int, version.split())), python)
    return dict(sorted(found.items()))


ALL_PYTHONS = pythons()
PYTHONS = [python for version, python in ALL_PYTHONS.items() if version >= (3, 11)]
OLD_PYTHONS = [python for version, python in ALL_PYTHONS.items() if version < (3, 11)]
NAMES = {python: ".".join(map(str, version)) for version, python in ALL_PYTHONS.items()}


def build(output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # That may take longer than a test should.
    faulthandler.cancel_dump_traceback_later()
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "onefile", "--output", output],
        env=os.environ | environment,
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=BUILD,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The file, in a directory with nothing else, and the lines that the script has printed."""
    file = tmp_path_factory.mktemp("it's built") / "sniproxy"
    done = build(file)
    if done.returncode == 111 and "CI" not in os.environ:
        pytest.skip(f"pip could not get the packages: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return file, done.stdout.splitlines()


@pytest.fixture(scope="module")
def onefile(built: tuple[Path, list[str]]) -> Path:
    """The file."""
    return built[0]


@pytest.fixture
def installed(onefile: Path, tmp_path: Path) -> Path:
    """A directory where it is installed under its three names."""
    place = tmp_path / "bin"
    place.mkdir()
    shutil.copy(onefile, place / "sniproxy")
    for name in sorted(PROGRAMS - {"sniproxy"}):
        (place / name).symlink_to("sniproxy")
    return place


def path(installed: Path, python: Path) -> dict[str, str]:
    """Return an environment in which the programs, and this Python, are found."""
    return {"PATH": f"{installed}:{python.parent}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


def run(
    *command: str | Path, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def start(
    hosts: Path, installed: Path, python: Path, *options: str, env: dict[str, str] | None = None
) -> Daemon:
    environment = path(installed, python) | {"PROGRAM": str(installed / "sniproxy")} | (env or {})
    return start_daemon(hosts, *options, env=environment, under=INSTEAD, measured=False)


def fetch(daemon: Daemon, certificates: Certificates) -> None:
    """Have curl and a TLS backend talk to each other through the daemon."""
    tls_socket = host_directory(daemon.hosts, NAME) / "tls-socket"
    with TlsBackend(tls_socket, certificates.server_context(NAME)):
        tls_socket.chmod(0o666)
        fetched = run(
            *("curl", "--disable", "--noproxy", "*", "--silent", "--show-error"),
            *("--cacert", certificates.authority, "--data", "the body"),
            *("--connect-to", f"{NAME}:443:127.0.0.1:{daemon.address[1]}", f"https://{NAME}/"),
            env={"PATH": os.environ["PATH"]},
        )
    assert (fetched.stdout, fetched.stderr, fetched.returncode) == ("the body", "", 0)


each_python = pytest.mark.parametrize("python", PYTHONS, ids=NAMES.get)
one_python = PYTHONS[0] if PYTHONS else Path(sys.executable)
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


# --- Installed -----------------------------------------------------------------------------------


def test_the_commands_that_it_prints_make_the_other_programs(
    built: tuple[Path, list[str]],
) -> None:
    file, printed = built
    commands = [line for line in printed if not line.startswith("onefile: ")]
    # As they stand; a second time as well, when the file was made anew.
    for _ in range(2):
        done = run("sh", "-euc", "\n".join(commands), env={"PATH": os.environ["PATH"]})
        assert (done.stderr, done.returncode) == ("", 0)
    assert {each.name for each in file.parent.iterdir()} == PROGRAMS
    for name in PROGRAMS:
        said = run(file.with_name(name), "--version", env=path(file.parent, one_python))
        assert said.stdout == says(name)


# --- At work -------------------------------------------------------------------------------------


def says(name: str) -> str:
    """Return what a program answers to --version: nothing in the file is compiled."""
    return f"{name} {sniproxy.__version__}{' (pure Python)' if name == 'sniproxy' else ''}\n"


@each_python
def test_it_is_the_program_that_it_is_called(installed: Path, python: Path) -> None:
    env = path(installed, python)
    for name in PROGRAMS:
        said = run(name, "--version", env=env)
        expected = (says(name), "", 0)
        assert (said.stdout, said.stderr, said.returncode) == expected
    assert run("sniproxy-hostname", "🕸💍.ws", env=env).stdout == "xn--sr8hvo.ws\n"
    said = run("sniproxy-listen", "127.0.0.1:0", "readlink", "/proc/self/fd/0", env=env)
    assert said.stdout.startswith("socket:")


def test_by_any_other_name_it_is_the_daemon(installed: Path) -> None:
    (installed / "sniproxy").rename(installed / "sniproxy-1.2.3")
    said = run("sniproxy-1.2.3", "--version", env=path(installed, one_python))
    assert said.stdout == says("sniproxy")


@needs_curl
@each_python
def test_it_serves(hosts: Path, installed: Path, python: Path, certificates: Certificates) -> None:
    with start(hosts, installed, python, "--log", "connections") as daemon:
        assert Path(f"/proc/{daemon.process.pid}/comm").read_text() == "sniproxy\n"
        fetch(daemon, certificates)
        assert f" name={NAME} " in daemon.wait_for_log("connection")
        assert ask(daemon, "nobody.example") == UNRECOGNIZED_NAME
        daemon.wait_for_log("reason=no_such_host")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("drained")
        assert daemon.wait() == 0


@needs_curl
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root directory")
def test_it_serves_where_it_can_open_nothing(
    hosts: Path, installed: Path, certificates: Certificates
) -> None:
    """Whatever it needs of itself it has read before: another worker, the words for a death."""
    options = ("--chroot", "--user", "nobody", "--workers", "2")
    with start(hosts, installed, one_python, *options) as daemon:
        eventually(lambda: len(daemon.workers()) == 2)
        # In the new root directory there is no file of that name.
        installed.rename(installed.with_name("gone"))
        for worker in daemon.workers():
            os.kill(worker, signal.SIGKILL)
            daemon.wait_for_log(f"pid={worker}")
        eventually(lambda: len(daemon.workers()) == 2)
        fetch(daemon, certificates)
        assert ask(daemon, "nobody.example") == UNRECOGNIZED_NAME
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        daemon.wait_for_log("drained")


def test_nothing_is_imported_from_the_hosts_directory(hosts: Path, installed: Path) -> None:
    evil = "import os\nos.write(2, b'evil was here')\nos._exit(66)\n"
    for name in EVIL:
        (hosts / f"{name}.py").write_text(evil)
        (hosts / name).mkdir()
        (hosts / name / "__init__.py").write_text(evil)
    (hosts / "__main__.py").write_text(evil)
    env = path(installed, one_python) | {"PYTHONPATH": str(hosts)}
    for command in (
        ("sniproxy-hostname", NAME),
        ("sniproxy", "--help"),
        ("sniproxy-check", "--help"),
        ("sniproxy-status", "--help"),
        ("sniproxy-listen", "127.0.0.1:0", "sniproxy", "--version"),
    ):
        ran = run(*command, env=env, cwd=hosts)
        assert (ran.stderr, ran.returncode) == ("", 0)
    with start(hosts, installed, one_python, env=env) as daemon:
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


# --- What is missing -----------------------------------------------------------------------------


@needs_curl
def test_hashed_names_with_the_machines_blake3(
    hosts: Path, installed: Path, certificates: Certificates
) -> None:
    # The environment that these tests run in has it.
    python = Path(sys.prefix, "bin", "python3")
    hashed = run("sniproxy-hostname", "--hashed", NAME, env=path(installed, python))
    assert (len(hashed.stdout), hashed.stderr) == (65, "")
    directory = hosts / hashed.stdout.strip()
    host_directory(hosts, NAME).rename(directory)
    with start(hosts, installed, python, "--hashed") as daemon:
        (hosts / NAME).symlink_to(directory)  # for `fetch`; the daemon does not look there
        fetch(daemon, certificates)


def test_hashed_names_without_blake3(hosts: Path, installed: Path) -> None:
    for python in PYTHONS:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('blake3') is None)"
        if subprocess.run([python, "-I", "-c", code]).returncode:
            break
    else:
        pytest.skip("every Python here has blake3")
    env = path(installed, python)
    for command in (
        ("sniproxy-listen", "127.0.0.1:0", "sniproxy", "--hashed"),
        ("sniproxy-hostname", "--hashed", NAME),
        ("sniproxy-check", "--hashed", NAME),
    ):
        ran = run(*command, env=env, cwd=hosts)
        program = "sniproxy" if command[0] == "sniproxy-listen" else command[0]
        assert ran.stderr.startswith(f"{program}: fatal: unable to hash names: ")
        assert "blake3" in ran.stderr
        assert (ran.stderr.count("\n"), ran.stdout, ran.returncode) == (1, "", 100)


TOO_OLD = r"NAME: fatal: unable to run: Python 3\.11 or newer is needed, and .+ is [0-9.]+; to .*\n"


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=NAMES.get)
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_an_old_python_says_that_it_is(installed: Path, python: Path, name: str) -> None:
    ran = run(name, "--version", env=path(installed, python))
    assert re.fullmatch(TOO_OLD.replace("NAME", name), ran.stderr)
    assert (ran.stdout, ran.returncode) == ("", 100)


def test_a_python_that_claims_to_be_old(onefile: Path) -> None:
    """For a machine without old ones."""
    code = "import runpy, sys; sys.argv.pop(0); sys.version_info = (3, 10)\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = run(sys.executable, "-I", "-c", code, onefile, env={})
    assert re.fullmatch(TOO_OLD.replace("NAME", "sniproxy"), ran.stderr)
    assert (ran.stdout, ran.returncode) == ("", 100)


# --- The file ------------------------------------------------------------------------------------


def test_what_is_in_it(onefile: Path) -> None:
    with zipfile.ZipFile(onefile) as archive:
        names = set(archive.namelist())
        # As far back as `ast` goes: an old Python must get to the line that says so.
        ast.parse(archive.read("__main__.py"), feature_version=(3, 4))
    assert not [name for name in names if name.endswith((".so", ".pyc", ".pyd"))]
    packages = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    needed = {"attrs", "idna", "outcome", "sdnotify", "sniffio", "sortedcontainers", "trio"}
    assert packages == needed | {"attr", *OWN_PACKAGES}
    licences = {re.match(r"(\w+)-[^/]+\.dist-info/(licenses/)?LICEN[CS]E", name) for name in names}
    assert {match[1] for match in licences if match} == needed | {"sniproxy"}


def test_the_same_bytes_again(onefile: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    before = os.umask(0o077)
    try:
        assert build(again, TZ="Pacific/Kiritimati").returncode == 0
    finally:
        os.umask(before)
    assert again.read_bytes() == onefile.read_bytes()
    assert again.stat().st_mode & 0o777 == 0o755


def test_what_is_compiled_is_not_let_in(onefile: Path, tmp_path: Path) -> None:
    version = "".join(map(str, sys.version_info[:2]))
    wheel = f"idna-999-cp{version}-cp{version}-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
        info = "idna-999.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: idna\nVersion: 999\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr(f"{info}/RECORD", "")
    places = f"{os.environ.get('PIP_FIND_LINKS', '')} {tmp_path}"
    built = build(tmp_path / "file", PIP_FIND_LINKS=places.strip())
    assert f"not pure Python: {wheel}" in built.stderr
    assert built.returncode == 1
    assert not (tmp_path / "file").exists()


def test_called_wrongly() -> None:
    script = ROOT / "scripts" / "onefile"
    assert run(sys.executable, script, "--what", env={}).returncode == 2
    assert "dist/sniproxy" in run(sys.executable, script, "--help", env={}).stdout
