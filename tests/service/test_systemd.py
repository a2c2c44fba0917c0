"""systemd with the units that we ship, in a machine with tenants."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sniproxy.service.privileges import CAP_NET_ADMIN
from tests.support.daemon import eventually
from tests.support.handed import filter_takes_a_right
from tests.support.hellos import hello_bytes
from tests.support.machine import Machine
from tests.support.tenants import Page
from tests.support.units import (
    SERVICE,
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
)

ROOT = Path(__file__).parents[2]
UNITS = ("sniproxy.socket", "sniproxy.service", "sniproxy@.service")
SYSTEM = "/etc/systemd/system"
PYTHON, SHELL = ("python3", "-c"), ("sh", "-euc")
COPY = "sniproxy@next.service"
HANDING_OVER = Page(ROOT / "docs/handing-over.md")
PROGRAM = "/opt/sniproxy/bin/sniproxy --upgrade-socket /run/%N/upgrade"

# The backend of the tenant whose name is the instance.
SITE = """
[Service]
User=%i
UMask=0
WorkingDirectory=/srv/hosts/%i.example
ExecStart=/usr/local/bin/demo-site %i.example
"""

# Fetches the page over and over, four times at once, until standard input ends; a line for each.
CLIENTS = """
import os, socket, ssl, sys, threading
enough = threading.Event()
context = ssl.create_default_context(cafile="/srv/hosts/one.example/cert.pem")
def fetch():
    with (
        socket.create_connection(("127.0.0.1", 443), 30) as client,
        context.wrap_socket(client, server_hostname="one.example") as stream,
    ):
        stream.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        return stream.makefile().read().splitlines()[-1]
def run():
    while not enough.is_set():
        try:
            line = fetch()
        except Exception as error:
            line = repr(error)
        os.write(1, f"{line}\\n".encode())
threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads:
    thread.start()
sys.stdin.read()
enough.set()
"""

# Connects, and asks for the page when standard input ends.
SLOW_CLIENT = """
import socket, ssl, sys
context = ssl.create_default_context(cafile="/srv/hosts/one.example/cert.pem")
client = socket.create_connection(("127.0.0.1", 443), 30)
stream = context.wrap_socket(client, server_hostname="one.example")
print("connected", flush=True)
sys.stdin.read()
stream.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
print(stream.makefile().read().splitlines()[-1])
"""

# Sends bytes, in hexadecimal digits, and says how many come back, and the first ones.
RAW_CLIENT = """
import socket, sys
client = socket.create_connection(("127.0.0.1", 443), 30)
client.sendall(bytes.fromhex(sys.argv[1]))
answer = client.makefile("rb").read()
print(len(answer), answer[:100].hex())
"""

# Connects many times, and says nothing.
SILENT_CLIENTS = """
import socket, sys
clients = [socket.create_connection(("127.0.0.1", 443), 30) for _ in range(50)]
print("connected", flush=True)
sys.stdin.read()
"""

# Begins a download, and reads the rest when standard input ends; says how much that was in all.
BULK_CLIENT = """
import socket, sys
client = socket.create_connection(("127.0.0.1", 443), 30)
client.sendall(bytes.fromhex(sys.argv[1]))
size = len(client.recv(1))
print("begun", flush=True)
sys.stdin.read()
while data := client.recv(1 << 20):
    size += len(data)
