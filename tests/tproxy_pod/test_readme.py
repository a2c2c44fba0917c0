"""The example in the README, as it stands, in networks of its own."""

from pathlib import Path
from typing import Final

import pytest

from tests.support.network import RESET, why_no_network
from tests.support.readme import run_example

# In the place of the pause: programs that are there when they are there. Then it goes on as the
# text does.
WAIT: Final = """
until $other nft list table inet tproxy_pod 2>/dev/null | grep -q redirect; do sleep 0.01; done
until nft list table inet tproxy_pod 2>/dev/null | grep -q redirect; do sleep 0.01; done
until $other bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080' 2>/dev/null; do sleep 0.01; done
"""
AFTER: Final = """
! curl -sS http://10.9.0.2:8081/
kill %2 %3 %4
wait %2 %3 %4
nft list tables
$other nft list tables
kill %1
"""

_why_not: Final = why_no_network(
    ("openssl", "openssl"), ("curl", "curl"), ("bash", "bash"), ("nft", "nftables")
)


@pytest.mark.skipif(_why_not is not None, reason=str(_why_not))
def test_the_example(tmp_path: Path) -> None:
    done = run_example("tproxy-pod", "# Two pods", tmp_path, wait=WAIT, after=AFTER)
    _, _, after = done.stdout.rpartition("<title>")
    assert after.startswith("Directory listing"), done.stderr
    assert "table" not in after
    assert "10.9.0.1 - - " in done.stderr
    assert "tls=yes" in done.stderr
    assert RESET.search(done.stderr)
    assert "tproxy-pod: drained served=" in done.stderr
