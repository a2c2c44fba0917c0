"""The status socket: a process tells whoever connects what it has counted, as far as they may know.

There is nothing to be asked: who connects is told lines of JSON, and then the end. Root and the
user that we are hear everything. Others hear of the hosts that belong to them, and not even how
many others there are. Who connects the kernel says: SO_PEERCRED, unix(7).

Among several processes, the one that has accepted tells what it has counted, and passes the
connection on to the next; the last one says the end. So they need no one who adds up, and whoever
reads does that.
"""

import array
import json
import os
import socket as std
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import trio

from sniproxy import __version__
from sniproxy.service import peer
from sniproxy.service.bind import listen_anywhere
from sniproxy.service.figures import Figures, HostFigures
from sniproxy.service.notify import Counts

# What a user stands for who has no number in this user namespace, user_namespaces(7): many may, so
# none of them owns anything. This is what the kernel has unless somebody changes it.
_OVERFLOW_UID: Final = 65534

# Hosts that are told of before connections have their turn: about a millisecond.
_TOLD_AT_ONCE: Final = 100

# As many times as long as it takes to tell something, we do something else: whoever asks without
# end has a fifth of a processor at the most.
_REST: Final = 4

# Who ask at a time, of one user, and of all those who hear of their own hosts alone: they are not
# to keep the administrator out. And seconds that each may go without reading.
_MOST_OF_USER: Final = 4
_MOST_OTHERS: Final = 16
_PATIENCE: Final = 10.0

# What is passed along with the connection.
_PASSED: Final = struct.Struct("iI")  # how many processes have yet to speak, and the asking uid


class Telling(Protocol):
    """What there is to be told of, beside what is counted."""

    def counts(self) -> Counts:
        """Return how many connections there are, and were."""

    def moved(self) -> Iterator[tuple[HostFigures, int, int]]:
        """Yield the figures of each open connection's host, and its bytes there and back so far."""


class _Asking(NamedTuple):
    """Somebody who has connected.

    Attributes:
        uid: Who it is.
        left: Processes that have yet to speak, with this one.
    """

    sock: std.socket
    uid: int
    left: int


# Tells somebody what they may hear.
_Tell = Callable[[_Asking], Awaitable[None]]


