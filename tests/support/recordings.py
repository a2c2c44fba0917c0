"""The corpus in `tests/flights/`: what real clients sent first, and what is known of each.

Law: imports nothing of `sniproxy`. How far a hello reaches is found out here with two length
fields and no judgement, for a recording is a fact: it is the parser that must cope with it.
"""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.support import hellos

FOLDER = Path(__file__).parent.parent / "flights"
_INDEX = "index.toml"

_PREAMBLE = """\
# First flights of real clients. Each table is a file, NAME.bin: the bytes as they came, nothing
# left out. It is written by tests/support/recorder.py; there it says what {name}, {port},
# {scratch} and {clients} stand for, and what came before a second connection.
"""


@dataclass(frozen=True)
class Recording:
    """A first flight.

    Attributes:
        label: The file's name without its suffix.
        client: Who sent it: program, version, TLS library.
        command: How it was called, with the recorder's placeholders.
        server_name: What it asked for, spelt as on the wire.
        recorded: When.
        connection: Which connection of the command this is, counted from 1; before the others of
            it, if any, a server had given out tickets.
        flight: The bytes.
    """

    label: str
    client: str
    command: tuple[str, ...]
    server_name: str
    recorded: date
    connection: int
    flight: bytes

    @cached_property
    def message(self) -> bytes:
        """The handshake message, without record headers."""
        hello = split_flight(self.flight)
        assert hello is not None, f"{self.label} ends inside the hello"
        return hello[0]

    @cached_property
    def rest(self) -> bytes:
        """What came after it: ChangeCipherSpec and early data, or, most often, nothing."""
        hello = split_flight(self.flight)
        assert hello is not None
        return hello[1]

    def in_records_of(self, size: int) -> bytes:
        """The flight as a client would send it that made its records so small."""
        return hellos.records(self.message, [size]) + self.rest


def split_flight(stream: bytes) -> tuple[bytes, bytes] | None:
    """Return the first handshake message, and what follows its last record; None: not there yet."""
    message = b""
    at = 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        end = at + 5 + int.from_bytes(stream[at + 3 : at + 5], "big")
        if len(stream) < max(end, at + 5):
            return None
        message += stream[at + 5 : end]
        at = end
    return message, stream[at:]


def load(folder: Path = FOLDER) -> list[Recording]:
    """Return the corpus, sorted by label."""
    index: dict[str, dict[str, Any]] = {}
    if (path := folder / _INDEX).exists():
        index = tomllib.loads(path.read_text())
    return [
        Recording(
            label=label,
            client=entry["client"],
            command=tuple(entry["command"]),
            server_name=entry["server_name"],
            recorded=entry["recorded"],
            connection=entry.get("connection", 1),
            flight=(folder / f"{label}.bin").read_bytes(),
        )
        for label, entry in sorted(index.items())
    ]


def save(recording: Recording, folder: Path = FOLDER) -> None:
    """Add a recording to the corpus, or put it in the place of the one with its label."""
    corpus = {known.label: known for known in load(folder)}
    corpus[recording.label] = recording
    (folder / f"{recording.label}.bin").write_bytes(recording.flight)
    (folder / _INDEX).write_text(_index_of(corpus[label] for label in sorted(corpus)))


def _index_of(corpus: Iterable[Recording]) -> str:
    tables = [_PREAMBLE]
    for recording in corpus:
        lines = [
            f"[{recording.label}]",
            f"client = {_string(recording.client)}",
            f"command = [{', '.join(map(_string, recording.command))}]",
            f"server_name = {_string(recording.server_name)}",
            f"recorded = {recording.recorded.isoformat()}",
        ]
        if recording.connection != 1:
            lines.append(f"connection = {recording.connection}")
        tables.append("\n".join([*lines, ""]))
    return "\n".join(tables)


def _string(text: str) -> str:
    """The string in TOML, the way that is easier to read: with no escapes if possible."""
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False)  # is TOML, too
