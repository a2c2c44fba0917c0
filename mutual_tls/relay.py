"""Pairs of a plain socket and a TLS connection, and the bytes that move between them, in the loop.

The laws:

- What one peer sends reaches the other unchanged, or the other sees a reset.
- The end of what one peer says becomes the end of what the other hears, after all bytes before it:
  a TCP end on the plain side, a close_notify on the TLS side. The opposite direction lives on.
- A TCP end without a close_notify is no end (RFC 8446 §6.1: "any data received after a closure
  alert has been received MUST be ignored", and without one it may have been cut off): the plain
  peer sees a reset.
- All that was received is decrypted in the same turn, whatever the plain end takes. To end our
  half, `unwrap`, reads too, and for that a whole record of data is fatal.
- Nothing is received while plaintext waits for the plain end, and nothing is read from the plain
  end while ciphertext waits for the TLS socket. So back-pressure reaches the senders, and a
  connection holds one buffer for each direction at the most; when nothing is under way, none.
- Every call may leave ciphertext to be sent: the answer to a KeyUpdate, the alert of a failure.

Both sockets are watched edge-triggered, EPOLLOUT from the start: an event says only that something
has changed.
"""

import ssl
from _socket import AF_UNIX, MSG_DONTWAIT, SHUT_WR, SO_LINGER, SOL_SOCKET, socket
from collections.abc import Callable, Iterator
from enum import StrEnum
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import Final

import trio

from mutual_tls.end import TLSEnd
from sniproxy.engine import tcp
from sniproxy.engine.linger import LastWords, Moved
from sniproxy.engine.loop import EventLoop
from sniproxy.engine.sweep import Sweep, Swept
from sniproxy.engine.tcp import LINGER_0

_EVENTS: Final = EPOLLIN | EPOLLRDHUP | EPOLLOUT | EPOLLET

# The most that one SSL_read returns: a record, RFC 8446 §5.1.
_RECORD: Final = 1 << 14

# Bytes that a system call moves: eight records. With half of it, bulk took a tenth more.
_CHUNK: Final = 1 << 17

# Bytes that pass a BIO at a time: one record. It keeps for ever a third more than it has once held;
# with two records a connection that was busy kept 78 KB, and not 33, and bulk was no faster.
_SLICE: Final = 1 << 14

# Bytes that a direction may move before the others have their turn: less than a millisecond.
_TURN: Final = 1 << 19

# Bytes received at a time, and in a turn, from a peer that sends more of other things than data.
# KeyUpdates take a hundred times as long as data does: with eight records in a call, and more of
# them in a turn, everybody else waited for half a second.
_LITTLE: Final = 1 << 14

# Bytes of answers to a peer that takes none and goes on asking for new keys: two thousand answers.
_MOST_ANSWERS: Final = 1 << 16

_WantRead, _ZeroReturn, _SSLError = ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLError


class Ending(StrEnum):
    """How a connection ended."""

    FINISHED = "finished"  # both ends had said all they had to say
    PLAIN_RESET = "plain_reset"  # the plain end broke it off
    TLS_RESET = "tls_reset"  # the TLS peer broke off its TCP connection
    TRUNCATED = "truncated"  # it ended that without a close_notify
    TLS_FAILED = "tls_failed"  # what it sent was no TLS, or was an alert
    IDLE = "idle"  # nothing was moved for too long
    HALF_CLOSED = "half_closed"  # one end had ended, and nothing was moved for too long
    CUT = "cut"  # by us


# To find a member of an Enum, Python 3.11 runs a function written in Python. Once is enough.
_FINISHED, _PLAIN_RESET, _TLS_RESET = Ending.FINISHED, Ending.PLAIN_RESET, Ending.TLS_RESET
_TRUNCATED, _TLS_FAILED, _CUT = Ending.TRUNCATED, Ending.TLS_FAILED, Ending.CUT

# Called when a connection has ended: plain bytes that went into TLS, those that came out of it, and
# how it ended.
OnEnd = Callable[[int, int, Ending], None]


