"""The manuals: well made, and of one mind with the programs."""

import ast
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

import mutual_tls.refusal
import tls_bridge.log
import tls_tproxy.log
import tls_tproxy.wrap
import tproxy_pod.log
import tproxy_pod.pod
from mutual_tls.dial import DialReason
from mutual_tls.end import TLSReason
from mutual_tls.relay import Ending
from sniproxy import session
from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.hosts import HostReason
from sniproxy.log import Log
from sniproxy.service import descriptors, signals, workers
from sniproxy.session import ALERTS, SessionReason
from sniproxy.wire import MAX_WIRE, Alert, HelloError, HelloReader, Reason
from sniproxy.wire.hello import MAX_HANDSHAKE
from sniproxy_hostname import Hostname, InvalidHostname
from tests.support.answers import ROWS
from tests.support.daemon import PATIENCE, start_daemon
from tls_bridge.http_connect import MOST_HEADER
from tls_bridge.refusal import ANSWERS, BridgeReason
from tls_tproxy.refusal import EXPECTED, WrapReason
from tls_tproxy.starttls import StartTLS
from tproxy_pod.log import Direction
from tproxy_pod.refusal import PodReason
from tproxy_pod.session import PlainEnding

ROOT = Path(__file__).parents[1]
MAN = ROOT / "man"
PAGES = {path.name: path.read_text() for path in sorted(MAN.iterdir())}

# Each has the same headings in the same order. Directories are no programs, and have none of those
# that speak of one.
PROGRAMS = {
    "sniproxy.8": "sniproxy",
    "sniproxy-check.1": "sniproxy_check",
    "sniproxy-hostname.1": "sniproxy_hostname",
    "sniproxy-listen.8": "sniproxy.listen",
    "sniproxy-status.1": "sniproxy_status",
    "tls-bridge.8": "tls_bridge",
    "tls-bridge-peer.8": "tls_bridge.peer",
    "tls-tproxy.8": "tls_tproxy",
    "tproxy-pod.8": "tproxy_pod",
    "tproxy-pod-inject.1": "tproxy_pod.inject",
}

# Those that serve, and the packages of each.
SERVICES = {
    "sniproxy.8": ["sniproxy"],
    "tls-bridge.8": ["sniproxy", "mutual_tls", "tls_bridge"],
    "tls-bridge-peer.8": ["sniproxy", "mutual_tls", "tls_bridge"],
    "tls-tproxy.8": ["sniproxy", "mutual_tls", "tls_tproxy"],
    "tproxy-pod.8": ["sniproxy", "mutual_tls", "tproxy_pod"],
}
HEADINGS = [
    *["NAME", "SYNOPSIS", "DESCRIPTION", "INTERFACE", "OPTIONS", "SIGNALS", "ENVIRONMENT", "FILES"],
    *["EXIT STATUS", "EXAMPLES", "DIAGNOSTICS", "SEE ALSO", "STANDARDS", "CAVEATS"],
    "SECURITY CONSIDERATIONS",
]
OF_PROGRAMS = {"OPTIONS", "SIGNALS", "ENVIRONMENT", "EXIT STATUS"}

# Manuals of others that are referred to: Debian's manpages, manpages-dev, systemd, libsystemd-dev,
# openbsd-inetd, acl, b3sum, nftables and util-linux have them.
OTHERS = {
    *[
        "b3sum 1",
        "setpriv 1",
        "accept 2",
        "connect 2",
        "cron 8",
        "getpeername 2",
        "getrlimit 2",
        "getsockname 2",
        "listen 2",
        "prctl 2",
        "recvmsg 2",
        "seccomp 2",
    ],
    *["sd_listen_fds 3", "sd_notify 3", "syslog 3"],
    *["acl 5", "group 5", "nsswitch.conf 5", "passwd 5", "systemd.exec 5", "systemd.socket 5"],
    *["ip 7", "ipv6 7", "landlock 7", "packet 7", "path_resolution 7", "symlink 7", "tcp 7"],
    *["unix 7", "inetd 8", "nft 8"],
}

# What mandoc says of the machine and not of the page: whether it has the manuals of others, and an
# index of them.
OF_THE_MACHINE = re.compile(
    r"STYLE: referenced manual not found: Xr (?!sniproxy|tls-bridge|tls-tproxy|tproxy-pod)|"
    r"^mandoc: outdated mandoc\.db lacks "
)

