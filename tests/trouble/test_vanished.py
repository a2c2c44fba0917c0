"""A client that vanishes amid a download, in a network of its own that can be cut off."""

import shutil
import subprocess
import sys

import pytest

from tests.support.daemon import PATIENCE

ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def why_not() -> str | None:
    for program, package in ("unshare", "util-linux"), ("ip", "iproute2"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian package {package})"
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        return "no network namespace is to be had here"
    return None


# Two seconds in the place of two minutes.
SCRIPT = """
import os, socket, subprocess
import trio
from sniproxy.engine import tcp
tcp.USER_TIMEOUT = 2000
from sniproxy.engine.listener import take_listening_socket
from tests.support.relays import bench, stream
from tests.support.sockets import unix_pair

async def main():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        listening = take_listening_socket(bound.fileno())
        client = socket.create_connection(bound.getsockname())
        fd, _ = listening._accept()
        near = socket.socket(fileno=fd)
        listening.close()
    backend, far = unix_pair()
    far.setblocking(False)
    async with bench() as it:
        it.join_these(near, far)
        end = it.stream(backend)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                async def download():
                    try:
                        while True:
                            await end.send_all(bytes(1 << 16))
                    except trio.BrokenResourceError:
                        pass
                nursery.start_soon(download)
                reader = it.stream(client)
                for _ in range(100):
                    await reader.receive_some(1 << 16)
                subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
                began = trio.current_time()
                await it.limit.wait_until_empty()
                print(it.endings[0][2], trio.current_time() - began)

trio.run(main)
"""


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_client_that_vanishes_amid_a_download_is_gone_when_the_time_is_over() -> None:
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    ending, seconds = done.stdout.split()
    assert ending == "near_reset"
    # The kernel looks when it would send again, with growing pauses.
    assert float(seconds) < 8
