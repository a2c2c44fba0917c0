"""The command sniproxy-hostname: arguments, standard input and output, exit codes."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from sniproxy_hostname.__main__ import main

ROOT = Path(__file__).parents[2]
HASH_OF_ABC = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def command(
    *arguments: str | bytes,
    typed: bytes = b"",
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    before: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a process of its own, with `typed` on standard input."""
    return subprocess.run(
        [sys.executable, "-m", "sniproxy_hostname", *arguments],
        input=typed,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=before,
        cwd=ROOT,
        check=False,
    )


class Outcome:
    def __init__(self, code: int, captured: pytest.CaptureFixture[str]) -> None:
        self.code = code
        self.out, self.err = captured.readouterr()


# --- names as arguments


def test_one_line_for_each_name() -> None:
    done = command("🕸💍.ws", "faß.de", "EXAMPLE.com.", "xn--sr8hvo.ws")
    assert done.stdout == b"xn--sr8hvo.ws\nxn--fa-hia.de\nexample.com\nxn--sr8hvo.ws\n"
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [["--hashed", "ABC."], ["abc", "--hashed"]])
def test_hashed(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    ran = Outcome(main(arguments), capfd)
    assert (ran.code, ran.out, ran.err) == (0, HASH_OF_ABC + "\n", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("..", "a label is empty: the name begins with a dot, or two dots meet"),
        ("a/b", "'/' is not allowed in a hostname"),
        ("_b.example", "the label '_b' begins with an underscore"),
        ("*.example.com", "'*' is not allowed in a hostname"),
        ("[::1]", "'[' is not allowed in a hostname"),
        ("-a.example", "the label '-a' begins with a hyphen"),
        ("--a.example", "the label '--a' begins with a hyphen"),
        ("-x", "the label '-x' begins with a hyphen"),
        ("", "the name is empty"),
    ],
)
def test_a_refused_name(name: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    ran = Outcome(main([name]), capfd)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"sniproxy-hostname: '{name}': {reason}\n"


def test_one_refused_name_stops_them_all_and_each_is_told() -> None:
    done = command("example.com", "_b", "example.org", "--", "-a.example")
    assert (done.returncode, done.stdout) == (1, b"")
    first, second = done.stderr.decode().splitlines()
    assert first == "sniproxy-hostname: '_b': the label '_b' begins with an underscore"
    assert second == "sniproxy-hostname: '-a.example': the label '-a' begins with a hyphen"


def test_after_two_hyphens_everything_is_a_name(capfd: pytest.CaptureFixture[str]) -> None:
    ran = Outcome(main(["--", "--hashed"]), capfd)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("sniproxy-hostname: '--hashed': ")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param(b"\x1b[31m", r"'\x1b[31m'", id="escape sequence"),
        pytest.param(b"a\nb", r"'a\nb'", id="newline"),
        pytest.param("\u202eא".encode(), r"'\u202e", id="right-to-left override"),
        pytest.param(b"\xff", r"'\udcff'", id="not UTF-8"),
    ],
)
def test_a_terminal_is_shown_nothing_it_obeys(
    name: bytes, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = Outcome(main([os.fsdecode(name)]), capfd)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("sniproxy-hostname: " + shown)
    assert ran.err.removesuffix("\n").isprintable()


def test_an_argument_that_is_not_utf_8_is_refused() -> None:
    done = command(b"\xff.example")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(rb"sniproxy-hostname: '\udcff.example': ")


# --- names on standard input


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        pytest.param(b"a\nb\n", b"a\nb\n", id="lines"),
        pytest.param(b"a\nb", b"a\nb\n", id="last line not ended"),
        pytest.param(b"a\r\nB.\r\n", b"a\nb\n", id="lines from Windows"),
        pytest.param("faß.de\n".encode(), b"xn--fa-hia.de\n", id="UTF-8"),
        pytest.param(b"", b"", id="nothing"),
    ],
)
def test_names_on_standard_input(typed: bytes, printed: bytes) -> None:
    done = command("-", typed=typed)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        pytest.param(b"a\n\nb\n", b"''", id="empty line"),
        pytest.param(b"\n", b"''", id="only an empty line"),
        pytest.param(b"a \n", b"'a '", id="space at the end"),
        pytest.param(b"a\r\r\n", rb"'a\r'", id="one carriage return too many"),
        pytest.param(b"\xff\n", rb"'\udcff'", id="not UTF-8"),
        pytest.param(b"-\n", b"'-'", id="a hyphen means itself here"),
    ],
)
def test_a_refused_name_on_standard_input(typed: bytes, shown: bytes) -> None:
    done = command("-", typed=typed)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"sniproxy-hostname: " + shown + b": ")


