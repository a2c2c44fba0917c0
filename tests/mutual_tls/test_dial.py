"""Connecting: addresses in turn, and what went wrong."""

import _socket
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
from trio.testing import trio_test

from mutual_tls import dial as module
from mutual_tls.dial import DialError, DialReason, Endpoint, dial, is_local, resolve
from sniproxy.engine.story import Story
from tests.support.story import stories, told

V4, V6 = socket.AF_INET, socket.AF_INET6


class Resolver(trio.abc.HostnameResolver):
    """Knows the addresses that it was told."""

    def __init__(self, *found: tuple[socket.AddressFamily, str, int]) -> None:
        self._found = found

    async def getaddrinfo(self, *args: object, **kwargs: object) -> list[tuple[object, ...]]:  # type: ignore[override]
        if not self._found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (
                family,
                socket.SOCK_STREAM,
                6,
                "",
                (host, port) if family == V4 else (host, port, 0, 0),
            )
            for family, host, port in self._found
        ]

    async def getnameinfo(self, *args: object) -> tuple[str, str]:
        raise NotImplementedError


@contextmanager
def name_is(*found: tuple[socket.AddressFamily, str, int]) -> Iterator[Endpoint]:
    before = trio.socket.set_custom_hostname_resolver(Resolver(*found))
    try:
        yield Endpoint("name.example", 443)
    finally:
        trio.socket.set_custom_hostname_resolver(before)


async def dialled(endpoint: Endpoint, *, local: bool = True) -> tuple[str, int]:
    """Return where a connection has gone."""
    is_forbidden = None if local else is_local
    sock = await told(lambda story: dial(story, endpoint, is_forbidden))
    address: tuple[str, int] = sock.getpeername()[:2]
    assert not sock.getblocking()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    sock.close()
    return address


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that does not answer: its queue is full."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@trio_test
async def test_an_address_is_connected_to_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        assert await dialled(Endpoint(*address)) == address


@trio_test
async def test_families_take_turns() -> None:
    addresses = [(V6, "2001:db8::1", 1), (V6, "2001:db8::2", 1), (V4, "192.0.2.1", 1)]
    with name_is(*addresses) as endpoint:
        found = await told(lambda story: resolve(story, endpoint))
        assert [address[0] for _, address in found] == [
            *("2001:db8::1", "192.0.2.1", "2001:db8::2"),
        ]


@trio_test
async def test_the_next_address_is_tried_at_once_if_one_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with name_is((V4, "127.0.0.1", closed_port()), (V4, "127.0.0.1", port)) as endpoint:
            began = trio.current_time()
            assert await dialled(endpoint) == ("127.0.0.1", port)
            assert trio.current_time() - began < 0.2


@trio_test
async def test_the_next_address_is_tried_beside_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, silent_port() as silent:
        port = listening.getsockname()[1]
        with name_is((V4, "127.0.0.1", silent), (V4, "127.0.0.1", port)) as endpoint:
            assert await dialled(endpoint) == ("127.0.0.1", port)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([], DialReason.UNRESOLVED),
        ([(V4, "127.0.0.1", 0)], DialReason.REFUSED),
        ([(V4, "127.0.0.1", 0), (V4, "255.255.255.255", 9)], DialReason.REFUSED),
        ([(V4, "255.255.255.255", 9)], DialReason.UNREACHABLE),
    ],
)
@trio_test
async def test_what_went_wrong(
    found: list[tuple[socket.AddressFamily, str, int]], reason: DialReason
) -> None:
    port = closed_port()
    with (
        name_is(*((family, host, own or port) for family, host, own in found)) as endpoint,
        pytest.raises(DialError) as caught,
    ):
        await dialled(endpoint)
    assert caught.value.reason is reason


@trio_test
async def test_a_name_that_leads_here_is_forbidden_where_that_is_asked_for() -> None:
    with (
        name_is((V4, "127.0.0.1", 9), (V6, "::1", 9)) as endpoint,
        pytest.raises(DialError) as caught,
    ):
        await dialled(endpoint, local=False)
    assert caught.value.reason is DialReason.FORBIDDEN


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *((each, True) for each in ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1")),
        *((each, True) for each in ("169.254.169.254", "fe80::1", "::ffff:169.254.169.254")),
        *((each, True) for each in ("0.0.0.0", "::", "224.0.0.1", "ff02::1")),
        *((each, False) for each in ("192.0.2.1", "10.0.0.1", "2001:db8::1", "fd00::1")),
    ],
)
def test_what_is_local(address: str, expected: bool) -> None:
    assert is_local(ipaddress.ip_address(address)) == expected


