"""The end of a service: open connections may end by themselves, for a while."""

from collections.abc import Awaitable, Callable

import trio


async def drain(
    wait_until_empty: Callable[[], Awaitable[None]], end: trio.Event, seconds: float
) -> None:
    """Wait for the open connections to end. Nothing is accepted meanwhile.

    Returns when `wait_until_empty` does, when `seconds` have passed, or when `end` is set,
    whichever is first.
    """
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:

            async def wait_for_end() -> None:
                await end.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_end)
            await wait_until_empty()
            nursery.cancel_scope.cancel()
