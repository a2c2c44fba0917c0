"""The end of a service: let live. Who is left then is for the caller to cut."""

import trio

from sniproxy.engine.census import Census


async def drain(census: Census, end: trio.Event, seconds: float) -> None:
    """Wait for those who are in, while nobody else is let in.

    Returns when the last has left, when `seconds` have passed, or when `end` is set,
    whichever is first.
    """
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:

            async def wait_for_end() -> None:
                await end.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_end)
            await census.empty()
            nursery.cancel_scope.cancel()
