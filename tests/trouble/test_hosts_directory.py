"""What tenants and administrators do to the hosts directory while connections come in."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask

NAME = "a.example"

# Root may do what the mode of a directory forbids, unless it gives these up, capabilities(7).
NO_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def link_loop(path: Path) -> None:
    path.symlink_to(path.name)


def datagram_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        directory = os.open(path.parent, os.O_PATH)
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Path.touch, "not_listening", id="file"),
        pytest.param(Path.mkdir, "not_listening", id="directory"),
        pytest.param(os.mkfifo, "not_listening", id="FIFO"),
        pytest.param(datagram_socket, "not_listening", id="datagram socket nobody has"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "no_socket", id="dangling link"),
        pytest.param(link_loop, "link_loop", id="link loop"),
    ],
)
def test_a_tls_socket_that_is_no_listening_socket(
    daemon: Daemon, make: Callable[[Path], object], reason: str
) -> None:
    make(host_directory(daemon.hosts, NAME) / "tls-socket")
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log(f"reason={reason}")


def test_a_tls_socket_that_is_a_datagram_socket(daemon: Daemon) -> None:
    path = host_directory(daemon.hosts, NAME) / "tls-socket"
    directory = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log("reason=not_a_stream_socket")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Path.touch, "no_such_host", id="file"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "no_such_host", id="dangling link"),
        pytest.param(link_loop, "link_loop", id="link loop"),
    ],
)
def test_a_host_that_is_no_directory(
    daemon: Daemon, make: Callable[[Path], object], reason: str
) -> None:
    make(daemon.hosts / NAME)
    assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log(f"reason={reason}")


def test_a_host_directory_without_search_permission(hosts: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may search any directory, and there is no setpriv (util-linux)")
    under = NO_OVERRIDE if os.geteuid() == 0 else ()
    directory = host_directory(hosts, NAME)
    with start_daemon(hosts, under=under) as daemon, Greeter(directory / "tls-socket", b"a"):
        directory.chmod(0)
        try:
            assert ask(daemon, NAME) == UNRECOGNIZED_NAME
            assert "refused" in daemon.wait_for_log("reason=permission_denied")
        finally:
            directory.chmod(0o755)
        # The way back was not barred.
        assert ask(daemon, NAME) == b"a"


@contextmanager
def again_and_again(action: Callable[[int], None], times: int) -> Iterator[threading.Thread]:
    """Do something so many times in another thread, while the block goes on."""

    def run() -> None:
        for number in range(times):
            action(number)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def test_a_host_that_is_removed_while_clients_connect(daemon: Daemon, tmp_path: Path) -> None:
    directory = daemon.hosts / NAME

    def come_or_go(number: int) -> None:
        if number % 2:
            shutil.rmtree(directory)
        else:
            host_directory(daemon.hosts, NAME)
            (directory / "tls-socket").symlink_to(tmp_path / "backend")

    answers = set()
    with Greeter(tmp_path / "backend", b"a"):
        with again_and_again(come_or_go, 1000) as thread:
            while thread.is_alive():
                answers.add(ask(daemon, NAME))
        # There or not there, and nothing in between.
        assert answers <= {b"a", UNRECOGNIZED_NAME}
        host_directory(daemon.hosts, NAME)
        (directory / "tls-socket").symlink_to(tmp_path / "backend")
        assert ask(daemon, NAME) == b"a"


def test_a_host_that_is_swapped_1000_times_under_load(daemon: Daemon, tmp_path: Path) -> None:
    """Every connection goes wholly to the one or the other, with the options of that one."""
    versions = tmp_path / "versions"
    versions.mkdir()
    link = daemon.hosts / NAME

    def swap(number: int) -> None:
        new = tmp_path / "new"
        new.symlink_to(versions / ("with", "without")[number % 2])
        new.replace(link)

    with (
        Greeter(host_directory(versions, "with") / "tls-socket", b"with") as with_header,
        Greeter(host_directory(versions, "without") / "tls-socket", b"without") as without_header,
    ):
        (versions / "with" / "send-proxy-v1").touch()
        swap(0)
        answers: list[bytes] = []
        with again_and_again(swap, 1000) as thread:
            while thread.is_alive() or len(set(answers)) < 2:
                answers.append(ask(daemon, NAME))
        assert set(answers) == {b"with", b"without"}
    hello = hellos.hello_bytes(NAME)
    assert len(with_header.heard) == answers.count(b"with")
    assert all(heard.startswith(b"PROXY TCP4 ") for heard in with_header.heard)
    assert set(without_header.heard) == {hello}


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_a_hosts_directory_that_is_moved_is_told_of_once_and_served_on(
    hosts: Path, options: list[str]
) -> None:
    """In the sandbox, where it has to be seen."""
    backend = Greeter(host_directory(hosts, NAME) / "tls-socket", b"word")
    with backend, start_daemon(hosts, *options, measured=False) as daemon:
        elsewhere = hosts.rename(hosts.parent / "elsewhere")
        daemon.wait_for_log("state=moved")
        # The workers have begun at the same time, and look at the same intervals.
        time.sleep(0.3)
        lines = [line for line in daemon.log() if " hosts_directory " in line]
        assert len(lines) == 1
        assert f"path={hosts} state=moved" in lines[0]
        assert ask(daemon, NAME) == b"word"
        elsewhere.rename(hosts)  # where the backend looks for its socket at the end
