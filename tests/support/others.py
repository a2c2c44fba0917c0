"""Other users, whom only root can be, and whether they can run the Python of these tests."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Nobody's, here and on most machines.
TENANT = 4001


@cache
def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "only root can act as several users"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "import sniproxy_check"],
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
            cwd="/",
            capture_output=True,
            user=TENANT,
            group=TENANT,
            extra_groups=[],
            check=False,
        )
    except OSError as error:
        return f"other users can't run {sys.executable}: {error.strerror}"
    return None if done.returncode == 0 else f"other users can't run {sys.executable}"


needs_python_for_all = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
