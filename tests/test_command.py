"""sniproxy's command line: what it refuses to start with, and how it says so."""

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import sniproxy
from sniproxy.__main__ import _config
from sniproxy.config import Config
from sniproxy.service import listen_fds
from sniproxy.service.options import OptionParser, ServiceOptions, service_fields
from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.build import MEANT
from tests.support.daemon import COVERAGE, start_daemon
from tests.support.greeting import Greeter, ask
from tests.support.sockets import receive_all, receive_exactly
from tests.support.supervisor import Supervisor

PROGRAM = [sys.executable, "-P", "-m", "sniproxy"]


def run(
    *options: str,
    stdin: int | None = subprocess.DEVNULL,
    cwd: Path | None = None,
    under: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run it where it is to fail; `under` is a command that becomes the daemon."""
    return subprocess.run(
        [*under, *PROGRAM, *options],
        stdin=stdin,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=10,
    )


def only_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line on standard error that explains the exit code."""
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("sniproxy: fatal: unable to ")
    assert result.returncode == code
    return line


@contextmanager
def a_file(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "file").open("w+") as file:
        yield file.fileno()


@contextmanager
def a_device(tmp_path: Path) -> Iterator[int]:
    with open(os.devnull) as null:
        yield null.fileno()


@contextmanager
def a_pipe(tmp_path: Path) -> Iterator[int]:
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


@contextmanager
def a_terminal(tmp_path: Path) -> Iterator[int]:
    ends = pty.openpty()
    yield ends[1]
    for end in ends:
        os.close(end)


@contextmanager
def a_udp_socket(tmp_path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock.fileno()


@contextmanager
def a_unix_socket(tmp_path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        yield sock.fileno()


@contextmanager
def a_netlink_socket(tmp_path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        yield sock.fileno()


@contextmanager
def a_tcp_socket_that_does_not_listen(tmp_path: Path) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.fileno()


@contextmanager
def a_connected_tcp_socket(tmp_path: Path) -> Iterator[int]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as sock,
    ):
        yield sock.fileno()


@pytest.mark.parametrize(
    ("standard_input", "called"),
    [
        (a_file, "a file"),
        (a_device, "a device"),
        (a_pipe, "a pipe"),
        (a_terminal, "a terminal"),
        (a_udp_socket, "a UDP socket"),
        (a_unix_socket, "a Unix socket"),
        (a_netlink_socket, "not a TCP socket"),
        (a_tcp_socket_that_does_not_listen, "a TCP socket that does not listen"),
        (a_connected_tcp_socket, "a TCP socket that does not listen"),
    ],
)
def test_standard_input_is_no_listening_tcp_socket(
    standard_input: Callable[[Path], AbstractContextManager[int]], called: str, tmp_path: Path
) -> None:
    with standard_input(tmp_path) as fd:
        line = only_line(run(stdin=fd), code=100)
    assert f"it is {called};" in line
    assert "pass one like this: sniproxy-listen :443 sniproxy " in line
    assert "systemd service: StandardInput=socket, and a socket unit of the same name" in line
    assert line.endswith(", or Sockets=)")


def test_standard_input_is_closed() -> None:
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *PROGRAM], capture_output=True, text=True, timeout=10
    )
    assert "it is closed;" in only_line(result, code=100)


@pytest.mark.parametrize("option", ["--unknown", "--hash", "-x", "argument", "--workers"])
def test_an_unknown_option_is_refused(option: str) -> None:
    assert option in only_line(run(option), code=100)


def test_an_unknown_option_is_called_just_that() -> None:
    assert "unknown option '--worker' (see sniproxy --help)" in only_line(run("--worker"), code=100)
    assert "unknown argument 'worker'" in only_line(run("worker"), code=100)


@pytest.mark.parametrize(
    "number",
    ["0", "-1", "x", "1025", "1.5", "", " 2", "1_0", "\N{FULLWIDTH DIGIT TWO}", "9" * 5000],
)
def test_a_number_of_workers_that_is_none_is_refused(number: str) -> None:
    line = only_line(run(f"--workers={number}"), code=100)
    assert line.startswith("sniproxy: fatal: unable to understand the options: ")
    assert "--workers" in line
    assert "from 1 to 1024" in line


@pytest.mark.parametrize("number", ["0", "-1", "x", "1e3", "1000000000"])
def test_a_number_of_connections_that_is_none_is_refused(number: str) -> None:
    line = only_line(run(f"--max-connections={number}"), code=100)
    assert "--max-connections" in line
    assert "from 1 to 999999999" in line


@pytest.mark.parametrize("option", ["--drain", "--idle-timeout", "--half-closed-timeout"])
@pytest.mark.parametrize("seconds", ["-1", "x", "1e3", "", " 2", "1.", ".5", "inf", "1000000000"])
def test_seconds_that_are_none_are_refused(option: str, seconds: str) -> None:
    line = only_line(run(f"{option}={seconds}"), code=100)
    assert option in line
    assert "is not a number of seconds from 0 to " in line


@pytest.mark.parametrize(
    "options",
    [
        ["--drain=0", "--idle-timeout=0.5", "--half-closed-timeout=31536000"],
        ["--drain=86400", "--workers=4", "--max-connections=4", "--log=connections"],
        [f"--user={os.getuid() or 65534}:65534", "--chroot", "--hashed"],
    ],
)
def test_options_can_be_checked(options: list[str], tmp_path: Path) -> None:
    """Without a socket, and in a directory that is no hosts directory."""
    result = run("--check-options", *options, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--worker=4", "unknown option '--worker=4'"),
        ("--drain=86401", "not a number of seconds from 0 to 86400"),
        ("--user=nobody-of-that-name", "there is no user"),
        ("--user=root", "root would keep its privileges"),
    ],
)
def test_options_that_are_wrong_do_not_pass_the_check(option: str, complaint: str) -> None:
    assert complaint in only_line(run("--check-options", option), code=100)


