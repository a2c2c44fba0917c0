"""The example in the README, as it stands, in a network of its own."""

import re
from pathlib import Path
from typing import Final

import pytest

from tests.support.network import RESET, why_no_network
from tests.support.readme import run_example

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
    done = run_example("tls-tproxy", "# A network", tmp_path, wait=WAIT, after=AFTER)
    assert re.search(r"Subject: CN ?= ?client\.example", done.stdout), done.stderr
    assert RESET.search(done.stderr)
    assert re.search("^tls-tproxy: refused .* reason=no_name", done.stderr, re.MULTILINE)
    assert "tls-tproxy: drained served=1 refused=1 cut=0" in done.stderr
    assert "table" not in done.stdout.rpartition("Subject:")[2]
