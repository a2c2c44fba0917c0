"""What is looked at while a program serves: it may end it."""

import subprocess
import sys

import pytest

from tests.support.daemon import PATIENCE

PROGRAM = """
import trio
from sniproxy.service.eventlog import EventLog
from sniproxy.service.fatal import FatalError
from sniproxy.service.notify import Counts, Notifier
from sniproxy.service.options import ServiceOptions
from sniproxy.service.start import run_program, run_service

looks = 0

async def serve(orders, supervisor):
    async with trio.open_nursery() as nursery:
        await nursery.start(orders.receive)
        nursery.start_soon(supervisor.run, Counts)
        supervisor.ready()
        await orders.drain.wait()
        nursery.cancel_scope.cancel()

def look():
    global looks
    looks += 1
    if looks == 2:
        raise FatalError("unable to go on: it is over")

def body(syslogd):
    log = EventLog("program")
    options = ServiceOptions(workers=WORKERS)
    run_service(options, log, Notifier(), serve, lambda: None, look)

raise SystemExit(run_program("program", body))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_fatal_while_it_serves_ends_it_and_is_told(workers: int) -> None:
    program = PROGRAM.replace("WORKERS", str(workers))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 111
    assert done.stderr == "program: fatal: unable to go on: it is over\n"
