"""The Debian package, from the first installation to the purge, on a machine of its own."""

import faulthandler
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import sniproxy
from tests.support.daemon import PATIENCE, eventually
from tests.support.machine import Machine

ROOT = Path(__file__).parents[2]
NAME = "one.example"
OWN_PACKAGES = ("sniproxy", "sniproxy_check", "sniproxy_hostname", "sniproxy_status")
PROGRAMS = ("sniproxy", "sniproxy-check", "sniproxy-hostname", "sniproxy-listen", "sniproxy-status")
NEXT_VERSION = "99.9"

# Seconds: packages come over a network.
BUILD = 300.0

# The certificate of NAME in the machine, its key, and the socket of its backend.
CERTIFICATE, KEY, BACKEND = "/root/one.crt", "/root/one.key", f"/srv/hosts/{NAME}/tls-socket"

CURL = ("curl", "--silent", "--show-error", "--fail", "--output", "/dev/null", "--max-time", "30")

FETCH = (
    *CURL,
    *("--cacert", CERTIFICATE, "--resolve", f"{NAME}:443:127.0.0.1", f"https://{NAME}/"),
)

# Fetches one page after the other until it is told to stop, and notes how it went.
CLIENT = (
    "sh",
    "-c",
    'while [ ! -e /run/enough ]; do "$@" || echo failed 0; done >>/run/fetches',
    "sh",
    *FETCH,
    *("--write-out", "fetched %{time_total}\n"),
)

# Makes a host in the working directory, connects to it, and from then on nobody says anything,
# until standard input ends. Then the backend does.
SILENT_CLIENT = """
import os, socket, ssl, sys
os.mkdir("silent.example")
os.chdir("silent.example")
backend = socket.socket(socket.AF_UNIX)
backend.bind("tls-socket")
os.chmod("tls-socket", 0o666)
backend.listen()
hello = ssl.MemoryBIO()
context = ssl.create_default_context()
tls = context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="silent.example")
try:
    tls.do_handshake()
except ssl.SSLWantReadError:
    pass
client = socket.create_connection(("127.0.0.1", 443), 30)
client.sendall(hello.read())
connection, _ = backend.accept()
print("connected", flush=True)
sys.stdin.read()
try:
    connection.sendall(b"still here")
    print(client.recv(10).decode())
except ConnectionError:  # the one or the other of them is told first
    print("cut")
"""

# Seconds. With a silent client a version that is restarted drains for five.
NO_WAIT = 3.0
UPGRADE = 60.0

OVERRIDE = "/etc/systemd/system/sniproxy.service.d/override.conf"
CALL = "/usr/bin/sniproxy --upgrade-socket /run/%N/upgrade"
WRONG_OPTION = "[Service]\nExecStart=\nExecStart=/usr/bin/sniproxy --verbose\n"
WITHOUT_UPGRADE_SOCKET = "[Service]\nExecStart=\nExecStart=/usr/bin/sniproxy --drain 5\n"
COPY = "sniproxy@next.service"

# Where notes are made when anything is installed or runs.
NOTES = r"/(dev|proc|root|run|sys|tmp|var/(cache|log|tmp)|var/lib/(dpkg|systemd))(/.*)?"

