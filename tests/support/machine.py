"""A Debian machine with systemd as its first process: a container that begins anew with each boot.

    with Machine() as machine:
        machine.install_wheel()
        machine.run("systemctl", "start", "something.service")

The tree is made once, by debootstrap, and kept in the user's cache; what a machine changes lives in
memory and goes with it. It has its own network, which is a loopback interface and nothing else, its
own processes and its own control groups. It takes root. Nothing stays behind: no mount, since they
all belong to the machine's namespaces, and no process, since all end with its first one.
"""

import contextlib
import faulthandler
import fcntl
import hashlib
import itertools
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.build import MEANT
from tests.support.daemon import PATIENCE, eventually

# Debian 12. Debian 13 is called trixie.
_SUITE: Final = "bookworm"

# What every machine has, beside the smallest system.
_PACKAGES: Final = ("curl", "openssl", "python3", "python3-venv", "systemd", "systemd-sysv")

# Seconds. A tree usually takes one or two minutes, and all else a few seconds; these are for slow
# networks, and for hosts that do much else.
_DEBOOTSTRAP: Final = 900.0
_PIP: Final = 300.0
_BOOT: Final = 30.0
_COMMAND: Final = 30.0

_CHECKOUT: Final = Path(__file__).parents[2]

# All that a command in the machine knows of ours.
_ENVIRONMENT: Final = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
}

# Puts itself into control groups, and becomes the command that follows their names. It ends when
# whoever started it does, however that comes about.
_ENTER_GROUPS: Final = """
while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" && shift || exit; done
shift
exec setpriv --pdeathsig TERM "$@"
"""

# Of the names of machines. The id of our process follows, and a number.
_PREFIX: Final = "sniproxy-tests-"

# Runs a command with the /usr of a tree, and with an overlay over a directory, where it may write.
# All else is as it is here.
_AS_IN_THE_TREE: Final = """
usr=$1 directory=$2 folder=$3
shift 3
layers=lowerdir=$directory,upperdir=$folder/upper,workdir=$folder/work
mount -t overlay -o "$layers" overlay "$directory"
mount --bind "$usr" /usr
exec "$@"
"""

_numbers = itertools.count(1)


def why_no_machine() -> str | None:
    """Return what is missing here for a machine, in words for people; None if nothing is."""
    if os.geteuid() != 0:
        return "only root can boot a machine"
    for program, package in (
        ("apt-get", "apt"),
        ("debootstrap", "debootstrap"),
        ("nsenter", "util-linux"),
        ("systemd-nspawn", "systemd-container"),
    ):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian package {package})"
    if subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "no namespaces are to be had here"
    if not any(kind == "cgroup2" and os.access(place, os.W_OK) for place, kind, _ in _mounts()):
        return "no control groups (cgroup2) are to be had here"
    if _mirror() is None:
        return "apt has no mirror of Debian here"
    return None


