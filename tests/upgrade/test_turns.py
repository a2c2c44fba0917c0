"""One copy of the daemon after the other takes over, under load."""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Daemon, start_daemon
from tests.upgrade.load import Load, running

TURNS = 10
ECHOES = 60

# What has to be so for root alone.
OTHER_USER = ("--user", "61001:61001")


async def turn(hosts: Path, old: Daemon, *options: str) -> Daemon:
    """Have another copy take over; return it."""
    new = Daemon(None, hosts, options, measured=False)
    new.address = old.address
    try:
        await asyncio.to_thread(new.wait_for_log, "taken_over")
        assert await asyncio.to_thread(old.wait) == 0
    except BaseException as error:
        new.__exit__(type(error), error, error.__traceback__)
        raise
    return new


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--workers", "3"),
        pytest.param(
            (*OTHER_USER, "--chroot"),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root"),
        ),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_ten_upgrades_in_a_row(hosts: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    hosts.chmod(0o755)
    every = ("--upgrade-socket", str(tmp_path / "upgrade"), *options)

    async def go() -> Load:
        with ExitStack() as stack:
            daemon = stack.enter_context(start_daemon(hosts, *every, measured=False))
            load = Load(daemon.address)
            async with running(load, hosts, ECHOES):
                await asyncio.sleep(0.5)
                for _ in range(TURNS):
                    daemon = stack.enter_context(await turn(hosts, daemon, *every))
                    await asyncio.sleep(0.1)
            return load

    load = asyncio.run(go())
    assert load.fresh > TURNS
    assert load.longest < PATIENCE
