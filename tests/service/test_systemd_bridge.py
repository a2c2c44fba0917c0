"""systemd with the units of tls-bridge that we ship: both sides, and a service, in one machine."""

from collections.abc import Iterator

import pytest

from tests.support.bridge import INGRESS, PEER, authority, write, write_identity
from tests.support.daemon import eventually
from tests.support.machine import Machine
from tests.support.units import (
    OF_EVERYBODY,
    SYSTEM,
    UNITS,
    changed,
    check_rights,
    commands,
    ended,
    heard,
    heard_amid_restarts,
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
INGRESS_UNIT, PEER_UNIT = "tls-bridge@main.service", "tls-bridge-peer@main.service"
SNI_SOCKET = "tls-bridge-sni@main.socket"
INGRESS_PLACE, PEER_PLACE = "/srv/tls-bridge/main", "/srv/tls-bridge-peer/main"
ALL_UNITS = sorted(path.name for path in UNITS.iterdir() if "tproxy" not in path.name)

each_side = pytest.mark.parametrize("unit", [INGRESS_UNIT, PEER_UNIT])

# The services behind the peer: one says back what it hears, and one, with TLS, which PROXY header
# has come.
SERVICES = r"""
import socket, ssl, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/web/cert.pem", "/srv/web/key.pem")
def echo(client):
    while data := client.recv(65536):
        client.sendall(data)
def page(client):
    header = b""
    while not header.endswith(b"\r\n"):
        header += client.recv(1)
    with context.wrap_socket(client, server_side=True) as stream:
        stream.recv(65536)
        stream.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + header)
def run(listening, answer):
    while True:
        client, _ = listening.accept()
        threading.Thread(target=serve, args=(client, answer)).start()
def serve(client, answer):
    with client:
        answer(client)
for port, answer in (8000, echo), (8001, page):
    listening = socket.create_server(("127.0.0.1", port))
    threading.Thread(target=run, args=(listening, answer)).start()
print("listening", flush=True)
"""

# What clients have in common: to get to a service, and to hear that it is that.
TUNNEL = r"""
import os, socket, sys, threading
def tunnel(target="web.internal:80", port=8080):
    client = socket.create_connection(("127.0.0.1", port), 30)
    stream = client.makefile("rwb", 0)
    stream.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    status = stream.readline().decode().strip()
    while stream.readline() not in (b"\r\n", b""):
        pass
    if " 200 " not in status:
        sys.exit(status)
    return client, stream
def ask(stream, words=b"hello\n"):
    stream.write(words)
    return stream.readline().decode().strip()
"""

ONE_CLIENT = f"{TUNNEL}\nclient, stream = tunnel(*sys.argv[1:])\nprint(ask(stream))"

OTHER_CLIENT = f"{TUNNEL}\nclient, stream = tunnel(port=8081)\nprint(ask(stream))"

# Over and over, four at once, until standard input ends; a line for each.
CLIENTS = (
    TUNNEL
    + r"""
enough = threading.Event()
def run():
    while not enough.is_set():
        try:
            client, stream = tunnel()
            with client, stream:
                line = ask(stream)
        except (Exception, SystemExit) as error:
            line = repr(error)
        os.write(1, f"{line}\n".encode())
threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads:
    thread.start()
sys.stdin.read()
enough.set()
"""
)

# Gets to the service, and speaks with it when standard input ends.
SLOW_CLIENT = (
    TUNNEL
    + """
client, stream = tunnel()
print("connected", flush=True)
sys.stdin.read()
print(ask(stream))
"""
)


@pytest.fixture(scope="module")
def machine(machine: Machine) -> Iterator[Machine]:
    """The machine, as the comments in the units have it, with both sides, and with sniproxy."""
    machine.install_wheel("bridge")
    for unit in ALL_UNITS:
        machine.write(f"{SYSTEM}/{unit}", (UNITS / unit).read_text())
    # Names that nobody has to be asked for; nobody answers for the others.
    machine.write("/etc/hosts", f"127.0.0.1 localhost {PEER}\n")
    machine.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
    root = machine.root

    useradd, make, *key, enable = commands("tls-bridge@.service")
    machine.run(*SHELL, f"{useradd}; {make}")
    place = root / INGRESS_PLACE.removeprefix("/")
    for name in "web.internal", "web.example", "gone.internal":
        write(place / "hosts" / name / "peer", "rack\n")
    write(place / "peers/rack/address", f"{PEER}:8443\n")
    write_identity(place / "peers/rack/identity", INGRESS)
    machine.run(*SHELL, f"cd {INGRESS_PLACE}/peers/rack/identity; {key[0]}")
    machine.run(*SHELL, enable)

    same_useradd, make, *key, enable = commands("tls-bridge-peer@.service")
    assert same_useradd == useradd
    machine.run(*SHELL, make)
    place = root / PEER_PLACE.removeprefix("/")
    write(place / "clients" / INGRESS)
    write(place / "allow/web.internal/80", "127.0.0.1:8000\n")
    write(place / "allow/web.example/443", "127.0.0.1:8001\n")
    write(place / "allow/web.example/send-proxy-v1")
    write(place / "allow/gone.internal/80")
    write_identity(place / "identity", PEER)
    machine.run(*SHELL, f"cd {PEER_PLACE}/identity; {key[0]}")
    machine.run(*SHELL, enable)

    write_identity(root / "srv/web", "web.example")
    with started(machine, *PYTHON, SERVICES) as services:
        assert heard(services.stdout) == ["listening"]
        yield machine


@pytest.fixture(scope="module")
def behind(machine: Machine) -> Machine:
    """The machine, where sniproxy has a host that the ingress carries to the peer."""
    machine.run(*SHELL, "\n".join(commands("sniproxy.service")))
    *links, section, paths, stop, enable = commands("tls-bridge-sni@.socket")
    machine.run(*SHELL, "\n".join(links))
    machine.write(f"{SYSTEM}/sniproxy.service.d/override.conf", f"{section}\n{paths}\n")
    machine.run(*SHELL, f"systemctl daemon-reload; {stop}; {enable}")
    return machine


def fetch(machine: Machine, *target: str) -> None:
    assert machine.run(*PYTHON, ONE_CLIENT, *target).stdout == "hello\n"


def fetch_page(machine: Machine, port: int) -> None:
    """Get to the service with TLS by the server name; it knows from where."""
    authority().cert_pem.write_to_path(str(machine.root / "root/ca.pem"))
    done = machine.run(
        *("curl", "--silent", "--show-error", "--max-time", "30", "--cacert", "/root/ca.pem"),
        *("--connect-to", f"web.example:443:127.0.0.1:{port}", "https://web.example/"),
        *("--write-out", "%{local_port}"),
    )
    header, local_port = done.stdout.splitlines()
    word, family, source, _, source_port, _ = header.split()
    assert (word, family, source, source_port) == ("PROXY", "TCP4", "127.0.0.1", local_port)


def refusal(machine: Machine, target: str) -> str:
    """Return the status that a CONNECT to somewhere gets."""
    done = machine.run(*PYTHON, ONE_CLIENT, target, check=False)
    assert done.returncode == 1
    return done.stderr.strip()


# --- The files -----------------------------------------------------------------------------------


def test_both_sides_have_the_same_settings() -> None:
    ingress, peer = settings("tls-bridge@.service"), settings("tls-bridge-peer@.service")
    peers = [
        (key, value.replace("tls-bridge-peer", "tls-bridge")) for key, value in peer["[Service]"]
    ]
    assert peers == ingress["[Service]"]


def test_they_end_and_begin_as_sniproxy_does() -> None:
    sniproxys = dict(settings("sniproxy.service")["[Service]"])
    ours = dict(settings("tls-bridge@.service")["[Service]"])
    for key in "Restart", "RestartSec", "WatchdogSec", "KillMode", "TimeoutStopSec", "LimitNOFILE":
        assert ours[key] == sniproxys[key]


def test_systemd_understands_them(machine: Machine) -> None:
    sockets = (
        f"{name}@main.socket" for name in ("tls-bridge", "tls-bridge-sni", "tls-bridge-peer")
    )
    verify = ("systemd-analyze", "verify", "--man=no")
    done = machine.run(*verify, *sockets, INGRESS_UNIT, PEER_UNIT)
    assert done.stdout + done.stderr == ""


@each_side
def test_systemd_finds_little_exposed(machine: Machine, unit: str) -> None:
    # 15 of 100; "1.5" as it shows it. As for sniproxy, though these have a network.
    done = machine.run("systemd-analyze", "security", "--threshold=15", "--no-pager", unit)
    assert "Overall exposure level" in done.stdout


# --- Serving -------------------------------------------------------------------------------------


def test_the_first_client_starts_both(machine: Machine) -> None:
    for unit in INGRESS_UNIT, PEER_UNIT:
        machine.run("systemctl", "stop", unit)
        assert state(machine, unit) == "inactive"
    fetch(machine)
    for unit in INGRESS_UNIT, PEER_UNIT:
        assert state(machine, unit) == "active"


@each_side
def test_what_people_see(machine: Machine, unit: str) -> None:
    machine.run("systemctl", "restart", unit)
    fetch(machine)
    eventually(lambda: show(machine, "StatusText", unit) == "0 open, 1 served, 0 refused")
    status = machine.run("systemctl", "status", unit).stdout
    assert 'Status: "0 open, 1 served, 0 refused"' in status


def test_the_journal_knows_what_is_serious(machine: Machine) -> None:
    machine.run("systemctl", "restart", INGRESS_UNIT)
    assert refusal(machine, "nobody.internal:80").startswith("HTTP/1.1 403 ")
    # sd-daemon(3): 4 is a warning, 6 is information.
    assert wait_for_log(machine, "address=127.0.0.1:8080", INGRESS_UNIT)[0] == 6
    assert wait_for_log(machine, "reason=no_route", INGRESS_UNIT)[0] == 6
    machine.run("systemctl", "stop", "tls-bridge-peer@main.socket")
    try:
        assert refusal(machine, "web.internal:80").startswith("HTTP/1.1 502 ")
        assert wait_for_log(machine, "reason=refused", INGRESS_UNIT)[0] == 4
    finally:
        machine.run("systemctl", "start", "tls-bridge-peer@main.socket")


def test_a_host_of_sniproxy_is_served_elsewhere(behind: Machine) -> None:
    """sniproxy takes the client to the second socket of the ingress, with its address."""
    fetch_page(behind, 443)
    # By the other socket clients say CONNECT, as before.
    fetch(behind)
    listening = [line.split() for _, line in journal(behind, INGRESS_UNIT) if " listening " in line]
    assert {words[2] for words in listening} == {
        "address=127.0.0.1:8080",
        "address=/run/tls-bridge/main/tls-socket",
    }


def test_the_second_socket_is_for_sniproxy_alone(behind: Machine) -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('{}')"
    path = "/run/tls-bridge/main/tls-socket"
    for user, code in ("sniproxy", 0), ("tls-bridge", 1), ("nobody", 1):
        client = ("runuser", "--user", user, "--", *PYTHON, connect.format(path))
        assert behind.run(*client, check=False).returncode == code


def test_two_instances(machine: Machine) -> None:
    lines = commands("tls-bridge@.socket")[:2]
    port = "ListenStream=127.0.0.1:8081"
    drop_in = f"{SYSTEM}/tls-bridge@other.socket.d/override.conf"
    machine.write(drop_in, "\n".join((*lines, port, "")))
    machine.run("cp", "--archive", INGRESS_PLACE, "/srv/tls-bridge/other")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "tls-bridge@other.socket")
    try:
        assert machine.run(*PYTHON, OTHER_CLIENT).stdout == "hello\n"
        fetch(machine)
        assert state(machine, "tls-bridge@other.service") == "active"
    finally:
        machine.run("systemctl", "stop", "tls-bridge@other.socket", "tls-bridge@other.service")
        machine.run("rm", "--recursive", "/srv/tls-bridge/other", drop_in)
        machine.run("systemctl", "daemon-reload")


