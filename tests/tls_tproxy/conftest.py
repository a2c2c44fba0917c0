import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.wrapping import Site

EXAMPLE = Path(__file__).parents[2] / "docs" / "cert-checker-example"


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """Two machines, and a resolver: one of each for all tests."""
    with Site() as site:
        yield site


@pytest.fixture(scope="package")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the example of a certificate checker is installed."""
    for package in "pip", "hatchling":
        if find_spec(package) is None:
            pytest.skip(f"the Python package {package} is missing")
    work = tmp_path_factory.mktemp("example")
    # A copy: nothing of building it is left in the tree.
    source = shutil.copytree(EXAMPLE, work / "source")
    target = work / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target