print(size)
"""

# A backend, of root's, that has much to say.
BULK = """
import os, socket
os.makedirs("/srv/hosts/bulk.example", exist_ok=True)
os.chdir("/srv/hosts/bulk.example")
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind("new")
    os.chmod("new", 0o666)
    listening.listen()
    os.rename("new", "tls-socket")
    print("listening", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(bytes(1 << 24))
"""

# A backend, of root's, that is handed its clients.
HANDED = """
import os
from sniproxy import handoff
os.makedirs("/srv/hosts/handed.example", exist_ok=True)
with handoff.listen("/srv/hosts/handed.example/handoff-socket") as listener:
    print("listening", flush=True)
    client, address = listener.accept()
    with client:
        client.recv(65536)
        client.sendall(address[0].encode())
"""

# A module that puts a bug into the daemon: for it, to enter a host's directory is to call this.
BUG = """
import os
enter = os.chdir
def chdir(path):
    if path in {names!r}:
        raise ZeroDivisionError
    enter(path)
os.chdir = chdir
"""


@pytest.fixture(scope="module")
def machine(machine: Machine) -> Machine:
    """The machine, as the comments in the units have it; one tenant has a host."""
    machine.install_wheel()
    for unit in UNITS:
        machine.write(f"{SYSTEM}/{unit}", (ROOT / "systemd" / unit).read_text())
    machine.run(*SHELL, "\n".join(commands("sniproxy.service")))
    machine.write(f"{SYSTEM}/site@.service", SITE)
    machine.write(
        "/usr/local/bin/demo-site", (ROOT / "scripts" / "demo-site").read_text(), mode=0o755
    )
    machine.run("systemctl", "daemon-reload")
    add_host(machine, "one")
    return machine


@pytest.fixture(autouse=True)
def _no_limit(request: pytest.FixtureRequest) -> None:
    """Forget what tests before did: usually systemd allows five starts in ten seconds."""
    if "machine" in request.fixturenames:
        machine: Machine = request.getfixturevalue("machine")
        machine.run("systemctl", "reset-failed")


def add_host(machine: Machine, tenant: str, place: str | None = None) -> None:
    """Make a user, who runs the site of a host of the user's own; a link leads to another place."""
    name = f"{tenant}.example"
    directory = place or f"/srv/hosts/{name}"
    machine.run("useradd", tenant)
    machine.run("install", "--directory", f"--owner={tenant}", directory)
    if place is not None:
        machine.run("ln", "--symbolic", place, f"/srv/hosts/{name}")
    machine.run(
        *("runuser", "--user", tenant, "--"),
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-noenc", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
        *("-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"),
    )
    machine.run("systemctl", "start", f"site@{tenant}")
    eventually((machine.root / directory.removeprefix("/") / "tls-socket").exists)


def try_to_fetch(
    machine: Machine, tenant: str, *options: str
) -> "subprocess.CompletedProcess[str]":
    name = f"{tenant}.example"
    where = ("--resolve", f"{name}:443:127.0.0.1", f"https://{name}/")
    # Longer than anything that may be waited for here.
    curl = ("curl", "--silent", "--show-error", "--max-time", "30")
    return machine.run(*curl, *options, *where, check=False)


def fetch(machine: Machine, tenant: str = "one") -> None:
    done = try_to_fetch(machine, tenant, "--cacert", f"/srv/hosts/{tenant}.example/cert.pem")
    assert (done.stdout, done.stderr) == (page(tenant), "")


def page(tenant: str) -> str:
    return f"This is {tenant}.example. I see a Unix socket, and not who you are.\n"


@contextmanager
def changed(machine: Machine, *settings: str, starts: bool = True) -> Iterator[None]:
    """Run it with a drop-in, as `systemctl edit` makes them."""
    drop_in = f"{SYSTEM}/sniproxy.service.d/override.conf"
    machine.write(drop_in, "\n".join(("[Service]", *settings, "")))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", SERVICE, check=starts)
    try:
        yield
    finally:
        machine.run("rm", drop_in)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "reset-failed")
        machine.run("systemctl", "restart", "sniproxy.socket", SERVICE)


# --- The files -----------------------------------------------------------------------------------


def test_the_copies_have_the_settings_of_the_service() -> None:
    service, copies = settings("sniproxy.service"), settings("sniproxy@.service")
    assert service.pop("[Install]")
    [description, *unit] = service.pop("[Unit]")
    assert copies.pop("[Unit]") == [("Description", f"{description[1]}, copy %i"), *unit]
    assert copies == {"[Service]": [("Sockets", "sniproxy.socket"), *service["[Service]"]]}


def test_systemd_understands_them(machine: Machine) -> None:
    done = machine.run("systemd-analyze", "verify", "--man=no", "sniproxy.socket", SERVICE, COPY)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("unit", [SERVICE, COPY])
def test_systemd_finds_little_exposed(machine: Machine, unit: str) -> None:
    # 15 of 100; "1.5" as it shows it.
    done = machine.run("systemd-analyze", "security", "--threshold=15", "--no-pager", unit)
    assert "Overall exposure level" in done.stdout


