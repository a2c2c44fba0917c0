"""The commands where a package is missing that they need."""

import shlex
import subprocess
import sys

import pytest

from tests.support.daemon import PATIENCE


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
