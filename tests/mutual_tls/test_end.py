"""What a story says to a peer and hears from it while there is no tunnel."""

from _socket import socket
from typing import cast

from trio.testing import trio_test

from mutual_tls.end import listen_to_the_end, receive_some
from sniproxy.engine.story import Story
from tests.support.story import told


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
