"""The example in the README, as it stands, in a network of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.daemon import PATIENCE
from tests.support.network import why_no_network

README: Final = Path(__file__).parents[2] / "README.md"

# As the text says, and a namespace for the processes: they end with the shell.
ALONE: Final = ("unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-eumc")

# In the place of the pause: programs that are there when they are there. Then it goes on as the
# text does.
WAIT: Final = """
until (exec 3<>/dev/tcp/127.0.0.2/443) 2>/dev/null; do sleep 0.01; done
until nft list tables | grep -q tls_tproxy; do sleep 0.01; done
"""
AFTER: Final = """
! curl -sS http://127.0.0.3:8443/
kill %1 %2
wait
nft list tables
"""

_why_not: Final = why_no_network(
    ("openssl", "openssl"), ("curl", "curl"), ("bash", "bash"), ("nft", "nftables")
)


@pytest.mark.skipif(_why_not is not None, reason=str(_why_not))
def test_the_example(tmp_path: Path) -> None:
    section = README.read_text().split("\n## tls-tproxy: ")[1]
    [example] = re.findall(r"```sh\n(# A network.*?)```", section, re.DOTALL)
    assert example.count("sleep 2;") == 1
    script = example.replace("sleep 2;", WAIT) + AFTER
    programs = Path(sys.executable).parent
    assert shutil.which("tls-tproxy", path=programs), "the project is not installed"
    done = subprocess.run(
        [*ALONE, script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # three keys of RSA are made
    )
    assert re.search(r"Subject: CN ?= ?client\.example", done.stdout), done.stderr
    assert "reset by peer" in done.stderr
    assert re.search("^tls-tproxy: refused .* reason=no_name", done.stderr, re.MULTILINE)
    assert "tls-tproxy: drained served=1 refused=1 cut=0" in done.stderr
    assert "table" not in done.stdout.rpartition("Subject:")[2]