def test_an_instance_for_clients_who_say_a_hello_only(machine: Machine) -> None:
    """As the comment in the socket says, on a TCP port."""
    lines = commands("tls-bridge@.socket")[-4:]
    drop_in = f"{SYSTEM}/tls-bridge@hello.socket.d/override.conf"
    machine.write(drop_in, "\n".join((*lines, "")).replace("=443", "=127.0.0.1:8082"))
    machine.run("cp", "--archive", INGRESS_PLACE, "/srv/tls-bridge/hello")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "tls-bridge@hello.socket")
    try:
        fetch_page(machine, 8082)
    finally:
        machine.run("systemctl", "stop", "tls-bridge@hello.socket", "tls-bridge@hello.service")
        machine.run("rm", "--recursive", "/srv/tls-bridge/hello", drop_in)
        machine.run("systemctl", "daemon-reload")


# --- Ends, and beginnings ------------------------------------------------------------------------


@each_side
def test_a_restart_refuses_nobody(machine: Machine, unit: str) -> None:
    fetch(machine)
    assert heard_amid_restarts(machine, *PYTHON, CLIENTS, unit=unit) == {"hello"}


@each_side
def test_who_is_in_may_come_to_an_end(machine: Machine, unit: str) -> None:
    fetch(machine)
    with started(machine, *PYTHON, SLOW_CLIENT) as slow:
        assert heard(slow.stdout) == ["connected"]
        machine.run("systemctl", "--no-block", "restart", unit)
        wait_for_log(machine, "draining", unit)
        assert state(machine, unit) == "deactivating"
        assert ended(slow) == (["hello"], "")
    eventually(lambda: state(machine, unit) == "active")
    fetch(machine)


