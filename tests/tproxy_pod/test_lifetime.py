"""What a tproxy-pod leaves behind, and how it starts and ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tests.support.bridge import write
from tests.support.daemon import PATIENCE, eventually, unmeasured
from tests.support.network import why_no_network
from tests.support.pods import MODULE, Pod, Pods, ask, fails_soon, receive_all, running

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

NOTHING: Final[dict[str, list[str]]] = {"tables": [], "rules": [], "routes": []}

# For commands that end at once.
COMMAND: Final = (sys.executable, "-bb", "-P", "-X", "dev", "-W", "error", "-m", MODULE)


@pytest.fixture
def pod(pods: Pods) -> Pod:
    return pods.pod()


@pytest.fixture
def outsider(pods: Pods) -> Pod:
    return pods.pod()


def run(pod: Pod, place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run tproxy-pod, where it ends by itself at once."""
    return subprocess.run(
        [*pod.machine.under, *COMMAND, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        cwd=place,
        env=unmeasured(),
    )


def is_plain(pod: Pod, outsider: Pod) -> bool:
    """Tell whether connections leave and come as if nobody was there."""
    for one, other in (pod, outsider), (outsider, pod):
        with other.listen(8080) as listening:
            client = one.connect(other, 8080)
            name = client.getsockname()
            if ask(client, listening) != name:
                return False
    return True


def is_refused(pod: Pod, outsider: Pod) -> bool:
    """Tell whether they are refused, both ways, at once."""
    for one, other in (pod, outsider), (outsider, pod):
        with other.listen(8080):
            assert fails_soon(lambda one=one, other=other: one.connect(other, 8080))  # type: ignore[misc]
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("user", [(), ("--user=nobody",)], ids=["root", "nobody"])
def test_nothing_is_left_behind(
    pod: Pod, outsider: Pod, tmp_path: Path, number: signal.Signals, user: tuple[str, ...]
) -> None:
    """Observed: everything was left, and connections timed out."""
    readable(pod, tmp_path)
    with pod.start(tmp_path, *user, measured=False) as daemon:
        there = pod.rules()
        assert there["tables"] == ["tproxy_pod"]
        assert len(there["rules"]) == len(there["routes"]) == 2
        daemon.signal(number)
        assert daemon.wait() == (0 if number is signal.SIGTERM else -number)
        # By the children, if we were killed.
        eventually(lambda: pod.rules() == NOTHING)
        assert is_plain(pod, outsider)


def readable(pod: Pod, place: Path) -> None:
    """Make a directory that any user may read."""
    pod.issue(place / "pod/identity")
    os.chmod(place / "pod/identity/tls.key", 0o644)
    for each in (place, *place.parents):
        if each.owner() == "root" and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o011)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_fail_closed_refuses_when_it_is_gone(
    pod: Pod, outsider: Pod, tmp_path: Path, number: signal.Signals
) -> None:
    with pod.start(tmp_path, "--fail-closed") as daemon:
        assert pod.rules()["tables"] == ["tproxy_pod", "tproxy_pod_refuse"]
        daemon.signal(number)
        daemon.wait()
    eventually(lambda: pod.rules() == {**NOTHING, "tables": ["tproxy_pod_refuse"]})
    assert is_refused(pod, outsider)
    # What is left alone stays so.
    with pod.listen(8081) as listening:
        client = pod.connect("127.0.0.1", 8081)
        name = client.getsockname()
        assert ask(client, listening) == name
    # The next one takes it over, and works.
    with pod.start(tmp_path, "--fail-closed"):
        assert pod.rules()["tables"] == ["tproxy_pod", "tproxy_pod_refuse"]
    done = run(pod, tmp_path, "--stop-refusing")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pod.rules() == NOTHING
    assert is_plain(pod, outsider)


def test_a_table_that_refuses_comes_back(pod: Pod, tmp_path: Path) -> None:
    """nftables.service flushes the ruleset of others at each of its starts."""
    with pod.start(tmp_path, "--fail-closed"):
        pod.machine.run("nft", "flush", "ruleset")
        eventually(lambda: "tproxy_pod_refuse" in pod.rules()["tables"])
    run(pod, tmp_path, "--stop-refusing")


def test_five_starts_leave_one_rule(pod: Pod, tmp_path: Path) -> None:
    """Observed: rules piled up."""
    for _ in range(5):
        with pod.start(tmp_path) as daemon:
            there = pod.rules()
            assert len(there["rules"]) == len(there["routes"]) == 2
            # The children have no time to clean up: as when a container is killed.
            for pid in daemon.workers():
                os.kill(pid, signal.SIGKILL)
            daemon.signal(signal.SIGKILL)
            daemon.wait()
        assert len(pod.rules()["rules"]) == 2
    with pod.start(tmp_path):
        assert len(pod.rules()["rules"]) == 2
    assert pod.rules() == NOTHING


def test_a_start_right_after_a_kill_works(pod: Pod, outsider: Pod, tmp_path: Path) -> None:
    """The children of the one before do not take the rules of the next one along."""
    for _ in range(3):
        with pod.start(tmp_path) as daemon:
            daemon.signal(signal.SIGKILL)
            daemon.wait()
    with pod.start(tmp_path):
        time.sleep(0.1)  # there is nothing to wait for that should not come
        there = pod.rules()
        assert len(there["rules"]) == len(there["routes"]) == 2


