"""What the shells offer behind the names of the programs, asked of the shells themselves."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, eventually

ROOT = Path(__file__).parents[1]
COMPLETIONS = ROOT / "completions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STARTS: dict[str, str] = PROJECT["project"]["scripts"]

# Asks bash, without a terminal, for what it would offer behind the words.
ASK_BASH = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
_sniproxy "$1" "${!#}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

# Makes the tab key write what would be offered into a file, and insert nothing. The system of
# completion calls compadd to filter, too: then it is told in which arrays.
ASK_ZSH = """
PS1='READY>'
fpath=($COMPLETIONS/zsh $fpath)
autoload -Uz compinit && compinit -u -D
compadd() {
    local -a offered
    if (( $@[(I)-[OAD]] )); then
        builtin compadd "$@"
        return
    fi
    builtin compadd -O offered "$@"
    print -rl -- $offered >>$OFFERED
    builtin compadd "$@"
}
tell() {
    _main_complete
    compstate[insert]= compstate[list]=
    print -r END >>$OFFERED
}
zle -C tell complete-word tell
bindkey '^I' tell
"""

# As the tests of the hostile names need it. A terminal that knows nothing is asked nothing.
START = {
    "bash": 'PS1="READY>"; source "$COMPLETIONS/bash/sniproxy"',
    "fish": "set -p fish_complete_path $COMPLETIONS/fish",
    "zsh": "PS1='READY>'; fpath=($COMPLETIONS/zsh $fpath); autoload -Uz compinit; compinit -u -D",
}
INTERACTIVE = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "fish": ("fish", "--no-config", "--private", "-i"),
    "zsh": ("zsh", "-f", "-i"),
}

# Entries that a tenant could make, by what is typed of them.
HOSTILE = {
    "one.": "one.example",
    "a": "a b  c",
    "c": "c$(touch ran)",
    "d": "d`touch ran`",
    "e": "e;touch ran",
    "f": "f'\"",
    "g": "g\\x",
    "h": "h*?[x]",
    "i": "i&touch ran|x>y<z",
    "j": "j:k=l@m",
    "k": "k${HOME}~#!",
    "l": "l{a,b}(c)",
    "m": "m%s%n\x1b[31m",
    "n": "n\ntouch ran",
}

every_shell = pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
every_program = pytest.mark.parametrize("program", STARTS)


def needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


class Terminal:
    """An interactive shell in a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._said = b""

    def wait_for(self, text: bytes) -> None:
        """Wait until the shell has written that; forget what it wrote up to there."""
        deadline = time.monotonic() + PATIENCE
        while text not in self._said:
            left = deadline - time.monotonic()
            assert select.select([self._descriptor], [], [], max(left, 0))[0], self._said
            self._said += os.read(self._descriptor, 65536)
        self._said = self._said.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())


@contextmanager
def terminal(*command: str, cwd: Path, env: dict[str, str]) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    try:
        # fish wants a terminal that is its own, to control jobs.
        with subprocess.Popen(
            ("setsid", "--ctty", *command),
            cwd=cwd,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            try:
                yield Terminal(ours)
            finally:
                process.kill()
    finally:
        os.close(ours)


def environment(place: Path) -> dict[str, str]:
    """Return what a shell is started with: little, and a home of its own."""
    return {
        "COMPLETIONS": str(COMPLETIONS),
        "HOME": str(place),
        "LC_ALL": "C.UTF-8",
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "PS1": "READY>",
        "TERM": "dumb",
        "ZDOTDIR": str(place),
    }


def offered(shell: str, place: Path, *words: str) -> list[str]:
    """Return what a shell offers for the last of the words."""
    needs(shell)
    program = words[0]
    env = environment(place)
    if shell == "zsh":
        return offered_by_zsh(place, env, " ".join(words))
    if shell == "bash":
        # As bash-completion does, which loads the file of that name.
        file = str(COMPLETIONS / "bash" / program)
        command = ["bash", "--norc", "--noprofile", "-c", ASK_BASH, "bash", file, *words]
    else:
        code = "set -p fish_complete_path $COMPLETIONS/fish; complete -C $argv[1]"
        command = ["fish", "--no-config", "-c", code, " ".join(words)]
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition("\t")[0] for line in done.stdout.splitlines() if line]


