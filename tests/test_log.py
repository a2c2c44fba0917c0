"""The event lines: always one line, always printable, whatever a client sent."""

import os
import select
from pathlib import Path

import pytest

from sniproxy.log import Log, show_address


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        (b"example.com", "example.com"),
        (112, "112"),
        ("two words", '"two words"'),
        ("", '""'),
        (b'say "x"', '"say \\x22x\\x22"'),
        (b"a\\b", '"a\\x5cb"'),
        (b"line\nend\r\x1b[31m\x00\x7f\xff", '"line\\x0aend\\x0d\\x1b[31m\\x00\\x7f\\xff"'),
        ("\N{SPIDER WEB}", '"\\x1f578"'),
    ],
)
def test_a_value_is_printable(value: object, shown: str, capfd: pytest.CaptureFixture[str]) -> None:
    Log().event("word", key=value, absent=None)
    assert capfd.readouterr().err == f"sniproxy: word key={shown}\n"


def test_a_bug_has_its_traceback_in_lines(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError as error:
        Log().bug(error)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "sniproxy: bug Traceback (most recent call last):"
    assert lines[-1] == "sniproxy: bug ZeroDivisionError: why"


def test_a_line_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: write(full, line))
    Log().event("word")
    os.close(full)


def test_a_reader_that_has_fallen_behind_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        log = Log()
        for _ in range(5000):
            log.event("word", key="x" * 100)
    finally:
        os.dup2(kept, 2)
        for fd in kept, reader, writer:
            os.close(fd)


def test_what_a_client_says_at_length_is_cut_short(capfd: pytest.CaptureFixture[str]) -> None:
    Log().event("word", key=b"\xff" * 60_000)
    line = capfd.readouterr().err
    assert line.endswith('..."\n')
    assert len(line) < select.PIPE_BUF


def test_syslog_is_opened_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr("syslog.openlog", lambda *args: calls.append(args))
    monkeypatch.setattr("syslog.syslog", lambda *args: calls.append(args))
    log = Log(to_syslog=True)
    assert len(calls) == 1
    log.event("word", key=1)
    assert calls[1][1] == "word key=1"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (("192.0.2.1", 443), "192.0.2.1:443"),
        (("2001:db8::1", 443, 0, 0), "[2001:db8::1]:443"),
        (("::ffff:192.0.2.1", 443, 0, 0), "192.0.2.1:443"),
    ],
)
def test_addresses_are_written_as_usual(
    address: tuple[str, int] | tuple[str, int, int, int], shown: str
) -> None:
    assert show_address(address) == shown
