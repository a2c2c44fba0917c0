"""Sessions with nft: what becomes of a command, of the tables, and of nft itself."""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from mutual_tls.netfilter import child, table
from mutual_tls.netfilter.command import Command, Name
from mutual_tls.netfilter.table import (
    Nft,
    NftEndedError,
    NftError,
    create_table,
    replace_elements,
)
from tests.support.daemon import PATIENCE, eventually
from tests.support.network import Machine, why_no_network

_why_not = why_no_network(("nft", "nftables"))
needs_network = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

NOBODY = (65534, 65534)
NAME = Name("of_a_test")


@pytest.fixture(params=[None, NOBODY], ids=["root", "nobody"])
def nft(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Nft]:
    nft = machine.do(Nft, request.param)
    yield nft
    nft.close()


def tables(machine: Machine) -> list[str]:
    return machine.run("nft", "list", "tables").splitlines()


@needs_network
def test_a_table_is_there_until_the_session_ends(machine: Machine, nft: Nft) -> None:
    nft.run(create_table(NAME))
    assert tables(machine) == [f"table inet {NAME}"]
    machine.run("nft", "flush", "ruleset")
    assert tables(machine) == [f"table inet {NAME}"]
    for command in f"delete table inet {NAME}", f"add chain inet {NAME} c":
        done = subprocess.run(
            [*machine.under, "nft", command], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 1
        assert "Operation not permitted" in done.stderr
    nft.close()
    assert tables(machine) == []
    nft.close()  # once more is nothing


@needs_network
def test_an_error_is_an_exception_and_undoes_its_transaction(machine: Machine, nft: Nft) -> None:
    nft.run(create_table(NAME))
    with pytest.raises(NftError, match=r"^nft: No such file or directory"):
        nft.run(
            Command("add set inet $table ports { type inet_service; }", table=NAME),
            *replace_elements(Name("another"), Name("ports"), [1]),
        )
    assert "ports" not in machine.run("nft", "list", "ruleset")
    with pytest.raises(NftError, match=r"^nft: syntax error"):
        nft.run(Command("}"))
    with pytest.raises(NftError, match=r"^nft: .*File exists$"):
        nft.run(create_table(NAME))
    # An error says what the command was, which may be long: more than the socket takes at once.
    with pytest.raises(NftError) as raised:
        nft.run(*replace_elements(NAME, Name("none"), range(10000)))
    assert len(str(raised.value)) < 400
    nft.run(Command("add set inet $table ports { type inet_service; }", table=NAME))
    assert "ports" in machine.run("nft", "list", "ruleset")


@needs_network
def test_elements_are_replaced(machine: Machine, nft: Nft) -> None:
    prefixes = Name("prefixes")
    nft.run(
        create_table(NAME),
        Command("add set inet $table ports { type inet_service; }", table=NAME),
        Command("add set inet $t $s { type ipv4_addr; flags interval; }", t=NAME, s=prefixes),
    )
    for values in [443, 8443], list(range(1, 1001)), [], [8443, 5432]:
        nft.run(*replace_elements(NAME, Name("ports"), values))
        listed = machine.run("nft", "list", "set", "inet", str(NAME), "ports")
        elements = listed.partition("elements = {")[2].partition("}")[0]
        assert sorted(int(each) for each in elements.split(",") if each.strip()) == sorted(values)
    # The old elements and the new ones may overlap.
    for text in ["10.0.0.0/8", "192.168.0.0/16"], ["10.0.0.0/9"], ["10.0.0.0/8"]:
        nft.run(*replace_elements(NAME, prefixes, [IPv4Network(each) for each in text]))
        listed = machine.run("nft", "list", "set", "inet", str(NAME), "prefixes")
        assert all(each in listed for each in text)
        assert listed.count("/") == len(text)
    with pytest.raises(NftError):
        nft.run(*replace_elements(NAME, prefixes, [IPv6Network("2001:db8::/32")]))


@needs_network
def test_what_nft_is_left_with(machine: Machine, nft: Nft, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        ours = machine.do(Nft, NOBODY)
        ours.run(create_table(NAME))
        process = Path(f"/proc/{ours._process.pid}")
        assert (process / "comm").read_text() == "nft\n"
        # Its end of ours three times over, and the netlink socket.
        links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        assert all(link.startswith("socket:") for link in links)
        assert len(set(links)) == 2
        status = dict(
            line.split(":\t", 1) for line in (process / "status").read_text().splitlines()
        )
        only_net_admin = f"{1 << 12:016x}"
        for kind in "CapPrm", "CapEff", "CapBnd":
            assert status[kind] == only_net_admin
        assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
        assert status["Groups"].split() == []
        assert status["NoNewPrivs"] == "1"
        assert (process / "environ").read_bytes() == b"HOME=/dev/null\0LC_ALL=C\0"
        with pytest.raises(NftError, match="Permission denied"):
            ours.run(Command('include "/etc/shadow"'))
        ours.close()


@needs_network
def test_signals_for_our_group_do_not_end_nft(machine: Machine, nft: Nft) -> None:
    nft.run(create_table(NAME))
    pid = nft._process.pid
    assert os.getsid(pid) == pid
    for number in signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM:
        os.kill(pid, number)
    nft.run()
    assert tables(machine) == [f"table inet {NAME}"]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGTERM not in blocked


@needs_network
def test_the_end_of_nft_is_noticed(machine: Machine, nft: Nft) -> None:
    nft.run(create_table(NAME))

    nft.run()
    assert not nft.has_ended()  # its answers are not its end
    os.kill(nft._process.pid, signal.SIGKILL)
    eventually(nft.has_ended)
    eventually(lambda: tables(machine) == [])
    with pytest.raises(NftEndedError, match="unable to run nft"):
        nft.run(create_table(NAME))
    with pytest.raises(NftEndedError, match="unable to run nft"):
        nft.run()


@needs_network
def test_a_copy_of_this_process_does_not_hold_the_table(machine: Machine, nft: Nft) -> None:
    nft.run(create_table(NAME))
    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.close(writing)
        try:
            nft.close()  # which is not ours to end
        finally:
            os.read(reading, 1)
            os._exit(0)
    os.close(reading)
    try:
        nft.run()
        nft.close()
        assert tables(machine) == []
        assert os.waitpid(copy, os.WNOHANG) == (0, 0)
    finally:
        os.close(writing)
        os.waitpid(copy, 0)


@needs_network
def test_whoever_looks_sees_the_end_of_an_nft_that_was_ended(machine: Machine, nft: Nft) -> None:
    os.kill(nft._process.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_DEADLINE", 0.05)
        with pytest.raises(NftEndedError, match="it did not answer within"):
            nft.run()
    assert nft.has_ended()


# --- An nft of our own, in place of the real one


def pretend(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    nft = directory / "nft"
    nft.write_text(f"#!/bin/sh\n{script}\n")
    nft.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def children() -> str:
    return Path("/proc/thread-self/children").read_text()


def test_no_nft_is_told_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child, "_SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NftEndedError, match=r"nft is not installed \(Debian package nftables\)"):
        Nft()
    pretend(tmp_path, monkeypatch, "cat")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NftEndedError, match=r"setpriv is not installed \(Debian package util-l"):
        Nft(NOBODY)


def test_an_nft_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, others = len(os.listdir("/proc/self/fd")), children()
    pretend(tmp_path, monkeypatch, "echo 'nft: no interactive mode' >&2; exit 1")
    with pytest.raises(NftEndedError, match=r"^unable to run nft: nft: no interactive mode$"):
        Nft()
    # So it is if it has ended before it is asked anything.
    start = child.start

    def start_late(
        command: list[str], *, user: None
    ) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        process, ours = start(command, user=user)
        process.wait(PATIENCE)
        return process, ours

    with monkeypatch.context() as patch:
        patch.setattr(child, "start", start_late)
        with pytest.raises(NftEndedError, match=r"^unable to run nft: nft: no interactive mode$"):
            Nft()
    (tmp_path / "nft").write_text("#!/nowhere\n")
    with pytest.raises(NftEndedError, match=r"^unable to run nft: No such file or directory$"):
        Nft()
    assert children() == others
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_nft_that_does_not_answer_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = children()
    monkeypatch.setattr(table, "_DEADLINE", 0.05)
    pretend(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(NftEndedError, match="it did not answer within"):
        Nft()
    assert children() == others


def test_prompts_and_echoes_are_no_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As nft does if it was built with readline.
    script = r"""
    printf 'nft> '
    while read -r line; do
        printf '%s\n' "$line"
        case $line in
            describe*) printf 'meta expression, datatype mark'; sleep 0.01; printf ', 32 bits\n' ;;
            bad*) printf 'Error: no\n%s\n' "$line" ;;
        esac
        printf 'nft> '
    done"""
    pretend(tmp_path, monkeypatch, script)
    nft = Nft()
    nft.run(Command("good"))
    with pytest.raises(NftError, match=r"^nft: no$"):
        nft.run(Command("bad"))
    nft.close()
