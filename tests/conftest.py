from pathlib import Path

import pytest

from tests.support.certificates import Certificates


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