# --- Serving -------------------------------------------------------------------------------------


def test_the_first_client_starts_it(machine: Machine) -> None:
    machine.run("systemctl", "stop", SERVICE)
    assert state(machine) == "inactive"
    fetch(machine)
    assert state(machine) == "active"


def test_what_people_see(machine: Machine) -> None:
    machine.run("systemctl", "restart", SERVICE)
    fetch(machine)
    eventually(lambda: show(machine, "StatusText") == "0 open, 1 served, 0 refused")
    status = machine.run("systemctl", "status", SERVICE).stdout
    assert 'Status: "0 open, 1 served, 0 refused"' in status
    assert "sniproxy: listening address=[::]:443" in status


def test_the_journal_knows_what_is_serious(machine: Machine) -> None:
    machine.run("systemctl", "restart", SERVICE)
    assert "unrecognized name" in try_to_fetch(machine, "nobody").stderr
    # A ClientHello that says it has 2^24 - 1 bytes.
    alert = machine.run(*PYTHON, RAW_CLIENT, "160301001001ffffff" + "00" * 12)
    assert alert.stdout == "7 15030300020250\n"
    # sd-daemon(3): 4 is a warning, 6 is information.
    assert wait_for_log(machine, "listening")[0] == 6
    assert wait_for_log(machine, "reason=no_such_host")[0] == 6
    assert wait_for_log(machine, "reason=hello_too_large")[0] == 4


def test_a_new_host(machine: Machine) -> None:
    fetch(machine)
    pid = main_pid(machine)
    add_host(machine, "two")
    fetch(machine, "two")
    assert main_pid(machine) == pid


def test_a_host_on_a_filesystem_that_is_mounted_later(machine: Machine) -> None:
    fetch(machine)
    pid = main_pid(machine)
    machine.run("mkdir", "/srv/hosts/three.example")
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/srv/hosts/three.example")
    add_host(machine, "three")
    fetch(machine, "three")
    assert main_pid(machine) == pid
    # It has the root directory of the next version, and that of the old one is gone.
    machine.run("systemctl", "reload", SERVICE)
    eventually(lambda: main_pid(machine) != pid)
    fetch(machine, "three")


def test_a_tenant_does_not_get_the_socket_of_another(machine: Machine) -> None:
    machine.run("useradd", "thief")
    machine.run("install", "--directory", "--owner=thief", "/srv/hosts/thief.example")
    machine.run("ln", "--symbolic", "../one.example/tls-socket", "/srv/hosts/thief.example")
    assert "unrecognized name" in try_to_fetch(machine, "thief").stderr
    thief, one = (machine.run("id", "--user", name).stdout.strip() for name in ("thief", "one"))
    # In a user namespace both would be the same.
    refused = f': the directory belongs to uid {thief}, the listener to uid {one}"'
    assert refused in wait_for_log(machine, "reason=wrong_owner")[1]


def test_a_link_out_of_the_hosts_directory(machine: Machine) -> None:
    add_host(machine, "four", "/run/backends/four")
    assert "unrecognized name" in try_to_fetch(machine, "four").stderr
    with changed(machine, "BindReadOnlyPaths=/run/backends"):
        fetch(machine, "four")


def test_another_hosts_directory(machine: Machine) -> None:
    # There is none at the usual place.
    machine.run("mv", "/srv/hosts", "/var/hosts")
    with changed(machine, "WorkingDirectory=/var/hosts", "BindReadOnlyPaths=/var/hosts"):
        machine.run("mv", "/var/hosts", "/srv/hosts")
        fetch(machine)


def test_another_address(machine: Machine) -> None:
    drop_in = f"{SYSTEM}/sniproxy.socket.d/override.conf"
    lines = commands("sniproxy.socket")
    machine.write(drop_in, "\n".join((*lines, "FreeBind=yes", "")))
    restart = (
        f"systemctl daemon-reload; systemctl stop {SERVICE}; systemctl restart sniproxy.socket"
    )
    try:
        machine.run(*SHELL, f"{restart}; systemctl start {SERVICE}")
        address = lines[-1].removeprefix("ListenStream=")
        wait_for_log(machine, f"address={address}")
    finally:
        machine.run(*SHELL, f"rm {drop_in}; {restart}")