@each_side
def test_killed_it_comes_back(machine: Machine, unit: str) -> None:
    machine.run("systemctl", "start", unit)
    old = main_pid(machine, unit)
    machine.run("systemctl", "kill", "--signal=KILL", unit)
    fetch(machine)
    assert main_pid(machine, unit) not in {0, old}


@each_side
def test_called_wrongly_it_is_tried_again_until_it_is_mended(machine: Machine, unit: str) -> None:
    program = unit.partition("@")[0]
    wrong = ("ExecStart=", f"ExecStart=/opt/sniproxy/bin/{program} --verbose")
    with changed(machine, unit, *wrong, starts=False), started(machine, *PYTHON, ONE_CLIENT) as one:
        eventually(lambda: "unknown option '--verbose'" in show(machine, "StatusText", unit))
        eventually(lambda: int(show(machine, "NRestarts", unit)) >= 2)
        machine.write(f"{SYSTEM}/{unit}.d/override.conf", "")
        machine.run("systemctl", "daemon-reload")
        if unit == INGRESS_UNIT:
            # The client has waited in the queue of the port. An ingress waits for ten seconds only.
            assert ended(one) == (["hello"], "")
        eventually(lambda: state(machine, unit) == "active")
    fetch(machine)


# --- Confined ------------------------------------------------------------------------------------


