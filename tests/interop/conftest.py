"""One daemon for the whole folder: as in life, all kinds of clients come to the same one."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import NAME, Visit
from tests.support.backends import host_directory
from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, start_daemon


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_daemon(tmp_path_factory.mktemp("hosts")) as daemon:
        yield daemon


@pytest.fixture
def hosts(daemon: Daemon) -> Path:
    """The daemon's hosts directory."""
    return daemon.hosts


@pytest.fixture
def tls_socket(hosts: Path) -> Path:
    """Where the backend of NAME is to listen."""
    return host_directory(hosts, NAME) / "tls-socket"


@pytest.fixture
def visit(daemon: Daemon, certificates: Certificates) -> partial[Visit]:
    """A visit to the daemon: `visit(NAME)`, and more if need be."""
    return partial(Visit, daemon.address, certificates.authority)
