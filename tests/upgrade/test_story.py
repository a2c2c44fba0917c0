"""What the log and the status socket say of connections that have seen several copies."""

import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import Daemon, eventually, start_daemon
from tests.support.sockets import receive_exactly
from tests.support.status import hosts_in, processes, read_status

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)
COPIES = 3


@pytest.mark.parametrize("proxy", [False, True])
def test_connections_are_told_from_their_beginning(
    hosts: Path, tmp_path: Path, proxy: bool
) -> None:
    status = tmp_path / "status"
    upgrade = "--upgrade-socket", str(tmp_path / "upgrade")
    options = "--log", "connections", "--status-socket", str(status), *upgrade
    if proxy:
        (host_directory(hosts, NAME) / "send-proxy-v1").touch()
    with ExitStack() as stack:
        backend = stack.enter_context(RawBackend(host_directory(hosts, NAME) / "tls-socket"))
        daemon = stack.enter_context(start_daemon(hosts, *options))
        with daemon.connect() as refused:
            refused.sendall(hellos.hello_bytes("nobody.example"))
            assert refused.recv(1) == b"\x15"
        eventually(lambda: processes(read_status(status))[0]["open"] == 0)
        client = stack.enter_context(daemon.connect())
        client.sendall(HELLO)
        connection = stack.enter_context(backend.accept())
        if proxy:
            while connection.recv(1) != b"\n":
                pass
        assert receive_exactly(connection, len(HELLO)) == HELLO
        began = time.monotonic()
        for number in range(COPIES):
            client.sendall(b"up")
            connection.sendall(b"down")
            assert receive_exactly(connection, 2) + receive_exactly(client, 4) == b"updown"
            new = stack.enter_context(Daemon(None, hosts, options))
            new.wait_for_log("taken_over")
            assert daemon.wait() == 0
            assert not [line for line in daemon.log() if " connection " in line]
            new.address = daemon.address
            daemon = new
            [process] = processes(read_status(status))
            assert process["pid"] == daemon.process.pid
            counted = process["open"], process["served"], process["refused"]
            assert counted == (1, 1, 1)
            assert process["reasons"] == {"no_such_host": 1}
            moved = len(HELLO) + 2 * (number + 1), 4 * (number + 1)
            assert (process["up"], process["down"]) == moved
            host = hosts_in(read_status(status))[NAME]
            assert (host["open"], host["served"], host["up"], host["down"]) == (1, 1, *moved)
        client.close()
        connection.close()
        line = daemon.wait_for_log("connection")
        assert f"name={NAME} up={len(HELLO) + 2 * COPIES} down={4 * COPIES} " in line
        assert line.endswith("ending=finished")
        found = re.search(r"seconds=([0-9.]+)", line)
        assert found is not None
        # From accept on, and not from when the last copy has got it.
        assert 0 <= float(found[1]) - (time.monotonic() - began) + 0.5 <= 1
        eventually(lambda: hosts_in(read_status(status))[NAME]["open"] == 0)
        [process] = processes(read_status(status))
        assert (process["open"], process["served"]) == (0, 1)
