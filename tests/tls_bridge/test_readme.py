"""The example in the README, as it stands, in a network of its own."""

import re
from pathlib import Path
from typing import Final

import pytest

from tests.support.network import why_no_network
from tests.support.readme import run_example

# In the place of the pause: programs that are there when they are there. Then it goes on as the
# text does.
BEFORE: Final = "ip link set lo up\n"
WAIT: Final = """
for port in 8000 8443 8080; do
    until (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.01; done
done
"""
AFTER: Final = """
! curl -sS -p -x http://127.0.0.1:8080 http://web.internal:81/
kill %1 %2 %3
wait
"""

_why_not: Final = why_no_network(("openssl", "openssl"), ("curl", "curl"), ("bash", "bash"))


@pytest.mark.skipif(_why_not is not None, reason=str(_why_not))
def test_the_example(tmp_path: Path) -> None:
    done = run_example(
        "tls-bridge", "# Who is who", tmp_path, before=BEFORE, wait=WAIT, after=AFTER
    )
    assert "hello" in done.stdout.splitlines(), done.stderr
    assert "response 403" in done.stderr
    assert re.search(
        "^tls-bridge-peer: refused .* reason=port_not_allowed", done.stderr, re.MULTILINE
    )
    # Both, wherever in a line: several programs write there at a time.
    assert {"tls-bridge", "tls-bridge-peer"} == set(
        re.findall("(tls-bridge(?:-peer)?): drained", done.stderr)
    )
