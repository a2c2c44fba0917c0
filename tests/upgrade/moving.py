"""Connections that go from one copy of the daemon's heart to another, as in an upgrade."""

import os
import socket
from typing import Any

from sniproxy.session import Sessions
from sniproxy.upgrade.letters import BATCH, Way, read_memory, write_memory
from sniproxy.upgrade.portable import Parcel, Portable, Revived, revive, suspend_each


class Batch:
    """All connections of a copy, which stand still from now on."""

    def __init__(self, sessions: Sessions) -> None:
        self._portables: list[Portable] = []
        parcel = Parcel()
        self.records: list[dict[str, Any]] = []
        for each in suspend_each(sessions):
            self._portables.append(each)
            self.records.append(each.describe(parcel))
        memory = write_memory(self.records, parcel.blob)
        one, other = map(Way, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        one.send(BATCH, [memory, *parcel.fds])
        os.close(memory)
        self._message = other.receive()
        one.close()
        other.close()

    def let_go(self) -> None:
        """Close what the other copy has."""
        for each in self._portables:
            each.close()

    def resume(self) -> None:
        """Go on with all of it, in the same copy."""
        self._message.close()
        for each in self._portables:
            each.resume()

    def revive(self, sessions: Sessions) -> list[Revived]:
        """Go on with all of it in another copy; return those."""
        memory, *fds = self._message.fds
        records, blob = read_memory(memory)
        revived = [revive(sessions, record, fds, blob) for record in records]
        for each in revived:
            sessions.limit.add()
            each.begin()
        return revived
