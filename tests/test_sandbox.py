"""What whoever takes over the daemon can't do, while it serves."""

import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from sniproxy.service import libc, sandbox
from tests.support.backends import host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask

NAME = "a.example"

# By what the kernel has to offer for it, in the words of the log: what is tried, and the error.
STOPPED = {
    "files": {
        **dict.fromkeys(["read", "write", "create", "truncate", "list", "rename"], "EACCES"),
        **dict.fromkeys(["remove", "make_directory", "link", "proc", "execute"], "EACCES"),
    },
    "tcp": dict.fromkeys(["connect_tcp", "bind_tcp"], "EACCES"),
    "abstract_sockets": {"connect_abstract": "EPERM"},
    "signals": {"signal": "EPERM"},
    "network": dict.fromkeys(["tcp_socket", "udp_socket"], "EACCES"),
    "programs": dict.fromkeys(["execute", "execute_memory", "type"], "EACCES"),
}
LANDLOCK = ["files", "tcp", "abstract_sockets", "signals"]
WITHOUT_LANDLOCK = ["network", "programs"]
# And all that is tried, if nothing is forbidden; a traceback never is.
DONE = dict.fromkeys([name for tries in STOPPED.values() for name in tries] + ["trace"], "done")


@dataclass
class Surroundings:
    """What an intruder finds around him."""

    files: Path
    environment: dict[str, str]


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[Surroundings]:
    files = tmp_path / "files"
    files.mkdir()
    (files / "file").write_text("secret")
    (files / "pending").touch()
    abstract = f"sniproxy-test-{secrets.token_hex(8)}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(f"\0{abstract}")
        unix.listen()
        yield Surroundings(
            files,
            {
                "INTRUDER_FILES": str(files),
                "INTRUDER_TCP": str(tcp.getsockname()[1]),
                "INTRUDER_ABSTRACT": abstract,
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
        )


def taken_over(hosts: Path, surroundings: Surroundings, *options: str) -> Daemon:
    return start_daemon(
        hosts,
        *options,
        env=surroundings.environment,
        module="tests.support.intruder",
        measured=False,
    )


def fields(line: str) -> dict[str, str]:
    """Return what a line of the log says."""
    return dict(pair.split("=", 1) for pair in line.split()[2:])


def forbidden(daemon: Daemon) -> list[str]:
    return fields(daemon.wait_for_log("sandbox"))["forbids"].split(",")


def serves(daemon: Daemon) -> bool:
    """Tell whether all that a lookup takes is still allowed."""
    (host_directory(daemon.hosts, NAME) / "send-proxy-v1").touch()
    (daemon.hosts / "alias.example").symlink_to(NAME)
    with Greeter(daemon.hosts / NAME / "tls-socket", b"word") as backend:
        return (
            ask(daemon, NAME) == b"word"
            and ask(daemon, "alias.example") == b"word"
            and all(heard.startswith(b"PROXY TCP4 ") for heard in backend.heard)
            and ask(daemon, "b.example") == UNRECOGNIZED_NAME
        )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_whoever_takes_it_over_is_locked_in(
    hosts: Path, surroundings: Surroundings, workers: str
) -> None:
    with taken_over(hosts, surroundings, "--workers", workers) as daemon:
        came = fields(daemon.wait_for_log("intruder"))
        in_force = forbidden(daemon)
        assert serves(daemon)
    if "files" not in in_force:
        pytest.skip("the kernel has no Landlock: see landlock(7)")
    expected = dict(DONE)
    for what in in_force:
        expected |= STOPPED.get(what, {})
    if workers != "1":
        # The first process is in the same sandbox: they may signal each other.
        expected["signal"] = "done"
    assert came == expected
    assert {path.name for path in surroundings.files.iterdir()} == {"pending", "file"}
    assert (surroundings.files / "file").read_text() == "secret"


def test_below_the_hosts_directory_files_can_be_read_and_no_more(
    hosts: Path, surroundings: Surroundings
) -> None:
    """For the sake of `hold`."""
    surroundings.files.rename(hosts / "files")
    surroundings.environment["INTRUDER_FILES"] = str(hosts / "files")
    with taken_over(hosts, surroundings) as daemon:
        came = fields(daemon.wait_for_log("intruder"))
        in_force = forbidden(daemon)
    if "files" not in in_force:
        pytest.skip("the kernel has no Landlock: see landlock(7)")
    expected = STOPPED["files"] | dict.fromkeys(["read", "list"], "done")
    assert {name: came[name] for name in expected} == expected


def test_where_that_can_not_be_told_to_the_kernel_nothing_can_be_read(hosts: Path) -> None:
    """A unit of an earlier version has a filter that does not know the call."""

    def prepare() -> None:
        real = libc.call

        def call(name: str, *arguments: object) -> int:
            if name == "syscall" and arguments[0] == sandbox._LANDLOCK_ADD_RULE:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            return real(name, *arguments)

        libc.call = call  # type: ignore[assignment]

    assert entered(prepare, hosts)[0] == "new_privileges"


def test_this_kernel_offers_all_of_it(hosts: Path) -> None:
    """Else the test above would say little."""
    with start_daemon(hosts, measured=False) as sandboxed:
        in_force = forbidden(sandboxed)
    missing = {"new_privileges", *STOPPED} - set(in_force)
    if missing:
        pytest.skip(f"Linux {os.uname().release} has no means against {', '.join(missing)}")
    assert in_force == ["new_privileges", *STOPPED]


def test_without_a_sandbox_all_of_it_succeeds(hosts: Path, surroundings: Surroundings) -> None:
    """So what stops the intruder is the sandbox, and nothing else."""
    with taken_over(hosts, surroundings, "--no-sandbox") as daemon:
        assert forbidden(daemon) == ["nothing"]
        came = fields(daemon.wait_for_log("intruder"))
        # That takes root, and a kernel that still does it. But EACCES is never why not.
        assert came["type"] in ("done", "EPERM", "EIO")
        assert came == DONE | {"type": came["type"]}
        assert serves(daemon)


def no_new_privileges(daemon: Daemon) -> bool:
    status = Path("/proc", str(daemon.process.pid), "status").read_text()
    return "NoNewPrivs:\t1\n" in status


def test_no_program_it_runs_gains_privileges(hosts: Path) -> None:
    with start_daemon(hosts, measured=False) as daemon:
        assert no_new_privileges(daemon)
    with start_daemon(hosts, "--no-sandbox") as daemon:
        assert not no_new_privileges(daemon)


def entered(prepare: Callable[[], object], *readable: Path) -> list[str]:
    """Return what is forbidden in a sandbox that a child of ours enters: there is no way out."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Whatever happens, it does not go on with our tests.
        try:
            prepare()
            os.write(writing, ",".join(sandbox.enter(readable)).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with open(reading) as pipe:
        return pipe.read().split(",")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (0, []),
        (1, ["files"]),
        (3, ["files"]),
        (4, ["files", "tcp"]),
        (5, ["files", "tcp"]),
        (6, ["files", "tcp", "abstract_sockets", "signals"]),
        (99, ["files", "tcp", "abstract_sockets", "signals"]),
    ],
)
def test_an_older_kernel_gives_what_it_has(version: int, expected: list[str]) -> None:
    real = sandbox._landlock_version()
    if version > real and real < 6:
        pytest.skip(f"the Landlock of Linux {os.uname().release} has version {real}")

    def prepare() -> None:
        sandbox._landlock_version = lambda: version

    assert entered(prepare) == ["new_privileges", *expected, *WITHOUT_LANDLOCK]


# AUDIT_ARCH_..., linux/audit.h: 64 bits, the lowest byte first, and the number of elf.h.
ARCHITECTURES = {"x86_64": 0xC0000000 | 62, "aarch64": 0xC0000000 | 183}


@pytest.mark.parametrize(
    "machine", sorted({"x86_64", "aarch64", "riscv64", "alpha", "mips64"} - {os.uname().machine})
)
def test_on_a_machine_with_other_numbers_nothing_wrong_is_tried(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this one is: the wrong filter would forbid all calls, and no answer would come."""
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(machine=machine))
    if machine in sandbox._CALLS:
        # Not entered, then: only that there is one, and each comparison leads somewhere.
        program = sandbox._filter(sandbox._CALLS[machine], [socket.AF_UNIX, socket.AF_INET])
        assert program[1] == (sandbox._IF_EQUAL, 1, 0, ARCHITECTURES[machine])
        assert all(at + 1 + max(each[1:3]) < len(program) for at, each in enumerate(program[:-1]))
    else:
        has_landlock = sandbox._landlock_version() > 0
        assert has_landlock == (machine == "riscv64")
        assert entered(lambda: None) == (
            ["new_privileges", *LANDLOCK] if has_landlock else ["new_privileges"]
        )