# b3sum's, in an example.
OPTIONS_OF_OTHERS = {"--no-names"}
OPTION = re.compile(r"(?<![\w-])(?:--?[a-z][a-zA-Z-]*|-C\b)")

every_page = pytest.mark.parametrize("page", PAGES)
every_program = pytest.mark.parametrize("page", PROGRAMS)
every_service = pytest.mark.parametrize("page", SERVICES)


def section(page: str, heading: str, macro: str = "Sh") -> str:
    """Return the source of a section, or of a subsection if `macro` is Ss."""
    ends = r"^\.Sh " if macro == "Sh" else r"^\.S[hs] "
    found = re.search(
        rf"^\.{macro} {heading}\n(.*?)(?={ends}|\Z)", PAGES[page], re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"{page} has no {heading}"
    return found[1]


def items(source: str) -> list[str]:
    """Return the heads of all lists."""
    return re.findall(r"^\.It (.+)$", source, re.MULTILINE)


def options(source: str) -> set[str]:
    """Return the options in a source, as they are typed."""
    return set(OPTION.findall(re.sub(r"\bFl (?=\w)", "-", source.replace("Fl Fl ", "--"))))


def run(page: str, *arguments: str) -> str:
    """Return what the program of a page says on standard output."""
    command = [sys.executable, "-P", "-m", PROGRAMS[page], *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


# --- well made


def test_mandoc_finds_nothing_wrong() -> None:
    needs("mandoc")
    # In their directory: there mandoc finds those of them that they refer to.
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wall", *PAGES],
        cwd=MAN,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not OF_THE_MACHINE.search(line)] == []


@every_page
def test_groff_finds_nothing_wrong(page: str) -> None:
    """It is what man-db shows manuals with."""
    needs("groff")
    command = ["groff", "-mdoc", "-Tutf8", "-ww", "-z", page]
    done = subprocess.run(command, cwd=MAN, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


@every_page
def test_the_title_is_that_of_the_file(page: str) -> None:
    name, number = page.split(".")
    lines = PAGES[page].splitlines()
    assert lines[0].startswith(".Dd ")
    assert lines[1:5] == [f".Dt {name.upper()} {number}", ".Os", ".Sh NAME", f".Nm {name}"]


@every_page
def test_the_headings_are_the_same_everywhere(page: str) -> None:
    wanted = [each for each in HEADINGS if page in PROGRAMS or each not in OF_PROGRAMS]
    assert re.findall(r"^\.Sh (.+)$", PAGES[page], re.MULTILINE) == wanted


@every_page
def test_what_it_refers_to_is_there(page: str) -> None:
    ours = {name.replace(".", " ") for name in PAGES}
    for target in re.findall(r"^\.Xr (\S+ \d)", PAGES[page], re.MULTILINE):
        assert target in ours | OTHERS
    for heading in re.findall(r"^\.Sx (.+?)(?: \.| ,)?$", PAGES[page], re.MULTILINE):
        assert re.search(rf"^\.S[hs] {heading}$", PAGES[page], re.MULTILINE)
    # Sections of other pages.
    for heading, name, number in re.findall(
        r"^\.Dq (.+)\nin\n\.Xr (\S+) (\d)", PAGES[page], re.MULTILINE
    ):
        assert f"\n.Ss {heading}\n" in PAGES[f"{name}.{number}"]


def test_every_page_is_installed() -> None:
    """In a wheel, and so in share/man of a virtual environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    expected = {f"man/{page}": f"share/man/man{page[-1]}/{page}" for page in PAGES}
    assert expected.items() <= wheel["shared-data"].items()


# --- of one mind with the programs


@every_program
def test_every_option_is_there_and_no_other(page: str) -> None:
    told = set(OPTION.findall(run(page, "--help")))
    heads = [options(head) for head in items(section(page, "OPTIONS"))]
    described = set().union(*heads)
    assert options(section(page, "SYNOPSIS")) == described
    # --help leaves out that it can be called -h, too.
    assert described - {"-h"} == told - {"-h"}
    assert run(page, "-h") == run(page, "--help")
    # By the alphabet: it is a page to look things up in.
    names = [max(each, key=len).lstrip("-").lower() for each in heads]
    assert names == sorted(names)


@every_page
def test_no_option_is_named_that_does_not_exist(page: str) -> None:
    exist = set().union(*(OPTION.findall(run(each, "--help")) for each in PROGRAMS))
    named = {each for each in options(PAGES[page]) if each.startswith("--")}
    assert named <= exist | OPTIONS_OF_OTHERS


@pytest.mark.parametrize(
    ("page", "command_lines"),
    [
        ("sniproxy.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        ("sniproxy-listen.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        ("tls-bridge.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        ("tls-bridge-peer.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        ("tls-tproxy.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        ("tproxy-pod.8", ["--version", "--no-such-option", "--version >/dev/full"]),
        (
            "tproxy-pod-inject.1",
            [
                "--version",
                "--image=i --secret=s <<'.'\na: [\n.",
                "--no-such-option",
                "--version >/dev/full",
            ],
        ),
        ("sniproxy-hostname.1", ["a.example", "_b", "--no-such-option", "a.example >/dev/full"]),
    ],
)
def test_every_exit_code_is_there(page: str, command_lines: list[str]) -> None:
    """One command line for each of them."""
    program = f"{shlex.quote(sys.executable)} -P -m {PROGRAMS[page]}"
    codes = [
        subprocess.run(
            ["sh", "-c", f"exec {program} {line}"], capture_output=True, timeout=PATIENCE
        ).returncode
        for line in command_lines
    ]
    assert items(section(page, "EXIT STATUS")) == list(map(str, codes))


def alerts_of_reasons() -> dict[str, set[int]]:
    """Return which alerts go with a reason; no alert at all with those of the session."""
    alerts: dict[str, set[int]] = {reason: {alert} for reason, alert in ALERTS.items()}
    alerts |= {reason: set() for reason in SessionReason}
    for row in ROWS:
        try:
            if (hello := HelloReader().feed(row.flight)) is not None:
                Hostname(hello.required_server_name())
        except HelloError as error:
            alerts.setdefault(error.reason, set()).add(error.alert)
        except InvalidHostname:
            alerts.setdefault(Reason.INVALID_NAME, set()).add(Alert.UNRECOGNIZED_NAME)
    return alerts


def test_every_reason_is_there_with_its_alert() -> None:
    described = {}
    for head in items(section("sniproxy.8", "Reasons for refusals", "Ss")):
        found = re.fullmatch(r"Cm (\w+) Pq (none|\d+(?: or \d+)*)", head)
        assert found is not None, head
        described[found[1]] = {int(number) for number in re.findall(r"\d+", found[2])}
    assert described == alerts_of_reasons()
    assert list(described) == sorted(described)


def test_the_reasons_are_all_that_the_daemon_knows() -> None:
    """Should there ever be a fourth list of them, it is not to be missed above."""
    lists = {
        each
        for each in StrEnum.__subclasses__()
        if each.__name__.endswith("Reason") and each.__module__.startswith("sniproxy.")
    }
    assert lists == {Reason, HostReason, SessionReason}
    assert {reason for each in lists for reason in each} == alerts_of_reasons().keys()


def test_every_reason_of_a_lookup_is_in_the_page_of_the_directory() -> None:
    heads = items(section("sniproxy-hosts.5", "DIAGNOSTICS"))
    assert {head.removeprefix("Cm ") for head in heads} == set(HostReason)


def test_every_alert_is_there() -> None:
    source = section("sniproxy.8", "Alerts", "Ss")
    described = re.findall(r"^\.It (\d+)\n(\w+):", source, re.MULTILINE)
    assert described == [(str(int(alert)), alert.name.lower()) for alert in Alert]


def events_in(
    path: Path, inserted: list[str] | None = None
) -> Iterator[tuple[str, list[str] | None]]:
    """Find the events that a module logs, and their fields; None if these are not written there.

    With `inserted`, these are the fields that a mapping among them stands for.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="event"),
                args=[ast.Constant(value=str(word)), *_],
                keywords=keywords,
            ):
                fields: list[str] = []
                for keyword in keywords:
                    fields += [keyword.arg] if keyword.arg is not None else inserted or []
                is_known = inserted is not None or all(each.arg for each in keywords)
                yield word, fields if is_known else None