@each_side
def test_it_has_no_rights(machine: Machine, unit: str) -> None:
    fetch(machine)
    check_rights(machine, "tls-bridge", unit)


@each_side
def test_it_can_write_nowhere(machine: Machine, unit: str) -> None:
    fetch(machine)
    assert writable_places(machine, unit) <= {"/proc", *OF_EVERYBODY}


@each_side
def test_its_own_sandbox_is_as_without_systemd(machine: Machine, unit: str) -> None:
    machine.run("systemctl", "restart", unit)
    _, line = wait_for_log(machine, "sandbox", unit)
    place = show(machine, "WorkingDirectory", unit)
    programs = ("sniproxy-listen", "127.0.0.1:8083", unit.partition("@")[0])
    outside = ("env", f"--chdir={place}", "PATH=/opt/sniproxy/bin:/usr/bin", *programs)
    with started(machine, *outside) as program:
        assert heard(program.stderr) == [line]


@pytest.mark.parametrize("options", ["--log connections", "--workers 2"])
def test_the_system_calls_are_all_that_they_need(behind: Machine, options: str) -> None:
    # One that is not listed is death now.
    strict = ("SystemCallErrorNumber=", "ExecStart=")
    exe = "ExecStart=/opt/sniproxy/bin"
    with (
        changed(behind, PEER_UNIT, *strict, f"{exe}/tls-bridge-peer {options}"),
        changed(behind, INGRESS_UNIT, *strict, f"{exe}/tls-bridge {options}"),
    ):
        pids = [main_pid(behind, unit) for unit in (INGRESS_UNIT, PEER_UNIT)]
        fetch(behind)
        fetch_page(behind, 443)
        assert refusal(behind, "nobody.internal:80").startswith("HTTP/1.1 403 ")
        # A name that the peer has to ask for.
        assert refusal(behind, "gone.internal:80").startswith("HTTP/1.1 502 ")
        wait_for_log(behind, "reason=unresolved", PEER_UNIT)
        # Another key and certificate.
        write_identity(behind.root / PEER_PLACE.removeprefix("/") / "identity", PEER)
        fetch(behind)
        assert [main_pid(behind, unit) for unit in (INGRESS_UNIT, PEER_UNIT)] == pids
        for unit in INGRESS_UNIT, PEER_UNIT:
            with started(behind, *PYTHON, SLOW_CLIENT) as slow:
                assert heard(slow.stdout) == ["connected"]
                behind.run("systemctl", "--no-block", "stop", unit)
                wait_for_log(behind, "draining", unit)
                assert ended(slow) == (["hello"], "")
            eventually(lambda unit=unit: state(behind, unit) == "inactive")  # type: ignore[misc]
            assert show(behind, "Result", unit) == "success"
            log = [line for _, line in journal(behind, unit)]
            assert not [line for line in log if "SYS" in line or " worker_died " in line]
            behind.run("systemctl", "start", unit)
