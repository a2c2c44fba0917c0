"""The questions that this machine has asked, and which answers belong to them.

Law: an answer counts only if a question is pending that went from the same address and port to the
same server, with the same id, name and type, at most `PATIENCE` seconds ago: what RFC 5452 §9.1 has
a resolver compare. Everything else is turned away by a look at twelve bytes and a table, before
anybody parses it.

Of several answers that match, the first one counts, whatever it says, and the question is gone. So
it is for the client's resolver, too: whoever guesses port and id in time, and is faster than the
server, has deceived the client already. A forger who can read the question needs no guess. What
bounds the harm is the certificate, which has to be valid for a name that was asked for.

A question that came in from elsewhere and is passed on, by a router or a NAT gateway, is not one of
this machine: it is known by its id, name and type, which neither of them changes. A resolver on
this machine that serves others asks in its own name; whoever may use it has his names looked up
here, and this file can't tell.
"""

import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

from sniproxy_hostname import Hostname, InvalidHostname

__all__ = ["MOST_QUESTIONS", "PATIENCE", "Exchange", "Questions"]

# Seconds in which an answer must come. resolv.conf(5): a resolver waits for 5 s and then asks anew;
# others wait for up to 10 s.
PATIENCE: Final = 10.0

# Questions that are pending, of both sorts. Answered ones are gone, so that is 1,600 a second that
# get no answer. It must be more than the packets that the socket's queue can hold: a question that
# is passed on must not be forgotten before it leaves. One takes about 0.5 kB.
MOST_QUESTIONS: Final = 16_384

# RFC 1035 §4.1.1: id, flags, and the number of entries in each of the four sections.
_HEADER: Final = struct.Struct("!6H")
_QR_AND_OPCODE: Final = 0xF800
_RESPONSE: Final = 0x8000
_TC: Final = 0x0200

# Behind the name of a question: the type A or AAAA, and the class IN.
_WANTED: Final = (b"\0\1\0\1", b"\0\x1c\0\1")


class Exchange(NamedTuple):
    """Between whom a question and its answer go.

    Attributes:
        loopback: whether over a loopback interface. The answer has to come the way that the
            question went: on any other interface the kernel drops what claims to come from this
            machine, but not before it is seen here.
        client: the address that asks, packed.
        port: the port that it asks from.
        server: the address that answers, packed. Its port is 53.
    """

    loopback: bool
    client: bytes
    port: int
    server: bytes


# The id, and the question section.
_Question = tuple[int, bytes]
_Pending = tuple[Exchange, int, bytes]

_Key = TypeVar("_Key", _Pending, _Question)


class _Latest(Generic[_Key]):
    """What has been noted in the last `PATIENCE` seconds, and is no more than `most`."""

    def __init__(self, clock: Callable[[], float], most: int) -> None:
        self._clock = clock
        self._most = most
        self._noted: OrderedDict[_Key, float] = OrderedDict()  # and when, the latest last

    def __len__(self) -> int:
        return len(self._noted)

    def add(self, key: _Key) -> None:
        now = self._clock()
        noted = self._noted
        noted[key] = now
        noted.move_to_end(key)
        # Two, so that those that are over get fewer while one comes.
        for _ in range(2):
            if len(noted) > self._most or now - noted[next(iter(noted))] > PATIENCE:
                noted.popitem(last=False)

    def __contains__(self, key: _Key) -> bool:
        noted_at = self._noted.get(key)
        return noted_at is not None and self._clock() - noted_at <= PATIENCE

    def clear(self) -> None:
        self._noted.clear()

    def take(self, key: _Key) -> bool:
        """Forget it; return whether it was there."""
        noted_at = self._noted.pop(key, None)
        return noted_at is not None and self._clock() - noted_at <= PATIENCE


class Questions:
    """Questions that wait for their answers.

    Args:
        clock: seconds that never go back.
        most: how many are remembered, the latest.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, most: int = MOST_QUESTIONS
    ) -> None:
        self._pending: _Latest[_Pending] = _Latest(clock, most)
        self._from_elsewhere: _Latest[_Question] = _Latest(clock, most)

    def __len__(self) -> int:
        """Return how many questions are remembered that have got no answer."""
        return len(self._pending)

    def came_in(self, message: bytes) -> None:
        """Note a question that somebody else asks: if it goes out from here, it is passed on.

        Args:
            message: a DNS message that has come in, but not over loopback.
        """
        if (question := _read_question(message)) is not None:
            self._from_elsewhere.add(question)

    def asked(self, exchange: Exchange, message: bytes) -> bool:
        """Note a question that leaves this machine. One that is sent again waits anew.

        Returns:
            Whether its answer matters.
        """
        question = _read_question(message)
        if question is None or question in self._from_elsewhere:
            return False
        self._pending.add((exchange, *question))
        return True

    def forget(self) -> None:
        """Let no answer match any question that has been asked so far."""
        self._pending.clear()

    def is_answered_by(self, exchange: Exchange, message: bytes) -> bool:
        """Tell whether a message answers a question that is pending. Then that one is gone."""
        if len(message) < _HEADER.size:
            return False
        number, flags, questions, _, _, _ = _HEADER.unpack_from(message)
        if flags & _QR_AND_OPCODE != _RESPONSE or questions != 1:
            return False
        return self._pending.take((exchange, number, _question_section(message)))


def _question_section(message: bytes) -> bytes:
    """Return the one question of a message, in lower case; anything if it is not sound.

    It ends four bytes behind the first zero, which is the root's length octet: no hostname holds
    another one. Case folding changes neither a length octet, 63 at most, nor the types and the
    class that matter. Servers repeat the question as it was; one that put a pointer into its name
    would point to what comes later, which RFC 1035 §4.1.4 does not have.
    """
    return message[_HEADER.size : message.find(b"\0", _HEADER.size) + 5].lower()


def _read_question(message: bytes) -> _Question | None:
    """Return the id and the question section of a question that matters here."""
    if len(message) < _HEADER.size:
        return None
    number, flags, questions, answers, authorities, _ = _HEADER.unpack_from(message)
    if flags & (_QR_AND_OPCODE | _TC) or (questions, answers, authorities) != (1, 0, 0):
        return None
    section = _question_section(message)
    if not section.endswith(_WANTED) or not _is_hostname(section[:-4]):
        return None
    return number, section


def _is_hostname(wire: bytes) -> bool:
    """Tell whether `wire`, which holds no zero but for its end, is a name that can be learned."""
    labels = []
    at = 0
    while at < len(wire) and (length := wire[at]) != 0:
        labels.append(wire[at + 1 : at + 1 + length])
        at += 1 + length
    # A dot inside of a label is no separator: joined, it would be another name.
    if at != len(wire) - 1 or any(b"." in label for label in labels):
        return False
    try:
        Hostname(b".".join(labels))
    except InvalidHostname:
        return False
    return True