@pytest.mark.parametrize("has_right", [True, False])
def test_clients_are_handed_over(machine: Machine, has_right: bool) -> None:
    lines = HANDING_OVER["unit"].text.splitlines()[1:]
    if not has_right:
        lines = [line for line in lines if "CAP_NET_ADMIN" not in line]
    with changed(machine, *lines):
        guarded = has_right or not filter_takes_a_right()
        assert wait_for_log(machine, f"guarded={'yes' if guarded else 'no'}")[0] == 6
        # Who may be given the right, but by a program that it may not run.
        bounding = 1 << CAP_NET_ADMIN if has_right else 0
        check_rights(machine, "sniproxy", bounding=bounding)
        # The next version has the same rights, and hands over, too.
        old = main_pid(machine)
        machine.run("systemctl", "reload", SERVICE)
        eventually(lambda: main_pid(machine) != old)
        check_rights(machine, "sniproxy", bounding=bounding)
        said = [line for _, line in journal(machine) if "guarded=" in line]
        assert len(said) == 2
        assert said[0] == said[1]
        _hand_over(machine)
        fetch(machine)


def _hand_over(machine: Machine) -> None:
    with started(machine, "/opt/sniproxy/bin/python", "-c", HANDED) as backend:
        assert heard(backend.stdout) == ["listening"]
        answer = machine.run(*PYTHON, RAW_CLIENT, hello_bytes("handed.example").hex()).stdout
        address = b"::ffff:127.0.0.1"
        assert answer == f"{len(address)} {address.hex()}\n"


# --- Ends, and beginnings ------------------------------------------------------------------------


def test_a_restart_refuses_nobody(machine: Machine) -> None:
    fetch(machine)
    assert heard_amid_restarts(machine, *PYTHON, CLIENTS) == {page("one").strip()}


@pytest.mark.parametrize("options", ["", "--workers 2"])
def test_a_reload_cuts_nobody(machine: Machine, options: str) -> None:
    call = ("ExecStart=", f"ExecStart={PROGRAM} {options}")
    hello = hello_bytes("bulk.example").hex()
    with (
        changed(machine, *call, "WatchdogSec=1"),
        started(machine, *PYTHON, BULK) as backend,
        started(machine, *PYTHON, CLIENTS) as clients,
    ):
        pids = [main_pid(machine)]
        invocation = show(machine, "InvocationID")
        assert heard(backend.stdout) == ["listening"]
        with (
            started(machine, *PYTHON, SLOW_CLIENT) as slow,
            started(machine, *PYTHON, BULK_CLIENT, hello) as bulk,
        ):
            assert heard(slow.stdout) == ["connected"]
            assert heard(bulk.stdout) == ["begun"]
            lines = heard(clients.stdout, 20)
            for _ in range(3):
                machine.run("systemctl", "reload", SERVICE)
                eventually(lambda: main_pid(machine) not in pids)
                pids.append(main_pid(machine))
                lines += heard(clients.stdout, 20)
            assert ended(slow) == ([page("one").strip()], "")
            assert ended(bulk) == ([str(1 << 24)], "")
        rest, errors = ended(clients)
        assert errors == ""
        assert {*lines, *rest} == {page("one").strip()}
        # systemd watches over the last one: it hears twice that all is well.
        for _ in range(2):
            heard_at = show(machine, "WatchdogTimestampMonotonic")
            eventually(lambda: show(machine, "WatchdogTimestampMonotonic") != heard_at)  # noqa: B023
        assert (show(machine, "InvocationID"), show(machine, "NRestarts")) == (invocation, "0")
        eventually(lambda: show(machine, "StatusText").startswith("0 open, "))
        log = [line for _, line in journal(machine)]
        assert sum(line.startswith("sniproxy: taken_over ") for line in log) >= 3
        # Of systemd: that it hears somebody who may not speak, or watches what it can't.
        for wrong in "reception only permitted", "not our child", "Killing process":
            assert not [line for line in log if wrong in line]
        machine.run("systemctl", "stop", SERVICE)
        assert (state(machine), show(machine, "Result")) == ("inactive", "success")


