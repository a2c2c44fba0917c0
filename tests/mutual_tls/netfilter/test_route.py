"""The route by which packets stay here: that it is made, and what becomes of it."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Final

import pytest

from mutual_tls.netfilter import child, route
from mutual_tls.netfilter.mark import MASK, STAYS_HERE
from mutual_tls.netfilter.route import LocalRoute, RouteError
from mutual_tls.netfilter.table import Nft
from tests.support.daemon import eventually
from tests.support.network import Machine, why_no_network

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

NOBODY: Final = (65534, 65534)


def rules(machine: Machine) -> list[str]:
    """Return the rules and routes of both families that are not there by themselves."""
    found = []
    for family in "-4", "-6":
        found += [
            line
            for line in machine.run("ip", family, "rule", "show").splitlines()
            if "fwmark" in line
        ]
        found += machine.run("ip", family, "route", "show", "table", "all").splitlines()
    return [line for line in found if "1443" in line]


@pytest.mark.parametrize("user", [None, NOBODY], ids=["root", "nobody"])
def test_it_is_there_as_long_as_it_lasts(
    machine: Machine, nft: Nft, user: tuple[int, int] | None
) -> None:
    made = machine.do(LocalRoute, nft, user)
    assert made.has_ipv6
    there = rules(machine)
    assert len(there) == 4
    assert (
        sum(f"fwmark {STAYS_HERE:#x}/{MASK:#x} iif lo lookup 1443" in line for line in there) == 2
    )
    assert sum(line.startswith("local default dev lo table 1443") for line in there) == 2
    made.close()
    assert rules(machine) == []


def test_what_another_one_has_left_is_replaced(machine: Machine, nft: Nft) -> None:
    """Its child was killed, too, as when a container is."""
    before = machine.do(LocalRoute, nft)
    before._process.kill()
    before.close()
    rule = f"fwmark {STAYS_HERE:#x}/{MASK:#x} iif lo lookup 1443 pref 1443"
    machine.run("sh", "-c", f"ip rule add {rule} 2>/dev/null || true")
    assert len(rules(machine)) == 4
    made = machine.do(LocalRoute, nft)
    assert len(rules(machine)) == 4
    made.close()
    assert rules(machine) == []


def test_it_is_gone_before_the_tables_are(machine: Machine) -> None:
    """Whoever starts next finds no table of ours, and then no rule, which would be taken away."""
    nft = machine.do(Nft)
    made = machine.do(LocalRoute, nft)
    os.kill(made._process.pid, signal.SIGSTOP)
    # As the kernel closes them when we are killed: both at once, and the child is not quick.
    nft._socket.close()
    made._socket.close()
    with pytest.raises(subprocess.TimeoutExpired):
        nft._process.wait(0.2)
    os.kill(made._process.pid, signal.SIGCONT)
    eventually(lambda: nft._process.poll() is not None)
    assert rules(machine) == []
    made.close()


@pytest.mark.parametrize("switched_off", [False, True])
def test_ipv6_is_there_if_the_loopback_device_has_it(
    machine: Machine, nft: Nft, switched_off: bool
) -> None:
    switch = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
    machine.run("sh", "-c", f"echo {int(switched_off)} >{switch}")
    made = machine.do(LocalRoute, nft)
    assert made.has_ipv6 is not switched_off
    assert len(rules(machine)) == (2 if switched_off else 4)
    made.close()
    assert rules(machine) == []


def test_a_program_that_is_missing_is_told(
    machine: Machine, nft: Nft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "_SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "sh").symlink_to("/bin/sh")
    message = r"unable to make a route: ip is not installed \(Debian package iproute2\)"
    with pytest.raises(RouteError, match=message):
        machine.do(LocalRoute, nft)


def test_what_ip_says_is_told(
    machine: Machine, nft: Nft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho 'RTNETLINK answers: No' >&2; exit 2\n")
    (tmp_path / "ip").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(RouteError, match="unable to make a route: ip: RTNETLINK answers: No"):
            machine.do(LocalRoute, nft)
    assert rules(machine) == []


def test_it_has_not_all_the_time(
    machine: Machine, nft: Nft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(route, "_PATIENCE", 0.2)
    (tmp_path / "ip").write_text("#!/bin/sh\nexec sleep 1\n")
    (tmp_path / "ip").chmod(0o755)
    with pytest.raises(RouteError, match="it took more than 0 seconds"):
        machine.do(LocalRoute, nft)