class StatusSocket:
    """The status socket of a program, in whichever of its processes.

    Args:
        path: where it is to be.
        program: the name of the program.
        kinds: what is timed.
        workers: how many processes serve.
        listening: the socket, if there is one already.

    Attributes:
        path: As above.
        figures: What this process has counted.

    Raises:
        FatalError: it can't be made.
    """

    def __init__(
        self,
        path: str,
        program: str,
        kinds: tuple[str, ...],
        workers: int,
        listening: std.socket | None = None,
    ) -> None:
        self._listening = listening or listen_anywhere(path)
        self._listening.setblocking(False)
        self.path = path
        self.figures = Figures(kinds)
        self._program = program
        self._accepting: trio.CancelScope | None = None
        # By which each process is passed those who ask; all hold both ends, so whoever takes the
        # place of a process that has died gets what that has not taken.
        self._ways = [_pair() for _ in range(workers)] if workers > 1 else []
        self._user = os.geteuid()
        self._asking: dict[int, int] = {}  # uid: how many
        # Of whoever makes work, and rests; those who hear all do not wait for the others.
        self._turns = {False: trio.Lock(), True: trio.Lock()}

    def fileno(self) -> int:
        """Return the descriptor of the listening socket."""
        return self._listening.fileno()

    def close(self) -> None:
        """Stop listening, so that another copy can; whoever is being told is told the rest."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._listening.close()

    def end(self) -> None:
        """Close all that there is."""
        self._listening.close()
        for way in self._ways:
            for end in way:
                end.close()

    async def run(
        self, telling: Telling, on_fault: Callable[[Exception], None], worker: int | None
    ) -> None:
        """Tell, until cancelled, whoever connects.

        Args:
            telling: what there is to be told of.
            on_fault: called with every exception that nobody expected.
            worker: the number of this process among several.
        """
        self._user = os.geteuid()  # whom we have become
        tell = partial(self._tell, telling, on_fault, worker)
        async with trio.open_nursery() as nursery:
            if worker is not None and self._ways:
                nursery.start_soon(self._take, nursery, tell, worker)
            with trio.CancelScope() as self._accepting:
                await self._accept(nursery, tell)

    async def _accept(self, nursery: trio.Nursery, tell: _Tell) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._listening)
                began = time.perf_counter()
                sock, _ = self._listening.accept()
            except BlockingIOError:
                continue  # another process was quicker
            except OSError:
                await trio.sleep(1)  # no descriptors are left; it may be better then
                continue
            sock.setblocking(False)
            _, uid, _ = peer.credentials(sock)
            self._begin(nursery, tell, _Asking(sock, uid, max(1, len(self._ways))))
            await trio.sleep(_REST * (time.perf_counter() - began))

    async def _take(self, nursery: trio.Nursery, tell: _Tell, worker: int) -> None:
        """Tell those whom other processes pass on."""
        way = self._ways[worker - 1][0]
        while True:
            await trio.lowlevel.wait_readable(way)
            try:
                data, fds, _, _ = std.recv_fds(way, _PASSED.size, 1)
            except OSError:
                await trio.sleep(1)
                continue
            if fds:  # else no descriptor was left for it
                left, uid = _PASSED.unpack(data)
                self._begin(nursery, tell, _Asking(std.socket(fileno=fds[0]), uid, left))

    def _begin(self, nursery: trio.Nursery, tell: _Tell, asking: _Asking) -> None:
        same = self._asking.get(asking.uid, 0)
        others = sum(many for uid, many in self._asking.items() if not self._sees_all(uid))
        is_full = others >= _MOST_OTHERS and not self._sees_all(asking.uid)
        if same >= _MOST_OF_USER or is_full:
            asking.sock.close()
            return
        self._asking[asking.uid] = same + 1
        nursery.start_soon(tell, asking)

    async def _tell(
        self,
        telling: Telling,
        on_fault: Callable[[Exception], None],
        worker: int | None,
        asking: _Asking,
    ) -> None:
        try:
            await self._tell_all(asking, telling, worker)
            if asking.left > 1:
                assert worker is not None
                self._pass_on(asking, worker)
            else:
                await _send(asking.sock, [{"kind": "end"}])
        except (OSError, trio.TooSlowError):
            pass  # it has gone; or the next process takes nothing: the reader sees no end
        except Exception as error:  # noqa: BLE001 - connections are not to suffer from it
            on_fault(error)
        finally:
            asking.sock.close()
            self._asking[asking.uid] -= 1
            if not self._asking[asking.uid]:
                del self._asking[asking.uid]

    async def _tell_all(self, asking: _Asking, telling: Telling, worker: int | None) -> None:
        """Tell what the user may hear."""
        turn = self._turns[self._sees_all(asking.uid)]
        async with turn:
            began = time.perf_counter()
            shown, hosts, moved = self._look(asking.uid, telling, worker)
            await trio.sleep(_REST * (time.perf_counter() - began))
        await _send(asking.sock, [shown])
        for first in range(0, len(hosts), _TOLD_AT_ONCE):
            async with turn:
                began = time.perf_counter()
                batch = hosts[first : first + _TOLD_AT_ONCE]
                data = _encode([_show_host(each, moved.get(each)) for each in batch])
                await trio.sleep(_REST * (time.perf_counter() - began))
            await _send_bytes(asking.sock, data)

    def _sees_all(self, uid: int) -> bool:
        # Not even the user that we are, if many look like that one.
        return uid in (0, self._user) and uid != _OVERFLOW_UID

    def _look(
        self, uid: int, telling: Telling, worker: int | None
    ) -> tuple[dict[str, Any], list[HostFigures], dict[HostFigures, tuple[int, int]]]:
        """Return what a user may hear of the process, and of which hosts, with bytes of these.

        The bytes are those of hosts that have open connections.
        """
        sees_all = self._sees_all(uid)
        # Whoever stands for many owns nothing.
        owner = None if uid == _OVERFLOW_UID else uid
        # In one step, so that no byte is told of twice, or missed, and no figure ever falls.
        up, down = self.figures.moved()
        moved: dict[HostFigures, tuple[int, int]] = {}
        for each, more_up, more_down in telling.moved():
            up += more_up
            down += more_down
            if sees_all or each.owner == owner:
                so_far = moved.get(each) or (each.up, each.down)
                moved[each] = so_far[0] + more_up, so_far[1] + more_down
        shown: dict[str, Any] = {
            "kind": "process",
            "program": self._program,
            "version": __version__,
            "pid": os.getpid(),
            "worker": worker,
            "user": self._user,
            "sees": "all" if sees_all else "own",
            "uptime": round(self.figures.uptime(), 3),
        }
        if sees_all:
            shown |= asdict(telling.counts()) | {"up": up, "down": down} | self.figures.show()
        hosts = [
            each
            for each in self.figures.hosts.values()
            if sees_all or (each.owner == owner and owner is not None)
        ]
        return shown, hosts, moved

    def _pass_on(self, asking: _Asking, worker: int) -> None:
        """Have the next process tell the rest.

        Raises:
            OSError: it takes nothing.
        """
        way = self._ways[worker % len(self._ways)][1]
        data = _PASSED.pack(asking.left - 1, asking.uid)
        ancillary = (std.SOL_SOCKET, std.SCM_RIGHTS, array.array("i", [asking.sock.fileno()]))
        way.sendmsg([data], [ancillary])


def _show_host(figures: HostFigures, moved: tuple[int, int] | None) -> dict[str, Any]:
    up, down = moved or (figures.up, figures.down)
    shown: dict[str, Any] = {
        "kind": "host",
        "host": figures.host,
        "owner": figures.owner,
        "open": figures.served - figures.ended,
        "served": figures.served,
        "refused": figures.refused,
        "up": up,
        "down": down,
        "reasons": figures.reasons or {},
        "last": [each._asdict() for each in figures.last or ()],
    }
    if figures.handed_over:  # most programs hand nothing over
        shown["handed_over"] = figures.handed_over
    return shown


def _encode(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


async def _send(sock: std.socket, lines: list[dict[str, Any]]) -> None:
    await _send_bytes(sock, _encode(lines))


async def _send_bytes(sock: std.socket, data: bytes) -> None:
    """Send all of it.

    Raises:
        OSError: nobody listens any more.
        TooSlowError: somebody does not read.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left, std.MSG_NOSIGNAL) :]
        except BlockingIOError:
            with trio.fail_after(_PATIENCE):
                await trio.lowlevel.wait_writable(sock)


def _pair() -> tuple[std.socket, std.socket]:
    """Return two ends of a way for messages; neither waits."""
    return std.socketpair(std.AF_UNIX, std.SOCK_SEQPACKET | std.SOCK_NONBLOCK)