def test_killed_after_a_reload_it_comes_back(machine: Machine) -> None:
    fetch(machine)
    old = main_pid(machine)
    machine.run("systemctl", "reload", SERVICE)
    eventually(lambda: main_pid(machine) != old)
    new = main_pid(machine)
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    fetch(machine)
    assert main_pid(machine) not in {0, old, new}


def test_a_reload_that_fails_changes_nothing(machine: Machine) -> None:
    machine.run("systemctl", "restart", SERVICE)
    old = main_pid(machine)
    # One that is not compiled: of those that are there would be another.
    [module] = machine.root.glob("opt/sniproxy/lib/python3.*/site-packages/sniproxy/serve.py")
    aside = module.with_suffix(".aside")
    module.rename(aside)  # Python's own cache of it does not count without it
    try:
        with started(machine, *PYTHON, SLOW_CLIENT) as slow:
            assert heard(slow.stdout) == ["connected"]
            assert machine.run("systemctl", "reload", SERVICE, check=False).returncode != 0
            assert "No module named 'sniproxy.serve'" in "".join(
                line for _, line in journal(machine)
            )
            fetch(machine)
            assert (state(machine), main_pid(machine)) == ("active", old)
            aside.rename(module)
            machine.run("systemctl", "reload", SERVICE)
            assert ended(slow) == ([page("one").strip()], "")
    finally:
        if aside.exists():
            aside.rename(module)
    eventually(lambda: main_pid(machine) != old)
    # The socket is systemd's as before.
    machine.run("systemctl", "stop", SERVICE)
    fetch(machine)


def test_a_reload_of_one_that_was_called_without_the_upgrade_socket(machine: Machine) -> None:
    with changed(machine, "ExecStart=", "ExecStart=/opt/sniproxy/bin/sniproxy"):
        old = main_pid(machine)
        assert machine.run("systemctl", "reload", SERVICE, check=False).returncode != 0
        _, line = wait_for_log(machine, "upgrade:")
        assert "unable to upgrade: nobody listens at '/run/sniproxy/upgrade'" in line
        fetch(machine)
        assert (state(machine), main_pid(machine)) == ("active", old)


def test_a_new_version_starts_before_the_old_one_drains(machine: Machine) -> None:
    [upgrade, *link] = commands("sniproxy@.service")
    with changed(machine, "BindReadOnlyPaths=/mnt"):
        old = main_pid(machine)
        machine.run(*SHELL, "\n".join(link))
        machine.run("systemctl", "daemon-reload")
        with (
            started(machine, *PYTHON, CLIENTS) as clients,
            started(machine, *PYTHON, SLOW_CLIENT) as slow,
        ):
            assert heard(slow.stdout) == ["connected"]
            with started(machine, *SHELL, upgrade) as upgrading:
                eventually(lambda: state(machine) == "deactivating")
                assert "/mnt:/mnt" in show(machine, "BindReadOnlyPaths", COPY)
                # The old one waits for the slow client, and nobody waits for the old one.
                lines = heard(clients.stdout, 100)
                assert (state(machine), main_pid(machine)) == ("deactivating", old)
                assert ended(slow) == ([page("one").strip()], "")
                ended(upgrading)
            lines += heard(clients.stdout, 20)
            rest, errors = ended(clients)
        machine.run("rm", "--recursive", f"{SYSTEM}/sniproxy@.service.d")
        assert upgrading.returncode == 0
        assert (state(machine), state(machine, COPY)) == ("active", "inactive")
        assert main_pid(machine) != old
    assert errors == ""
    assert {*lines, *rest} == {page("one").strip()}


def test_a_new_version_that_does_not_start_changes_nothing(machine: Machine) -> None:
    fetch(machine)
    old = main_pid(machine)
    directory = f"{SYSTEM}/sniproxy@.service.d"
    machine.write(f"{directory}/x.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/python3 --no\n")
    machine.run("systemctl", "daemon-reload")
    [upgrade, *_] = commands("sniproxy@.service")
    try:
        assert machine.run(*SHELL, upgrade, check=False).returncode != 0
        # systemd has made the socket a blocking one, for the new copy.
        fetch(machine)
        assert (state(machine), main_pid(machine)) == ("active", old)
    finally:
        machine.run("systemctl", "stop", COPY)
        machine.run("rm", "--recursive", directory)
        machine.run("systemctl", "daemon-reload")