def test_every_option_reaches_the_configuration() -> None:
    options = ["--hashed", "--no-owner-check", "--no-sandbox", "--chroot", "--user", "nobody"]
    options += ["--workers", "2", "--max-connections", "30", "--log", "connections"]
    options += ["--handoff", "--upgrade-socket", "/run/upgrade"]
    options += ["--drain", "4", "--idle-timeout", "5", "--half-closed-timeout", "6"]
    assert _config(options) == Config(
        hashed=True,
        check_owner=False,
        hands_over=True,
        upgrade_socket="/run/upgrade",
        sandbox=False,
        chroot=True,
        user="nobody",
        workers=2,
        max_connections=30,
        log_connections=True,
        drain_seconds=4.0,
        idle_seconds=5.0,
        half_closed_seconds=6.0,
    )


def test_fewer_connections_than_workers_are_refused() -> None:
    line = only_line(run("--max-connections=2", "--workers=3"), code=100)
    assert "--max-connections 2 is less than one for each of 3 workers" in line


def test_a_log_that_is_none_is_refused() -> None:
    line = only_line(run("--log=everything"), code=100)
    assert "--log" in line
    assert "'errors', 'connections'" in line


def test_a_mistake_has_its_exit_code_even_if_nobody_hears_of_it() -> None:
    with open("/dev/full", "w") as full:
        for options in [], ["--unknown"]:
            result = subprocess.run(
                [*PROGRAM, *options], stdin=subprocess.DEVNULL, stderr=full, timeout=10
            )
            assert result.returncode == 100
        result = subprocess.run([*PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 111
    assert result.stderr.startswith(b"sniproxy: fatal: unable to write standard output")


def test_the_supervisor_is_told_of_a_mistake(supervisor: Supervisor) -> None:
    """systemctl status shows it, even where the journal does not know whose line it was."""
    line = only_line(run("--worker", env=os.environ | supervisor.environment), code=100)
    assert supervisor.hear("STATUS=") == "STATUS=" + line.removeprefix("sniproxy: fatal: ")


def test_a_mistake_of_several_lines_is_told_in_one() -> None:
    assert "'a\\nb'" in only_line(run("a\nb"), code=100)


def test_a_file_that_is_all_three_is_told_of_a_mistake(tmp_path: Path) -> None:
    """Only where all three are one socket it is inetd, and syslog is told."""
    path = tmp_path / "file"
    with path.open("w+") as file:
        result = subprocess.run(
            [*PROGRAM, "--unknown"], stdin=file, stdout=file, stderr=file, timeout=10
        )
    assert result.returncode == 100
    assert path.read_text().startswith("sniproxy: fatal: unable to understand the options")


def test_the_help_says_what_it_is_and_what_each_option_does() -> None:
    described, _, rest = run("--help").stdout.partition("\noptions:\n")
    assert "Route TLS connections by server name" in described
    options, _, _ = rest.partition("\n\n")
    for option in options.removeprefix("  -").split("\n  -"):
        # Two spaces, or the next line, part it from its explanation.
        assert re.match(r"(\S| (?! ))+\s{2,}[a-z]+ ", option), option


def test_the_defaults_are_those_of_the_contract() -> None:
    parser = OptionParser("program", "what it is", "program")
    parser.add_service_options()
    options = parser.understand([])
    assert options is not None
    assert ServiceOptions(**service_fields(options)) == ServiceOptions()
    assert _config([]) == Config()


def test_help_and_version_need_no_socket() -> None:
    result = run("--help")
    assert "--hashed" in result.stdout
    for option in "--workers N", "--max-connections N", "--no-owner-check", "--log {errors,":
        assert option in result.stdout
    for option in "--drain", "--idle-timeout", "--half-closed-timeout":
        assert f"\n  {option} SECONDS" in result.stdout
    assert "\n  --user NAME[:GROUP]" in result.stdout
    assert (result.returncode, result.stderr) == (0, "")
    result = run("--version")
    assert result.stdout == f"sniproxy {sniproxy.__version__} ({MEANT})\n"
    assert (result.returncode, result.stderr) == (0, "")


# --- LISTEN_FDS, as of systemd without StandardInput=socket

# Becomes the daemon with LISTEN_PID its own, and descriptor 3 what was standard input.
AS_LISTEN_FDS = ("sh", "-c", 'export LISTEN_PID=$$; exec 3<&0 "$@" </dev/null', "sh")
TWO_SOCKETS = ("sh", "-c", 'export LISTEN_PID=$$; exec 3<&0 4<&0 "$@" </dev/null', "sh")


def test_a_socket_may_come_by_listen_fds(hosts: Path) -> None:
    backend = Greeter(host_directory(hosts, "a.example") / "tls-socket", b"word")
    with backend, start_daemon(hosts, under=AS_LISTEN_FDS, env={"LISTEN_FDS": "1"}) as daemon:
        assert ask(daemon, "a.example") == b"word"
        daemon.signal(signal.SIGHUP)
        assert daemon.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            daemon.connect()


def test_a_drain_closes_the_port_of_listen_fds_while_somebody_is_served(hosts: Path) -> None:
    with (
        RawBackend(host_directory(hosts, "a.example") / "tls-socket") as backend,
        start_daemon(hosts, under=AS_LISTEN_FDS, env={"LISTEN_FDS": "1"}) as daemon,
        daemon.connect() as client,
    ):
        client.sendall(hellos.hello_bytes("a.example"))
        with backend.accept():
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_log("draining")
            with pytest.raises(ConnectionRefusedError):
                daemon.connect()


def test_listen_fds_serve_where_standard_input_is_closed(hosts: Path) -> None:
    under = ("sh", "-c", 'export LISTEN_PID=$$; exec 3<&0 <&- "$@"', "sh")
    with start_daemon(hosts, under=under, env={"LISTEN_FDS": "1"}) as daemon:
        assert ask(daemon, "a.example").startswith(b"\x15")
        assert os.readlink(f"/proc/{daemon.process.pid}/fd/0") == os.devnull


def test_listen_fds_win_over_standard_input_which_is_closed(hosts: Path) -> None:
    """They are addressed to the process. Of the other port nobody would accept."""
    script = (
        "import os, socket, sys; os.dup2(0, 3); other = socket.create_server(('127.0.0.1', 0)); "
        "os.dup2(other.fileno(), 0); os.environ['LISTEN_PID'] = str(os.getpid()); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    under = (sys.executable, "-c", script)
    with start_daemon(hosts, under=under, env={"LISTEN_FDS": "1"}) as daemon:
        assert ask(daemon, "a.example").startswith(b"\x15")
        assert os.readlink(f"/proc/{daemon.process.pid}/fd/0") == os.devnull


def test_what_is_passed_is_taken_once() -> None:
    ours = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    environment = ours | {"LISTEN": "stays"}
    assert list(listen_fds.take(environment)) == [3, 4]
    assert environment == {"LISTEN": "stays"}
    assert not listen_fds.take(environment)


@pytest.mark.parametrize("pid", ["", "1", "x", "-1", f" {os.getpid()}"])
def test_what_is_passed_to_others_is_not_taken(pid: str) -> None:
    environment = {"LISTEN_PID": pid, "LISTEN_FDS": "1"}
    assert not listen_fds.take(environment)
    assert not environment


def test_listen_fds_of_another_process_are_not_for_us(hosts: Path) -> None:
    with start_daemon(hosts, env={"LISTEN_FDS": "1", "LISTEN_PID": "1"}) as daemon:
        assert ask(daemon, "a.example").startswith(b"\x15")


@pytest.mark.parametrize("count", ["0", "-1", "x", "", "1" * 5000])
def test_listen_fds_that_are_no_number_are_none(hosts: Path, count: str) -> None:
    under = ("sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh")
    with start_daemon(hosts, under=under, env={"LISTEN_FDS": count}) as daemon:
        assert ask(daemon, "a.example").startswith(b"\x15")


def test_more_sockets_than_one_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        environment = os.environ | {"LISTEN_FDS": "2"}
        result = run(stdin=listening.fileno(), under=TWO_SOCKETS, env=environment)
    line = only_line(result, code=100)
    assert "LISTEN_FDS passes 2 sockets; start one copy for each socket" in line


def test_a_socket_of_listen_fds_that_does_not_listen() -> None:
    with socket.socket() as sock:
        environment = os.environ | {"LISTEN_FDS": "1"}
        result = run(stdin=sock.fileno(), under=AS_LISTEN_FDS, env=environment)
    line = only_line(result, code=100)
    assert "LISTEN_FDS must be a listening TCP socket, but it is a TCP socket that does not" in line


def test_more_connections_than_there_can_be_are_warned_of(hosts: Path) -> None:
    with start_daemon(hosts, "--max-connections", "10000000", "--workers", "2") as daemon:
        line = daemon.wait_for_log("capacity")
        given = int(line.partition("given=")[2].split()[0])
        assert "asked=10000000" in line
        assert "RLIMIT_NOFILE (LimitNOFILE= in systemd)" in line
        assert f"capacity={given // 2}" in daemon.wait_for_log("listening")


def test_enough_connections_are_no_warning(hosts: Path) -> None:
    with start_daemon(hosts, "--max-connections", "10") as daemon:
        assert "capacity=10" in daemon.wait_for_log("listening")
        assert not any(line.startswith("sniproxy: capacity ") for line in daemon.log())


def test_it_says_which_directory_it_serves_in_the_bytes_that_the_kernel_has(tmp_path: Path) -> None:
    hosts = Path(os.fsdecode(os.fsencode(tmp_path) + b"/h\xc3\xb4tes \xff"))
    hosts.mkdir()
    with start_daemon(hosts) as daemon:
        log = "\n".join(daemon.log())
        assert f'hosts="{tmp_path}/h\\xc3\\xb4tes \\xff"' in log


def test_without_a_sandbox_it_says_that_nothing_is_forbidden(hosts: Path) -> None:
    with start_daemon(hosts, "--no-sandbox") as daemon:
        assert daemon.wait_for_log("sandbox") == "sniproxy: sandbox forbids=nothing"


def test_it_says_which_directory_it_serves(hosts: Path) -> None:
    with start_daemon(hosts) as daemon:
        assert f"hosts={hosts}" in daemon.wait_for_log("listening")


def test_the_hosts_directory_is_gone(hosts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *PROGRAM]
        result = subprocess.run(
            command, stdin=listening.fileno(), cwd=hosts, capture_output=True, text=True, timeout=10
        )
    assert "hosts directory" in only_line(result, code=100)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("number", "code"), [("ENFILE", 111), ("EIO", 111), ("EACCES", 100)])
def test_what_may_get_better_is_no_wrong_call(hosts: Path, number: str, code: int) -> None:
    """A supervisor tries again, or does not."""
    fail = (
        *("strace", "--quiet=path-resolution,exit", "--output", os.devnull),
        *("--trace-path", ".", "--inject", f"openat:error={number}"),
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        result = run(stdin=listening.fileno(), cwd=hosts, under=fail)
    assert "unable to search the hosts directory" in only_line(result, code)


def test_inetd_lets_go_of_the_port(hosts: Path) -> None:
    # inetd's "wait" mode: the listening socket is standard input, output and error.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        process = subprocess.Popen(
            PROGRAM,
            stdin=listening.fileno(),
            stdout=listening.fileno(),
            stderr=listening.fileno(),
            cwd=hosts,
        )
    try:
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(b"x")
            assert receive_all(client) == bytes([21, 3, 3, 0, 2, 2, 10])
        with RawBackend(host_directory(hosts, "a.example") / "tls-socket") as backend:
            flight = hellos.hello_bytes("a.example")
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(flight)
                with backend.accept() as connection:
                    assert receive_exactly(connection, len(flight)) == flight
                    process.send_signal(signal.SIGHUP)
                    # Somebody is served still, and yet the port is closed.
                    while True:
                        try:
                            socket.create_connection(address, timeout=10).close()
                        except ConnectionResetError:
                            pass  # it was half open when the port closed
                        except ConnectionRefusedError:
                            break
                    assert process.poll() is None
        assert process.wait(timeout=5) == 0
    finally:
        process.kill()
        process.wait()


def test_a_mistake_under_inetd_has_its_exit_code(hosts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        process = subprocess.run([*PROGRAM, "--x"], stdin=fd, stdout=fd, stderr=fd, timeout=10)
    assert process.returncode == 100


def test_a_mistake_under_inetd_is_told_to_syslogd(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    script = (
        "import sys; from sniproxy.service import syslogd; syslogd._DEV_LOG = sys.argv.pop(1); "
        "from sniproxy.__main__ import main; sys.exit(main())"
    )
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        syslogd.bind(path)
        fd = listening.fileno()
        command = [sys.executable, "-P", "-c", script, path, "--x"]
        process = subprocess.run(command, stdin=fd, stdout=fd, stderr=fd, timeout=10)
        line = syslogd.recv(1000, socket.MSG_DONTWAIT).decode()
    assert process.returncode == 100
    assert line.startswith("<27>")  # daemon.err
    assert ": fatal: unable to understand the options: unknown option '--x'" in line


def test_it_may_have_as_many_descriptors_as_the_hard_limit_says(hosts: Path) -> None:
    with start_daemon(hosts) as daemon:
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text().splitlines()
        [line] = [line for line in limits if line.startswith("Max open files")]
        soft, hard = line.split()[3:5]
        assert soft == hard


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_with_too_few_descriptors_it_does_not_start(hosts: Path, options: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        few = ("prlimit", "--nofile=25")
        result = run(*options, stdin=listening.fileno(), cwd=hosts, under=few)
    assert "RLIMIT_NOFILE" in only_line(result, 111)


def test_where_others_have_taken_the_descriptors_it_says_so(hosts: Path) -> None:
    """Enough are allowed, but who started it has left some of them open."""
    script = 'for fd in $(seq 3 17); do eval "exec $fd</dev/null"; done; exec "$@"'
    with socket.create_server(("127.0.0.1", 0)) as listening:
        result = run(
            stdin=listening.fileno(),
            cwd=hosts,
            under=("prlimit", "--nofile=26", "bash", "-c", script, "bash"),
            # In the sandbox no measurement could be saved.
            env={key: value for key, value in os.environ.items() if key != COVERAGE},
        )
    *bug, last = [line for line in result.stderr.splitlines() if " sandbox " not in line]
    assert last.startswith("sniproxy: fatal: unable to serve: ")
    assert all(line.startswith("sniproxy: bug ") for line in bug)
    assert "Too many open files" in bug[-1]
    assert result.returncode == 111


def test_with_just_enough_descriptors_it_serves(hosts: Path) -> None:
    with (
        start_daemon(hosts, under=("prlimit", "--nofile=26")) as daemon,
        Greeter(host_directory(hosts, "a.example") / "tls-socket", b"word"),
    ):
        for _ in range(5):
            assert ask(daemon, "a.example") == b"word"


def test_a_daemon_started_with_a_closed_standard_error_serves(hosts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *PROGRAM]
        process = subprocess.Popen(command, stdin=listening.fileno(), cwd=hosts)
        with socket.create_connection(listening.getsockname(), timeout=10) as client:
            client.sendall(b"x")
            assert receive_all(client) == bytes([21, 3, 3, 0, 2, 2, 10])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