def test_every_event_is_there_with_its_fields(capfd: pytest.CaptureFixture[str]) -> None:
    Log().refusal("why", "192.0.2.1:1", b"a.example", Alert.UNRECOGNIZED_NAME, "more")
    refused = re.findall(r"(\w+)=", capfd.readouterr().err)
    # A traceback has no fields, and is no event in the source.
    events = {"bug": ["text"]}
    for path in (ROOT / "sniproxy").rglob("*.py"):
        for word, fields in events_in(path):
            events[word] = refused if fields is None else fields
    described = {}
    for head in items(section("sniproxy.8", "Log", "Ss")):
        cm, word, ar, *fields = head.split()
        assert (cm, ar) == ("Cm", "Ar")
        described[word] = fields
    assert described == events


def described_events(page: str) -> dict[str, list[str]]:
    """Return the events in a page, and their fields."""
    described = {}
    for head in items(section(page, "Log", "Ss")):
        cm, word, ar, *fields = head.split()
        assert (cm, ar) == ("Cm", "Ar")
        described[word] = fields
    return described


def events_of(package: str, refused: list[str], inserted: list[str]) -> dict[str, list[str]]:
    """Return the events that a program of TLS logs, and their fields.

    `refused` are those of a refusal, and `inserted` those in the line of a connection that are its
    own.
    """
    # A traceback has no fields, and is no event in the source.
    events = {"bug": ["text"]}
    for each in "sniproxy/service", package:
        for path in (ROOT / each).rglob("*.py"):
            for word, fields in events_in(path):
                events[word] = refused if fields is None else fields
    for word, fields in events_in(ROOT / "sniproxy" / "serving.py"):
        assert fields is not None
        events[word] = [each for each in fields if each != "hosts"]
    for path in (ROOT / "mutual_tls").glob("*.py"):
        for word, fields in events_in(path, inserted):
            assert fields is not None
            events[word] = fields
    # What becomes of an identity is told by a function that was passed.
    told = re.findall(r'_on_event\("(\w+)"', (ROOT / "mutual_tls" / "identity.py").read_text())
    assert told
    return events | {word: ["detail"] for word in told}


