"""What is counted, and that it is bounded whatever clients do."""

import pytest

from sniproxy.service import figures
from sniproxy.service.figures import Figures, Latency


@pytest.fixture
def counted() -> Figures:
    return Figures(("lookup",))


def test_a_connection_is_counted_in_and_out(counted: Figures) -> None:
    left: list[None] = []
    counted.on_left = lambda: left.append(None)
    host = counted.served("a.example", 1000)
    assert counted.served("a.example", 1000) is host
    assert (host.served, host.ended) == (2, 0)
    host.left(10, 200, "finished")
    assert (host.served, host.ended, host.up, host.down) == (2, 1, 10, 200)
    assert counted.moved() == (10, 200)
    assert len(left) == 1
    counted.left(1, 1)  # of no host
    assert counted.moved() == (11, 201)


def test_who_is_handed_over_is_served_too(counted: Figures) -> None:
    assert "handed_over" not in counted.show()
    counted.served("a.example", 1000)
    host = counted.hand_over("a.example", 1000)
    assert (host.served, host.handed_over) == (2, 1)
    host.left(0, 0, "finished")
    assert not host.is_idle()  # the other one is open
    # In all it stays counted, whoever has the host now.
    assert counted.hand_over("a.example", 2000).handed_over == 1
    assert counted.show()["handed_over"] == 2


def test_another_process_goes_on_counting_who_was_handed_over(counted: Figures) -> None:
    counted.hand_over("a.example", 1000).left(0, 0, "finished")
    after = Figures(("lookup",))
    after.handed_over = 0
    after.add(counted.tell())
    assert (after.handed_over, after.hosts["a.example"].handed_over) == (1, 1)
    # Who hands nothing over has nothing to tell.
    after.add(Figures(("lookup",)).tell())
    assert after.handed_over == 1


def test_the_last_twenty_refusals_of_a_host_are_kept(counted: Figures) -> None:
    for number in range(25):
        counted.refused_at("a.example", 1000, "no_socket", f"192.0.2.{number}:1", "why" * 200)
    host = counted.hosts["a.example"]
    assert host.last is not None
    assert [event.client for event in host.last] == [f"192.0.2.{each}:1" for each in range(5, 25)]
    assert all(len(event.detail or "") == 300 for event in host.last)
    assert (host.refused, host.reasons) == (25, {"no_socket": 25})


def test_another_owner_hears_nothing_of_the_one_before(counted: Figures) -> None:
    counted.served("a.example", 1000).left(1, 1, "finished")
    counted.refused_at("a.example", 1000, "no_socket", "192.0.2.1:1", None)
    counted.refused_at("a.example", 2000, "not_listening", "192.0.2.2:1", None)
    host = counted.hosts["a.example"]
    assert (host.owner, host.served, host.up, host.refused) == (2000, 0, 0, 1)
    assert host.last is not None
    assert [event.client for event in host.last] == ["192.0.2.2:1"]
    assert counted.moved() == (1, 1)  # in all


def test_who_does_not_know_the_owner_leaves_it(counted: Figures) -> None:
    counted.served("a.example", 1000)
    counted.refused_at("a.example", None, "no_such_host", "192.0.2.1:1", None)
    assert counted.hosts["a.example"].owner == 1000


def test_hosts_are_bounded_and_those_with_connections_stay(
    counted: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_MOST_HOSTS", 3)
    counted.served("open.example", 1)
    for number in range(10):
        counted.served(f"{number}.example", 1).left(0, 0, "finished")
    assert list(counted.hosts) == ["open.example", "8.example", "9.example"] or set(
        counted.hosts
    ) == {"open.example", "8.example", "9.example"}


def test_where_all_have_connections_another_host_is_counted_in_all_alone(
    counted: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_MOST_HOSTS", 2)
    for name in "a.example", "b.example":
        counted.served(name, 1)
    counted.served("c.example", 1).left(5, 7, "finished")
    assert set(counted.hosts) == {"a.example", "b.example"}
    assert counted.moved() == (5, 7)
    # However many they are.
    monkeypatch.setattr(figures, "_MOST_OTHERS", 3)
    for _ in range(10):
        counted.served("c.example", 1).left(1, 1, "finished")
    assert len(counted._others) <= 3
    assert counted.moved() == (15, 17)


def test_bytes_of_whom_another_owner_follows_are_counted_to_the_end(counted: Figures) -> None:
    before = counted.served("a.example", 1000)
    counted.served("a.example", 2000).left(1, 2, "finished")
    assert counted.moved() == (1, 2)
    before.left(10, 20, "finished")
    assert counted.moved() == counted.moved() == (11, 22)


def test_refusals_are_kept_of_so_many_hosts_the_latest(
    counted: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_MOST_REFUSED", 2)
    for name in "a.example", "b.example", "a.example", "c.example":
        counted.refused_at(name, 1, "no_socket", "192.0.2.1:1", None)
    kept = {name for name, host in counted.hosts.items() if host.last}
    assert kept == {"a.example", "c.example"}
    assert counted.hosts["b.example"].refused == 1  # the count stays


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.9e-6, 0), (1e-6, 1), (3.9e-6, 2), (100e-6, 7), (16.0, 24), (1e6, 24)],
)
def test_a_latency_is_in_the_bucket_of_its_power_of_two(seconds: float, bucket: int) -> None:
    latency = Latency()
    latency.add(seconds)
    assert latency.show() == {"count": 1, "sum": round(seconds, 9), "buckets": {str(bucket): 1}}


def test_nothing_is_noted_for_an_owner_of_before(counted: Figures) -> None:
    before = counted.served("a.example", 1000)
    counted.served("a.example", 2000)
    counted.note(before, "192.0.2.1:1", "why", "detail")
    assert before.last is None
    assert counted.hosts["a.example"].last is None
