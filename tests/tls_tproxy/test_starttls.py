"""PostgreSQL before TLS: byte by byte, with nothing lost and nothing taken for what it is not."""

import _socket
import socket
import ssl
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test

from mutual_tls.end import TLSEnd, TLSError, TLSReason
from mutual_tls.refusal import Refusal
from sniproxy.engine.story import Story
from tests.support.sockets import plain, receive_exactly, reset, tcp_pair, unix_pair
from tests.support.story import told
from tests.support.strategies import steady
from tests.support.tls import NAME, authority, context
from tls_tproxy.refusal import WrapReason
from tls_tproxy.starttls import decline_encryption, request_encryption

SSL = struct.pack(">II", 8, 80877103)
GSSENC = struct.pack(">II", 8, 80877104)
CANCEL = struct.pack(">IIII", 16, 80877102, 1, 2)
# Protocol 3.0, "user" "me", and the end of the parameters.
STARTUP = struct.pack(">II", 17, 3 << 16) + b"user\0me\0\0"


class Pair:
    """The other side of the connection, and ours."""

    def __init__(self) -> None:
        self.outside, inside = tcp_pair()
        self.outside.settimeout(5)
        inside.setblocking(False)
        self.inside: _socket.socket = plain(inside)

    def close(self) -> None:
        self.outside.close()
        self.inside.close()

    def left(self) -> bytes:
        """Return what we have left in the socket."""
        self.outside.shutdown(socket.SHUT_WR)
        self.inside.settimeout(5)
        return b"".join(iter(lambda: self.inside.recv(1 << 16), b""))


@pytest.fixture
def pair() -> Iterator[Pair]:
    it = Pair()
    yield it
    it.close()


# --- the client


@pytest.mark.parametrize(
    ("requests", "begin"),
    [
        ([], STARTUP),
        ([SSL], STARTUP),
        ([GSSENC], STARTUP),
        ([GSSENC, SSL], STARTUP),
        ([SSL, GSSENC], STARTUP),
        ([SSL], CANCEL),
        # The second one is for the server to judge.
        ([SSL], SSL),
        ([GSSENC, SSL], GSSENC),
        # sslnegotiation=direct: a record of a handshake.
        ([], b"\x16\x03\x01\x02\x00\x01"),
        ([], SSL[:7] + b"\x2e"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 8, 1000])
@trio_test
async def test_a_client_goes_on_in_plaintext(
    requests: list[bytes], begin: bytes, size: int
) -> None:
    pair = Pair()
    answers: list[bytes] = []

    def speak() -> None:
        """Speak as a client does, which waits for each answer; in pieces."""
        pair.outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for message in *requests, begin:
            for start in range(0, len(message), size):
                pair.outside.sendall(message[start : start + size])
            if message is not begin or len(answers) < len(requests):
                answers.append(receive_exactly(pair.outside, 1))

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        said = await told(lambda story: decline_encryption(story, pair.inside))
        thread.join(5)
        # No byte more was read than had to be, and none was lost.
        assert len(said) <= 8
        assert said + pair.left() == begin
        assert answers == [b"N"] * len(requests)
    finally:
        pair.close()


PIECES = st.sampled_from([SSL, GSSENC, STARTUP, CANCEL, SSL[:4], SSL[:7], b"\0", b"x"])


@steady
@given(st.lists(PIECES | st.binary(max_size=9), max_size=5).map(b"".join))
def test_whatever_a_client_says_is_passed_on(data: bytes) -> None:
    rest, declined = data, b""
    expected = [SSL, GSSENC]
    while rest[:8] in expected:
        expected.remove(rest[:8])
        rest, declined = rest[8:], declined + b"N"

    left, right = unix_pair()
    right.setblocking(False)
    left.sendall(data)
    left.shutdown(socket.SHUT_WR)
    ours = plain(right)

    @trio_test
    async def run() -> None:
        said = await told(lambda story: decline_encryption(story, ours))
        assert said + ours.recv(100) == rest

    with left:
        try:
            run()
        finally:
            ours.close()
        assert receive_exactly(left, 3) == declined


@pytest.mark.parametrize("said", [b"", SSL[:1], SSL[:4], SSL[:7]])
@trio_test
async def test_a_client_that_ends_meanwhile(said: bytes) -> None:
    pair = Pair()
    pair.outside.sendall(said)
    pair.outside.shutdown(socket.SHUT_WR)
    assert await told(lambda story: decline_encryption(story, pair.inside)) == said
    pair.close()


@trio_test
async def test_requests_without_waiting_are_answered_one_by_one() -> None:
    pair = Pair()
    pair.outside.sendall(GSSENC + SSL + STARTUP)
    said = await told(lambda story: decline_encryption(story, pair.inside))
    assert said + pair.left() == STARTUP
    assert receive_exactly(pair.outside, 2) == b"NN"
    pair.close()


@trio_test
async def test_a_client_that_resets() -> None:
    pair = Pair()
    pair.outside.sendall(SSL[:4])
    reset(pair.outside)
    with pytest.raises(OSError, match="reset"):
        await told(lambda story: decline_encryption(story, pair.inside))
    pair.close()


# --- the server


@trio_test
async def test_a_server_that_begins_tls() -> None:
    pair = Pair()
    pair.outside.sendall(b"S")
    await told(lambda story: request_encryption(story, pair.inside))
    assert receive_exactly(pair.outside, 8) == SSL
    pair.close()


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (b"N", WrapReason.STARTTLS_DECLINED, "the server does not offer TLS"),
        (b"", WrapReason.STARTTLS_FAILED, "the server ended without an answer"),
        (b"G", WrapReason.STARTTLS_FAILED, "the server answered b'G', and not S or N"),
        (b"s", WrapReason.STARTTLS_FAILED, "the server answered b's', and not S or N"),
        (b"\0", WrapReason.STARTTLS_FAILED, r"the server answered b'\\x00', and not S or N"),
        (
            b"E\0\0\0\x1aSFATAL\0Mlook here: \x1b]0;\0\0",
            WrapReason.STARTTLS_FAILED,
            "the server answered b'E', and not S or N",
        ),
    ],
)
@trio_test
async def test_a_server_that_does_not(answer: bytes, reason: WrapReason, detail: str) -> None:
    pair = Pair()
    pair.outside.sendall(answer)
    pair.outside.shutdown(socket.SHUT_WR)
    with pytest.raises(Refusal, match=f"^{detail}$") as caught:
        await told(lambda story: request_encryption(story, pair.inside))
    assert caught.value.reason is reason
    pair.close()


