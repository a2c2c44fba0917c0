import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, start_daemon
from tests.support.supervisor import Supervisor

# Who is started with & by a script, or by nohup(1), ignores these. So would the programs that are
# tested here. A signal that is caught, and be it to do nothing, has its default action again in a
# program that is executed, execve(2); and these tests themselves still do not end of it.
for _number in signal.SIGHUP, signal.SIGINT, signal.SIGQUIT:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that is trusted in these tests, and nowhere else."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """An empty hosts directory."""
    directory = tmp_path / "hosts"
    directory.mkdir()
    return directory


@pytest.fixture
def daemon(hosts: Path) -> Iterator[Daemon]:
    """A running daemon, one for each test."""
    with start_daemon(hosts) as daemon:
        yield daemon


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """What NOTIFY_SOCKET leads to."""
    supervisor = Supervisor(tmp_path / "notify")
    yield supervisor
    supervisor.socket.close()
