"""Both sides, each with its own directory as the root directory, and no longer root."""

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.bridge import PEER, Bridge, Daemon, ask, connect, write
from tests.support.sockets import receive_exactly

CONFINED = ("--chroot", "--user", "nobody")

# What the manual says that it takes: /proc. Nothing of Python is in there.
WITH_PROC = 'mkdir proc && mount --bind /proc proc && exec "$@"'
UNDER = ("unshare", "--mount", "sh", "-c", WITH_PROC, "sh")


def why_not() -> str | None:
    """Return what is missing here, in words for people; None if nothing is."""
    if os.geteuid() != 0:
        return "only root can change its root directory"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "no namespaces are to be had here"
    return None


_why_not = why_not()
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


def test_nothing_of_python_is_needed_when_it_serves(tmp_path: Path) -> None:
    """Python encodes names by a codec, and rules by tables, that it loads late by itself."""
    with ExitStack() as stack:
        it = Bridge(tmp_path, stack)
        write(it.ingress_place / "peers/p/servers", f"bücher.example\n{PEER}\n")
        write(it.peer_place / "clients/another", "bücher.example\n")

        def start(listening: socket.socket, place: Path, module: str) -> Daemon:
            # It could not save what it measured.
            daemon = Daemon(listening, place, CONFINED, under=UNDER, module=module, measured=False)
            stack.enter_context(daemon)
            daemon.wait_for_log("listening")
            return daemon

        start(it.peer_socket, it.peer_place, "tls_bridge.peer")
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ingress = start(listening, it.ingress_place, "tls_bridge")
        client, header = ask(ingress, connect())
        with client:
            assert header.startswith(b"HTTP/1.1 200 ")
            client.sendall(b"hello")
            assert receive_exactly(client, 5) == b"hello"