def offered_by_zsh(place: Path, env: dict[str, str], line: str) -> list[str]:
    file = place / "offered"
    file.unlink(missing_ok=True)
    start = place / "start.zsh"
    start.write_text(ASK_ZSH)
    env["OFFERED"] = str(file)
    with terminal("zsh", "-f", "-i", cwd=place, env=env) as shell:
        shell.wait_for(b"READY>")
        shell.type(f"source {start}; print START''ED\r")
        shell.wait_for(b"STARTED")
        shell.wait_for(b"READY>")
        shell.type(f"{line}\t")
        eventually(lambda: file.exists() and file.read_text().endswith("END\n"))
    lines = file.read_text().splitlines()[:-1]
    return [each.removesuffix("=") for each in lines if each]


def options_of(program: str) -> set[str]:
    """Return the options that the help of a program has."""
    module, _, function = STARTS[program].partition(":")
    code = f"import sys; from {module} import {function} as main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    heads = re.findall(r"^  (-\S.*?)(?:  |$)", done.stdout, re.MULTILINE)
    found = {part.split()[0] for head in heads for part in head.split(", ")}
    assert {"--help", "--version"} <= found
    # All understand it; the help of some doesn't say so.
    return found | {"-h"}


def test_they_are_written_from_the_options(tmp_path: Path) -> None:
    """Run scripts/completions if this fails: an option has changed."""
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "completions", "--output", tmp_path],
        check=True,
        timeout=PATIENCE,
    )
    made, kept = (
        {str(path.relative_to(top)): path.read_text() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path, COMPLETIONS)
    )
    assert made == kept


def test_they_are_installed_where_shells_look() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    places = {
        "completions/bash": "share/bash-completion/completions",
        "completions/fish": "share/fish/vendor_completions.d",
        "completions/zsh": "share/zsh/site-functions",
    }
    assert places.items() <= wheel.items()
    names = {
        "bash": set(STARTS),
        "fish": {f"{name}.fish" for name in STARTS},
        "zsh": {"_sniproxy"},
    }
    for shell, files in names.items():
        assert {path.name for path in (COMPLETIONS / shell).iterdir()} == files


@every_shell
@every_program
def test_every_option_is_offered_and_no_other(shell: str, program: str, tmp_path: Path) -> None:
    found = offered(shell, tmp_path, program, "-")
    assert len(found) == len(set(found))
    assert set(found) == options_of(program)


@every_shell
def test_fixed_words(shell: str, tmp_path: Path) -> None:
    assert offered(shell, tmp_path, "sniproxy", "--log-format", "j") == ["json"]
    assert set(offered(shell, tmp_path, "tls-tproxy", "--log", "")) == {"errors", "connections"}
    words = set(offered(shell, tmp_path, "tls-tproxy", "--logLevel", ""))
    assert {"info", "error"} <= words
    # Of what a number is, nothing is known.
    assert offered(shell, tmp_path, "sniproxy", "--workers", "") == []