@trio_test
async def test_without_a_descriptor_it_is_not_the_other_side_that_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("mutual_tls.dial.socket", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        await dialled(Endpoint("127.0.0.1", 9))


@trio_test
async def test_who_has_no_time_leaves_no_socket() -> None:
    before = os.listdir("/proc/self/fd")
    with silent_port() as silent:

        async def run(story: Story) -> bool:
            with story.time_limit(0.1) as limit:
                await dial(story, Endpoint("127.0.0.1", silent))
            return limit.is_over

        assert await told(run)
    assert os.listdir("/proc/self/fd") == before


class Unlucky(_socket.socket):
    """Is given the very port that it is to connect to."""

    def connect_ex(self, address: tuple[str, int]) -> int:  # type: ignore[override]
        with contextlib.suppress(OSError):  # it has it already
            self.bind(address)
        return super().connect_ex(address)


@trio_test
async def test_a_socket_that_is_connected_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "socket", Unlucky)
    for host, family in ("127.0.0.1", V4), ("::1", V6):
        with socket.create_server((host, 0), family=family) as listening:
            port = listening.getsockname()[1]
        with pytest.raises(DialError) as caught:
            await dialled(Endpoint(host, port))
        assert caught.value.reason is DialReason.REFUSED


class Unwanted(_socket.socket):
    """Is accepted, and reset before anybody has looked."""

    def connect_ex(self, address: tuple[str, int]) -> int:  # type: ignore[override]
        return errno.ECONNRESET


@trio_test
async def test_who_resets_at_once_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "socket", Unwanted)
    with pytest.raises(DialError, match="reset by peer") as caught:
        await dialled(Endpoint("127.0.0.1", 9))
    assert caught.value.reason is DialReason.REFUSED


@trio_test
async def test_options_are_set_before_it_connects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, silent_port() as silent:
        port = listening.getsockname()[1]
        options = ((socket.SOL_SOCKET, socket.SO_PRIORITY, 3),)
        with name_is((V4, "127.0.0.1", silent), (V4, "127.0.0.1", port)) as endpoint:
            sock = await told(lambda story: dial(story, endpoint, options=options))
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 3
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    sock.close()


@trio_test
async def test_an_option_that_cannot_be_set_is_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        endpoint = Endpoint(*listening.getsockname())
        options = ((socket.SOL_SOCKET, 0x7FFF, 1),)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError) as raised:  # noqa: PT011
            await told(lambda story: dial(story, endpoint, options=options))
        assert raised.value.errno == errno.ENOPROTOOPT
        assert len(os.listdir("/proc/self/fd")) == len(before)
        with pytest.raises(BlockingIOError):
            listening.accept()


class Slow(Resolver):
    """Answers when it is told to."""

    def __init__(self, *found: tuple[socket.AddressFamily, str, int]) -> None:
        super().__init__(*found)
        self.asked = 0
        self.may_answer = trio.Event()

    async def getaddrinfo(self, *args: object, **kwargs: object) -> list[tuple[object, ...]]:  # type: ignore[override]
        self.asked += 1
        await self.may_answer.wait()
        return await super().getaddrinfo(*args, **kwargs)


@pytest.mark.parametrize("is_found", [True, False])
@trio_test
async def test_who_wants_the_same_name_at_the_same_time_waits_for_one_thread(
    is_found: bool,
) -> None:
    resolver = Slow(*([(V4, "192.0.2.1", 443)] if is_found else []))
    results: list[object] = []

    async def ask(story: Story) -> None:
        try:
            results.append(await resolve(story, Endpoint("name.example", 443)))
        except DialError as error:
            results.append(error.reason)

    before = trio.socket.set_custom_hostname_resolver(resolver)
    try:
        async with stories() as it:
            asking = [Story(it) for _ in range(100)]
            for story in asking:
                it.begin(story, ask(story))
                await trio.testing.wait_all_tasks_blocked()
            assert resolver.asked == 1
            # The first one gives up, and another asks in its place.
            asking[0].abort()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert resolver.asked == 2
            resolver.may_answer.set()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert resolver.asked == 2
            # And nothing is kept.
            it.begin(asking[0], ask(asking[0]))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert resolver.asked == 3
    finally:
        trio.socket.set_custom_hostname_resolver(before)
    expected = [(V4, ("192.0.2.1", 443))] if is_found else DialReason.UNRESOLVED
    assert results == [expected] * 100


@trio_test
async def test_no_thread_is_no_fault_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(endpoint: Endpoint) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "_getaddrinfo", fail)
    with pytest.raises(OSError, match="start new thread") as caught:
        await dialled(Endpoint("name.example", 443))
    assert caught.value.errno == errno.ENOMEM
