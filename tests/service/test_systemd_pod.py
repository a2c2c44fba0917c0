"""systemd with the unit of tproxy-pod that we ship: a machine, and another one that it talks to."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.bridge import write_identity
from tests.support.daemon import eventually
from tests.support.machine import Machine, why_no_machine
from tests.support.network import RESET
from tests.support.units import (
    SYSTEM,
    UNITS,
    commands,
    heard,
    main_pid,
    settings,
    show,
    started,
    state,
    wait_for_log,
)

# A command that runs another one there.
Under = tuple[str, ...]

PYTHON, SHELL = ("python3", "-c"), ("sh", "-euc")
UNIT = "tproxy-pod.service"
PLACE = "/srv/tproxy-pod"
HERE, THERE = "10.9.0.1", "10.9.0.2"

# The other machine, with a cable; its namespace is that of a process which stays.
CABLE = f"""
ip link add cable type veth peer name cable netns $1
ip address add {HERE}/24 dev cable
ip link set cable up
nsenter --net=/proc/$1/ns/net sh -euc '
    ip link set lo up
    ip address add {THERE}/24 dev cable
    ip link set cable up'
"""

# A program that knows nothing of TLS, and says who has come.
SERVER = r"""
import socket
listening = socket.create_server(("0.0.0.0", 8080))
print("listening", flush=True)
while True:
    client, address = listening.accept()
    with client:
        try:
            client.recv(65536)
            client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + address[0].encode() + b"\n")
        except OSError:
            pass
"""


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Machine, Under]]:
    """The machine, as the comment in the unit has it, and the way to the other one."""
    if missing := why_no_machine():
        pytest.skip(missing)
    with Machine(["iproute2", "nftables"]) as machine, ExitStack() as stack:
        machine.install_wheel("pod")
        machine.write(f"{SYSTEM}/{UNIT}", (UNITS / UNIT).read_text())
        useradd, make, key, enable, *_ = commands(UNIT)
        machine.run(*SHELL, f"{useradd}; {make}")
        place = machine.root / PLACE.removeprefix("/")
        write_identity(place / "pod/identity", HERE)
        write_identity(machine.root / "srv/client", THERE)
        machine.run(*SHELL, f"cd {PLACE}/pod/identity; {key}")
        stay = ("unshare", "--net", "sh", "-c", "echo $$; exec sleep infinity")
        other = stack.enter_context(started(machine, *stay))
        [pid] = heard(other.stdout)
        machine.run(*SHELL, CABLE, "sh", pid)
        server = stack.enter_context(started(machine, *PYTHON, SERVER))
        assert heard(server.stdout) == ["listening"]
        machine.run(*SHELL, enable)
        yield machine, ("nsenter", f"--net=/proc/{pid}/ns/net")


@pytest.fixture(scope="module")
def machine(both: tuple[Machine, Under]) -> Machine:
    return both[0]


@pytest.fixture(scope="module")
def other(both: tuple[Machine, Under]) -> Under:
    return both[1]


def fetch(machine: Machine, other: Under, *options: str) -> str:
    """Return what the other machine gets from the program here."""
    command = ("curl", "--silent", "--show-error", "--max-time", "10", *options)
    done = machine.run(*other, "sh", "-c", '"$@" 2>&1 || true', "sh", *command)
    return done.stdout.strip()


def fetch_with_tls(machine: Machine, other: Under) -> str:
    identity = "/srv/client"
    options = ("--cacert", f"{identity}/ca.pem", "--cert", f"{identity}/cert.pem")
    return fetch(machine, other, *options, "--key", f"{identity}/key.pem", f"https://{HERE}:8080/")


def tables(machine: Machine) -> list[str]:
    lines = machine.run("nft", "list", "tables").stdout.splitlines()
    return sorted(line.split()[-1] for line in lines)


def test_it_is_confined_as_tls_tproxy_is_but_for_what_it_needs() -> None:
    theirs = settings("tls-tproxy@.service")["[Service]"]
    ours = settings(UNIT)["[Service]"]
    assert {key for key, _ in set(ours) ^ set(theirs)} == {
        *("ExecStart", "WorkingDirectory", "User", "RestrictAddressFamilies"),
    }
    assert ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK") in ours


def test_systemd_understands_it(machine: Machine) -> None:
    done = machine.run("systemd-analyze", "verify", "--man=no", UNIT)
    assert done.stdout + done.stderr == ""


def test_systemd_finds_little_exposed(machine: Machine) -> None:
    # As for tls-tproxy, without packet sockets.
    done = machine.run("systemd-analyze", "security", "--threshold=22", "--no-pager", UNIT)
    assert "Overall exposure level" in done.stdout


def test_who_has_a_certificate_is_served_and_nobody_else(machine: Machine, other: Under) -> None:
    assert fetch_with_tls(machine, other) == THERE
    assert "reset" in fetch(machine, other, f"http://{HERE}:8080/")
    # sd-daemon(3): 4 is a warning.
    assert wait_for_log(machine, "reason=not_tls", UNIT)[0] == 4
    eventually(lambda: show(machine, "StatusText", UNIT) == "0 open, 1 served, 1 refused")
    # What leaves has to find TLS.
    done = machine.run("sh", "-c", f"curl -sS http://{THERE}:9/ 2>&1 || true")
    assert RESET.search(done.stdout), done.stdout
    assert wait_for_log(machine, f"destination={THERE}:9", UNIT)[0] == 4


def test_it_has_no_right_but_the_one(machine: Machine) -> None:
    status = machine.run("cat", f"/proc/{main_pid(machine, UNIT)}/status").stdout
    assert "CapEff:\t0000000000002000\n" in status  # CAP_NET_RAW, linux/capability.h


def test_killed_it_refuses_until_it_comes_back(machine: Machine, other: Under) -> None:
    old = main_pid(machine, UNIT)
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    assert "200" not in fetch(machine, other, f"http://{HERE}:8080/")
    eventually(lambda: main_pid(machine, UNIT) not in {0, old})
    eventually(lambda: state(machine, UNIT) == "active")
    eventually(lambda: fetch_with_tls(machine, other) == THERE)


def test_stopped_it_refuses_until_it_is_told_not_to(machine: Machine, other: Under) -> None:
    machine.run("systemctl", "stop", UNIT)
    try:
        assert tables(machine) == ["tproxy_pod_refuse"]
        assert machine.run("ip", "rule", "show", "pref", "1443").stdout == ""
        assert fetch(machine, other, f"http://{HERE}:8080/") != THERE
        *_, last = (line for line in commands(UNIT) if "--stop-refusing" in line)
        machine.run(*last.split())
        assert tables(machine) == []
        assert fetch(machine, other, f"http://{HERE}:8080/") == THERE
    finally:
        machine.run("systemctl", "start", UNIT)
    assert fetch_with_tls(machine, other) == THERE
