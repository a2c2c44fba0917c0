"""systemd with the unit of tls-tproxy that we ship: a resolver and servers, in one machine."""

from collections.abc import Iterator

import pytest

from tests.support.bridge import write, write_identity
from tests.support.daemon import eventually
from tests.support.machine import Machine, why_no_machine
from tests.support.units import (
    OF_EVERYBODY,
    SYSTEM,
    UNITS,
    changed,
    commands,
    ended,
    heard,
    journal,
    main_pid,
    settings,
    show,
    started,
    state,
    wait_for_log,
    writable_places,
)

PYTHON, SHELL = ("python3", "-c"), ("sh", "-euc")
UNIT = "tls-tproxy@main.service"
PLACE = "/srv/tls-tproxy/main"
NAME = "service.example"
PORT, SECURE_PORT, LISTENING = 8443, 443, 8444

# Bits of capabilities, linux/capability.h.
NET_ADMIN, NET_RAW = 1 << 12, 1 << 13

# The server: it wants a certificate of the client, and says whose it was, and what it hears. And on
# the port without TLS somebody who would hear what leaves in plaintext.
SERVERS = r"""
import socket, ssl, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/server/cert.pem", "/srv/server/key.pem")
context.load_verify_locations("/srv/server/ca.pem")
context.verify_mode = ssl.CERT_REQUIRED
def secure(client):
    with context.wrap_socket(client, server_side=True) as stream:
        [(_, name)] = stream.getpeercert()["subjectAltName"]
        while data := stream.recv(65536):
            stream.sendall(name.encode() + b": " + data)
def plain(client):
    with client:
        client.recv(65536)
        client.sendall(b"plaintext\n")
def serve(client, answer):
    try:
        answer(client)
    except OSError:
        pass
def run(listening, answer):
    while True:
        client, _ = listening.accept()
        threading.Thread(target=serve, args=(client, answer)).start()
for host in "127.0.0.2", "::1":
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port, answer in (443, secure), (8443, plain):
        listening = socket.create_server((host, port), family=family)
        threading.Thread(target=run, args=(listening, answer)).start()
print("listening", flush=True)
"""