def test_it_ends_if_what_holds_its_rules_has_ended(pod: Pod, tmp_path: Path) -> None:
    for program in "nft", "sh":
        with pod.start(tmp_path) as daemon:
            [child] = [each for each in daemon.workers() if name_of(each) == program]
            os.kill(child, signal.SIGKILL)
            assert daemon.wait() == 111
            daemon.wait_for_log("fatal:")
    with pod.start(tmp_path):
        assert len(pod.rules()["rules"]) == 2
    assert pod.rules() == NOTHING


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_one_is_enough(pod: Pod, tmp_path: Path) -> None:
    with pod.start(tmp_path):
        done = run(pod, tmp_path, "-tcp-port", "11", "-tls-port", "12")
        assert done.returncode == 111
        assert done.stderr == (
            "tproxy-pod: fatal: unable to redirect connections: "
            "another tproxy-pod runs in this network namespace\n"
        )


def test_other_rules_are_left_alone(pod: Pod, tmp_path: Path) -> None:
    rules = "table inet others { chain c { type filter hook output priority 0; counter; }; }"
    pod.machine.run("nft", rules)
    pod.machine.run("ip", "rule", "add", "fwmark", "0x7", "lookup", "7")
    before = pod.machine.run("ip", "rule", "show")
    with pod.start(tmp_path):
        assert pod.rules()["tables"] == ["others", "tproxy_pod"]
    assert pod.rules()["tables"] == ["others"]
    assert pod.machine.run("ip", "rule", "show") == before


def test_a_pod_without_ipv6(pods: Pods, outsider: Pod, tmp_path: Path) -> None:
    """It is switched off, as in many a cluster."""
    pod = pods.pod()
    pod.machine.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
    pod.issue(tmp_path / "pod/identity", pod.address)
    with running(pod, tmp_path) as here, here.pod.listen(8080):
        assert len(pod.rules()["rules"]) == 1
        assert fails_soon(lambda: outsider.connect(pod, 8080))
        here.line("refused", "direction=in", "reason=not_tls")
        with pytest.raises(OSError, match=r"Network is unreachable|Cannot assign"):
            pod.connect(outsider, 8080, version=6)
        # It is switched on again, and still nothing leaves in plaintext.
        pod.machine.run("sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        address, gateway = pod.addresses[6], pod.addresses[6][:-1] + "1"
        pod.machine.run("ip", "address", "add", f"{address}/64", "dev", "cable", "nodad")
        pod.machine.run("ip", "-6", "route", "add", "default", "via", gateway)
        with outsider.listen(8080, version=6):
            assert fails_soon(lambda: pod.connect(outsider, 8080, version=6))


@pytest.mark.parametrize("drain", [0, 5])
def test_a_drain_lets_connections_end(pods: Pods, tmp_path: Path, drain: int) -> None:
    one, other = pods.pod(), pods.pod()
    (tmp_path / "one").mkdir()
    with (
        running(one, tmp_path / "one", f"--drain={drain}") as here,
        running(other, tmp_path / "other"),
        other.listen(8080) as listening,
        one.connect(other, 8080) as client,
        listening.accept()[0] as program,
    ):
        client.settimeout(PATIENCE)
        client.sendall(b"hello")
        assert program.recv(100) == b"hello"
        here.daemon.signal(signal.SIGTERM)
        here.line("draining", "open=1")
        if drain:
            # Nobody new: at once, and not in plaintext.
            assert fails_soon(lambda: one.connect(other, 8080))
            program.sendall(b"the rest")
            program.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"the rest"
            client.close()
            assert here.daemon.wait() == 0
            here.line("drained", "cut=0")
        else:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-cert", "c"], "-cert and -key go together"),
        (["-ca-cert", "c"], "-ca-cert goes with -cert and -key"),
        (["-tcp-port", "0"], "argument -tcp-port/--tcp-port: '0' is no port"),
        (["-tls-port", "65536"], "argument -tls-port/--tls-port: '65536' is no port"),
        (["-tls-port", "1"], "-tcp-port, -tls-port and --ready-port have to differ"),
        (["--probe-address", "10.0.0.0.0"], "argument --probe-address: unable to understand"),
        (["-v", "much"], "argument -v: 'much' is no level, a number"),
        (["-x"], "unknown option '-x' (see tproxy-pod --help)"),
    ],
)
def test_a_bad_option_is_told(pod: Pod, tmp_path: Path, options: list[str], message: str) -> None:
    done = run(pod, tmp_path, *options)
    assert done.returncode == 100
    assert done.stderr.startswith(f"tproxy-pod: fatal: unable to understand the options: {message}")
    assert pod.rules() == NOTHING


def test_the_command_line_of_the_first_one_works(pods: Pods, outsider: Pod, tmp_path: Path) -> None:
    """From any directory, with nothing prepared."""
    pod = pods.pod()
    identity = pod.issue(tmp_path / "files")
    place = tmp_path / "empty"
    place.mkdir()
    files = [f"-cert={identity}/tls.crt", "-key", f"{identity}/tls.key"]
    options = ["-tcp-port", "11", "-tls-port", "12", "-v", "2", f"-ca-cert={identity}/ca.crt"]
    done = run(pod, place, *files, *options, "--check-options")
    assert (done.returncode, done.stderr) == (0, "")
    with running(pods.pod(), tmp_path / "there") as there, there.pod.listen(8080) as listening:
        write(place / "pod/identity/not", "used")
        with pod.start(place, *files, *options):
            ask(pod.connect(there.pod, 8080), listening)
