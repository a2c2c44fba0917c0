import resource

import pytest

from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.service.descriptors import raise_limit, share


@pytest.mark.parametrize(
    ("limit", "connections", "pipes"),
    [
        (26, 1, 0),
        (40, 7, 1),
        (64, 18, 2),
        (1024, 468, 32),
        (1 << 20, 524_244, 32),
    ],
)
def test_what_a_limit_suffices_for(limit: int, connections: int, pipes: int) -> None:
    assert share(limit, MOST_PIPES) == (connections, pipes)


def test_a_limit_that_does_not_suffice() -> None:
    with pytest.raises(ValueError, match="allows 25 descriptors, and it takes 26"):
        share(25, MOST_PIPES)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What RLIMIT_NOFILE is, and what it is set to after that."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    return limits


def test_the_soft_limit_is_raised_to_the_hard_one(limit: list[tuple[int, int]]) -> None:
    limit.append((1024, 4096))
    assert raise_limit() == 4096
    assert limit == [(1024, 4096), (4096, 4096)]
    assert raise_limit() == 4096
    assert len(limit) == 2


def test_no_limit_is_what_linux_allows(limit: list[tuple[int, int]]) -> None:
    limit.append((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert raise_limit() == 1 << 20


def test_a_limit_that_may_not_be_raised_stays(
    limit: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int, limit: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    limit.append((1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_limit() == 1024
