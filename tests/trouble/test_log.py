"""A log that can't be written, and one that somebody tries to fill."""

import os
import signal
import socket
import threading
from pathlib import Path

from tests.support import hellos
from tests.support.backends import host_directory
from tests.support.daemon import Daemon
from tests.support.greeting import UNRECOGNIZED_NAME, Greeter, ask
from tests.support.sockets import receive_all

NAME = "a.example"


def test_a_full_disk_behind_standard_error(hosts: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        daemon = Daemon(listening, hosts, stderr=full)
    os.close(full)
    with daemon, Greeter(host_directory(hosts, NAME) / "tls-socket", b"a"):
        for _ in range(3):
            assert ask(daemon, "nobody.example") == UNRECOGNIZED_NAME
            assert ask(daemon, NAME) == b"a"


def test_a_scan_of_10000_bad_names_makes_few_lines(daemon: Daemon) -> None:
    number, threads = 10_000, 8

    def scan(first: int) -> None:
        for each in range(first, number, threads):
            with daemon.connect() as client:
                client.sendall(hellos.hello_bytes(f"bad{each}.example"))
                assert receive_all(client) == UNRECOGNIZED_NAME

    scanners = [threading.Thread(target=scan, args=[first]) for first in range(threads)]
    for scanner in scanners:
        scanner.start()
    for scanner in scanners:
        scanner.join()
    refused = [line for line in daemon.log() if "reason=no_such_host" in line and "client=" in line]
    assert len(refused) == 20
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    # None is forgotten: every one is a line or counted in one.
    suppressed = [line for line in daemon.log() if "suppressed reason=no_such_host" in line]
    counted = sum(int(line.rpartition("count=")[2]) for line in suppressed)
    assert counted + len(refused) == number
    assert len(daemon.log()) < 20 + 20
