"""The event lines: always one line, always printable, whatever a client sent."""

import os
import re
import select
import socket
from contextlib import closing
from pathlib import Path
from syslog import LOG_INFO, LOG_WARNING

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.log import Log
from sniproxy.service.eventlog import show_address
from sniproxy.service.syslogd import Syslog
from sniproxy.wire import Alert


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


@pytest.fixture
def dev_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Where syslogd is to be."""
    path = str(tmp_path / "log")
    monkeypatch.setattr("sniproxy.service.syslogd._DEV_LOG", path)
    return path


def listen_as_syslogd(path: str) -> socket.socket:
    Path(path).unlink(missing_ok=True)
    syslogd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    syslogd.bind(path)
    syslogd.settimeout(2)
    return syslogd


def test_a_line_for_syslog(dev_log: str) -> None:
    with listen_as_syslogd(dev_log) as syslogd, closing(Syslog("sniproxy")) as log:
        log.write(LOG_WARNING, "word key=\N{SPIDER WEB}")
        line = syslogd.recv(1000).decode()
    time = r"[A-Z][a-z]{2} [ 1-3]\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"<28>{time} sniproxy\[{os.getpid()}\]: word key=\\U0001f578", line)


def test_syslogd_may_come_late_and_be_another(dev_log: str) -> None:
    with closing(Syslog("sniproxy")) as log:
        log.write(LOG_INFO, "nobody there")
        for word in "first", "second":
            with listen_as_syslogd(dev_log) as syslogd:
                log.write(LOG_INFO, word)
                assert syslogd.recv(1000).decode().endswith(f": {word}")
            log.write(LOG_INFO, "nobody there")


def test_syslogd_may_listen_for_streams(dev_log: str) -> None:
    """As syslog-ng's does where it is told to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as syslogd:
        syslogd.bind(dev_log)
        syslogd.listen()
        with closing(Syslog("sniproxy")) as log:
            for word in "first", "second":
                log.write(LOG_INFO, word)
            connection, _ = syslogd.accept()
            with connection:
                messages = connection.recv(1000).split(b"\0")
    assert [message.rpartition(b": ")[2] for message in messages] == [b"first", b"second", b""]


def test_a_syslogd_that_is_another_is_none_where_it_must_not_be(dev_log: str) -> None:
    with closing(Syslog("sniproxy")) as log:
        with listen_as_syslogd(dev_log) as syslogd:
            log.write(LOG_INFO, "first")
            assert syslogd.recv(1000).endswith(b": first")
        log.stay()
        with listen_as_syslogd(dev_log) as syslogd:
            log.write(LOG_INFO, "second")
            syslogd.settimeout(0)
            with pytest.raises(BlockingIOError):
                syslogd.recv(1000)


def test_a_syslogd_that_does_not_read_is_not_waited_for(dev_log: str) -> None:
    with listen_as_syslogd(dev_log), closing(Syslog("sniproxy")) as log:
        # net.unix.max_dgram_qlen, 512 where systemd has set it, is how many it holds.
        for _ in range(5000):
            log.write(LOG_INFO, "x" * 100)


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


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def refuse(log: Log, reason: str, times: int) -> None:
    for _ in range(times):
        log.refusal(reason, "192.0.2.1:1", b"a.example", Alert.UNRECOGNIZED_NAME, None)


@trio_test
async def test_of_one_kind_few_are_written_and_the_rest_is_counted(
    clock: MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    def lines() -> list[str]:
        return capfd.readouterr().err.splitlines()

    log = Log()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        refuse(log, "no_such_host", 23)
        refuse(log, "deadline", 1)
        # Another kind has its own limit.
        assert len(lines()) == 21
        await trio.sleep(11)
        assert lines() == ["sniproxy: suppressed reason=no_such_host count=3"]
        # Who goes on is only counted, once in ten seconds.
        refuse(log, "no_such_host", 5)
        await trio.sleep(10)
        assert lines() == ["sniproxy: suppressed reason=no_such_host count=5"]
        # After ten seconds of silence everything is said again.
        await trio.sleep(10)
        refuse(log, "no_such_host", 21)
        assert len(lines()) == 20
        nursery.cancel_scope.cancel()
    # And nothing is forgotten in the end.
    assert lines() == ["sniproxy: suppressed reason=no_such_host count=1"]


def test_bugs_and_exhaustion_are_limited_too(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log()
    for _ in range(30):
        log.bug(ZeroDivisionError("why"))
        log.exhausted(OSError(24, "Too many open files"))
    lines = capfd.readouterr().err.splitlines()
    assert lines.count("sniproxy: bug ZeroDivisionError: why") == 20
    assert lines.count('sniproxy: exhausted reason="Too many open files"') == 20


@pytest.mark.parametrize(
    ("alert", "priority"), [(Alert.UNRECOGNIZED_NAME, 6), (Alert.INTERNAL_ERROR, 4), (None, 6)]
)
def test_the_journal_is_told_how_bad_it_is(
    alert: Alert | None, priority: int, capfd: pytest.CaptureFixture[str]
) -> None:
    status = os.fstat(2)
    log = Log(environment={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    log.refusal("reason", "client", None, alert, None)
    assert capfd.readouterr().err.startswith(f"<{priority}>sniproxy: refused client=client ")


def test_a_journal_that_is_not_standard_error_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    Log(environment={"JOURNAL_STREAM": "1:2"}).event("word")
    assert capfd.readouterr().err == "sniproxy: word\n"
