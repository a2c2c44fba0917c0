"""The event lines: always one line, always printable, whatever a client sent."""

import json
import os
import re
import select
import socket
import tracemalloc
from contextlib import closing
from pathlib import Path
from syslog import LOG_INFO, LOG_WARNING

import pytest
import trio
from trio.testing import MockClock, trio_test

from sniproxy.log import Log
from sniproxy.service.eventlog import Seconds, show_address
from sniproxy.service.linelimit import PerKey
from sniproxy.service.syslogd import Syslog
from sniproxy.wire import Alert
from tests.support.daemon import Daemon, eventually


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        (b"example.com", "example.com"),
        (112, "112"),
        ("!~", "!~"),
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


def test_an_event_goes_to_syslogd_where_that_is_asked_for(
    dev_log: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with listen_as_syslogd(dev_log) as syslogd, closing(Syslog("sniproxy")) as log:
        Log(log).event("word", LOG_WARNING, key=1)
        line = syslogd.recv(1000, socket.MSG_DONTWAIT).decode()
    assert line.startswith("<28>")
    assert line.endswith(f" sniproxy[{os.getpid()}]: word key=1")
    assert capfd.readouterr().err == ""


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


def refuse(
    log: Log,
    reason: str = "no_such_host",
    client: str = "192.0.2.1:1",
    name: str = "a.example",
    times: int = 1,
    *,
    is_host: bool = False,
) -> None:
    for _ in range(times):
        alert = Alert.UNRECOGNIZED_NAME
        if log.admits(reason, client, name.encode(), is_host=is_host):
            log.refusal(reason, client, name.encode(), alert, None)


class Lines:
    """What was written since the last call."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self) -> list[str]:
        return self._capfd.readouterr().err.splitlines()


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Lines:
    return Lines(capfd)


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def log(now: list[float]) -> Log:
    return Log(clock=lambda: now[0])


@trio_test
async def test_of_one_kind_few_are_written_and_the_rest_is_counted(
    clock: MockClock, lines: Lines
) -> None:
    log = Log(clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        refuse(log, "no_such_host", times=23)
        # Another kind has its own limit.
        refuse(log, "deadline")
        assert len(lines()) == 21
        await trio.sleep(9)
        refuse(log)
        await trio.sleep(2)
        assert lines() == ["sniproxy: suppressed reason=no_such_host count=4"]
        # Who goes on has a line in ten seconds.
        refuse(log, times=5)
        assert len(lines()) == 1
        await trio.sleep(9.5)
        assert lines() == ["sniproxy: suppressed reason=no_such_host count=4"]
        # After ten seconds of silence everything is said again.
        await trio.sleep(1)
        refuse(log, times=21)
        assert len(lines()) == 20
        nursery.cancel_scope.cancel()
    # And nothing is forgotten in the end.
    assert lines() == ["sniproxy: suppressed reason=no_such_host count=1"]


def test_silence_is_counted_from_the_last_refusal(log: Log, lines: Lines, now: list[float]) -> None:
    """So no trickle keeps a kind limited, and no clock that ticks for all ends it early."""
    refuse(log, times=30)
    lines()
    for _ in range(5):
        now[0] += 9.9
        refuse(log, client="192.0.2.2:1")
    assert len(lines()) == 3  # every other one: the last was named less than ten seconds ago
    now[0] += 10
    refuse(log, times=30)
    assert len(lines()) == 20


def test_the_noise_of_one_host_does_not_hide_another(
    log: Log, lines: Lines, now: list[float]
) -> None:
    told = 0
    refuse(log, "not_listening", name="a.example", is_host=True, times=21)
    for _ in range(10):
        for _ in range(11):
            now[0] += 1
            refuse(log, "not_listening", name="a.example", is_host=True, times=100)
        lines()
        refuse(log, "not_listening", name="b.example", is_host=True)
        told += len(lines())
    assert told == 10


def test_ways_of_writing_a_name_are_one_host(log: Log, lines: Lines) -> None:
    for number in range(1 << 11):
        spelt = "".join(
            letter.upper() if number >> at & 1 else letter
            for at, letter in enumerate("abcdefghijk")
        )
        refuse(log, "wrong_owner", name=f"{spelt}.example.", is_host=True)
    assert len(lines()) == 20
    refuse(log, "wrong_owner", name="b.example", is_host=True)
    assert len(lines()) == 1


def test_a_noisy_host_is_told_of_again(log: Log, lines: Lines, now: list[float]) -> None:
    for _ in range(100):
        refuse(log, "not_listening", is_host=True, times=10)
        now[0] += 1
    written = lines()
    assert 20 + 8 <= len(written) <= 20 + 10


def test_a_client_that_was_not_told_of_is_at_a_host_that_was(log: Log, lines: Lines) -> None:
    refuse(log, "not_listening", is_host=True, times=1000)
    lines()
    refuse(log, "not_listening", client="192.0.2.2:1", is_host=True, times=2)
    [line] = lines()
    assert "client=192.0.2.2:1 " in line


def test_another_reason_of_the_same_client_and_host_is_told_of(log: Log, lines: Lines) -> None:
    refuse(log, "not_listening", is_host=True, times=1000)
    lines()
    refuse(log, "wrong_owner", is_host=True)
    assert len(lines()) == 1


def test_each_of_forty_clients_is_named(log: Log, lines: Lines) -> None:
    for number in range(40):
        refuse(log, client=f"192.0.2.{number}:1", times=1 + number % 2)
    text = "\n".join(lines())
    assert all(f"client=192.0.2.{number}:1" in text for number in range(40))


def test_a_client_is_an_address_and_not_a_port(log: Log, lines: Lines) -> None:
    for port in range(1, 3001):
        refuse(log, client=f"192.0.2.1:{port}")
    assert len(lines()) == 20


def test_a_customer_with_an_ipv6_network_is_one_client(log: Log, lines: Lines) -> None:
    for number in range(3000):
        refuse(log, client=f"[2001:db8::{number:x}]:1")
    assert len(lines()) == 20
    refuse(log, client="[2001:db8:0:1::1]:1")
    assert len(lines()) == 1


def test_3000_refusals_of_one_client_are_few_lines_whatever_it_does(
    log: Log, lines: Lines, now: list[float]
) -> None:
    for number in range(3000):
        now[0] += 0.02
        refuse(log, f"reason_{number % 5}", name=f"name{number}.example")
    assert len(lines()) < 600


def test_a_scan_leaves_memory_and_lines_bounded_and_hides_no_host(
    log: Log, lines: Lines, now: list[float]
) -> None:
    refuse(log, "wrong_owner", name="host.example", client="198.51.100.1:1", is_host=True)
    lines()
    tracemalloc.start()
    try:
        written = told = 0
        for second in range(60):
            for number in range(second * 2000, (second + 1) * 2000):
                client = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:1"
                refuse(log, client=client, name=f"n{number}.example")
                refuse(
                    log,
                    "name_too_long",
                    client=f"[2001:db8:{number >> 16:x}:{number & 65535:x}::]:1",
                )
            written += len(lines())
            if second % 10 == 9:
                now[0] += 1
                refuse(
                    log, "wrong_owner", name="host.example", client="198.51.100.1:1", is_host=True
                )
                told += len(lines())
            else:
                now[0] += 1
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current < 1 << 20
    assert written <= 7 * 256 + 2 * 20
    assert told == 6


def test_a_key_that_is_remembered_long_enough_makes_room() -> None:
    limit = PerKey(2)
    assert limit.admit("a", 0.0)
    assert limit.admit("b", 5.0)
    assert not limit.admit("c", 9.9)
    assert limit.admit("c", 10.0)  # in the place of a
    assert not limit.admit("d", 14.9)
    assert limit.admit("d", 15.0)


def test_names_that_are_no_hosts_do_not_count_as_hosts(log: Log, lines: Lines) -> None:
    for number in range(3000):
        refuse(log, name=f"n{number}.example")
    assert len(lines()) == 20


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


# --- As JSON


@pytest.fixture
def json_log() -> Log:
    log = Log(environment={})
    log.is_json = True
    return log


def objects(capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_lines_are_objects_of_json(json_log: Log, capfd: pytest.CaptureFixture[str]) -> None:
    json_log.worker = 2
    json_log.refusal("why", "192.0.2.1:1", b"a.example", Alert.UNRECOGNIZED_NAME, "in more words")
    json_log.event("connection", up=5, seconds=Seconds(1.23456), name=None)
    first, second = objects(capfd)
    assert list(first.items()) == [
        ("program", "sniproxy"),
        ("event", "refused"),
        ("worker", 2),
        ("client", "192.0.2.1:1"),
        ("name", "a.example"),
        ("reason", "why"),
        ("alert", 112),
        ("detail", "in more words"),
    ]
    assert second == {
        "program": "sniproxy", "event": "connection", "worker": 2, "up": 5, "seconds": 1.235
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [b'"},{"a":"', b"\n", b"\x1b[31m", b"\\", bytes(range(256)), b"\xff" * 5000, b"\0" * 5000],
)
def test_whatever_a_client_says_is_one_string_of_one_line(
    json_log: Log, capfd: pytest.CaptureFixture[str], name: bytes
) -> None:
    json_log.refusal("why", "192.0.2.1:1", name, None, "x" * 5000)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.isascii()
    assert len(err) <= select.PIPE_BUF
    [line] = err.splitlines()
    found = json.loads(line)["name"]
    assert found == name.decode("latin-1")[:300] + ("..." if len(name) > 300 else "")


def test_values_too_many_for_a_line_leave_it_json(
    json_log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {f"field{number}": "\x00" * 300 for number in range(10)}
    json_log.event("long", **fields)
    [line] = objects(capfd)
    assert line["event"] == "long"
    assert len(line) == 12


def test_a_traceback_is_an_object_for_each_line(
    json_log: Log, capfd: pytest.CaptureFixture[str]
) -> None:
    json_log.bug(ZeroDivisionError("why"))
    found = objects(capfd)
    assert [line["line"] for line in found] == list(range(1, len(found) + 1))
    assert found[-1]["detail"] == "ZeroDivisionError: why"


def test_the_journal_is_told_the_priority_of_json_too(capfd: pytest.CaptureFixture[str]) -> None:
    status = os.fstat(2)
    log = Log(environment={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    log.is_json = True
    log.event("something")
    assert capfd.readouterr().err.startswith('<6>{"program": "sniproxy", ')


def test_the_daemon_writes_json(hosts: Path, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("wb") as log,
        socket.create_server(("127.0.0.1", 0)) as listening,
        Daemon(listening, hosts, ("--log-format", "json"), stderr=log.fileno()) as daemon,
    ):
        eventually(lambda: '"listening"' in (tmp_path / "log").read_text())
        with daemon.connect() as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(1) == b"\x15"
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["event"] for line in lines} >= {"listening", "refused", "drained"}
