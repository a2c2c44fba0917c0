"""Tenants who point a name at what is not theirs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.backends import host_directory
from tests.support.daemon import Daemon, start_daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask

NAME = "a.example"
TENANT, OTHER = 20_001, 20_002

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="tenants are other users, and only root can be many"
)


@contextmanager
def victim(path: Path, uid: int) -> Iterator[None]:
    """Have a listener of some user's that is not to hear a byte."""
    with Greeter(path, b"victim", uid) as it:
        yield
    # It may have been connected to, for that is how one learns whose it is.
    assert set(it.heard) <= {b""}


@pytest.fixture
def directory(hosts: Path) -> Path:
    """The directory of a tenant's host."""
    directory = host_directory(hosts, NAME)
    os.chown(directory, TENANT, -1)
    return directory


def test_a_tenants_own_backend(daemon: Daemon, directory: Path) -> None:
    with Greeter(directory / "tls-socket", b"own", TENANT):
        assert ask(daemon, NAME) == b"own"


@pytest.mark.parametrize("uid", [OTHER, 0], ids=["another tenant", "root"])
def test_a_link_to_a_socket_of(daemon: Daemon, directory: Path, tmp_path: Path, uid: int) -> None:
    with victim(tmp_path / "theirs", uid):
        (directory / "tls-socket").symlink_to(tmp_path / "theirs")
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log("reason=wrong_owner")


def test_a_link_to_a_host_of_another_tenant(daemon: Daemon, hosts: Path) -> None:
    """It is the other tenant's directory that is reached, and who speaks for it is its owner."""
    theirs = host_directory(hosts, "b.example")
    os.chown(theirs, OTHER, -1)
    with Greeter(theirs / "tls-socket", b"theirs", OTHER):
        (hosts / NAME).symlink_to("b.example")
        assert ask(daemon, NAME) == b"theirs"


def test_a_host_that_is_a_directory_like_tmp(daemon: Daemon, hosts: Path, tmp_path: Path) -> None:
    """Root's, and anyone may write there: a link to a root daemon, for example."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (hosts / NAME).symlink_to(shared)
    with victim(tmp_path / "roots", 0):
        (shared / "tls-socket").symlink_to(tmp_path / "roots")
        assert ask(daemon, NAME) == UNRECOGNIZED_NAME
    assert "refused" in daemon.wait_for_log("reason=writable_by_others")


def test_what_an_administrator_links_may_belong_to_anyone(
    daemon: Daemon, hosts: Path, tmp_path: Path
) -> None:
    with Greeter(tmp_path / "theirs", b"own", TENANT):
        (host_directory(hosts, NAME) / "tls-socket").symlink_to(tmp_path / "theirs")
        assert ask(daemon, NAME) == b"own"


def test_a_link_that_is_swapped_between_check_and_use(
    daemon: Daemon, directory: Path, tmp_path: Path
) -> None:
    link, new = directory / "tls-socket", directory / "new"
    with victim(tmp_path / "theirs", OTHER), Greeter(tmp_path / "own", b"own", TENANT):
        done = threading.Event()

        def swap() -> None:
            for number in range(2000):
                new.symlink_to(tmp_path / ("own", "theirs")[number % 2])
                new.replace(link)
            done.set()

        link.symlink_to(tmp_path / "own")
        thread = threading.Thread(target=swap)
        thread.start()
        answers = set()
        while not done.is_set():
            answers.add(ask(daemon, NAME))
        thread.join()
        assert answers <= {b"own", UNRECOGNIZED_NAME}


def test_the_check_can_be_turned_off(hosts: Path, directory: Path, tmp_path: Path) -> None:
    with start_daemon(hosts, "--no-owner-check") as daemon, Greeter(tmp_path / "roots", b"root's"):
        (directory / "tls-socket").symlink_to(tmp_path / "roots")
        assert ask(daemon, NAME) == b"root's"