class TLSRelay:
    """All connections of a process that are relayed between a plain and a TLS end.

    Args:
        on_fault: called with every exception that nobody expected.
        idle_seconds: after so many seconds without a byte a connection is reset; 0 is never.
        half_closed_seconds: the same for a connection one of whose directions has ended.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_fault: Callable[[Exception], None],
        idle_seconds: float = 0.0,
        half_closed_seconds: float = 0.0,
    ) -> None:
        self.loop = loop
        self.cipher = memoryview(bytearray(_CHUNK))
        # A record begun earlier may come on top, and there must be room for one more read.
        self.plain = memoryview(bytearray(_CHUNK + 2 * _RECORD))
        # TLS peers that have had an alert, or the last words of a plain end that reads no more.
        self.last_words = LastWords(loop, on_fault, half_closed_seconds)
        self.sweep = Sweep(loop, on_fault, idle_seconds, half_closed_seconds)

    def join(
        self, plain: socket, end: TLSEnd, on_end: OnEnd, to_plain: bytes = b"", to_tls: bytes = b""
    ) -> None:
        """Relay until both directions have ended.

        The sockets belong to the relay from now on, whatever happens.

        Args:
            plain: a connected stream socket; nobody else watches it from now on.
            end: whose handshake is over; the same holds for its socket.
            on_end: called once, when both sockets have been given up.
            to_plain: what the TLS peer has said already, and was decrypted.
            to_tls: what the plain peer has said already.

        Raises:
            OSError: the kernel can't watch them (ENOMEM, ENOSPC); both are reset.
        """
        pair = _Pair(self, plain, end, on_end)
        try:
            pair.start(to_plain, to_tls)
        except BaseException:
            pair.abort()
            raise

    async def run(self) -> None:
        """End connections on which nothing moves for too long, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.last_words.run)
            nursery.start_soon(self.sweep.run)

    def moved(self) -> Iterator[Moved]:
        """Yield what each connection has moved so far: its `on_end`, and bytes there and back."""
        for watcher in self.loop.watchers():
            if isinstance(watcher, _Pair) and watcher.ssl is not None:
                yield watcher.on_end, watcher.up, watcher.down
        yield from self.last_words.moved()

    def abort_all(self) -> None:
        """Reset every connection."""
        for watcher in self.loop.watchers():
            if isinstance(watcher, _Pair):
                watcher.abort()
        self.last_words.abort_all()


class _PlainEnd:
    """Watches the plain socket of a pair."""

    __slots__ = ("pair",)

    def __init__(self, pair: "_Pair") -> None:
        self.pair: _Pair | None = pair  # None once it is over

    def on_event(self, events: int) -> None:
        """React to what happened to the plain socket; 0 is another turn."""
        pair = self.pair
        if pair is None:
            return
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            pair.plain_ending = True
            if events & EPOLLERR and (pair.up_ended or pair.unsent is not None):
                # No read will bring the error up soon.
                return pair.abort(_PLAIN_RESET)
        if events & EPOLLOUT and pair.received is not None:
            pair.pump_down()
        if events == EPOLLOUT or pair.ssl is None:
            return
        if not pair.up_ended and pair.unsent is None:
            pair.pump_up()

    def abort(self) -> None:
        """Reset both peers."""
        if self.pair is not None:
            self.pair.abort()