def test_clients_start_the_service_if_no_copy_runs(machine: Machine) -> None:
    machine.run("systemctl", "start", COPY)
    machine.run("systemctl", "stop", SERVICE)
    fetch(machine)
    assert (state(machine), state(machine, COPY)) == ("inactive", "active")
    machine.run("systemctl", "stop", COPY)
    fetch(machine)
    assert (state(machine), state(machine, COPY)) == ("active", "inactive")


def test_killed_it_comes_back(machine: Machine) -> None:
    machine.run("systemctl", "start", SERVICE)
    old = main_pid(machine)
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    fetch(machine)
    assert main_pid(machine) not in {0, old}


def test_the_watchdog_bites(machine: Machine) -> None:
    fetch(machine)
    assert show(machine, "WatchdogUSec") == "30s"
    # So long we do not wait.
    with changed(machine, "WatchdogSec=2"):
        old = main_pid(machine)
        invocation = show(machine, "InvocationID")
        machine.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", SERVICE)
        fetch(machine)
        assert main_pid(machine) not in {0, old}
        log = machine.run("journalctl", "--output=cat", f"INVOCATION_ID={invocation}").stdout
        assert "Watchdog timeout" in log


def test_called_wrongly_it_is_tried_again_until_it_is_mended(machine: Machine) -> None:
    wrong = ("ExecStart=", "ExecStart=/opt/sniproxy/bin/sniproxy --verbose")
    with changed(machine, *wrong, starts=False), started(machine, *PYTHON, CLIENTS) as clients:
        # Somebody tries again and again: more often than systemd allows by default.
        for _ in range(6):
            assert machine.run("systemctl", "restart", SERVICE, check=False).returncode != 0
        began = time.time()
        priority, line = wait_for_log(machine, "fatal:")
        assert "unable to understand the options: unknown option '--verbose'" in line
        assert priority == 3
        eventually(lambda: int(show(machine, "NRestarts")) >= 3, patience=30)
        # It does not spin: no more than one in RestartSec. Nor does it flood the journal: a start
        # that fails takes seven lines, six of them systemd's, however many clients come.
        since = f"--since=@{began:.0f}"
        starts = (time.time() - began) / 2 + 2
        assert int(show(machine, "NRestarts")) <= starts
        said = machine.run("journalctl", "--output=cat", since, "--grep=sniproxy").stdout
        assert said.count("\n") <= 8 * starts
        assert state(machine, "sniproxy.socket") == "active"

        def status_says_why() -> bool:  # of the last start, once it has failed
            status = machine.run("systemctl", "status", SERVICE, check=False).stdout
            reason = "Status: \"unable to understand the options: unknown option '--verbose'"
            return "auto-restart" in status and reason in status

        eventually(status_says_why)
        # Mended: nobody starts anything.
        machine.run("rm", f"{SYSTEM}/sniproxy.service.d/override.conf")
        machine.run("systemctl", "daemon-reload")
        lines = heard(clients.stdout, 20)
        assert set(lines) == {page("one").strip()}
        assert state(machine) == "active"
        # What `changed` takes away in the end.
        machine.write(f"{SYSTEM}/sniproxy.service.d/override.conf", "")


def test_two_commands_do_not_end_a_service_that_runs(machine: Machine) -> None:
    fetch(machine)
    pid = main_pid(machine)
    drop_in = f"{SYSTEM}/sniproxy.service.d/override.conf"
    machine.write(drop_in, "[Service]\nExecStart=/opt/sniproxy/bin/sniproxy --workers 2\n")
    try:
        machine.run("systemctl", "daemon-reload")
        refused = machine.run("systemctl", "restart", SERVICE, check=False)
        assert "bad unit file setting" in refused.stderr
        status = machine.run("systemctl", "status", SERVICE, check=False).stdout
        assert "Loaded: bad-setting" in status
        fetch(machine)
        assert main_pid(machine) == pid
    finally:
        machine.run("rm", drop_in)
        machine.run("systemctl", "daemon-reload")


# --- What is wrong, and what was counted ----------------------------------------------------------