# A program that knows nothing of TLS. It says the first line at once, and the second one when its
# standard input ends.
CLIENT = r"""
import socket, sys
name, family = sys.argv[1], socket.AF_INET6 if "6" in sys.argv[2:] else socket.AF_INET
address = socket.getaddrinfo(name, 8443, family, socket.SOCK_STREAM)[0][4]
client = socket.socket(family)
client.settimeout(30)
try:
    client.connect(address)
    stream = client.makefile("rwb", 0)
    for _ in range(1 + ("twice" in sys.argv)):
        stream.write(b"hello\n")
        print(stream.readline().decode().strip(), flush=True)
        if "twice" in sys.argv:
            sys.stdin.read()
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """The machine, as the comment in the unit has it, with a resolver and servers."""
    if missing := why_no_machine():
        pytest.skip(missing)
    with Machine(["dnsmasq-base", "nftables"]) as machine:
        machine.install_wheel("tproxy")
        machine.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
        machine.write("/etc/hosts", "127.0.0.1 localhost\n")
        machine.write(f"{SYSTEM}/tls-tproxy@.service", (UNITS / "tls-tproxy@.service").read_text())
        useradd, make, key, enable, *_ = commands("tls-tproxy@.service")
        machine.run(*SHELL, f"{useradd}; {make}")
        place = machine.root / PLACE.removeprefix("/")
        write(place / f"wrap/ports/{PORT}", f"{SECURE_PORT}\n")
        write(place / f"wrap/names/{NAME}/ports/{PORT}", f"{SECURE_PORT}\n")
        write_identity(place / "identity", "client.example")
        write_identity(machine.root / "srv/server", NAME)
        machine.run(*SHELL, f"cd {PLACE}/identity; {key}")
        resolver = (
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv"),
            *("--no-hosts", "--pid-file", "--user=root", "--listen-address=127.0.0.1"),
            *("--bind-interfaces", f"--host-record={NAME},127.0.0.2,::1"),
            "--host-record=other.example,127.0.0.3",
        )
        with started(machine, *resolver), started(machine, *PYTHON, SERVERS) as servers:
            assert heard(servers.stdout) == ["listening"]
            machine.run(*SHELL, enable)
            yield machine


def say(machine: Machine, name: str = NAME, *words: str) -> str:
    """Return what a program gets to hear."""
    return machine.run(*PYTHON, CLIENT, name, *words).stdout.strip()


def tables(machine: Machine) -> list[str]:
    lines = machine.run("nft", "list", "tables").stdout.splitlines()
    return sorted(line.split()[-1] for line in lines)


def nft_of(machine: Machine, pid: int) -> str:
    """Return the process id of its only child."""
    [child] = machine.run("cat", f"/proc/{pid}/task/{pid}/children").stdout.split()
    return child


def stop_refusing(machine: Machine) -> None:
    """As the comment in the unit says."""
    *_, last = (line for line in commands("tls-tproxy@.service") if "--stop-refusing" in line)
    machine.run(*last.split())


# --- The file ------------------------------------------------------------------------------------


def test_it_ends_and_begins_as_sniproxy_does() -> None:
    sniproxys = dict(settings("sniproxy.service")["[Service]"])
    ours = dict(settings("tls-tproxy@.service")["[Service]"])
    for key in "Restart", "RestartSec", "WatchdogSec", "KillMode", "TimeoutStopSec", "LimitNOFILE":
        assert ours[key] == sniproxys[key]


def test_it_is_confined_as_tls_bridge_is_but_for_what_it_needs() -> None:
    bridges = settings("tls-bridge@.service")["[Service]"]
    ours = settings("tls-tproxy@.service")["[Service]"]
    rights = "CAP_NET_ADMIN CAP_NET_RAW"
    families = "AF_UNIX AF_INET AF_INET6 AF_NETLINK"
    assert set(ours) - set(bridges) == {
        ("ExecStart", f"/opt/sniproxy/bin/tls-tproxy --port {LISTENING} --fail-closed"),
        ("WorkingDirectory", "/srv/tls-tproxy/%i"),
        ("User", "tls-tproxy"),
        ("AmbientCapabilities", rights),
        ("CapabilityBoundingSet", rights),
        ("RestrictAddressFamilies", f"{families} AF_PACKET"),
        ("SystemCallFilter", "capset"),
    }
    assert {key for key, _ in set(bridges) - set(ours)} == {
        *("ExecStart", "WorkingDirectory", "User"),
        *("CapabilityBoundingSet", "RestrictAddressFamilies"),
    }


def test_systemd_understands_it(machine: Machine) -> None:
    done = machine.run("systemd-analyze", "verify", "--man=no", UNIT)
    assert done.stdout + done.stderr == ""


def test_systemd_finds_little_exposed(machine: Machine) -> None:
    # 23 of 100; "2.3" as it shows it. tls-bridge has 1.5; the difference is that there is no such
    # thing as this without the two rights, and packet sockets.
    done = machine.run("systemd-analyze", "security", "--threshold=23", "--no-pager", UNIT)
    assert "Overall exposure level" in done.stdout


# --- Serving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_program_without_tls_is_wrapped(machine: Machine, family: str) -> None:
    assert say(machine, NAME, family) == "client.example: hello"


def test_what_people_see(machine: Machine) -> None:
    machine.run("systemctl", "restart", UNIT)
    assert say(machine) == "client.example: hello"
    eventually(lambda: show(machine, "StatusText", UNIT) == "0 open, 1 served, 0 refused")


def test_the_journal_knows_what_is_serious(machine: Machine) -> None:
    assert say(machine, "other.example") == "ConnectionResetError"
    # sd-daemon(3): 4 is a warning, 6 is information.
    assert wait_for_log(machine, f"ports={PORT}", UNIT)[0] == 6
    assert wait_for_log(machine, "reason=unknown_name", UNIT)[0] == 6
    assert say(machine, "127.0.0.9") == "ConnectionResetError"
    assert wait_for_log(machine, "reason=no_name", UNIT)[0] == 4


# --- Ends, and beginnings ------------------------------------------------------------------------


def test_a_restart_keeps_the_port_wrapped(machine: Machine) -> None:
    old = main_pid(machine, UNIT)
    with started(machine, *PYTHON, CLIENT, NAME, "twice") as slow:
        assert heard(slow.stdout) == ["client.example: hello"]
        machine.run("systemctl", "--no-block", "restart", UNIT)
        wait_for_log(machine, "draining", UNIT)
        # Meanwhile nobody leaves in plaintext, and who is in may go on.
        assert say(machine) == "ConnectionRefusedError"
        assert ended(slow) == (["client.example: hello"], "")
    eventually(lambda: state(machine, UNIT) == "active")
    assert main_pid(machine, UNIT) not in {0, old}
    assert say(machine) == "client.example: hello"


def test_killed_it_refuses_until_it_comes_back(machine: Machine) -> None:
    old = main_pid(machine, UNIT)
    machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    assert say(machine) in {"ConnectionRefusedError", "client.example: hello"}
    eventually(lambda: main_pid(machine, UNIT) not in {0, old})
    eventually(lambda: say(machine) == "client.example: hello")


def test_without_its_nft_it_starts_anew(machine: Machine) -> None:
    old = main_pid(machine, UNIT)
    machine.run(*SHELL, f"kill -KILL {nft_of(machine, old)}")
    eventually(lambda: main_pid(machine, UNIT) not in {0, old})
    eventually(lambda: state(machine, UNIT) == "active")
    assert say(machine) == "client.example: hello"


def test_stopped_its_table_is_gone_and_nothing_leaves_in_plaintext(machine: Machine) -> None:
    assert len(tables(machine)) == 2
    machine.run("systemctl", "stop", UNIT)
    try:
        assert tables(machine) == [f"tls_tproxy_refuse_{LISTENING}"]
        assert say(machine) == "ConnectionRefusedError"
        stop_refusing(machine)
        assert tables(machine) == []
        assert say(machine) == "plaintext"
    finally:
        machine.run("systemctl", "start", UNIT)
    assert say(machine) == "client.example: hello"


def test_without_fail_closed_nothing_is_left(machine: Machine) -> None:
    exe = f"ExecStart=/opt/sniproxy/bin/tls-tproxy --port {LISTENING}"
    with changed(machine, UNIT, "ExecStart=", exe):
        # What the one before has left.
        stop_refusing(machine)
        assert say(machine) == "client.example: hello"
        machine.run("systemctl", "stop", UNIT)
        assert tables(machine) == []
    assert say(machine) == "client.example: hello"


def test_called_wrongly_it_is_tried_again_until_it_is_mended(machine: Machine) -> None:
    wrong = ("ExecStart=", "ExecStart=/opt/sniproxy/bin/tls-tproxy --verbose")
    with changed(machine, UNIT, *wrong, starts=False):
        eventually(lambda: "unknown option '--verbose'" in show(machine, "StatusText", UNIT))
        eventually(lambda: int(show(machine, "NRestarts", UNIT)) >= 2)
        assert say(machine) == "ConnectionRefusedError"
    assert say(machine) == "client.example: hello"


# --- Confined ------------------------------------------------------------------------------------


def fields_of(machine: Machine, pid: int) -> dict[str, str]:
    status = machine.run("cat", f"/proc/{pid}/status").stdout
    return dict(line.split(":\t", 1) for line in status.splitlines())


def test_it_has_the_right_to_mark_and_no_other(machine: Machine) -> None:
    fields = fields_of(machine, main_pid(machine, UNIT))
    uid = machine.run("id", "--user", "tls-tproxy").stdout.strip()
    assert fields["Uid"].split() == [uid] * 4
    for capabilities in "CapPrm", "CapEff":
        assert int(fields[capabilities], 16) == NET_RAW
    for capabilities in "CapInh", "CapAmb":
        assert int(fields[capabilities], 16) == 0
    assert int(fields["CapBnd"], 16) == NET_ADMIN | NET_RAW
    assert fields["NoNewPrivs"] == "1"
    # SECCOMP_MODE_FILTER
    assert fields["Seccomp"] == "2"


def test_its_nft_has_no_more_than_it_was_given(machine: Machine) -> None:
    fields = fields_of(machine, int(nft_of(machine, main_pid(machine, UNIT))))
    assert fields["Name"] == "nft"
    assert int(fields["CapEff"], 16) == NET_ADMIN | NET_RAW
    assert fields["Uid"] == fields_of(machine, main_pid(machine, UNIT))["Uid"]


def test_it_can_write_nowhere(machine: Machine) -> None:
    assert writable_places(machine, UNIT) <= {"/proc", *OF_EVERYBODY}


def test_its_own_sandbox_is_as_without_systemd(machine: Machine) -> None:
    _, line = wait_for_log(machine, "sandbox", UNIT)
    program = ("/opt/sniproxy/bin/tls-tproxy", "--user", "tls-tproxy")
    with started(machine, "env", f"--chdir={PLACE}", *program) as outside:
        assert heard(outside.stderr) == [line]


@pytest.mark.parametrize("options", ["--log connections", "--workers 2"])
def test_the_system_calls_are_all_that_it_needs(machine: Machine, options: str) -> None:
    # One that is not listed is death now.
    exe = f"ExecStart=/opt/sniproxy/bin/tls-tproxy --port {LISTENING} --fail-closed"
    with changed(machine, UNIT, "SystemCallErrorNumber=", "ExecStart=", f"{exe} {options}"):
        pid = main_pid(machine, UNIT)
        for family in "4", "6":
            assert say(machine, NAME, family) == "client.example: hello"
        assert say(machine, "other.example") == "ConnectionResetError"
        # Another key and certificate; and another port.
        place = machine.root / PLACE.removeprefix("/")
        write_identity(place / "identity", "client.example")
        write(place / "wrap/ports/9443")
        wait_for_log(machine, f"ports={PORT},9443", UNIT)
        (place / "wrap/ports/9443").unlink()
        assert say(machine) == "client.example: hello"
        assert main_pid(machine, UNIT) == pid
        machine.run("systemctl", "stop", UNIT)
        assert show(machine, "Result", UNIT) == "success"
        log = [line for _, line in journal(machine, UNIT)]
        assert not [line for line in log if "SYS" in line or " worker_died " in line]