# Numbers of prctl(2).
PRCTL = {"x86_64": 157, "aarch64": 167}


@pytest.mark.parametrize(
    ("call", "argument", "left", "number"),
    [
        *(
            ("landlock_create_ruleset", 0, WITHOUT_LANDLOCK, number)
            for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
        ),
        *(
            ("prctl", sandbox._PR_SET_SECCOMP, LANDLOCK, number)
            for number in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES)
        ),
    ],
)
def test_what_a_filter_hides_is_done_without(
    call: str, argument: int, left: list[str], number: int
) -> None:
    """As containers do. The filter that hides it is made in the way of ours."""
    machine = os.uname().machine
    if machine not in PRCTL:
        pytest.skip(f"there is no filter for {machine}")
    hidden = PRCTL[machine] if call == "prctl" else sandbox._LANDLOCK_CREATE_RULESET

    def prepare() -> None:
        ours = sandbox._filter
        sandbox._filter = lambda calls, families: [
            (sandbox._LOAD, 0, 0, sandbox._CALL),
            (sandbox._IF_EQUAL, 0, 3, hidden),
            (sandbox._LOAD, 0, 0, sandbox._FIRST),
            (sandbox._IF_EQUAL, 0, 1, argument),
            (sandbox._RETURN, 0, 0, sandbox._SECCOMP_RET_ERRNO | number),
            (sandbox._RETURN, 0, 0, sandbox._SECCOMP_RET_ALLOW),
        ]
        libc.call("prctl", sandbox._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        assert sandbox._enter_filter([socket.AF_UNIX])
        sandbox._filter = ours

    assert entered(prepare) == ["new_privileges", *left]


@pytest.mark.parametrize(
    ("call", "argument"), [("landlock_create_ruleset", 0), ("prctl", sandbox._PR_SET_SECCOMP)]
)
def test_what_is_there_and_fails_is_an_error(
    call: str, argument: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not done without: whoever asks for a sandbox gets all of it, or hears why not."""
    real = libc.call

    def fail(function: str, *arguments: object) -> int:
        wanted = (
            function == "prctl" and arguments[0] == argument
            if call == "prctl"
            else function == "syscall" and arguments[0] == sandbox._LANDLOCK_CREATE_RULESET
        )
        if wanted:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        return real(function, *arguments)

    monkeypatch.setattr(libc, "call", fail)
    with pytest.raises(OSError, match=os.strerror(errno.E2BIG)):
        if call == "prctl":
            sandbox._enter_filter([socket.AF_UNIX])
        else:
            sandbox._enter_landlock([], sandbox._BIND_TCP)


def test_a_python_of_32_bits_gets_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes other system calls, which the filter would all forbid."""
    monkeypatch.setattr("sys.maxsize", (1 << 31) - 1)
    assert entered(lambda: None) == ["new_privileges", *LANDLOCK]


def test_the_filter_bars_programs_even_without_landlock() -> None:
    """Tried with arguments that are none: the kernel would find another error."""
    calls = sandbox._CALLS.get(os.uname().machine)
    if calls is None:
        pytest.skip(f"there is no filter for {os.uname().machine}")
    numbers = calls.execve, calls.execveat, sandbox._IO_URING_SETUP

    def is_barred(number: int) -> bool:
        try:
            libc.call("syscall", number, 0, 0, 0, 0, 0)
        except OSError as error:
            return error.errno == errno.EACCES
        return False

    assert not any(map(is_barred, numbers))
    if (pid := os.fork()) == 0:
        code = 1
        try:
            libc.call("prctl", sandbox._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            has_filter = sandbox._enter_filter([socket.AF_UNIX])
            code = 0 if not has_filter or all(map(is_barred, numbers)) else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_number_is_passed_whole(tmp_path: Path) -> None:
    """Not its lower 32 bits, as ctypes does with an int."""
    with (tmp_path / "file").open("wb") as file:
        libc.call("lseek", file.fileno(), 1 << 32, os.SEEK_SET)
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 1 << 32


def test_who_connects_and_reads_its_configuration_is_left_that_and_no_more(tmp_path: Path) -> None:
    """Tried in a child: nobody comes out again."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "file").write_text("x")
    (tmp_path / "outside").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()

        def bind() -> None:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))

        tries: dict[str, Callable[[], object]] = {
            "read": lambda: (inside / "file").read_text(),
            "list": lambda: os.listdir(inside),
            "connect": lambda: socket.create_connection(address).close(),
            "resolve": lambda: socket.getaddrinfo("localhost", 1),
            "write": lambda: (inside / "file").write_text("y"),
            "create": lambda: (inside / "new").touch(),
            "read_outside": lambda: (tmp_path / "outside").read_text(),
            "bind": bind,
            "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
            "run": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
        }
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            forbidden = sandbox.enter([inside, Path("/etc"), tmp_path / "absent"], may_connect=True)
            done = [name for name, attempt in tries.items() if _succeeds(attempt)]
            os.write(writer, " ".join([",".join(forbidden), *done]).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(writer)
        with open(reader, "rb") as file:
            words, *done = file.read().decode().split()
    if set(words.split(",")) < {"files", "tcp", "network", "programs"}:
        pytest.skip(f"this kernel forbids {words} only")
    assert done == ["read", "list", "connect", "resolve"]


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("error", [FileNotFoundError, NotADirectoryError, PermissionError])
def test_a_directory_that_is_out_of_reach_is_not_allowed_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def out_of_reach(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", out_of_reach)
    monkeypatch.setattr(libc, "call", None)  # no rule is added
    sandbox._allow_to_read(-1, Path("/srv/anywhere"))