# What adduser keeps of the files that it has changed.
COPIES = {"/etc/group-", "/etc/gshadow-", "/etc/passwd-", "/etc/shadow-"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built here for the machine."""
    for program in "dpkg-deb", "dpkg-shlibdeps":
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package dpkg-dev)")
    system = platform.freedesktop_os_release()
    if (system["ID"], system.get("VERSION_CODENAME")) != ("debian", "bookworm"):
        pytest.skip("the machine is a Debian 12, and this is none to build its package on")
    output = tmp_path_factory.mktemp("deb")
    built = build(output)
    if built.returncode == 111 and "CI" not in os.environ:
        pytest.skip(f"pip could not get the packages: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    [package] = output.glob(f"sniproxy_{sniproxy.__version__}_*.deb")
    return package


def build(output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # That may take longer than a test should.
    faulthandler.cancel_dump_traceback_later()
    return subprocess.run(
        [ROOT / "scripts" / "deb", "--output", output],
        # Without that the date is that of the last commit, and there may be one while we test.
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} | environment,
        capture_output=True,
        text=True,
        timeout=BUILD,
    )


@pytest.fixture(scope="module")
def files_before(machine: Machine) -> set[str]:
    """What there is in the machine before anything is installed."""
    return files(machine)


@pytest.fixture(scope="module")
def installed(machine: Machine, files_before: set[str], package: Path) -> Machine:
    """The machine, with the package."""
    done = install(machine, package)
    assert (done.returncode, done.stderr) == (0, "")
    return machine


@pytest.fixture(scope="module")
def serving(installed: Machine) -> Iterator[Machine]:
    """The machine, with a host, and the port open."""
    with host(installed):
        yield installed


@contextmanager
def host(installed: Machine) -> Iterator[None]:
    """Make a host, and open the port."""
    installed.run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-noenc", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
        *("-keyout", KEY, "-out", CERTIFICATE),
    )
    installed.run("mkdir", f"/srv/hosts/{NAME}")
    with started(
        installed,
        # A longer path than this one is too long for it.
        *("env", f"--chdir=/srv/hosts/{NAME}", "openssl", "s_server", "-unix", "tls-socket"),
        *("-quiet", "-www", "-cert", CERTIFICATE, "-key", KEY),
    ):
        eventually(lambda: Path(f"{installed.root}{BACKEND}").exists())
        installed.run("chmod", "666", BACKEND)
        # The service as well, so that there is more to forget. Only the socket is started.
        installed.run("systemctl", "enable", "sniproxy.service")
        installed.run("systemctl", "start", "sniproxy.socket")
        yield


@contextmanager
def started(machine: Machine, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in the machine as long as the block lasts."""
    process = machine.start(*argv)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def files(machine: Machine) -> set[str]:
    found = machine.run("find", "/", "-xdev").stdout.splitlines()
    return {path for path in found if not re.fullmatch(NOTES, path)}


def install(machine: Machine, package: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(package, machine.root / "root")
    package_file = f"/root/{package.name}"
    return machine.run("dpkg", "--install", package_file, check=False, timeout=UPGRADE)


def fetch(machine: Machine, port: int = 443) -> None:
    where = ("--cacert", CERTIFICATE, "--resolve", f"{NAME}:{port}:127.0.0.1")
    machine.run(*CURL, *where, f"https://{NAME}:{port}/")


def is_enabled(machine: Machine) -> str:
    units = ("sniproxy.socket", "sniproxy.service")
    return machine.run("systemctl", "is-enabled", *units, check=False).stdout.strip()


def main_pid(machine: Machine) -> str:
    """Return the process id of the service; 0 if it does not run."""
    return show("MainPID", machine)


def show(what: str, machine: Machine, unit: str = "sniproxy.service") -> str:
    """Return a property of a unit."""
    return machine.run("systemctl", "show", f"--property={what}", "--value", unit).stdout.strip()


def listeners(machine: Machine) -> int:
    """Return how many TCP sockets listen. 0A is that state, proc_net(5) has the format."""
    lines = machine.run("cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    return sum(line.split()[3] == "0A" for line in lines)


# --- Installed -----------------------------------------------------------------------------------


def test_nothing_listens_yet(installed: Machine) -> None:
    assert is_enabled(installed) == "disabled\ndisabled"
    assert listeners(installed) == 0
    assert main_pid(installed) == "0"


def test_the_user_and_the_hosts_directory(installed: Machine) -> None:
    user = installed.run("getent", "passwd", "sniproxy").stdout
    assert re.fullmatch(r"sniproxy:x:\d{3}:\d{3}:[^:]*:/nonexistent:/usr/sbin/nologin\n", user)
    assert installed.run("id", "--groups", "--name", "sniproxy").stdout == "sniproxy\n"
    hosts = installed.run("stat", "--format=%U %G %a", "/srv/hosts").stdout
    assert hosts == "root root 755\n"


def test_the_programs(installed: Machine) -> None:
    for name in PROGRAMS:
        says = f"{name} {sniproxy.__version__}{' (compiled)' if name == 'sniproxy' else ''}\n"
        assert installed.run(name, "--version").stdout == says
    assert installed.run("sniproxy-hostname", "🕸💍.ws").stdout == "xn--sr8hvo.ws\n"
    # BLAKE3's answer for "abc", as its own tests have it.
    hashed = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85\n"
    assert installed.run("sniproxy-hostname", "--hashed", "abc").stdout == hashed


def test_nothing_is_left_to_compile(installed: Machine) -> None:
    assert is_compiled(installed, "311")


def test_another_python_of_the_system_compiles_it_anew(installed: Machine) -> None:
    stale = "/usr/lib/sniproxy/sniproxy/__pycache__/serve.cpython-39.pyc"
    installed.run("find", "/usr/lib/sniproxy", "-name", "*.pyc", "-delete")
    installed.run("touch", stale)
    # As the package python3 does.
    hook = "/usr/share/python3/runtime.d/sniproxy.rtupdate"
    for step in "pre-rtupdate", "rtupdate", "post-rtupdate":
        installed.run(hook, step, "python3.9", "python3.11")
    assert is_compiled(installed, "311")
    installed.run("test", "!", "-e", stale)


def is_compiled(machine: Machine, python: str) -> bool:
    modules = ("find", "/usr/lib/sniproxy", "-name", "*.py")
    compiled = ("find", "/usr/lib/sniproxy", "-name", f"*.cpython-{python}.pyc")
    count = machine.run(*modules).stdout.count("\n")
    return 0 < count == machine.run(*compiled).stdout.count("\n")


def test_nothing_is_imported_from_elsewhere(installed: Machine) -> None:
    modules = ("trio", *OWN_PACKAGES, "sitecustomize", "argparse", "encodings")
    places = ("/run/hosts", "/usr/local/lib/python3.11/dist-packages")
    for place in places:
        for module in modules:
            installed.write(f"{place}/{module}/__init__.py", "import os; os._exit(66)")
    there = ("env", "--chdir=/run/hosts", "PYTHONPATH=/run/hosts", "PYTHONHOME=/run/hosts")
    for name in PROGRAMS:
        installed.run(*there, name, "--help")
    installed.run("rm", "-r", *(f"{place}/{module}" for place in places for module in modules))


def test_the_service_sees_no_more_programs_than_it_needs(installed: Machine) -> None:
    for unit in "sniproxy.service", "sniproxy@.service":
        text = installed.run("cat", f"/usr/lib/systemd/system/{unit}").stdout
        assert "\nBindReadOnlyPaths=/usr/bin/sniproxy /usr/bin/python3 " in text
        assert f"ExecStart={CALL}\n" in text
        assert "ExecReload=/usr/bin/sniproxy --upgrade /run/%N/upgrade\n" in text


def test_the_pages_and_papers(installed: Machine) -> None:
    for page in (ROOT / "man").glob("sniproxy*"):
        text = installed.run("zcat", f"/usr/share/man/man{page.suffix[1:]}/{page.name}.gz").stdout
        assert ".Nd " in text
        assert "/opt/sniproxy" not in text
    for path in (
        *(f"bash-completion/completions/{name}" for name in PROGRAMS),
        *(f"fish/vendor_completions.d/{name}.fish" for name in PROGRAMS),
        "zsh/vendor-completions/_sniproxy",
    ):
        installed.run("test", "-s", f"/usr/share/{path}")
    doc = "/usr/share/doc/sniproxy"
    for paper in "README.Debian", "README.md", "hosting.md", "changelog.gz":
        installed.run("test", "-s", f"{doc}/{paper}")
    runs = installed.run("grep", "-rhoE", "(/opt|/usr/bin)/sniproxy.*", f"{doc}/examples").stdout
    assert "/usr/bin/sniproxy-listen :443\n" in runs
    assert "/opt" not in runs
    configuration = "listener 443 {\n table t\n}\ntable t {\n ^one\\.example$ unix:/run/one\n}\n"
    installed.write("/root/sniproxy.conf", configuration)
    done = installed.run(f"{doc}/examples/coming-from", "sniproxy", "/root/sniproxy.conf")
    assert "mkdir -m 0755 one.example" in done.stdout


def test_nothing_of_the_programs_that_speak_tls_is_in_it(installed: Machine) -> None:
    files = installed.run("dpkg-query", "--listfiles", "sniproxy").stdout.splitlines()
    assert "/usr/lib/systemd/system/sniproxy.socket" in files
    left_out = re.compile(r"tls.bridge|tls.tproxy|tproxy.pod|mutual.tls")
    assert [path for path in files if left_out.search(path)] == []


def test_every_package_in_it_has_its_licence_in_the_copyright_file(installed: Machine) -> None:
    text = installed.run("cat", "/usr/share/doc/sniproxy/copyright").stdout
    found = installed.run("find", "/usr/lib/sniproxy", "-name", "*.dist-info", "-printf", "%f\n")
    names = {name.removesuffix(".dist-info") for name in found.stdout.splitlines()}
    names -= {f"sniproxy-{sniproxy.__version__}"}
    [ours, *parts] = re.split(r"\n== (.+) ==\n", text)
    assert ours.startswith("MIT License")
    assert "runtime library of mypyc" in ours
    assert "Jukka Lehtosalo" in ours
    assert set(parts[0::2]) == names
    for licence in parts[1::2]:
        assert re.search(r"Copyright|common-licenses", licence)


def test_it_does_not_replace_debians_program_of_that_name(
    installed: Machine, package: Path, tmp_path: Path
) -> None:
    control = tmp_path / "other" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: sniproxy\nVersion: 0.6.0-2.1\nArchitecture: all\n"
        "Maintainer: Somebody else <else@example.org>\nDescription: reads /etc/sniproxy.conf\n"
    )
    other = tmp_path / "other.deb"
    subprocess.run(["dpkg-deb", "--build", control.parent.parent, other], check=True)
    with Machine() as machine:
        assert install(machine, other).returncode == 0
        refused = install(machine, package)
        assert "sniproxy 0.6.0-2.1 is another program" in refused.stderr
        assert refused.returncode == 1
        status = machine.run(
            "dpkg-query", "--show", "--showformat=${Status} ${Version}", "sniproxy"
        )
        assert status.stdout == "install ok installed 0.6.0-2.1"


def test_the_same_bytes_again(package: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = build(tmp_path, TZ="Pacific/Kiritimati", LC_ALL="C", TMPDIR=str(tmp_path))
    finally:
        os.umask(before)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / package.name).read_bytes() == package.read_bytes()


# --- At work -------------------------------------------------------------------------------------


def test_the_first_client_starts_it(serving: Machine) -> None:
    fetch(serving)
    status = serving.run("cat", f"/proc/{main_pid(serving)}/status").stdout
    # As ps(1) and pkill(1) know it.
    assert status.startswith("Name:\tsniproxy\n")
    uid = serving.run("id", "--user", "sniproxy").stdout.strip()
    assert re.search(rf"^Uid:(\t{uid}){{4}}$", status, re.MULTILINE)


def test_hashed_names(serving: Machine) -> None:
    name = serving.run("sniproxy-hostname", "--hashed", NAME).stdout.strip()
    serving.run("mkdir", "/run/hashed")
    serving.run("ln", "--symbolic", f"/srv/hosts/{NAME}", f"/run/hashed/{name}")
    with started(
        serving,
        *("env", "--chdir=/run/hashed", "sniproxy-listen", ":8443"),
        *("sniproxy", "--hashed"),
    ) as daemon:
        assert daemon.stderr is not None
        while "listening" not in (line := daemon.stderr.readline()):
            assert line, "it ended"
        fetch(serving, 8443)


def test_all_that_on_debian_13(package: Path) -> None:
    """With another Python, and another systemd. It has no adduser unless somebody asks for it."""
    with Machine(["adduser"], suite="trixie") as machine:
        before = files(machine)
        done = install(machine, package)
        assert (done.returncode, done.stderr) == (0, "")
        assert is_compiled(machine, "313")
        hashed = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85\n"
        assert machine.run("sniproxy-hostname", "--hashed", "abc").stdout == hashed
        with host(machine):
            fetch(machine)
            old = main_pid(machine)

            done = install(machine, package)
            assert (done.returncode, done.stderr) == (0, "")
            assert (copies_started(machine), upgrades(machine)) == (0, "")
            eventually(lambda: main_pid(machine) not in {old, "0"})
            fetch(machine)

            # A wrong option: clients wait until it is mended.
            with ExitStack() as until_mended:
                until_mended.enter_context(overridden(machine, WRONG_OPTION))
                machine.run("systemctl", "restart", "sniproxy.service", check=False)
                with started(machine, *FETCH) as client:
                    eventually(lambda: "'--verbose'" in show("StatusText", machine))
                    eventually(lambda: int(show("NRestarts", machine)) >= 2)
                    assert show("ActiveState", machine, "sniproxy.socket") == "active"
                    assert client.poll() is None
                    until_mended.close()
                    assert client.communicate(timeout=PATIENCE) == ("", "")
                    assert client.returncode == 0

            machine.run("dpkg", "--purge", "sniproxy")
            assert files(machine) - before - COPIES == {
                "/srv/hosts",
                f"/srv/hosts/{NAME}",
                BACKEND,
            }


# --- A newer one, and the end: what the tests above need is gone after these ----------------------


def test_an_upgrade_that_does_not_start_changes_nothing(serving: Machine, package: Path) -> None:
    fetch(serving)
    old = main_pid(serving)
    wrong = "[Service]\nExecReload=\nExecReload=/usr/bin/sniproxy --upgrade /run/nowhere/upgrade\n"
    with overridden(serving, wrong):
        done = install(serving, package)
        assert "the new version does not start: see journalctl -u sniproxy.service" in done.stderr
        assert "the old one goes on" in done.stderr
        assert done.returncode == 0
        assert main_pid(serving) == old
        fetch(serving)
    assert upgrades(serving) == ""


def test_a_copy_that_does_not_start_changes_nothing(serving: Machine, package: Path) -> None:
    with overridden(serving, WITHOUT_UPGRADE_SOCKET):
        serving.run("systemctl", "restart", "sniproxy.service")
    old = main_pid(serving)
    with overridden(serving, WRONG_OPTION):
        done = install(serving, package)
        assert "the new version does not start: unable to understand the options" in done.stderr
        assert "unknown option '--verbose'" in done.stderr
        assert "the old one goes on" in done.stderr
        assert done.returncode == 0
        assert main_pid(serving) == old
        fetch(serving)
    assert upgrades(serving) == ""
    serving.run("systemctl", "restart", "sniproxy.service")


def test_what_policy_rc_d_forbids_is_not_done(serving: Machine, package: Path) -> None:
    fetch(serving)
    old = main_pid(serving)
    starts = copies_started(serving)
    serving.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", mode=0o755)
    try:
        assert install(serving, package).returncode == 0
    finally:
        serving.run("rm", "/usr/sbin/policy-rc.d")
    assert main_pid(serving) == old
    assert copies_started(serving) == starts


@pytest.mark.parametrize(
    ("call", "said"),
    # The second one as it was before there was an upgrade socket: who stays for long is cut.
    [("", "still here"), (WITHOUT_UPGRADE_SOCKET, "cut")],
    ids=["taken over", "restarted"],
)
def test_an_upgrade_refuses_nobody(
    serving: Machine, package: Path, tmp_path: Path, call: str, said: str
) -> None:
    newer = tmp_path / f"sniproxy_{NEXT_VERSION}.deb"
    tree = tmp_path / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    for path in tree / "DEBIAN" / "control", tree / "usr/lib/sniproxy/sniproxy/__init__.py":
        path.write_text(path.read_text().replace(sniproxy.__version__, NEXT_VERSION))
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, newer], check=True)
    # Another hosts directory: whoever takes no notice of what the administrator has changed refuses
    # all clients. The server goes on in the directory that was moved.
    elsewhere = "WorkingDirectory=/srv/elsewhere\nBindReadOnlyPaths=/srv/elsewhere\n"
    serving.run("mkdir", "/srv/elsewhere")
    serving.run("mv", f"/srv/hosts/{NAME}", "/srv/elsewhere")
    with overridden(serving, f"[Service]\n{elsewhere}{call}"):
        serving.run("systemctl", "restart", "sniproxy.service")
        with (
            started(serving, *CLIENT),
            started(serving, *CLIENT) as client,
            # A restart has to wait for this one, as long as it may.
            started(
                serving, "env", "--chdir=/srv/elsewhere", "python3", "-c", SILENT_CLIENT
            ) as silent,
        ):
            assert silent.stdout is not None
            assert silent.stdout.readline() == "connected\n"
            old = main_pid(serving)
            eventually(lambda: len(fetches(serving)) > 20)
            done = install(serving, newer)
            so_far = len(fetches(serving))
            eventually(lambda: len(fetches(serving)) > so_far + 20)
            serving.run("touch", "/run/enough")
            client.wait(PATIENCE)
            assert silent.communicate(timeout=PATIENCE)[0] == f"{said}\n"
        assert (done.returncode, done.stderr) == (0, "")
        # Nobody was refused, and nobody had to wait for the drain.
        assert {line.split()[0] for line in fetches(serving)} == {"fetched"}
        assert max(float(line.split()[1]) for line in fetches(serving)) < NO_WAIT
        assert main_pid(serving) not in {old, "0"}
        says = f"sniproxy {NEXT_VERSION} (compiled)\n"
        assert serving.run("sniproxy", "--version").stdout == says
        assert upgrades(serving) == ""
        serving.run("mv", f"/srv/elsewhere/{NAME}", "/srv/hosts")
    serving.run("rm", "--recursive", "/srv/elsewhere", "/run/enough", "/run/fetches")
    serving.run("systemctl", "restart", "sniproxy.service")
    fetch(serving)