@trio_test
async def test_a_server_that_resets() -> None:
    pair = Pair()
    reset(pair.outside)
    with pytest.raises(Refusal, match="reset") as caught:
        await told(lambda story: request_encryption(story, pair.inside))
    assert caught.value.reason is WrapReason.STARTTLS_FAILED
    pair.close()


@trio_test
async def test_one_byte_of_a_server_is_read_and_no_more() -> None:
    pair = Pair()
    pair.outside.sendall(b"Sand what is said in plaintext")
    await told(lambda story: request_encryption(story, pair.inside))
    assert pair.left() == b"and what is said in plaintext"
    pair.close()


def serve(sock: socket.socket, side: ssl.SSLContext, stuffed: bytes) -> None:
    """Be a server of PostgreSQL, with somebody in between who says more than it does."""
    assert receive_exactly(sock, 8) == SSL
    sock.sendall(b"S" + stuffed)
    try:
        with side.wrap_socket(sock, server_side=True) as tls:
            tls.sendall(tls.recv(100))
            tls.recv(1)
    except OSError:
        assert stuffed


@pytest.mark.parametrize("stuffed", [b"", b"R\0\0\0\x08\0\0\0\0"])
@trio_test
async def test_what_comes_before_tls_is_not_taken_for_what_comes_within(stuffed: bytes) -> None:
    """CVE-2021-23222: here an AuthenticationOk that the server has not said."""
    pair = Pair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(NAME).configure_cert(server)
    thread = threading.Thread(target=serve, args=(pair.outside, server, stuffed))
    thread.start()

    async def ask(story: Story) -> bytes:
        await request_encryption(story, pair.inside)
        side = context(ssl.TLSVersion.TLSv1_3, server_side=False)
        end = TLSEnd(story, pair.inside, side, server_name=NAME)
        try:
            await end.shake_hands()
            await end.send(STARTUP)
            return await end.receive()
        finally:
            story.loop.close(pair.inside)

    if stuffed:
        with pytest.raises(TLSError) as caught:
            await told(ask)
        assert caught.value.reason is TLSReason.NOT_TLS
    else:
        assert await told(ask) == STARTUP
    thread.join(5)
    assert not thread.is_alive()
    pair.outside.close()