class Machine:
    """A machine, booted while the block runs.

    Args:
        packages: What it is to have of Debian, beside systemd, Python, curl and openssl. Each list
            has a tree of its own, to be made the first time.
        suite: Which Debian it is.

    Attributes:
        leader: The process id, out here, of the machine's first process.
        root: The machine's files, seen from out here. An absolute link in there leads to our own.
    """

    def __init__(self, packages: Sequence[str] = (), suite: str = _SUITE) -> None:
        self._suite = suite
        self._tree = _tree(suite, sorted({*_PACKAGES, *packages}))
        self._name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self._ends = contextlib.ExitStack()
        self.leader = 0
        self.root = Path("/nonexistent")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ends:
            self._boot(ends)
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def _boot(self, ends: contextlib.ExitStack) -> None:
        groups = ends.enter_context(_control_groups(self._name))
        nspawn = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            f"--directory={self._tree}",
            "--volatile=overlay",
            f"--machine={self._name}",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "--notify-ready=yes",
            "--console=pipe",
            # Allowed on any kernel that has it, and by a later systemd-nspawn.
            "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
            # For SIGTERM, which it gets if we are killed: the machine is to end at once.
            "--kill-signal=SIGKILL",
        ]
        with (
            tempfile.TemporaryFile() as console,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
        ):
            # An abstract one, unix(7): there is nothing to be removed.
            notified.bind(f"\0{self._name}")
            notified.settimeout(_BOOT)
            process = subprocess.Popen(
                ["sh", "-c", _ENTER_GROUPS, "sh", *groups, "--", *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": f"@{self._name}",
                    # Control groups as they are today, whatever the host has.
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                    # Several machines may run from one tree, since none changes it.
                    "SYSTEMD_NSPAWN_LOCK": "0",
                },
                # Ctrl-C is for pytest, which then ends us in order.
                start_new_session=True,
            )
            ends.callback(self._end, process)
            try:
                self._wait(notified)
            except TimeoutError:
                console.seek(0)
                said = console.read().decode(errors="replace")
                raise AssertionError(f"it does not boot:\n{said}") from None
            # The socket is closed now: what nobody would read, the machine would wait to tell.
        self.root = Path("/proc", str(self.leader), "root")

    def _wait(self, notified: socket.socket) -> None:
        """Wait until the machine says that it has booted, sd_notify(3), and learn its leader."""
        while True:
            for line in notified.recv(4096).decode().splitlines():
                if line == "READY=1":
                    return
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    self.leader = int(line.partition("=")[2])

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            if self.leader:
                # With the first process of a machine all others end, pid_namespaces(7).
                os.kill(self.leader, signal.SIGKILL)
            else:
                process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()

    def run(
        self,
        *argv: str,
        input: str | None = None,  # noqa: A002 - as in `subprocess`
        check: bool = True,
        timeout: float = _COMMAND,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root, and return what it said.

        Args:
            argv: The command.
            input: Its standard input.
            check: Whether it fails the test with its output if its exit code is not 0.
            timeout: In seconds, after which it fails in any case.
        """
        done = subprocess.run(
            self._inside(argv),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=_ENVIRONMENT,
        )
        if check and done.returncode:
            raise AssertionError(f"{argv}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command in the machine; its standard output and error are pipes."""
        return subprocess.Popen(
            self._inside(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_ENVIRONMENT,
        )

    def _inside(self, argv: Sequence[str]) -> list[str]:
        enter = [shutil.which("nsenter") or "nsenter", "--target", str(self.leader)]
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        # nsenter waits outside; the command itself ends when it is killed.
        return [*enter, *spaces, "setpriv", "--pdeathsig", "KILL", *argv]

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of root's in the machine, and the directories that lead to it."""
        # In there, where links lead where they should.
        self.run("install", "-D", f"--mode={mode:o}", "/dev/stdin", path, input=text)

    def install_wheel(
        self, *extras: str, venv: str = "/opt/sniproxy", wheel: Path | None = None
    ) -> None:
        """Install the checkout, as a wheel, into a new environment of the machine's Python.

        It is made out here, where there is a network and pip has been configured.

        Args:
            extras: those to be installed.
            venv: the new environment.
            wheel: one that is to be installed in the place of the checkout.
        """
        source = wheel or _CHECKOUT
        if wheel is None and MEANT == "compiled":
            # scripts/compiled-tree has left it there.
            [source] = _CHECKOUT.glob("dist/*.whl")
        checkout = f"{source}[{','.join(extras)}]" if extras else str(source)
        with self._environment(venv) as (made, pip):
            wheels = self._make_wheels(extras, pip)
            pip("install", "--no-index", f"--find-links={wheels}", checkout)
            shutil.copytree(made, self.root / venv.removeprefix("/"), symlinks=True)

    def bring_checkout(self, path: str, *extras: str, group: str | None = None) -> None:
        """Put the checkout there, as a clone has it; pip finds in the machine what it takes.

        Args:
            path: a new directory.
            extras: those that can be installed.
            group: the dependency group that can be.
        """
        with self._environment("/opt/wheels") as (_, pip):
            wheels = self._make_wheels(extras, pip, group)
        shutil.copytree(wheels, self.root / "srv/wheels")
        self.write("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /srv/wheels\n")
        listed = ["git", "-C", str(_CHECKOUT), "ls-files", "--cached", "--others"]
        files = subprocess.run(
            [*listed, "--exclude-standard"], check=True, capture_output=True, text=True
        )
        for file in files.stdout.splitlines():
            source, target = _CHECKOUT / file, self.root / path.removeprefix("/") / file
            if source.exists():  # else it has been removed, and that is not committed yet
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def _make_wheels(
        self, extras: Sequence[str], pip: Callable[..., None], group: str | None = None
    ) -> Path:
        """Return a directory with wheels of all that the checkout needs, made if need be."""
        pyproject = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())
        project = pyproject["project"]
        optional = [each for extra in extras for each in project["optional-dependencies"][extra]]
        # With the dependencies goes what builds the wheel, so that a second time no network is
        # needed.
        wanted = [*project["dependencies"], *optional, *pyproject["build-system"]["requires"]]
        if group is not None:
            wanted += [*pyproject["dependency-groups"][group], "editables"]
        with _kept(f"wheels-{_digest([self._suite, *wanted])}") as (wheels, new):
            if new is not None:
                pip("wheel", f"--wheel-dir={new}", *wanted)
        return wheels

    @contextlib.contextmanager
    def _environment(self, venv: str) -> Iterator[tuple[Path, Callable[..., None]]]:
        """Make an environment of the machine's Python, out here.

        Yields where it is to be found afterwards, and what runs its pip.
        """
        _take_time()
        with tempfile.TemporaryDirectory(prefix="sniproxy-") as folder:
            made = Path(folder, "upper", Path(venv).name)
            for directory in made.parent, made, Path(folder, "work"):
                directory.mkdir()
            # Whatever is at that place here is not seen through it, be it removed meanwhile.
            os.setxattr(made, "trusted.overlay.opaque", b"y")
            places = (str(self._tree / "usr"), str(Path(venv).parent), folder)

            def run(*command: str) -> None:
                _run_apart(("sh", "-euc", _AS_IN_THE_TREE, "sh", *places, *command), _PIP)

            pip = (f"{venv}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check")
            run("/usr/bin/python3", "-m", "venv", venv)
            yield made, partial(run, *pip)


# --- Control groups ------------------------------------------------------------------------------


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Yield place, type and options of every mounted filesystem, proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()
        yield before.split()[4], kind, options


@contextlib.contextmanager
def _control_groups(name: str) -> Iterator[list[str]]:
    """Make a control group below ours, in each hierarchy that systemd uses; remove it at the end.

    systemd-nspawn leaves groups behind, and two of them in one group would get in each other's way.
    """
    ours = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for place, kind, options in _mounts():
            if (controllers, kind) == ("", "cgroup2") or (
                controllers == "name=systemd" and controllers in options.split(",")
            ):
                ours.append(Path(place, path.removeprefix("/")))
                break
    groups = [group / name for group in ours]
    # Those of somebody who was killed.
    for group in ours:
        for other in group.glob(f"{_PREFIX}*"):
            if not Path("/proc", other.name.removeprefix(_PREFIX).partition("-")[0]).exists():
                _remove_group(other)
    try:
        for group in groups:
            group.mkdir()
        yield list(map(str, groups))
    finally:
        for group in groups:
            # The last processes take a moment to leave it.
            eventually(partial(_remove_group, group))


def _remove_group(group: Path) -> bool:
    """Remove a group with all that is in it; tell whether that was possible."""
    for each, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(each)
        except FileNotFoundError:
            pass
        except OSError:  # EBUSY
            return False
    return True


# --- What is kept --------------------------------------------------------------------------------


@contextlib.contextmanager
def _kept(name: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield the place for a directory in the cache; and if it is not there, where to make it.

    What is made there gets its place at the end of the block, as a whole, unless that fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sniproxy-tests")
    place = cache / name
    if place.exists():
        yield place, None
        return
    _take_time()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield place, None
            return
        new = cache / f"{name}.new"
        # Of somebody who was killed.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield place, new
            new.rename(place)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _take_time() -> None:
    """Allow this test to take longer than a test should, which is in pyproject.toml."""
    faulthandler.cancel_dump_traceback_later()


def _digest(lines: Sequence[str]) -> str:
    # 48 bits are enough not to mistake one for another.
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def plain_tree() -> Path:
    """Return the tree of a machine that has no other packages than each has."""
    return _tree(_SUITE, sorted(_PACKAGES))


def _tree(suite: str, packages: Sequence[str]) -> Path:
    """Return a Debian system with these packages, made if need be."""
    mirror = _mirror()
    assert mirror is not None
    with _kept(f"{suite}-{_digest(packages)}") as (place, new):
        if new is not None:
            _debootstrap(new, suite, packages, mirror)
    return place


def _debootstrap(tree: Path, suite: str, packages: Sequence[str], mirror: str) -> None:
    settings = {
        "http_proxy": _apt_setting("Acquire::http::Proxy"),
        "https_proxy": _apt_setting("Acquire::https::Proxy"),
        "ca_certificate": _apt_setting("Acquire::https::CaInfo"),
    }
    with tempfile.NamedTemporaryFile("w", prefix="sniproxy-") as wgetrc:
        # debootstrap fetches with wget, which is to go the way that apt goes.
        wgetrc.writelines(f"{key} = {value}\n" for key, value in settings.items() if value)
        wgetrc.flush()
        include = f"--include={','.join(packages)}"
        bootstrap = ("debootstrap", "--variant=minbase", include, suite, str(tree), mirror)
        _run_apart(bootstrap, _DEBOOTSTRAP, WGETRC=wgetrc.name)
    # A third of the size.
    for useless in "var/cache/apt", "var/lib/apt/lists":
        shutil.rmtree(tree / useless)


def _run_apart(command: Sequence[str], timeout: float, **environment: str) -> None:
    """Run a command in namespaces where whatever it mounts and starts ends with it, and it with us.

    Raises:
        AssertionError: its exit code is not 0.
    """
    done = subprocess.run(
        [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *command,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _mirror() -> str | None:
    """Return where this system, if it is a Debian, gets its packages from."""
    system = platform.freedesktop_os_release()
    if system["ID"] != "debian":
        return None
    format_ = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", format_, "Created-By: Packages"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        release, component, uri = line.split()
        if (release, component) == (system.get("VERSION_CODENAME"), "main"):
            return uri
    return None


def _apt_setting(name: str) -> str:
    command = ["apt-config", "dump", "--format", "%v", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
