"""What a story says to a peer while there is no tunnel, and what it keeps to itself."""

import ssl
from _socket import socket
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
from trio.testing import trio_test

from mutual_tls.end import TLSEnd, TLSError, TLSReason, listen_to_the_end, receive_some
from sniproxy.engine.story import Stories, Story
from tests.support.sockets import plain, tcp_pair, unix_pair
from tests.support.story import stories, tell, told
from tests.support.tls import NAME, context


class Flood:
    """A socket whose peer sends faster than it is read: there is always more."""

    def __init__(self) -> None:
        self.is_shut_down = False

    def recv(self, most: int, flags: int) -> bytes:
        return b"x" * most

    def shutdown(self, how: int) -> None:
        self.is_shut_down = True


def flood() -> socket:
    return cast("socket", Flood())


@trio_test
async def test_a_peer_that_never_lets_up_does_not_outlast_a_time_limit() -> None:
    """And what the limits wait for, everybody else does, too."""

    async def run(story: Story) -> bool:
        with story.time_limit(0.01) as limit:
            while await receive_some(story, flood(), 10):
                pass
        return limit.is_over

    assert await told(run)


@trio_test
async def test_a_peer_that_never_lets_up_is_listened_to_for_a_second() -> None:
    async def run(story: Story) -> None:
        await listen_to_the_end(story, flood())

    await told(run)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", [TLSError, ValueError, SystemExit])
@trio_test
async def test_whatever_a_check_raises_our_certificate_stays(
    version: ssl.TLSVersion, kind: type[BaseException]
) -> None:
    near, far = (plain(each) for each in tcp_pair())
    shown: list[bytes] = []
    ours: list[bytes] = []

    def check(der: bytes) -> None:
        shown.append(der)
        raise TLSError(TLSReason.WRONG_NAME, "no") if kind is TLSError else kind("no")

    async def client(story: Story) -> None:
        side = context(version, server_side=False)
        end = TLSEnd(story, near, side, server_name=NAME, check=check)
        with pytest.raises(kind, match="no"):
            await end.shake_hands()
        assert not end.outgoing.pending
        story.loop.close(near)

    async def server(story: Story) -> None:
        side = context(version, server_side=True)
        end = TLSEnd(story, far, side, server_side=True, check=ours.append)
        with pytest.raises(TLSError) as caught:
            await end.shake_hands()
        assert caught.value.reason in (TLSReason.TLS_CLOSED, TLSReason.TLS_RESET)
        story.loop.close(far)

    async def run(it: Stories, side: Callable[[Story], Awaitable[None]]) -> None:
        (await tell(it, side))()

    with trio.fail_after(5):
        async with stories() as it, trio.open_nursery() as nursery:
            for side in client, server:
                nursery.start_soon(run, it, side)
    assert len(shown) == 1
    assert ours == []


@trio_test
async def test_a_peer_that_never_lets_up_does_not_keep_others_from_their_turn() -> None:
    far, near = unix_pair()
    inside = plain(near)
    with far:
        heard: list[bytes] = []

        async def listen(story: Story) -> None:
            far.send(b"one")
            while len(heard) < 3:
                heard.append(await receive_some(story, inside, 10))
                far.send(b"more")

        async def run(story: Story) -> None:
            other = Story(story.stories)
            story.stories.begin(other, listen(other))
            while len(heard) < 3:
                await receive_some(story, flood(), 10)

        await told(run)
    inside.close()
    assert heard == [b"one", b"more", b"more"]


class NoData:
    """What OpenSSL makes of changes of keys."""

    def read(self, most: int) -> bytes:
        raise ssl.SSLWantReadError


@trio_test
async def test_a_peer_that_sends_no_data_is_not_listened_to_for_long() -> None:
    async def run(story: Story) -> None:
        end = TLSEnd(story, flood(), ssl.create_default_context(), server_name="a.example")
        end.ssl = cast("ssl.SSLObject", NoData())
        with pytest.raises(TLSError, match="much, and no data") as caught:
            await end.receive()
        assert caught.value.reason is TLSReason.TLS_FAILED

    await told(run)