def test_an_upgrade_replaces_copies_too(serving: Machine, package: Path) -> None:
    # The second one as an upgrade that did not come to its end leaves it.
    serving.run("systemctl", "start", COPY, "sniproxy@upgrade.service")
    serving.run("systemctl", "stop", "sniproxy.service")
    old = show("MainPID", serving, COPY)
    assert install(serving, package).returncode == 0
    eventually(lambda: show("MainPID", serving, COPY) not in {old, "0"})
    assert upgrades(serving) == ""
    fetch(serving)
    serving.run("systemctl", "stop", COPY)


@contextmanager
def overridden(machine: Machine, text: str) -> Iterator[None]:
    """An administrator's changes to the service, for the next start."""
    machine.write(OVERRIDE, text)
    machine.run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        machine.run("rm", "--recursive", str(Path(OVERRIDE).parent))
        machine.run("systemctl", "daemon-reload")


def copies_started(machine: Machine) -> int:
    """Return how often a copy was started for an upgrade."""
    log = machine.run("journalctl", "--output=cat", "--unit=sniproxy@upgrade.service").stdout
    return log.count("Starting sniproxy@upgrade.service")


def upgrades(machine: Machine) -> str:
    """Return what is left of the copy that serves during an upgrade: the unit, and its file."""
    units = machine.run("systemctl", "list-units", "--all", "--no-legend", "sniproxy@upgrade*")
    return units.stdout + machine.run("find", "/run/systemd/system", "-name", "sniproxy*").stdout