def test_every_event_of_the_bridge_is_there_with_its_fields(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = tls_bridge.log.Log("tls-bridge")
    refusal = mutual_tls.refusal.Refusal(BridgeReason.NO_ROUTE, "more")
    log.refusal(refusal, 403, "192.0.2.1:1", "a.example:443", "p")
    refused = re.findall(r"(\w+)=", capfd.readouterr().err)
    events = events_of("tls_bridge", refused, ["name", "peer"])
    assert described_events("tls-bridge.8") == events


def test_every_event_of_the_wrapper_is_there_with_its_fields(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = tls_tproxy.log.Log()
    refusal = mutual_tls.refusal.Refusal(WrapReason.UNKNOWN_NAME, "more")
    log.refusal(refusal, "192.0.2.1:1", "192.0.2.2:2", "a.example")
    refused = re.findall(r"(\w+)=", capfd.readouterr().err)
    events = events_of("tls_tproxy", refused, ["destination", "name"])
    assert described_events("tls-tproxy.8") == events


def test_every_reason_of_the_bridge_is_there_with_its_answer() -> None:
    described = {}
    for head in items(section("tls-bridge.8", "Reasons for refusals", "Ss")):
        found = re.fullmatch(r"Cm (\w+) Pq (\d+) (\w+) (\d+)", head)
        assert found is not None, head
        described[found[1]] = (int(found[2]), found[3], int(found[4]))
    assert described == {
        str(reason): (answer.status, answer.error, int(answer.alert))
        for reason, answer in ANSWERS.items()
    }
    assert list(described) == sorted(described)
    assert section("tls-bridge.8", "Reasons for refusals", "Ss") in section(
        "tls-bridge.8", "DIAGNOSTICS"
    )


def test_the_answers_are_for_all_reasons_of_the_bridge() -> None:
    lists = {
        each
        for each in StrEnum.__subclasses__()
        if each.__name__.endswith("Reason")
        and each.__module__.startswith(("mutual_tls.", "tls_bridge."))
    }
    assert lists == {BridgeReason, mutual_tls.refusal.SessionReason, DialReason, TLSReason}
    assert {reason for each in lists for reason in each} == ANSWERS.keys()


# Those that only the other programs of TLS have. tls-tproxy resolves no name: it has an address,
# which the kernel knows.
NOT_OF_THE_WRAPPER = {
    DialReason.UNRESOLVED,
    DialReason.FORBIDDEN,
}


def test_every_reason_of_the_wrapper_is_there() -> None:
    heads = items(section("tls-tproxy.8", "Reasons for refusals", "Ss"))
    described = [head.removeprefix("Cm ") for head in heads]
    assert described == sorted(described)
    lists = (WrapReason, mutual_tls.refusal.SessionReason, DialReason, TLSReason)
    assert set(described) == {reason for each in lists for reason in each} - NOT_OF_THE_WRAPPER
    [expected] = re.findall(
        r"^\.Cm info\nfor\n(.+?)\nand\n\.Cm warning$",
        section("tls-tproxy.8", "Log", "Ss"),
        re.MULTILINE | re.DOTALL,
    )
    assert set(re.findall(r"^\.Cm (\w+)", expected, re.MULTILINE)) == EXPECTED


def test_every_reason_in_the_page_of_the_wrapped_names_exists() -> None:
    words = [head.removeprefix("Cm ") for head in items(section("tls-tproxy.5", "DIAGNOSTICS"))]
    assert words == sorted(words)
    heads = items(section("tls-tproxy.8", "Reasons for refusals", "Ss"))
    assert {f"Cm {word}" for word in words} <= set(heads)


def test_every_example_of_the_wrapper_is_understood() -> None:
    source = section("tls-tproxy.8", "EXAMPLES").replace("\\e\n", " ")
    lines = re.findall(r"^tls-tproxy (.+)$", source, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        # A user that every machine has.
        words = line.replace("--user tls-tproxy", "--user nobody").split()
        words = ["nobody" if word == "www-data" else word for word in words]
        assert run("tls-tproxy.8", *words, "--check-options") == ""
    example = run("tls-tproxy.8", "--help").splitlines()[-1].removeprefix("For example: tls-tproxy")
    assert run("tls-tproxy.8", *example.split(), "--check-options") == ""
    assert example.split() == lines[0].split()


# A program of a pod need not say anything, and no name is resolved.
NOT_OF_THE_POD = {DialReason.UNRESOLVED, DialReason.FORBIDDEN}


def test_every_event_of_the_pod_is_there_with_its_fields(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = tproxy_pod.log.Log()
    refusal = mutual_tls.refusal.Refusal(PodReason.NO_TLS_ANSWER, "more")
    log.refusal(refusal, Direction.OUT, "192.0.2.1:1", "192.0.2.2:2", "a.example")
    refused = re.findall(r"(\w+)=", capfd.readouterr().err)
    fields = ["direction", "destination", "peer", "tls"]
    assert described_events("tproxy-pod.8") == events_of("tproxy_pod", refused, fields)


def test_every_reason_of_the_pod_is_there() -> None:
    heads = items(section("tproxy-pod.8", "Reasons for refusals", "Ss"))
    described = [head.removeprefix("Cm ") for head in heads]
    assert described == sorted(described)
    lists = (PodReason, mutual_tls.refusal.SessionReason, DialReason, TLSReason)
    assert set(described) == {reason for each in lists for reason in each} - NOT_OF_THE_POD
    [expected] = re.findall(
        r"^\.Cm info\nfor\n(.+?)\nand\n\.Cm warning$",
        section("tproxy-pod.8", "Log", "Ss"),
        re.MULTILINE | re.DOTALL,
    )
    assert set(re.findall(r"^\.Cm (\w+)", expected, re.MULTILINE)) == tproxy_pod.refusal.EXPECTED
    endings = set(re.findall(r"^\.Cm (\w+)$", section("tproxy-pod.8", "Log", "Ss"), re.MULTILINE))
    assert {*Ending, *PlainEnding} <= endings


def test_every_example_of_the_pod_is_understood() -> None:
    source = section("tproxy-pod.8", "EXAMPLES").replace("\\e\n", " ")
    lines = re.findall(r"^tproxy-pod (.+)$", source, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = line.replace("--user tproxy-pod", "--user nobody").split()
        assert run("tproxy-pod.8", *words, "--check-options") == ""
    example = run("tproxy-pod.8", "--help").splitlines()[-1].removeprefix("For example: tproxy-pod")
    assert example.split() == lines[0].split()


def test_every_entry_of_the_directory_of_the_pod_is_there() -> None:
    """What the module says that reads them, in the page's synopsis."""
    said = tproxy_pod.pod.__doc__ or ""
    read = re.compile(r"^    pod/(?:egress/PREFIX|ingress/PORT)/([\w-]+)", re.MULTILINE)
    source = section("tproxy-pod.5", "SYNOPSIS")
    described = set(re.findall(r"Ar (?:PREFIX|PORT) Ns Pa /([\w-]+)", source))
    assert {*read.findall(said), "send-proxy-v2"} == described


def test_every_reason_in_the_page_of_the_pod_exists() -> None:
    words = [head.removeprefix("Cm ") for head in items(section("tproxy-pod.5", "DIAGNOSTICS"))]
    assert words == sorted(words)
    heads = items(section("tproxy-pod.8", "Reasons for refusals", "Ss"))
    assert {f"Cm {word}" for word in words} <= set(heads)


def test_every_entry_of_the_wrapped_names_is_there() -> None:
    """What the module says that reads them, in both places of the page."""
    said = tls_tproxy.wrap.__doc__ or ""
    entries = set(re.findall(r"^    wrap/names/NAME/([\w-]+)", said, re.MULTILINE))
    assert len(entries) == 9
    synopsis = re.findall(r"Ns Ar NAME Ns Pa /([\w-]+)", section("tls-tproxy.5", "SYNOPSIS"))
    source = section("tls-tproxy.5", "Directory of a name", "Ss")
    assert set(synopsis) == entries
    assert items(source) == [f"Pa {entry}" for entry in sorted(entries)]
    for word in StartTLS:
        assert f"\n.Cm {word} ,\n" in source


def test_every_reason_in_the_page_of_the_directories_exists() -> None:
    words = [head.removeprefix("Cm ") for head in items(section("tls-bridge.5", "DIAGNOSTICS"))]
    assert words == sorted(words)
    assert set(words) <= set(map(str, ANSWERS))


@pytest.mark.parametrize("page", ["tls-bridge.8", "tls-tproxy.8", "tproxy-pod.8"])
def test_every_ending_of_the_programs_of_tls_is_there(page: str) -> None:
    source = section(page, "Log", "Ss")
    for ending in Ending:
        assert re.search(rf"^\.Cm {ending}$", source, re.MULTILINE)


def test_every_ending_is_there() -> None:
    source = section("sniproxy.8", "Log", "Ss")
    for ending in session._ENDINGS.values():
        assert re.search(rf"^\.Cm {ending}$", source, re.MULTILINE)


def test_what_the_sandbox_forbids_is_there(hosts: Path) -> None:
    with start_daemon(hosts, measured=False) as daemon:
        line = daemon.wait_for_log("sandbox")
    heads = items(section("sniproxy.8", "Sandbox", "Ss"))
    forbidden = line.partition("forbids=")[2].split(",")
    assert set(forbidden) <= {head.removeprefix("Cm ") for head in heads}


@every_service
def test_every_variable_is_there(page: str) -> None:
    read = re.compile(r"""environ(?:ment)?(?:\.get\(|\[)"(\w+)"|"(\w+)" in (?:os\.)?environ""")
    found = {
        name
        for package in SERVICES[page]
        for path in (ROOT / package).rglob("*.py")
        for names in read.findall(path.read_text())
        for name in names
        if name
    }
    if page not in ("tls-tproxy.8", "tproxy-pod.8"):  # which open their own
        found |= {"LISTEN_FDS", "LISTEN_PID"}  # taken out by a loop
    if page == "tls-bridge.8":
        found.add("LISTEN_FDNAMES")  # so is this, which means nothing to the others
    if "mutual_tls" in SERVICES[page]:
        paths = ssl.get_default_verify_paths()
        found |= {paths.openssl_cafile_env, paths.openssl_capath_env}
    heads = items(section(page, "ENVIRONMENT"))
    assert found == {name for head in heads for name in re.findall(r"[A-Z]\w+", head[3:])}


@every_service
def test_every_signal_is_there(page: str) -> None:
    described = re.findall(r"SIG[A-Z0-9]+", " ".join(items(section(page, "SIGNALS"))))
    known = [*workers._ORDERS, *signals._IGNORED]
    assert described == [each.name for each in known]


@every_service
def test_the_ranges_of_options_are_right(page: str) -> None:
    for option in "--workers", "--max-connections":
        command = [sys.executable, "-P", "-m", PROGRAMS[page], option, "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        allowed = re.search(r"from 1 to \d+\b", done.stderr)
        assert allowed is not None
        assert re.search(rf"{allowed[0]}\b", section(page, "OPTIONS"))


def test_the_numbers_are_right() -> None:
    text = PAGES["sniproxy.8"].replace("\n", " ")
    assert f"{MAX_HANDSHAKE:,} bytes, in at most {MAX_WIRE:,} bytes" in text
    said = text.partition("So a hard limit of ")[2].partition(". ")[0]
    numbers = [int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*\d", said)]
    assert len(numbers) == 6
    for limit, connections in zip(numbers[::2], numbers[1::2], strict=True):
        assert descriptors.share(limit, MOST_PIPES).connections == connections
    assert f"more than {MOST_HEADER:,} bytes" in PAGES["tls-bridge.8"]