class _Pair(Swept):
    """One connection; watches the TLS socket. Up is from plain to TLS, down from TLS to plain."""

    __slots__ = (
        "close_notify",
        "discards",
        "down",
        "down_ended",
        "helping",
        "incoming",
        "on_end",
        "outgoing",
        "plain",
        "plain_end",
        "plain_ending",
        "quiet",
        "received",
        "relay",
        "ssl",
        "swept",
        "tls",
        "tls_ending",
        "unsent",
        "up",
        "up_ended",
    )

    def __init__(self, relay: TLSRelay, plain: socket, end: TLSEnd, on_end: OnEnd) -> None:
        self.relay = relay
        self.plain = plain
        self.plain_end = _PlainEnd(self)
        self.tls = end.socket
        self.ssl: ssl.SSLObject | None = end.ssl  # None once it is over
        self.incoming = end.incoming
        self.outgoing = end.outgoing
        self.on_end = on_end
        self.up = self.down = 0  # plain bytes that were moved
        self.swept = -1  # how many there were when they were looked at the last time
        self.quiet = 0  # sweeps in a row that found nothing moved
        self.unsent: bytes | None = None  # ciphertext that the TLS socket has not taken
        self.received: bytes | None = None  # plaintext that the plain socket has not taken
        self.up_ended = False  # our close_notify is written
        self.close_notify = False  # the peer's has been read
        self.down_ended = False  # and has been passed on as an end
        self.helping = _CHUNK  # bytes that are received from the TLS peer at a time
        self.discards = False  # the plain end reads no more: what is for it is thrown away
        # An end, or an error, stands behind what can be read. No other edge will tell of it, so a
        # short read is not the last one.
        self.plain_ending = self.tls_ending = False

    def start(self, to_plain: bytes, to_tls: bytes) -> None:
        """Move what is there already, and have the loop tell of more."""
        self.relay.loop.take_over(self.tls.fileno(), self, _EVENTS)
        self.relay.loop.take_over(self.plain.fileno(), self.plain_end, _EVENTS)
        if to_plain:
            self._deliver(to_plain)
        # Before anything else is asked of OpenSSL.
        if self.ssl is not None and self.incoming.pending:
            self._decrypt(0)
        if self.ssl is not None and to_tls:
            self.ssl.write(to_tls)
            self.up = len(to_tls)
        if self.ssl is not None and self.outgoing.pending:
            self.flush()
        if self.ssl is not None and self.close_notify and self.received is None:
            self._pass_on_end()

    def on_event(self, events: int) -> None:
        """React to what happened to the TLS socket; 0 is another turn."""
        if self.ssl is None:
            return
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self.tls_ending = True
            if events & EPOLLERR and (self.close_notify or self.received is not None):
                # No read will bring the error up soon.
                return self.abort(_TLS_RESET)
        if events & EPOLLOUT and self.unsent is not None and self.flush():
            if not self.up_ended:
                self.pump_up()
            elif self.down_ended or self.discards:
                return self._finish()
        if events != EPOLLOUT and self.ssl is not None:
            self.pump_down()

    # --- Up

    def pump_up(self) -> None:
        """Encrypt until the plain end has nothing, the TLS socket takes no more, or it is time."""
        assert self.ssl is not None
        relay, write, take = self.relay, self.ssl.write, self.outgoing.read
        plain = relay.plain
        moved = 0
        while True:
            try:
                size = self.plain.recv_into(plain, _CHUNK, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                # A Unix peer that has closed with bytes unread, unix(7): these were its last words.
                if self.plain.family == AF_UNIX:
                    self.discards = True
                    return self._end_up()
                return self.abort(_PLAIN_RESET)
            if not size:
                return self._end_up()
            pieces = []
            for start in range(0, size, _SLICE):
                write(plain[start : min(start + _SLICE, size)])  # a memory BIO takes all
                pieces.append(take())
            self.up += size
            if not self._send(pieces) or (size < _CHUNK and not self.plain_ending):
                return
            moved += size
            if moved >= _TURN:
                return relay.loop.call_soon(self.plain_end)

    def _end_up(self) -> None:
        """Pass on the end of what the plain end says."""
        assert self.ssl is not None
        self.up_ended = True
        self.swept = -1  # an end is something that was moved
        try:
            self.ssl.unwrap()  # writes our close_notify, and looks for the peer's
        except (_WantRead, _ZeroReturn):
            pass
        except _SSLError:
            return self._fail()
        if self.flush() and (self.down_ended or self.discards):
            self._finish()

    def flush(self) -> bool:
        """Send the ciphertext that there is; return whether all of it went."""
        data = self.outgoing.read() if self.unsent is None else self.unsent
        self.unsent = None
        while data:
            if not self._send([data]):
                return False
            data = self.outgoing.read()  # came up while the rest of it waited
        return True

    def _send(self, pieces: list[bytes]) -> bool:
        try:
            sent = self.tls.sendmsg(pieces, (), MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort(_TLS_RESET)
            return False
        if sent == sum(map(len, pieces)):
            return True
        self.unsent = b"".join(pieces)[sent:]
        return False

    # --- Down

    def pump_down(self) -> None:
        """Decrypt until the peer has sent no more, the plain end takes no more, or it is time."""
        if self.received is not None:
            data, self.received = self.received, None
            if not self._deliver(data):
                return
        relay = self.relay
        moved = 0
        while not self.close_notify:
            try:
                most = self.helping
                size = self.tls.recv_into(relay.cipher, most, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                return self.abort(_TLS_RESET)
            if not size:
                return self.abort(_TRUNCATED)
            has_taken_all = self._decrypt(size)
            if self.ssl is None or (self.outgoing.pending and not self._answer()):
                return
            if not has_taken_all:
                return
            if size < most and not self.tls_ending:
                break
            moved += size if most == _CHUNK else _TURN
            if moved >= _TURN and not self.close_notify:
                return relay.loop.call_soon(self)
        if self.close_notify and not self.down_ended:
            self._pass_on_end()

    def _answer(self) -> bool:
        """Send what OpenSSL answers to what was read; return whether the connection goes on."""
        if self.unsent is None:
            self.flush()
        elif self.outgoing.pending > _MOST_ANSWERS:
            self.abort(_TLS_FAILED)
        return self.ssl is not None

    def _decrypt(self, size: int) -> bool:
        """Decrypt what is in the BIO, and `size` bytes of the shared buffer; deliver it.

        Returns:
            Whether the plain end has taken all.
        """
        assert self.ssl is not None
        cipher, plain, incoming = self.relay.cipher, self.relay.plain, self.incoming
        read: Callable[[int, memoryview], int] = self.ssl.read  # type: ignore[assignment]
        got = 0
        try:
            for start in range(0, size or 1, _SLICE):
                if size:
                    incoming.write(cipher[start : min(start + _SLICE, size)])
                # To ask first saves the exception, and a microsecond.
                while incoming.pending and not self.close_notify:
                    count = 0
                    try:
                        count = read(_RECORD, plain[got:])
                    except _WantRead:
                        break
                    except _ZeroReturn:  # instead of 0, once our own close_notify is written
                        pass
                    got += count
                    self.close_notify = not count
        except _SSLError:
            self._fail(bytes(plain[:got]))
            return False
        self.helping = _CHUNK if 2 * got >= size else _LITTLE
        return not got or self._deliver(plain[:got])

    def _deliver(self, data: bytes | memoryview) -> bool:
        """Give plaintext to the plain end; return whether it took all."""
        if self.discards:
            return True
        if self.received is not None:
            self.received += data
            return False
        try:
            sent = self.plain.send(data, MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            # It reads no more, and may have said something before: its last words are delivered.
            self.discards = True
            if self.up_ended:
                self._finish()
            return self.ssl is not None
        self.down += sent
        if sent == len(data):
            return True
        self.received = bytes(data[sent:])
        return False

    def _pass_on_end(self) -> None:
        self.down_ended = True
        self.swept = -1
        if self.up_ended and self.unsent is None:
            return self._finish()
        try:
            self.plain.shutdown(SHUT_WR)
        except OSError:  # ENOTCONN: it was reset meanwhile
            self.abort(_PLAIN_RESET)

    # --- How it ends

    def _finish(self) -> None:
        """End the connection: all was said, or the plain end reads no more and has said all."""
        if self.down_ended:
            return self._close(_FINISHED)
        self._keep_tls(_PLAIN_RESET)

    def _fail(self, last: bytes = b"") -> None:
        """End for a failure of TLS: a reset for the plain end, the alert for the peer."""
        if (last and not self._deliver(last)) or self.ssl is None or not self.flush():
            return self.abort(_TLS_FAILED)
        self.plain.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
        self._keep_tls(_TLS_FAILED)

    def _keep_tls(self, ending: Ending) -> None:
        """Close the plain socket; keep the other until its peer has received our last words."""
        on_end, up, down, tls = self.on_end, self.up, self.down, self.tls
        loop = self.relay.loop
        loop.close(self.plain)
        self._forget()
        try:
            tls.shutdown(SHUT_WR)
        except OSError:  # ENOTCONN: it was reset meanwhile
            loop.close(tls)
            return on_end(up, down, ending)
        self.relay.last_words.add(
            tls, lambda other: on_end(up, down, ending), (on_end, up, down), peer_has_ended=False
        )

    def abort(self, ending: Ending = _CUT) -> None:
        """Reset both peers, so that neither takes the cut for an end."""
        if self.ssl is not None:
            for sock in self.plain, self.tls:
                sock.setsockopt(SOL_SOCKET, SO_LINGER, LINGER_0)
            self._close(ending)

    def _close(self, ending: Ending) -> None:
        on_end, up, down = self.on_end, self.up, self.down
        for sock in self.plain, self.tls:
            self.relay.loop.close(sock)
        self._forget()
        on_end(up, down, ending)

    def _forget(self) -> None:
        """Free the memory at once; without the cycle the collector need not come round for it."""
        self.plain_end.pair = None
        self.ssl = self.unsent = self.received = None

    def sweep(self, pause: float, idle_seconds: float, half_closed_seconds: float) -> None:
        """End the connection if nothing was moved for too long; `pause` is since the last look."""
        if self.ssl is None:
            return
        ends = [sock for sock in (self.plain, self.tls) if sock.family != AF_UNIX]
        if (moved := self.up + self.down) != self.swept:
            for sock in ends:
                tcp.expect_answers(sock, self.quiet * pause)
            self.swept = moved
            self.quiet = 0
            return
        self.quiet += 1
        seconds = self.quiet * pause
        is_half_closed = self.up_ended or self.close_notify or self.discards
        if is_half_closed and 0 < half_closed_seconds <= seconds:
            self.abort(Ending.HALF_CLOSED)
        elif 0 < idle_seconds <= seconds:
            self.abort(Ending.IDLE)
        elif moved:
            for sock in ends:
                tcp.spare_slow_reader(sock, seconds)
