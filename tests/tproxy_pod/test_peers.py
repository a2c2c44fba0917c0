"""What is remembered of servers, and for how long."""

from mutual_tls.dial import Endpoint
from tproxy_pod import peers
from tproxy_pod.peers import Peers

SERVER, OTHER = Endpoint("10.0.0.1", 80), Endpoint("10.0.0.1", 81)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_known_of_a_stranger() -> None:
    assert Peers(Clock()).speaks_tls(SERVER) is None


def test_it_is_forgotten_after_a_while() -> None:
    clock = Clock()
    known = Peers(clock)
    known.note(SERVER, speaks_tls=True)
    known.note(OTHER, speaks_tls=False)
    clock.now += 59.9
    assert known.speaks_tls(SERVER) is True
    assert known.speaks_tls(OTHER) is False
    clock.now += 0.1
    assert known.speaks_tls(OTHER) is None
    clock.now += 539.9
    assert known.speaks_tls(SERVER) is True
    clock.now += 0.1
    assert known.speaks_tls(SERVER) is None


def test_the_last_word_counts() -> None:
    clock = Clock()
    known = Peers(clock)
    known.note(SERVER, speaks_tls=False)
    known.note(SERVER, speaks_tls=True)
    assert known.speaks_tls(SERVER) is True


def test_the_oldest_is_forgotten_when_there_are_too_many() -> None:
    known = Peers(Clock())
    known.note(SERVER, speaks_tls=True)
    known.note(OTHER, speaks_tls=True)
    known.note(SERVER, speaks_tls=True)  # as if it was new
    for port in range(1, peers._MOST):
        known.note(Endpoint("10.0.0.2", port), speaks_tls=True)
    assert known.speaks_tls(OTHER) is None
    assert known.speaks_tls(SERVER) is True
    known.note(Endpoint("10.0.0.3", 1), speaks_tls=True)
    assert known.speaks_tls(SERVER) is None
