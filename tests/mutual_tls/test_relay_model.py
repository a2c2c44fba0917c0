"""The TLS relay against the model of the plain one: whatever two peers do, in whatever order.

The client is the TLS peer. Its end is a close_notify; where it goes away without one, or resets,
the backend has to see a reset.
"""

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from mutual_tls.end import TLSEnd
from mutual_tls.relay import TLSRelay
from tests.engine.test_relay_model import Peers, Running
from tests.support.daemon import PATIENCE
from tests.support.sockets import plain, reset, tcp_pair
from tests.support.story import TrioStory
from tests.support.strategies import steady
from tests.support.tls import NAME, context

_VERSIONS = st.sampled_from([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


class RunningTLS(Running):
    """The TLS relay in a thread of its own."""

    def make_relay(self) -> TLSRelay:  # type: ignore[override]
        return TLSRelay(self.loop, self.faults.append)


class TLSSocket:
    """The TLS peer, with the methods of a socket that the model uses."""

    def __init__(self, sock: socket.socket, version: ssl.TLSVersion, *, is_server: bool) -> None:
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._unsent = self._read_ahead = b""
        self._timeout: float | None = None
        self._ssl = context(version, server_side=is_server).wrap_bio(
            self._incoming, self._outgoing, is_server, None if is_server else NAME
        )
        sock.setblocking(False)

    def shake_hands(self) -> None:
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                self._wait(PATIENCE)
            else:
                return self._flush()

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def setsockopt(self, level: int, option: int, value: bytes | int) -> None:
        self._socket.setsockopt(level, option, value)

    def send(self, data: bytes) -> int:
        """Take all or nothing: nothing while some of what was taken before has not gone."""
        self._flush()
        if self._unsent:
            raise BlockingIOError
        taken = self._ssl.write(data) if data else 0
        self._flush()
        return taken

    def recv(self, size: int) -> bytes:
        if self._read_ahead:
            data, self._read_ahead = self._read_ahead[:size], self._read_ahead[size:]
            return data
        while True:
            try:
                return self._ssl.read(size)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                self._wait(self._timeout)

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        # unwrap() reads, too, and a record of data is fatal to it.
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := self._ssl.read(1 << 14):
                self._read_ahead += data
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            self._ssl.unwrap()
        self._flush()

    def close(self) -> None:
        self._socket.close()

    def send_rest_until_readable(self, other: socket.socket) -> None:
        """Send what was taken and has not gone, until the other socket has something to say."""
        self._flush()
        while self._unsent:
            readable, _, _ = select.select([other], [self._socket], [], PATIENCE)
            if readable:
                return
            self._flush()

    def _flush(self) -> None:
        self._unsent += self._outgoing.read()
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass

    def _wait(self, seconds: float | None) -> None:
        """Receive something, and send what can be sent meanwhile."""
        while True:
            self._flush()
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                if not seconds:
                    raise
                writing = [self._socket] if self._unsent else []
                found = select.select([self._socket], writing, [], seconds)
                assert any(found), "nothing came"
                continue
            if not data:  # without a close_notify: broken off
                raise ConnectionResetError
            self._incoming.write(data)
            return


class TLSPeers(Peers):
    """A TLS client, and a backend, with the relay between them."""

    running: Running

    @initialize(small=st.booleans(), version=_VERSIONS, is_server=st.booleans())
    def connect(self, small: bool, version: ssl.TLSVersion, is_server: bool) -> None:
        outside, near = tcp_pair()
        backend, far = tcp_pair()
        if small:
            for sock in (outside, near, backend, far):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        near.setblocking(False)
        far.setblocking(False)
        client = TLSSocket(outside, version, is_server=is_server)
        self.ends = {"client": client, "backend": backend}  # type: ignore[dict-item]
        self.sent = dict.fromkeys(self.ends, 0)
        self.received = dict.fromkeys(self.ends, 0)
        self.has_ended = dict.fromkeys(self.ends, False)
        self.is_broken = False
        self.given = plain(near), plain(far)
        shaking = threading.Thread(target=client.shake_hands)
        shaking.start()
        token = self.running._token
        trio.from_thread.run(self.carry, version, not is_server, trio_token=token)
        shaking.join(PATIENCE)

    async def carry(self, version: ssl.TLSVersion, server_side: bool) -> None:
        """Do the handshake, and join the two."""
        running = self.running
        end = TLSEnd(
            TrioStory(running.loop),
            self.given[0],
            context(version, server_side=server_side),
            server_side=server_side,
            server_name=None if server_side else NAME,
        )
        await end.shake_hands()
        running.limit.add()
        relay: TLSRelay = running.relay  # type: ignore[assignment]
        relay.join(self.given[1], end, lambda *_: running.limit.remove())

    def take(self, side: str, size: int = 1 << 20) -> bool:
        client: object = self.ends.get("client")
        if side == "backend" and isinstance(client, TLSSocket):
            client.send_rest_until_readable(self.ends[side])
        return super().take(side, size)

    def go_away(self, side: str) -> None:
        end: object = self.ends[side]
        reset(end._socket if isinstance(end, TLSSocket) else self.ends[side])


@pytest.fixture
def _running() -> Iterator[None]:
    TLSPeers.running = RunningTLS()
    yield
    TLSPeers.running.close()


@pytest.mark.usefixtures("_running")
def test_whatever_the_peers_do_nothing_is_lost_and_nothing_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    run_state_machine_as_test(
        TLSPeers, settings=settings(steady, max_examples=60, stateful_step_count=25)
    )
    assert len(os.listdir("/proc/self/fd")) <= before
