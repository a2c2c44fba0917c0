"""What is told at a status socket, and how `sniproxy-status` shows it."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sniproxy.service.fatal import FatalError
from sniproxy_status import prometheus, table
from sniproxy_status.__main__ import main
from sniproxy_status.reading import Report, read
from tests.support.backends import listen_unix

ROOT = Path(__file__).parents[2]
END = {"kind": "end"}


def process(worker: int | None = None, **fields: Any) -> dict[str, Any]:
    told = {
        "kind": "process",
        "program": "sniproxy",
        "version": "1.0",
        "pid": 100 + (worker or 0),
        "worker": worker,
        "user": 1,
        "sees": "all",
        "uptime": 60.0,
        "open": 1,
        "served": 5,
        "refused": 3,
        "up": 1000,
        "down": 5000,
        "reasons": {"no_socket": 2, "no_such_host": 1},
        "seconds": {"lookup": {"count": 3, "sum": 0.001, "buckets": {"5": 2, "9": 1}}},
    }
    return told | fields


def host(name: str, **fields: Any) -> dict[str, Any]:
    told = {
        "kind": "host",
        "host": name,
        "owner": 1000,
        "open": 1,
        "served": 5,
        "refused": 0,
        "up": 1000,
        "down": 5000,
        "reasons": {},
        "last": [],
    }
    return told | fields


def refusal(when: float, detail: str | None = "why") -> dict[str, Any]:
    return {"time": when, "client": "192.0.2.1:1", "reason": "no_socket", "detail": detail}


@contextmanager
def service(path: Path, *lines: dict[str, Any] | bytes) -> Iterator[str]:
    """Be a service that tells these lines to one who connects."""
    data = b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    )

    def tell() -> None:
        # Who has read enough closes before all is said.
        with listening, listening.accept()[0] as connection, suppress(OSError):
            connection.sendall(data)

    listening = listen_unix(path)
    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield str(path)
    finally:
        thread.join()


def told(tmp_path: Path, *lines: dict[str, Any]) -> Report:
    with service(tmp_path / "status", *lines, END) as path:
        return read(path)


def test_several_processes_are_added_up(tmp_path: Path) -> None:
    report = told(
        tmp_path,
        process(1),
        host("a.example", last=[refusal(3.0)], refused=1, reasons={"no_socket": 1}),
        process(2),
        host("a.example", last=[refusal(2.0)], refused=2, reasons={"no_socket": 2}),
        host("b.example", owner=None),
    )
    assert [each.worker for each in report.processes] == [1, 2]
    assert report.total is not None
    assert (report.total.served, report.total.down) == (10, 10000)
    assert report.total.reasons == {"no_socket": 4, "no_such_host": 2}
    assert report.latencies["lookup"].buckets == {5: 4, 9: 2}
    one = report.hosts["a.example"]
    assert (one.served, one.refused, one.reasons) == (10, 3, {"no_socket": 3})
    assert [each.time for each in one.last] == [2.0, 3.0]
    assert report.hosts["b.example"].owner is None


def test_no_more_refusals_are_kept_than_a_process_keeps(tmp_path: Path) -> None:
    many = [host("a.example", last=[refusal(float(each)) for each in range(20)]) for _ in range(2)]
    assert len(told(tmp_path, process(1), *many).hosts["a.example"].last) == 20


def test_what_is_unknown_is_left_alone(tmp_path: Path) -> None:
    assert told(tmp_path, process(new=1), host("a.example", new=[])).hosts["a.example"].served == 5


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([process()], "closed before the end"),
        ([], "closed before the end"),
        ([b"HTTP/1.1 400 Bad Request\n"], "no status socket"),
        ([b"\xff\n"], "no status socket"),
        ([b"[]\n"], "no status socket"),
        ([{"kind": "other"}], "no status socket"),
        ([{"kind": "host"}], "no status socket"),
        ([process(open="many")], "no status socket"),
        ([b"x" * (1 << 20), b"x" * (1 << 17)], "no status socket"),
        ([END], "no process has spoken"),
        ([process(up=-1), END], "no count"),
        ([process(up=1.5), END], "no count"),
        ([process(), host("a.example", handed_over=-1), END], "no count"),
        ([process(up=1 << 63), END], "no count"),
        ([process(uptime="x"), END], "no time"),
        ([process(program="\x1b[2J"), END], "no word"),
        ([process(version="1 2"), END], "no word"),
        ([process(seconds={"A b": {"count": 0, "sum": 0, "buckets": {}}}), END], "no word"),
        ([process(seconds={"a": {"count": 1, "sum": 0, "buckets": {"64": 1}}}), END], "no bucket"),
        ([process(reasons={"a": None}), END], "no count"),
        ([process(), host("a", last=[refusal(1e300)]), END], "no time"),
        ([process(), host("a", owner="root"), END], "no count"),
        ([process(), {**host("a"), "host": 5}, END], "no text"),
        ([b'{"kind":"process","uptime":Infinity}\n'], "Infinity is no number"),
        ([b"[" * 100_000 + b"\n"], "no status socket"),
    ],
)
def test_what_is_no_status_socket_is_said_to_be_none(
    tmp_path: Path, lines: list[dict[str, Any] | bytes], says: str
) -> None:
    with service(tmp_path / "status", *lines) as path, pytest.raises(FatalError, match=says):
        read(path)


def test_who_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniproxy_status.reading._PATIENCE", 0.01)
    with listen_unix(tmp_path / "status"), pytest.raises(FatalError, match="nothing was said"):
        read(str(tmp_path / "status"))


def test_where_nobody_listens_it_is_said(tmp_path: Path) -> None:
    listen_unix(tmp_path / "stale").close()
    (tmp_path / "file").touch()
    for name, says in [
        ("stale", "Connection refused"),
        ("file", "it is no socket"),
        ("none", "No such file"),
        ("x" * 200, "too long"),
    ]:
        with pytest.raises(FatalError, match=says):
            read(str(tmp_path / name))


def test_who_drips_is_not_listened_to_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniproxy_status.reading._LONGEST", 0.0)
    lines = process(), b" " * 100
    with service(tmp_path / "status", *lines) as path, pytest.raises(FatalError, match="not ended"):
        read(path)


def test_who_says_too_much_is_not_heard_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniproxy_status.reading._MOST_BYTES", 1000)
    lines = process(), host("a" * 1000)
    with service(tmp_path / "status", *lines) as path, pytest.raises(FatalError, match="says more"):
        read(path)


@pytest.mark.parametrize("bound", ["_MOST_HOSTS", "_MOST_REASONS"])
def test_who_names_too_many_is_not_heard_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(f"sniproxy_status.reading.{bound}", 1)
    lines = process(), host("a.example"), host("b.example"), END
    with service(tmp_path / "status", *lines) as path, pytest.raises(FatalError, match="more than"):
        read(path)


def test_halves_of_characters_can_be_written(tmp_path: Path) -> None:
    report = told(tmp_path, process(), host("\udc80.example", last=[refusal(1.0, "\ud800")]))
    assert list(report.hosts) == ["\\udc80.example"]
    assert "".join(prometheus.show(report, "/run/\udcff")).encode()


def test_fifty_thousand_hosts_are_read(tmp_path: Path) -> None:
    hosts = [host(f"{number}.example") for number in range(50_000)]
    report = told(tmp_path, process(), *hosts)
    assert len(report.hosts) == 50_000


# How it is shown.


def test_a_table(tmp_path: Path) -> None:
    last = [refusal(40.0), refusal(90.0)]
    report = told(
        tmp_path,
        process(),
        host("quiet.example", open=0),
        host("busy.example", open=7, last=last),
    )
    lines = list(table.show(report, now=100.0, with_refusals=True))
    assert lines[0] == "sniproxy 1.0, process 100, up 1 min 0 s"
    assert lines[1] == "1 open, 5 served, 3 refused, 1000 B up, 4.9 KiB down"
    assert lines[2] == "refused: no_socket 2, no_such_host 1"
    assert lines[3] == "lookup: mean 333 us, half below 32 us, 99 % below 512 us"
    assert [line.split()[0] for line in lines[5:8]] == ["host", "busy.example", "quiet.example"]
    assert lines[6].endswith("no_socket, 10 s ago")
    assert lines[9:] == [
        "busy.example",
        "  1970-01-01T00:00:40Z  192.0.2.1:1  no_socket  why",
        "  1970-01-01T00:01:30Z  192.0.2.1:1  no_socket  why",
    ]


def test_those_who_were_handed_over(tmp_path: Path) -> None:
    report = told(
        tmp_path,
        process(1, handed_over=2),
        host("a.example", handed_over=2),
        process(2, handed_over=1),
        host("a.example", handed_over=1),
        host("b.example"),
    )
    lines = list(table.show(report, now=0, with_refusals=False, before=report))
    assert lines[1].startswith("2 open, 10 served (3 handed over), 6 refused, ")
    heading, a, b = lines[-3:]
    column = slice(*re.search("handed over", heading).span())  # type: ignore[union-attr]
    assert [line[column].strip() for line in (a, b)] == ["3", "0"]
    assert [line.split()[-1] for line in (a, b)] == ["0.0", "0.0"]
    found = families(report)
    [all_of_them] = found["sniproxy_connections_handed_over"].samples
    assert all_of_them.value == 3
    of_hosts = found["sniproxy_host_connections_handed_over"].samples
    assert {each.labels["host"]: each.value for each in of_hosts} == {
        "a.example": 3,
        "b.example": 0,
    }


def test_who_hands_over_says_so_before_the_first_one(tmp_path: Path) -> None:
    """A time series that begins late is a rise that nobody sees."""
    report = told(tmp_path, process(handed_over=0), host("a.example"))
    assert not any("handed" in line for line in table.show(report, now=0, with_refusals=False))
    found = families(report)
    assert [each.value for each in found["sniproxy_connections_handed_over"].samples] == [0]
    assert [each.value for each in found["sniproxy_host_connections_handed_over"].samples] == [0]


def test_who_hands_nothing_over_says_nothing_of_it(tmp_path: Path) -> None:
    report = told(tmp_path, process(), host("a.example"))
    shown = [*table.show(report, now=0, with_refusals=False), *prometheus.show(report, "/run/s")]
    assert not any("handed" in line for line in shown)


def test_who_hears_of_their_own_hosts_hears_of_those_handed_over(tmp_path: Path) -> None:
    report = told(tmp_path, process(sees="own"), host("a.example", handed_over=4))
    shown = "\n".join(table.show(report, now=0, with_refusals=False))
    assert re.search(r"handed over .*\na\.example .* 4$", shown)


def test_what_happens_in_a_second(tmp_path: Path) -> None:
    before = told(tmp_path, process(), host("a.example"))
    (tmp_path / "status").unlink()
    now = told(
        tmp_path,
        process(served=15, up=3000, down=6000),
        host("a.example", served=9),
        host("b.example"),
    )
    shown = "\n".join(table.show(now, now=0, with_refusals=False, before=before, seconds=2.0))
    assert "5.0 connections and 1.5 KiB in a second" in shown
    assert re.search(r"a\.example .* 2\.0$", shown, re.MULTILINE)
    assert re.search(r"b\.example .* 2\.5$", shown, re.MULTILINE)


def test_no_escape_sequence_reaches_a_terminal(tmp_path: Path) -> None:
    report = told(
        tmp_path,
        process(reasons={"\x1b[2J": 1}),
        host("\x1b]0;a\x07", last=[refusal(1.0, "\x1b[31m\u202e\n")]),
    )
    shown = "\n".join(table.show(report, now=0, with_refusals=True))
    assert "\x1b" not in shown
    assert "\\x1b]0;a\\x07" in shown
    assert "\\u202e" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59.9, "59 s"), (3599, "59 min 59 s"), (86399, "23 h 59 min"), (90000, "1 d 1 h")],
)
def test_seconds(seconds: float, shown: str) -> None:
    assert table.show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**62, "4096.0 PiB")],
)
def test_bytes(size: int, shown: str) -> None:
    assert table.show_bytes(size) == shown


def families(report: Report, most_hosts: int = 1000) -> dict[str, Any]:
    text = "".join(f"{line}\n" for line in prometheus.show(report, "/run/status", most_hosts))
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_prometheus_reads_it(tmp_path: Path) -> None:
    nasty = 'a"\\\n.example'
    report = told(
        tmp_path, process(), host(nasty, refused=4, reasons={"no_socket": 4}), host("b.example")
    )
    found = families(report)
    samples = {
        (sample.name, sample.labels.get("host"), sample.labels.get("reason")): sample.value
        for family in found.values()
        for sample in family.samples
    }
    assert samples["sniproxy_connections_refused_total", None, "no_socket"] == 2
    assert samples["sniproxy_host_connections_refused_total", nasty, "no_socket"] == 4
    assert samples["sniproxy_connections_open", None, None] == 1
    histogram = found["sniproxy_lookup_seconds"]
    assert histogram.type == "histogram"
    buckets = {
        sample.labels["le"]: sample.value
        for sample in histogram.samples
        if sample.name.endswith("_bucket")
    }
    assert buckets["6.4e-05"] == 2
    assert buckets["0.001024"] == buckets["+Inf"] == 3
    for family in found.values():
        for sample in family.samples:
            assert sample.labels["program"] == "sniproxy"
            assert sample.labels["socket"] == "/run/status"


def test_hosts_are_bounded_in_prometheus(tmp_path: Path) -> None:
    hosts = [host(f"{number}.example", served=number) for number in range(10)]
    found = families(told(tmp_path, process(), *hosts), 3)
    shown = {sample.labels["host"] for sample in found["sniproxy_host_connections_open"].samples}
    assert shown == {"7.example", "8.example", "9.example"}


def test_who_hears_of_their_own_hosts_alone_has_no_totals(tmp_path: Path) -> None:
    own = {
        key: process()[key] for key in ("kind", "program", "version", "pid", "worker", "uptime")
    } | {"sees": "own"}
    report = told(tmp_path, own, host("a.example"))
    assert report.total is None
    assert "sniproxy_connections_open" not in families(report)
    assert not any("served," in line for line in table.show(report, now=0, with_refusals=False))


def test_the_dashboard_asks_for_what_there_is(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    report = told(
        tmp_path,
        process(handed_over=0, seconds={
            kind: {"count": 1, "sum": 1, "buckets": {"5": 1}}
            for kind in ("lookup", "connect", "setup")
        }),
        host("a.example", refused=1, reasons={"no_socket": 1}),
    )  # fmt: skip
    names = {sample.name for family in families(report).values() for sample in family.samples}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert asked
    for expression in asked:
        for name in re.findall(r"sniproxy_\w+", expression):
            assert name in names, name


# The command.


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capfd.readouterr()


def test_hosts_that_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = process(), host("a.example", last=[refusal(1.0)]), host("b.example"), END
    with service(tmp_path / "status", *lines) as path:
        code, out, _ = run(capfd, path, "A.Example.")
    assert code == 0
    assert "b.example" not in out
    assert "1970-01-01T00:00:01Z" in out


def test_a_host_that_is_unknown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with service(tmp_path / "status", process(), host("a.example"), END) as path:
        code, out, _ = run(capfd, path, "\x1b.example")
    assert code == 0
    assert out.endswith("nothing is known of \\x1b.example\n")


def test_who_has_seen_enough_closes_the_pipe(tmp_path: Path) -> None:
    hosts = [host(f"{number}.example") for number in range(2000)]
    with service(tmp_path / "status", process(), *hosts, END) as path:
        piped = f"{sys.executable} -m sniproxy_status {path} | head -n 1; echo ${{PIPESTATUS[0]}}"
        shown = subprocess.run(
            ["bash", "-c", piped],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    assert shown.stderr == ""
    assert shown.stdout.splitlines()[1] == "0"


def test_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = process(), host("a.example", last=[refusal(1.0)]), END
    with service(tmp_path / "status", *lines) as path:
        code, out, _ = run(capfd, "--json", path)
    assert code == 0
    document = json.loads(out)
    assert document["total"]["served"] == 5
    [one] = document["hosts"]
    assert one["host"] == "a.example"
    assert one["last"] == [refusal(1.0)]
    assert document["seconds"]["lookup"]["buckets"] == {"3.2e-05": 2, "0.000512": 1}


def test_prometheus_on_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with service(tmp_path / "status", process(), host("a.example"), END) as path:
        code, out, _ = run(capfd, "--prometheus", "--most-hosts", "0", path)
    assert code == 0
    assert "sniproxy_connections_served_total" in out
    assert "a.example" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the PATH of a status socket is missing"),
        (["--json", "--watch", "/x"], "not allowed with"),
        (["--colour", "/x"], "--colour"),
        (["--most-hosts", "-1", "/x"], "'-1'"),
        (["--watch", "/x"], "standard output is no terminal"),
    ],
)
def test_who_calls_it_wrongly_hears_how(
    capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code, out, error = run(capfd, *arguments)
    assert (code, out) == (100, "")
    assert says in error
    assert error.startswith("sniproxy-status: fatal: ")


def test_what_can_t_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capfd, str(tmp_path / "none"))
    assert (code, out) == (111, "")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(capfd: pytest.CaptureFixture[str], option: str) -> None:
    code, out, error = run(capfd, option)
    assert (code, error) == (0, "")
    assert "sniproxy-status" in out


def test_watching_goes_on_while_the_service_is_away(tmp_path: Path) -> None:
    path = tmp_path / "status"
    main_end, terminal = pty.openpty()
    program = [sys.executable, "-m", "sniproxy_status", "--watch", str(path)]
    watching = subprocess.Popen(program, stdout=terminal, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    seen = b""
    try:
        while b"trying again" not in seen:
            seen += os.read(main_end, 1 << 16)
        with service(path, process(), host("a.example"), END):
            while b"a.example" not in seen:
                seen += os.read(main_end, 1 << 16)
        watching.send_signal(2)
        assert watching.wait(10) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(main_end)
    assert b"Traceback" not in seen
