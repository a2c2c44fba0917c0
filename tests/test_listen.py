"""sniproxy-listen: what it binds, what it refuses, and the program that it becomes."""

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sniproxy.service.bind import check, listen, listen_anywhere, parse
from sniproxy.service.fatal import FatalError

LISTEN = [sys.executable, "-P", "-m", "sniproxy.listen"]

# Says what its standard input is.
LOOK = [
    sys.executable,
    "-c",
    """
import socket, sys
s = socket.socket(fileno=0)
listens = s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
v6only = s.family == socket.AF_INET6 and s.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
print(s.family.name, s.getsockname()[0], listens, v6only, sys.argv[1:])
""",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LISTEN, *arguments], capture_output=True, text=True, timeout=10)


def only_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("sniproxy-listen: fatal: unable to ")
    assert result.returncode == code
    return line


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("127.0.0.1:0", "AF_INET 127.0.0.1 1 False"),
        ("0.0.0.0:0", "AF_INET 0.0.0.0 1 False"),
        (":0", "AF_INET6 :: 1 0"),
        ("[::]:0", "AF_INET6 :: 1 0"),
        ("[::1]:0", "AF_INET6 ::1 1 1"),
    ],
)
def test_the_program_gets_the_socket_and_its_arguments(where: str, found: str) -> None:
    result = run(where, *LOOK, "--help", "-x", "")
    assert result.stdout == f"{found} ['--help', '-x', '']\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_as_many_may_wait_as_the_kernel_lets() -> None:
    with listen("127.0.0.1:0") as listening:
        # Of a listening socket, tcpi_sacked in struct tcp_info is the longest queue it may have.
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    [longest] = struct.unpack_from("I", info, 28)
    assert longest == int(Path("/proc/sys/net/core/somaxconn").read_text())


def test_standard_input_may_have_been_closed() -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *LISTEN, "127.0.0.1:0", *LOOK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    assert result.stdout == "AF_INET 127.0.0.1 1 False []\n"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("443", "not of the form ADDRESS:PORT"),
        ("::1:443", "not of the form ADDRESS:PORT"),
        ("127.0.0.1:", "not of the form ADDRESS:PORT"),
        ("127.0.0.1:https", "not of the form ADDRESS:PORT"),
        ("127.0.0.1:-1", "not of the form ADDRESS:PORT"),
        ("127.0.0.1:65536", "no port is higher than 65535"),
        ("*:443", "'*' is not a numeric IPv4 address"),
        ("[*]:443", "'*' is not a numeric IPv6 address"),
        ("127.1:443", "'127.1' is not a numeric IPv4 address"),
        ("2130706433:443", "'2130706433' is not a numeric IPv4 address"),
        ("localhost:443", "'localhost' is not a numeric IPv4 address"),
        ("256.0.0.1:443", "'256.0.0.1' is not a numeric IPv4 address"),
        ("[127.0.0.1]:443", "'127.0.0.1' is not a numeric IPv6 address"),
        ("[]:443", "'' is not a numeric IPv6 address"),
        ("\N{ARABIC-INDIC DIGIT ONE}:443", "is not a numeric IPv4 address"),
        ("127.0.0.1:\N{ARABIC-INDIC DIGIT ONE}", "not of the form ADDRESS:PORT"),
    ],
)
def test_what_is_no_address_is_refused(where: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse(where)


def test_a_wrong_call_is_explained() -> None:
    assert "'nonsense'" in only_line(run("nonsense", "true"), code=100)
    for arguments in [], [":0"], [":0", ""], ["--unknown"], ["-x", "true"]:
        assert "usage: sniproxy-listen ADDRESS:PORT PROGRAM" in only_line(run(*arguments), code=100)


def test_an_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert only_line(run(where, "true"), code=111) == (
            f"sniproxy-listen: fatal: unable to listen on {where}: Address already in use"
        )


def test_an_address_of_another_machine_is_named() -> None:
    line = only_line(run("192.0.2.1:0", "true"), code=111)
    assert "192.0.2.1:0: Cannot assign requested address" in line


def test_a_program_that_is_not_there_is_named() -> None:
    line = only_line(run(":0", "/nonexistent/program"), code=111)
    assert line.endswith("unable to run '/nonexistent/program': No such file or directory")


def test_a_kernel_without_ipv6_has_all_addresses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.socket

    def fail(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return create(family, kind)

    monkeypatch.setattr("sniproxy.service.bind.socket.socket", fail)
    with listen(":0") as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


def test_the_program_ignores_no_signal_that_we_did_not() -> None:
    result = run("127.0.0.1:0", "grep", "SigIgn", "/proc/self/status")
    assert int(result.stdout.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_help_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*LISTEN, "--help"], stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 111
        assert b"unable to write standard output" in result.stderr
        assert subprocess.run([*LISTEN, "nonsense"], stderr=full).returncode == 100


def test_help_and_version() -> None:
    assert run("--help").stdout.startswith("usage: sniproxy-listen ADDRESS:PORT PROGRAM")
    assert run("--version").stdout.startswith("sniproxy-listen ")


# --- Unix sockets, for programs that listen by themselves


def test_a_path_is_what_has_a_slash(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    assert [check(each) for each in (path, ":0")] == [path, ":0"]
    with pytest.raises(ValueError, match="107 bytes at most"):
        check("/" + 107 * "x")
    for _ in range(2):  # the second one finds what the first has left
        with listen_anywhere(path) as listening, socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            listening.accept()[0].close()
    with listen_anywhere("127.0.0.1:0") as listening:
        assert listening.family == socket.AF_INET


def test_it_is_for_everybody_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o077)
    try:
        listen_anywhere(str(path)).close()
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666


def test_who_is_there_is_not_driven_away(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    def fails(why: int) -> None:
        with pytest.raises(FatalError, match=f"listen on {path}: {os.strerror(why)}"):
            listen_anywhere(path)

    place = Path(path)
    place.write_text("a file")
    fails(errno.EEXIST)
    assert place.read_text() == "a file"
    place.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(path)
        fails(errno.EADDRINUSE)
    place.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        for _ in range(2):  # the second one finds the queue full
            fails(errno.EADDRINUSE)
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    fails(errno.EEXIST)
    path = str(tmp_path / "absent" / "socket")
    fails(errno.ENOENT)
