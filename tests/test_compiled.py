"""The compiled build: that it is what runs where it is meant to run, and reads what the sources do.

All other tests are run on both builds, by scripts/test; those that ask what a program does can't
tell one from the other.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy import wire
from tests.support import hellos, strategies
from tests.support.build import MEANT, ROOMS, ROOT, build_of, import_sources, module_name, traps
from tests.support.daemon import start_daemon
from tests.support.recordings import load

needs_both = pytest.mark.skipif(
    MEANT != "compiled", reason="the sources are tested, and there is nothing to compare them with"
)


def test_what_is_meant_is_tested() -> None:
    assert {room: build_of(module_name(room)) for room in ROOMS} == dict.fromkeys(ROOMS, MEANT)


def test_the_daemon_is_of_the_build_that_is_tested(hosts: Path) -> None:
    with start_daemon(hosts) as daemon:
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert ("/sniproxy/session.cpython-" in maps) == (MEANT == "compiled")


def test_a_program_that_serves_says_which_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sniproxy", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(f" ({MEANT})\n")


def test_nothing_compiled_is_left_in_the_sources() -> None:
    found = [path for room in ROOMS for path in (ROOT / room).parent.glob("*.so")]
    assert bool(found) == (MEANT == "compiled")


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_uses_what_would_be_compiled_into_something_else(room: str) -> None:
    assert traps((ROOT / room).read_text()) == []


def test_traps_are_found() -> None:
    source = """
class Some:
    __slots__ = ("one",)
    expire = abort
    one = Some.__new__(Some)
    def look(self):
        try:
            pass
        except KeyError as error:
            pass
        except (OSError, ValueError) as error:
            pass
        except OSError as other:
            pass
class Word(StrEnum):
    ONE = "one"
"""
    assert traps(source) == [
        "Some: expire is set in the class",
        "Some: one is set in the class",
        "look: `error` is (OSError, ValueError) and KeyError",
        "`Some.__new__` runs __init__, too",
    ]


# --- The same of every hello

Verdict = tuple[object, ...]


def read(streams: list[bytes], reader: type[wire.HelloReader], errors: type[Exception]) -> Verdict:
    """Return all that a reader says of a stream that comes in pieces."""
    one = reader()
    said: list[object] = []
    try:
        for stream in streams:
            hello = one.feed(stream)
            said += [one.size, one.missing]
            if hello is not None:
                attributes = hello.server_name, hello.protocol_name_list, hello.versions
                said += [*attributes, hello.alpn_protocols, hello.offers_tls13]
                said.append(hello.required_server_name())
                break
    except errors as error:
        said += [repr(error), str(error), *map(repr, error.args)]
    return (*said, one.size, one.missing)


def check_same(*streams: bytes) -> None:
    sources = import_sources("sniproxy.wire")
    pieces = list(streams)
    compiled = read(pieces, wire.HelloReader, wire.HelloError)
    assert compiled == read(pieces, sources.HelloReader, sources.HelloError)


@needs_both
def test_the_sources_are_beside() -> None:
    sources = import_sources("sniproxy.wire")
    assert sources.hello.__file__ == str(ROOT / "sniproxy" / "wire" / "hello.py")
    assert wire.hello.__file__.endswith(".so")


@needs_both
def test_of_real_clients() -> None:
    for recording in load():
        stream = recording.flight
        check_same(stream)
        for size in 1, 7, 1000:
            check_same(*hellos.cut(stream, [size]))
        for end in range(0, len(stream), 13):
            check_same(stream[:end])
        for position in range(0, min(len(stream), 600), 3):
            spoilt = bytearray(stream)
            spoilt[position] ^= 0xFF
            check_same(bytes(spoilt))


@needs_both
@strategies.steady
@given(st.data())
def test_of_those_made_up(data: st.DataObject) -> None:
    stream = data.draw(strategies.streams())
    check_same(stream)
    spoilt = data.draw(strategies.mutations(stream))
    check_same(spoilt)
    check_same(*hellos.cut(spoilt, data.draw(strategies.sizes)))


@needs_both
def test_of_what_the_fuzzer_has_found() -> None:
    for path in sorted((ROOT / "fuzz" / "corpus" / "hello").iterdir()):
        stream = path.read_bytes()
        check_same(stream)
        check_same(*hellos.cut(stream, [3]))


def test_where_nothing_compiles_that_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    done = subprocess.run(
        [*command, "--directory", tmp_path],
        cwd=ROOT,
        env=os.environ | {"SNIPROXY_COMPILE": "1", "CC": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "unable to compile:" in done.stderr
    assert not list(tmp_path.iterdir())
    # As before: what was tried was tried elsewhere.
    test_nothing_compiled_is_left_in_the_sources()
