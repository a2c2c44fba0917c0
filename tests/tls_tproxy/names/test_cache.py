"""The cache: newest first, expiry, and what is forgotten when there is too much."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies
from tls_tproxy.names.cache import LONGEST, MOST_NAMES, SHORTEST, Cache

HERE, THERE = bytes([192, 0, 2, 1]), bytes(15) + b"\1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_names_belong_to_their_address(clock: Clock) -> None:
    cache = Cache(clock)
    cache.learn(HERE, "a.example", 300)
    cache.learn(THERE, "b.example", 300)
    assert (cache.names(HERE), cache.names(THERE)) == (["a.example"], ["b.example"])
    assert cache.names(bytes(4)) == []


def test_the_newest_first(clock: Clock) -> None:
    cache = Cache(clock)
    for name in "a", "b", "c", "a":
        cache.learn(HERE, name, 300)
    assert cache.names(HERE) == ["a", "c", "b"]
    assert len(cache) == 3


@pytest.mark.parametrize(
    ("ttl", "kept"),
    [
        (0, SHORTEST),
        (SHORTEST - 1, SHORTEST),
        (SHORTEST + 1, SHORTEST + 1),
        (2**31 - 1, LONGEST),
    ],
)
def test_how_long(clock: Clock, ttl: int, kept: int) -> None:
    cache = Cache(clock)
    cache.learn(HERE, "a", ttl)
    clock.now += kept - 0.1
    assert cache.names(HERE) == ["a"]
    clock.now += 0.1
    assert cache.names(HERE) == []


def test_looked_up_again_it_stays(clock: Clock) -> None:
    cache = Cache(clock)
    cache.learn(HERE, "a", 300)
    cache.learn(HERE, "b", 600)
    clock.now += 200
    cache.learn(HERE, "a", 300)
    clock.now += 299
    assert cache.names(HERE) == ["a", "b"]
    clock.now += 1
    assert cache.names(HERE) == ["b"]


def test_a_short_ttl_replaces_a_long_one(clock: Clock) -> None:
    cache = Cache(clock)
    cache.learn(HERE, "a", 3000)
    cache.learn(HERE, "a", 0)
    clock.now += SHORTEST
    assert cache.names(HERE) == []


def test_of_too_many_names_the_latest(clock: Clock) -> None:
    cache = Cache(clock)
    for number in range(MOST_NAMES + 5):
        cache.learn(HERE, str(number), 300)
    assert cache.names(HERE) == [str(number) for number in range(MOST_NAMES + 4, 4, -1)]
    assert len(cache) == MOST_NAMES


def test_an_expired_name_takes_nobody_s_place(clock: Clock) -> None:
    cache = Cache(clock)
    cache.learn(HERE, "lasting", 3000)
    for number in range(MOST_NAMES - 1):
        cache.learn(HERE, str(number), 300)
    clock.now += 300
    cache.learn(HERE, "new", 300)
    assert cache.names(HERE) == ["new", "lasting"]


def test_the_address_that_was_learned_longest_ago_is_forgotten(clock: Clock) -> None:
    cache = Cache(clock, most=3)
    for number in 1, 2, 3, 1, 4:
        cache.learn(bytes([number]) * 4, "a", 300)
    assert [number for number in range(6) if cache.names(bytes([number]) * 4)] == [1, 3, 4]
    assert len(cache) == 3


def test_what_has_expired_leaves_the_memory(clock: Clock) -> None:
    cache = Cache(clock)
    for number in range(100):
        cache.learn(number.to_bytes(4, "big"), "a", 300)
    clock.now += 300
    for number in range(100, 150):
        cache.learn(number.to_bytes(4, "big"), "a", 300)
    assert len(cache) == 50


# What is done, in the order of events: an address is learned under a name; or time passes.
steps = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from("abc"), st.integers(0, 400)) | st.integers(1, 200),
    max_size=60,
)


@strategies.steady
@given(steps, st.integers(1, 8))
def test_as_a_plain_list_would_have_it(todo: list[tuple[int, str, int] | int], most: int) -> None:
    clock = Clock()
    cache = Cache(clock, most)
    learned: list[tuple[bytes, str, float]] = []  # the newest first
    for step in todo:
        if isinstance(step, int):
            clock.now += step
            continue
        number, name, ttl = step
        address = bytes([number] * 4)
        cache.learn(address, name, ttl)
        learned = [each for each in learned if each[:2] != (address, name)]
        learned.insert(0, (address, name, clock.now + max(ttl, SHORTEST)))
        assert len(cache) <= most
    for number in range(5):
        address = bytes([number] * 4)
        alive = [
            name for where, name, expires in learned if where == address and expires > clock.now
        ]
        known = cache.names(address)
        # All of it, the newest first; or only the newest, where there were too many.
        assert known == alive[: len(known)]
        if len({each[:2] for each in learned}) <= most:
            assert known == alive


FILL = """
import resource, sys, time
from tls_tproxy.names.cache import MOST_ENTRIES, Cache
def peak():  # bytes: RSS at its most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
cache = Cache()
for number in range(MOST_ENTRIES + 50_000):
    cache.learn(number.to_bytes(4, "big"), f"host-{number}.some.example.com", 300)
assert len(cache) == MOST_ENTRIES
assert cache.names((49_999).to_bytes(4, "big")) == []
assert cache.names((50_000).to_bytes(4, "big")) == ["host-50000.some.example.com"]
print((peak() - before) / MOST_ENTRIES)
"""


def test_a_million_entries() -> None:
    done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, check=True)
    each = float(done.stdout)
    print(f"{each:.0f} bytes an entry")  # noqa: T201 - worth knowing
    assert each < 500