WITH_STATUS = (
    "ExecStart=",
    f"ExecStart={PROGRAM} --status-socket /run/%N/status",
)


def test_a_tenant_sees_why_their_host_is_refused(machine: Machine) -> None:
    status = ("/opt/sniproxy/bin/sniproxy-status", "/run/sniproxy/status")
    for tenant in "five", "six":
        machine.run("useradd", "--create-home", tenant)
        # A home that the daemon may not search: most systems make it so.
        machine.run("chmod", "0700", f"/home/{tenant}")
        machine.run("ln", "--symbolic", f"/home/{tenant}/site", f"/srv/hosts/{tenant}.example")
    with changed(machine, *WITH_STATUS, "BindReadOnlyPaths=/home"):
        fetch(machine)
        for tenant in "five", "six":
            assert try_to_fetch(machine, tenant).returncode == 35
        root = machine.run(*status).stdout
        assert "3 open" not in root
        assert "1 served, 2 refused" in root
        told = machine.run("runuser", "--user", "five", "--", *status).stdout
        assert "six" not in told
        assert "one.example" not in told
        assert "served" not in told.splitlines()[0]
        assert "permission_denied" in told
        assert "/home/five (directory, mode 0700, uid " in told
        # Its copies have sockets of their own.
        machine.run("mkdir", "--parents", f"{SYSTEM}/sniproxy@.service.d")
        link = f"{SYSTEM}/sniproxy@.service.d/override.conf"
        machine.run("ln", "--symbolic", "../sniproxy.service.d/override.conf", link)
        machine.run("systemctl", "daemon-reload")
        try:
            machine.run("systemctl", "start", COPY)
            copy = machine.run(status[0], f"/run/{COPY.removesuffix('.service')}/status").stdout
            assert "0 served" in copy
        finally:
            machine.run("systemctl", "stop", COPY)
            machine.run("rm", link)


def test_what_the_unit_hides_is_found(machine: Machine) -> None:
    machine.run("mkdir", "--parents", "/srv/hosts/hidden.example", "/run/backends")
    machine.run("ln", "--symbolic", "/run/backends/socket", "/srv/hosts/hidden.example/tls-socket")
    machine.run("touch", "/run/backends/socket")
    fetch(machine)
    check = ("/opt/sniproxy/bin/sniproxy-check", "--pid", str(main_pid(machine)))
    found = machine.run(*check, "one.example", "hidden.example", check=False)
    machine.run("rm", "-r", "/srv/hosts/hidden.example")
    assert (found.returncode, found.stderr) == (1, "")
    lines = found.stdout.splitlines()
    assert re.match("one.example +served +certificate until ", lines[0])
    assert re.match("hidden.example +hidden ", lines[1])
    assert lines[2].endswith("# and add: BindReadOnlyPaths=/run/backends")


# --- Confined ------------------------------------------------------------------------------------


def test_it_has_no_rights(machine: Machine) -> None:
    fetch(machine)
    check_rights(machine, "sniproxy")


def test_its_root_directory_has_what_it_needs(machine: Machine) -> None:
    fetch(machine)
    process = f"/proc/{main_pid(machine)}"
    directories = ("", "/opt", "/run", "/run/systemd", "/srv", "/usr", "/usr/bin")
    found = set()
    for directory in directories:
        names = machine.run("ls", "--almost-all", f"{process}/root{directory}").stdout.split()
        found |= {f"{directory}/{name}" for name in names}
    # Not every machine has them.
    found -= {"/lib64", "/usr/lib64"}
    kernels = {"/dev", "/proc", "/sys"}
    pythons = {"/opt", "/opt/sniproxy", "/usr", "/usr/bin", "/usr/bin/python3", "/usr/lib", "/lib"}
    systemds = {"/run", "/run/systemd", "/run/systemd/incoming", "/run/systemd/notify"}
    assert found == kernels | pythons | systemds | {"/srv", "/srv/hosts", "/run/sniproxy"}

    mounts = machine.run("cat", f"{process}/mounts").stdout.splitlines()
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    # Its own processes, its upgrade socket, and what PrivateDevices= and PrivateIPC= give to
    # everybody.
    assert writable <= {
        "/proc",
        "/run/sniproxy",
        *(f"/dev/{name}" for name in ("hugepages", "mqueue", "pts", "shm")),
    }


