"""What tls-tproxy counts for its names, and whom it tells."""

import os
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write, write_identity
from tests.support.daemon import eventually
from tests.support.network import why_no_network
from tests.support.status import hosts_in, processes, read_status, total
from tests.support.wrapping import CLIENT, TAKEN, Site, is_reset, server_context, works

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


def test_names_are_counted(site: Site, tmp_path: Path) -> None:
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    path = tmp_path / "status"
    good, down, unknown = (site.new_name() for _ in range(3))
    run = tmp_path / "run"
    write(run / f"wrap/ports/{TAKEN}", "443\n")
    for name in good, down:
        (run / "wrap/names" / name.name).mkdir(parents=True)
    os.chown(run / "wrap/names" / down.name, 4001, 4001)
    write_identity(run / "identity", CLIENT)
    with (
        site.start(tmp_path, "--status-socket", str(path)),
        site.serve(good.address, server_context(good.name)),
    ):
        assert works(site.visit(good))
        for name in down, unknown:
            assert is_reset(lambda name=name: site.visit(name))  # type: ignore[misc]
        eventually(lambda: total(read_status(path), "open") == 0)
        lines = read_status(path)
        [process] = processes(lines)
        assert process["program"] == "tls-tproxy"
        assert (process["served"], process["refused"]) == (1, 2)
        assert process["seconds"]["setup"]["count"] == 1
        found = hosts_in(lines)
        assert set(found) == {good.name, down.name}
        assert (found[good.name]["up"], found[good.name]["down"]) == (5, 5)
        assert found[down.name]["reasons"] == {"refused": 1}
        assert set(hosts_in(read_status(path, 4001))) == {down.name}