def fetches(machine: Machine) -> list[str]:
    return machine.run("cat", "/run/fetches", check=False).stdout.splitlines()


def test_removed_installed_again_and_purged(
    serving: Machine, package: Path, files_before: set[str]
) -> None:
    # Copies are gone with it: one that runs, and one that can't start.
    serving.write("/run/systemd/system/sniproxy@wrong.service.d/wrong.conf", WRONG_OPTION)
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "start", COPY)
    assert serving.run("systemctl", "start", "sniproxy@wrong", check=False).returncode != 0
    fetch(serving)
    serving.run("dpkg", "--remove", "sniproxy")
    assert listeners(serving) == 0
    assert serving.run("pgrep", "--exact", "sniproxy", check=False).stdout == ""
    for unit in "sniproxy.service", COPY, "sniproxy@wrong.service":
        assert show("ActiveState", serving, unit) == "inactive"
    serving.run("rm", "--recursive", "/run/systemd/system/sniproxy@wrong.service.d")

    # The administrator has enabled it, and not taken that back.
    assert install(serving, package).returncode == 0
    fetch(serving)

    serving.run("dpkg", "--purge", "sniproxy")
    assert listeners(serving) == 0
    assert files(serving) - files_before - COPIES == {
        "/srv/hosts",
        f"/srv/hosts/{NAME}",
        BACKEND,
    }
    serving.run("getent", "passwd", "sniproxy")
    assert is_enabled(serving) == ""
