"""What tests ask of the units that we ship: of their files, and of systemd in a machine."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from tests.support.daemon import PATIENCE, eventually
from tests.support.machine import Machine

UNITS: Final = Path(__file__).parents[2] / "systemd"
SERVICE: Final = "sniproxy.service"

# Where an administrator copies them to.
SYSTEM: Final = "/etc/systemd/system"

# What PrivateDevices= and PrivateIPC= give to every service, and PrivateTmp=: two directories that
# are empty, and its own.
OF_EVERYBODY: Final = (
    *(f"/dev/{name}" for name in ("hugepages", "mqueue", "pts", "shm")),
    "/tmp",  # noqa: S108
    "/var/tmp",  # noqa: S108
)

# --- The files -----------------------------------------------------------------------------------


def commands(unit: str) -> list[str]:
    """Return what the comment at the top of a unit says that one should type, or write."""
    head = (UNITS / unit).read_text().partition("\n\n")[0]
    return [line.removeprefix("#     ") for line in head.splitlines() if line.startswith("#     ")]


def settings(unit: str) -> dict[str, list[tuple[str, str]]]:
    """Return the settings of a unit by section, in their order."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line, [])
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.append((key, value))
    return sections


# --- systemd -------------------------------------------------------------------------------------


def show(machine: Machine, what: str, unit: str = SERVICE) -> str:
    """Return a property of a unit."""
    return machine.run("systemctl", "show", f"--property={what}", "--value", unit).stdout.strip()


def state(machine: Machine, unit: str = SERVICE) -> str:
    return show(machine, "ActiveState", unit)


def main_pid(machine: Machine, unit: str = SERVICE) -> int:
    """Return the process id, as it is in the machine; 0 if there is none."""
    return int(show(machine, "MainPID", unit))


def journal(machine: Machine, unit: str = SERVICE) -> list[tuple[int, str]]:
    """Return what the daemon and systemd have said since the last start: priorities and lines."""
    entries = machine.run(
        *("journalctl", "--output=json", f"--unit={unit}"),
        f"_SYSTEMD_INVOCATION_ID={show(machine, 'InvocationID', unit)}",
    )
    lines = [json.loads(line) for line in entries.stdout.splitlines()]
    return [(int(line["PRIORITY"]), line["MESSAGE"]) for line in lines]


def wait_for_log(machine: Machine, word: str, unit: str = SERVICE) -> tuple[int, str]:
    """Return the first line that has `word` in it, and its priority."""
    found: list[tuple[int, str]] = []

    def is_there() -> bool:
        found.extend(line for line in journal(machine, unit) if word in line[1].split())
        return bool(found)

    eventually(is_there)
    return found[0]


@contextmanager
def changed(machine: Machine, unit: str, *lines: str, starts: bool = True) -> Iterator[None]:
    """Run it with a drop-in, as `systemctl edit` makes them."""
    drop_in = f"{SYSTEM}/{unit}.d/override.conf"
    machine.write(drop_in, "\n".join(("[Service]", *lines, "")))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", unit, check=starts)
    try:
        yield
    finally:
        machine.run("rm", drop_in)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", unit)


def writable_places(machine: Machine, unit: str) -> set[str]:
    """Return what is mounted for a unit so that it may be written to."""
    mounts = machine.run("cat", f"/proc/{main_pid(machine, unit)}/mounts").stdout.splitlines()
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    # systemd-nspawn has locked what it mounts there.
    return {path for path in writable if not path.startswith("/run/host/")}


# --- Programs ------------------------------------------------------------------------------------


@contextmanager
def started(machine: Machine, *argv: str) -> Iterator["subprocess.Popen[str]"]:
    """A program that runs in the machine."""
    process = machine.start(*argv)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in process.stdin, process.stdout, process.stderr:
            assert stream is not None
            stream.close()


def heard(stream: IO[str] | None, lines: int = 1) -> list[str]:
    """Return the next lines that a program says."""
    assert stream is not None
    return [stream.readline().rstrip("\n") for _ in range(lines)]


def ended(program: "subprocess.Popen[str]") -> tuple[list[str], str]:
    """End its standard input; return what else it says, and what on standard error."""
    # Not `communicate`, which doesn't know what has been read ahead for `heard`.
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdin.close()
    lines, errors = program.stdout.read().splitlines(), program.stderr.read()
    program.wait(PATIENCE)
    return lines, errors


# --- What every service has to bear --------------------------------------------------------------


def heard_amid_restarts(machine: Machine, *clients: str, unit: str = SERVICE) -> set[str]:
    """Restart it three times, while clients come again and again; return what these say."""
    pids = {main_pid(machine, unit)}
    with started(machine, *clients) as running:
        lines = heard(running.stdout, 20)
        for _ in range(3):
            machine.run("systemctl", "restart", unit)
            pids.add(main_pid(machine, unit))
            lines += heard(running.stdout, 20)
        rest, errors = ended(running)
    assert errors == ""
    assert len(pids) == 4
    return {*lines, *rest}


def check_rights(machine: Machine, user: str, unit: str = SERVICE, bounding: int = 0) -> None:
    """See that it is `user`, who can do nothing more than others, and is in a sandbox.

    Args:
        machine: where it runs.
        user: whom it should be.
        unit: which service it is.
        bounding: the capabilities that a program could give it, which it may not run: bits.
    """
    status = machine.run("cat", f"/proc/{main_pid(machine, unit)}/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    uid = machine.run("id", "--user", user).stdout.strip()
    assert fields["Uid"].split() == [uid] * 4
    for capabilities in "CapInh", "CapPrm", "CapEff", "CapAmb":
        assert int(fields[capabilities], 16) == 0
    assert int(fields["CapBnd"], 16) == bounding
    assert fields["NoNewPrivs"] == "1"
    # SECCOMP_MODE_FILTER
    assert fields["Seccomp"] == "2"