def test_its_network_is_its_own_and_empty(machine: Machine) -> None:
    fetch(machine)
    process = f"/proc/{main_pid(machine)}"
    ours, machines = (
        machine.run("readlink", f"{each}/ns/net").stdout for each in (process, "/proc/1")
    )
    assert ours != machines
    interfaces = machine.run("cat", f"{process}/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_its_own_sandbox_is_as_without_systemd(machine: Machine) -> None:
    machine.run("systemctl", "restart", SERVICE)
    _, line = wait_for_log(machine, "sandbox")
    programs = ("/opt/sniproxy/bin/sniproxy-listen", ":8443", "/opt/sniproxy/bin/sniproxy")
    with started(machine, "env", "--chdir=/srv/hosts", *programs) as outside:
        assert heard(outside.stderr) == [line]


@pytest.mark.parametrize("options", ["--log connections", "--hashed --workers 2 --handoff"])
def test_the_system_calls_are_all_that_it_needs(machine: Machine, options: str) -> None:
    plain = ["one.example", "bulk.example", "bug.example", "handed.example"]
    hashing = ("/opt/sniproxy/bin/sniproxy-hostname", "--hashed", *plain)
    hashed = machine.run(*hashing).stdout.split()
    for name, directory in zip(plain, hashed, strict=True):
        machine.run("ln", "--symbolic", "--force", name, f"/srv/hosts/{directory}")
    [library] = machine.root.glob("opt/sniproxy/lib/python3.*/site-packages")
    (library / "bug.py").write_text(BUG.format(names={"bug.example", hashed[2]}))
    (library / "bug.pth").write_text("import bug")
    try:
        with changed(
            machine,
            # One that is not listed is death now.
            "SystemCallErrorNumber=",
            # It would like to save the bug that it has compiled.
            "Environment=PYTHONDONTWRITEBYTECODE=1",
            # So that there is a capacity to be reached, of less than twenty connections.
            "LimitNOFILE=64",
            "ExecStart=",
            f"ExecStart={PROGRAM} {options}",
        ):
            _do_everything(machine, hands_over="--handoff" in options)
            log = journal(machine)
    finally:
        for name in "bug.py", "bug.pth":
            (library / name).unlink()
    assert (3, "sniproxy: bug ZeroDivisionError") in log
    assert not [line for _, line in log if "SYS" in line]


def _do_everything(machine: Machine, hands_over: bool) -> None:
    old = main_pid(machine)
    fetch(machine)
    machine.run("systemctl", "reload", SERVICE)
    eventually(lambda: main_pid(machine) != old)
    pid = main_pid(machine)
    fetch(machine)
    if hands_over:
        _hand_over(machine)
    assert "unrecognized name" in try_to_fetch(machine, "nobody").stderr
    assert "reset by peer" in try_to_fetch(machine, "bug").stderr
    with started(machine, *PYTHON, BULK) as backend:
        assert heard(backend.stdout) == ["listening"]
        hello = hello_bytes("bulk.example").hex()
        answer = machine.run(*PYTHON, RAW_CLIENT, hello).stdout
        assert answer.startswith(f"{1 << 24} ")
    with started(machine, *PYTHON, SILENT_CLIENTS) as silent:
        assert heard(silent.stdout) == ["connected"]
        fetch(machine)
    wait_for_log(machine, "reason=capacity")
    group = "/sys/fs/cgroup/system.slice/sniproxy.service/cgroup.procs"
    processes = {int(number) for number in machine.run("cat", group).stdout.split()}
    for worker in processes - {pid}:
        # They are replaced, the second one a second later.
        machine.run("sh", "-c", f"kill -KILL {worker}")
    fetch(machine)
    with started(machine, *PYTHON, SLOW_CLIENT) as slow:
        assert heard(slow.stdout) == ["connected"]
        assert main_pid(machine) == pid
        machine.run("systemctl", "--no-block", "stop", SERVICE)
        wait_for_log(machine, "draining")
        assert ended(slow) == ([page("one").strip()], "")
    eventually(lambda: state(machine) == "inactive")
    assert show(machine, "Result") == "success"
