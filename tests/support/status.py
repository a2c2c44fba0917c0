"""A reader of the status socket that shares nothing with `sniproxy-status`."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from tests.support.daemon import PATIENCE

Line = dict[str, Any]


def read_status(path: Path, uid: int | None = None) -> list[Line]:
    """Return the lines that a user is told, without the last one, which says the end.

    Args:
        path: where the socket is.
        uid: who asks; None for whoever runs the tests. Only root can be somebody else.
    """
    with connect_as(path, uid) as client:
        told = b"".join(iter(lambda: client.recv(1 << 16), b""))
    *lines, end = map(json.loads, told.splitlines())
    assert end == {"kind": "end"}
    return lines


def connect_as(path: Path, uid: int | None = None) -> socket.socket:
    """Connect to a Unix socket as a user: SO_PEERCRED is about who called connect(2)."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    before = os.geteuid()
    if uid is not None:
        os.seteuid(uid)
    try:
        client.connect(str(path))
    finally:
        os.seteuid(before)
    return client


def processes(lines: list[Line]) -> list[Line]:
    """Return the lines of processes."""
    return [line for line in lines if line["kind"] == "process"]


def hosts_in(lines: list[Line]) -> dict[str, Line]:
    """Return what is told of each host, all processes together."""
    found: dict[str, Line] = {}
    for line in lines:
        if line["kind"] != "host":
            continue
        if (before := found.setdefault(line["host"], line)) is not line:
            for key in "open", "served", "refused", "up", "down":
                before[key] += line[key]
            for reason, count in line["reasons"].items():
                before["reasons"][reason] = before["reasons"].get(reason, 0) + count
            before["last"] = sorted(before["last"] + line["last"], key=lambda each: each["time"])
    return found


def total(lines: list[Line], key: str) -> int:
    """Return a figure of all processes together."""
    return sum(line[key] for line in processes(lines))
