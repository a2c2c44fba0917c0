"""The commands where something is missing that they need."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, unmeasured


@pytest.mark.parametrize(
    ("program", "main"), [("tls-bridge", "main"), ("tls-bridge-peer", "main_peer")]
)
def test_a_package_is_missing(program: str, main: str) -> None:
    """It says which, and how it is had: with the pip of the very Python that misses it."""
    # None in sys.modules is a package that is not there.
    start = "import sys; sys.modules['cryptography'] = None; import tls_bridge.command as command; "
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{start}sys.exit(command.{main}())", "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (100, "")
    assert done.stderr == (
        f"{program}: fatal: unable to start: the Python package cryptography is missing; "
        f"{shlex.quote(sys.executable)} -m pip install 'sniproxy[bridge]'\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("module", ["tls_bridge", "tls_bridge.peer"])
def test_the_user_may_not_search_the_working_directory(module: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    options = ("--listen", "127.0.0.1:0", "--user", "nobody")
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=unmeasured(),
    )
    program = module.replace("_", "-").replace(".", "-")
    message = "unable to search the working directory: Permission denied"
    assert (done.returncode, done.stderr) == (100, f"{program}: fatal: {message}\n")
