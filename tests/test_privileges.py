"""Which capabilities are left, in a process of its own that has root's rights to lose."""

import os
import subprocess
import sys

import pytest

from sniproxy.service.privileges import CAP_NET_ADMIN, CAP_NET_RAW

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")

NOBODY = "65534:65534"


def left(*keep: int, user: str | None, before: tuple[int, ...] | None = None) -> dict[str, int]:
    """Return the sets of capabilities, as proc(5) has them, of who keeps only these."""
    program = f"""
from sniproxy.service.privileges import keep_capabilities
if {before!r} is not None:
    keep_capabilities({before!r})
from sniproxy.service.options import ServiceOptions
from sniproxy.service.start import drop_privileges
drop_privileges(ServiceOptions(user={user!r}), {keep!r})
print(open("/proc/self/status").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = (line.split(":") for line in done.stdout.splitlines() if line.startswith("Cap"))
    return {name: int(value, 16) for name, value in lines}


@pytest.mark.parametrize("user", [None, NOBODY])
@pytest.mark.parametrize("keep", [(), (CAP_NET_RAW,), (CAP_NET_RAW, CAP_NET_ADMIN)])
def test_only_what_is_needed_is_left(user: str | None, keep: tuple[int, ...]) -> None:
    sets = left(*keep, user=user)
    bits = sum(1 << number for number in keep)
    assert sets["CapEff"] == sets["CapPrm"] == bits
    assert sets["CapInh"] == sets["CapAmb"] == 0


def test_what_we_do_not_have_can_t_be_kept() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        left(CAP_NET_RAW, user=None, before=(CAP_NET_ADMIN,))
    assert "unable to keep the capabilities" in caught.value.stderr