@every_shell
def test_behind_sniproxy_listen_stands_another_command(shell: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in STARTS:
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    words = ("sniproxy-listen", "127.0.0.1:443")
    assert set(offered(shell, tmp_path, *words, "sniproxy-")) == {
        name for name in STARTS if name.startswith("sniproxy-")
    }
    assert offered(shell, tmp_path, *words, "sniproxy", "--has") == ["--hashed"]
    assert offered(shell, tmp_path, *words, "sniproxy", "--log-format", "t") == ["text"]


@every_shell
def test_users_and_processes(shell: str, tmp_path: Path) -> None:
    assert "root" in offered(shell, tmp_path, "sniproxy", "--user", "roo")
    assert "root" in offered(shell, tmp_path, "sniproxy-check", "--as", "roo")
    assert "root" in offered(shell, tmp_path, "tls-tproxy", "--user-only", "roo")
    pid = str(os.getpid())
    assert pid in offered(shell, tmp_path, "sniproxy-check", "--pid", pid)


@every_shell
def test_hosts_are_those_of_the_directory(shell: str, tmp_path: Path) -> None:
    for name in "here.example", "hosts/there.example", "hosts/.hidden":
        (tmp_path / name).mkdir(parents=True)
    check = "sniproxy-check"
    assert set(offered(shell, tmp_path, check, "h")) == {"here.example", "hosts"}
    assert offered(shell, tmp_path, check, "-C", "hosts", "") == ["there.example"]
    assert offered(shell, tmp_path, check, "--json", "-C", "hosts", "x", "t") == ["there.example"]
    assert offered(shell, tmp_path, check, "-C", "nowhere", "") == []


@contextmanager
def shell_to_type_into(shell: str, place: Path, cwd: Path) -> Iterator[Terminal]:
    """A shell that has what it completes with, and whose programs only note their arguments."""
    needs(shell)
    (place / "bin").mkdir()
    for name in STARTS:
        program = place / "bin" / name
        program.write_text(
            f"#!/bin/sh\nprintf '%s\\0' \"$@\" >{place}/new\nmv {place}/new {place}/given\n"
        )
        program.chmod(0o755)
    if shell == "fish":
        prompt = "function fish_prompt; printf READY\\>; end"
        command = (*INTERACTIVE[shell], "-C", prompt)
    else:
        command = INTERACTIVE[shell]
    with terminal(*command, cwd=cwd, env=environment(place)) as typing:
        typing.wait_for(b"READY>")
        typing.type(f"{START[shell]}; echo START''ED\r")
        typing.wait_for(b"STARTED")
        typing.wait_for(b"READY>")
        yield typing


def given(place: Path, typing: Terminal) -> list[str]:
    """Return the arguments that a program was started with."""
    file = place / "given"
    eventually(file.exists)
    arguments = file.read_text().split("\0")[:-1]
    file.unlink()
    typing.wait_for(b"READY>")
    return arguments


@every_shell
@pytest.mark.parametrize("is_cwd", [True, False], ids=["cwd", "elsewhere"])
def test_hostile_entries_are_quoted_and_not_evaluated(
    shell: str, is_cwd: bool, tmp_path: Path
) -> None:
    # Without ; and `: bash takes them for the end of a command, quoted or not, and asks nobody.
    hosts = tmp_path / "h $(touch ran)"
    for name in HOSTILE.values():
        (hosts / name).mkdir(parents=True)
    options = [] if is_cwd else ["-C", f"../{hosts.name}"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cwd = hosts if is_cwd else elsewhere
    typed = "" if is_cwd else f"-C '../{hosts.name}' "
    with shell_to_type_into(shell, tmp_path, cwd) as typing:
        for beginning, name in HOSTILE.items():
            if shell == "fish" and "\n" in name:
                continue  # to fish, it would be two
            typing.type(f"sniproxy-check {typed}{beginning}\t\r")
            assert given(tmp_path, typing) == [*options, name]
        # Within quotes that are open. In the working directory, bash adds the slash of a directory.
        for beginning in "'c", '"c', "'h", '"k':
            typing.type(f"sniproxy-check {typed}{beginning}\t\r")
            *before, last = given(tmp_path, typing)
            assert (before, last.rstrip("/")) == (options, HOSTILE[beginning[1:]])
        # All at once: they are shown. Then the line is taken back.
        typing.type(f"sniproxy-check {typed}\t\t\x15")
        typing.type("sniproxy-check --json\r")
        assert given(tmp_path, typing) == ["--json"]
    assert list(tmp_path.rglob("ran")) == []


@every_shell
def test_files_and_directories(shell: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "dir $(touch ran)").mkdir(parents=True)
    (place / "dirt").touch()
    (place / "file;touch ran").touch()
    with shell_to_type_into(shell, tmp_path, place) as typing:
        for words, expected in {
            "sniproxy-check -C d\t": ["-C", "dir $(touch ran)"],
            "tls-bridge --file f\t": ["--file", "file;touch ran"],
            "tls-bridge --identity d\t": ["--identity", "dir $(touch ran)"],
            "tproxy-pod -cert f\t": ["-cert", "file;touch ran"],
        }.items():
            typing.type(f"{words}\r")
            # zsh takes the slash of a directory back.
            assert [each.rstrip("/") for each in given(tmp_path, typing)] == expected
    assert list(tmp_path.rglob("ran")) == []


@every_shell
def test_within_a_longer_line(shell: str, tmp_path: Path) -> None:
    with shell_to_type_into(shell, tmp_path, tmp_path) as typing:
        for words, expected in {
            "true; LANG=C sniproxy-check --hands\t": ["--handshake"],
            "sniproxy --log=c\t": ["--log=connections"],
            "sniproxy --log-format=j\t --hash\t": ["--log-format=json", "--hashed"],
            f"{tmp_path}/bin/sniproxy --hash\t": ["--hashed"],
            "sniproxy-listen :443 sniproxy --log-format j\t": [
                *(":443", "sniproxy", "--log-format", "json")
            ],
        }.items():
            typing.type(f"{words}\r")
            assert given(tmp_path, typing) == expected
