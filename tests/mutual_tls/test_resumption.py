"""Sessions that are kept: for how long, and for whom."""

import ssl
from typing import cast

from mutual_tls.resumption import Sessions


class Session:
    def __init__(self, *, has_ticket: bool = True) -> None:
        self.has_ticket = has_ticket


class Connection:
    """A connection that counts how often its session is asked for: each time it is copied."""

    def __init__(self, session: Session | None) -> None:
        self._session = session
        self.asked = 0

    @property
    def session(self) -> Session | None:
        self.asked += 1
        return self._session


class Kept:
    """Sessions with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sessions = Sessions(lambda: self.now)

    def keep(self, context: ssl.SSLContext, connection: Connection) -> None:
        self.sessions.keep(context, "peer.example", cast("ssl.SSLObject", connection))

    def find(self, context: ssl.SSLContext, name: str = "peer.example") -> object:
        return self.sessions.find(context, name)


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def test_a_session_is_for_one_context_and_one_name() -> None:
    it, ours, session = Kept(), context(), Session()
    it.keep(ours, Connection(session))
    assert it.find(ours) is session
    assert it.find(context()) is None
    assert it.find(ours, "other.example") is None


def test_one_is_enough_for_a_minute() -> None:
    it, ours, first = Kept(), context(), Session()
    it.keep(ours, Connection(first))
    second = Connection(Session())
    it.now += 59
    it.keep(ours, second)
    assert (it.find(ours), second.asked) == (first, 0)
    it.now += 2
    it.keep(ours, second)
    assert it.find(ours) is not first


def test_where_there_is_none_it_is_asked_for_once_in_a_second() -> None:
    it, ours = Kept(), context()
    without = Connection(Session(has_ticket=False))
    for _ in range(5):
        it.keep(ours, without)
    assert (it.find(ours), without.asked) == (None, 1)
    it.now += 1.5
    later = Session()
    it.keep(ours, Connection(later))
    assert it.find(ours) is later


def test_a_session_that_was_of_no_use_is_forgotten() -> None:
    it, ours = Kept(), context()
    it.keep(ours, Connection(Session()))
    it.sessions.forget("peer.example")
    assert it.find(ours) is None
    again = Session()
    it.keep(ours, Connection(again))
    assert it.find(ours) is again