def test_both_kinds_keep_their_order() -> None:
    assert command("a", "-", "z", typed=b"m\nn\n").stdout == b"a\nm\nn\nz\n"


def test_standard_input_may_be_asked_for_twice() -> None:
    done = command("-", "a", "-", typed=b"m\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"m\na\n", b"")


# --- called wrongly


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no name was given"),
        (["--"], "no name was given"),
        (["--hashed"], "no name was given"),
        (["--hash", "a"], "unknown option '--hash'"),
        (["a", "--hashed=1"], "unknown option '--hashed=1'"),
        (["--\x1b"], r"unknown option '--\x1b'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    ran = Outcome(main(arguments), capfd)
    assert (ran.code, ran.out) == (100, "")
    usage = "(usage: sniproxy-hostname [--hashed] NAME...)"
    assert ran.err == f"sniproxy-hostname: fatal: {message} {usage}\n"


HELP = """\
usage: sniproxy-hostname [--hashed] NAME...

Print the name of the directory that sniproxy opens for each NAME, one a line.
The NAME - stands for the names on standard input, one a line, in UTF-8.

  --hashed    the names that sniproxy --hashed opens: BLAKE3 as 64 hex digits
  --help      print this
  --version   print the version

For example: mkdir "$(sniproxy-hostname one.example)"
"""


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    ran = Outcome(main([option]), capfd)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == HELP


def test_hashing_without_blake3(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    ran = Outcome(main(["--hashed", "a.example"]), capfd)
    assert (ran.code, ran.out) == (100, "")
    assert ran.err.startswith("sniproxy-hostname: fatal: unable to hash names: ")


def test_version(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"sniproxy": "1.2.3"}.__getitem__)
    ran = Outcome(main(["--version"]), capfd)
    assert (ran.code, ran.out, ran.err) == (0, "sniproxy-hostname 1.2.3\n", "")


def test_version_where_nothing_is_installed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_found)
    ran = Outcome(main(["--version"]), capfd)
    assert (ran.code, ran.out, ran.err) == (0, "sniproxy-hostname (not installed)\n", "")


def test_the_arguments_are_those_of_the_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sniproxy-hostname", "A"])
    assert Outcome(main(), capfd).out == "a\n"


def test_the_caller_keeps_its_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert [main(["a"]), main(["b"])] == [0, 0]
    assert capfd.readouterr().out == "a\nb\n"


# --- the system fails


@pytest.mark.parametrize("option", ["a", "--help"])
def test_a_full_disk_is_reported(option: str) -> None:
    with open("/dev/full", "wb") as full:
        done = command(option, stdout=full.fileno())
    message = b"sniproxy-hostname: fatal: unable to write standard output: "
    assert (done.returncode, done.stderr) == (111, message + b"No space left on device\n")


def test_a_reader_that_left_is_reported() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = command("a", stdout=pipe.fileno())
    message = b"sniproxy-hostname: fatal: unable to write standard output: "
    assert (done.returncode, done.stderr) == (111, message + b"Broken pipe\n")


def test_a_closed_standard_output_is_reported() -> None:
    done = command("a", before=lambda: os.close(1))
    message = b"sniproxy-hostname: fatal: unable to write standard output: "
    assert (done.returncode, done.stderr) == (111, message + b"Bad file descriptor\n")


def test_a_closed_standard_input_is_reported() -> None:
    done = command("-", before=lambda: os.close(0))
    message = b"sniproxy-hostname: fatal: unable to read standard input: "
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == message + b"Bad file descriptor\n"


@pytest.mark.parametrize(("argument", "code"), [("_b", 1), ("--what", 100)])
def test_the_exit_code_stands_where_no_message_can_be_written(argument: str, code: int) -> None:
    with open("/dev/full", "wb") as full:
        done = command(argument, stderr=full.fileno())
    assert (done.returncode, done.stdout) == (code, b"")
