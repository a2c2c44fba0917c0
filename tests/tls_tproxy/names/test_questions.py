"""Which answers belong to a question: every part of it counts."""

from typing import Any

import pytest

from tests.support import dns
from tests.support.dns import AAAA, RD, A, answering, asking, message, question
from tls_tproxy.names.questions import PATIENCE, Exchange, Questions

WWW = "www.example"
CLIENT, SERVER = b"\x0a\0\0\1", b"\x0a\0\0\2"
ENDS = Exchange(loopback=False, client=CLIENT, port=dns.PORT, server=SERVER)
GENUINE = answering(WWW, "192.0.2.1")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def questions(clock: Clock) -> Questions:
    """Return one pending question."""
    questions = Questions(clock)
    assert questions.asked(ENDS, asking(WWW))
    return questions


def answered(questions: Questions, said: bytes, **others: Any) -> bool:
    return questions.is_answered_by(ENDS._replace(**others), said)


def test_the_answer(questions: Questions) -> None:
    assert answered(questions, GENUINE)


def test_nothing_was_asked(clock: Clock) -> None:
    assert not answered(Questions(clock), GENUINE)


FORGED: dict[str, tuple[bytes, dict[str, Any]]] = {
    "another id": (answering(WWW, "192.0.2.1", number=dns.ID ^ 1), {}),
    "another name": (answering("wwv.example", "192.0.2.1"), {}),
    "a longer name": (answering("www.example.net", "192.0.2.1"), {}),
    "another type": (answering(WWW, "2001:db8::1", kind=AAAA), {}),
    "another class": (message([question(WWW, A, dns.CHAOS)]), {}),
    "a label with a dot": (message([question(b"\x0bwww.example\0")]), {}),
    "no question": (message([]), {}),
    "two questions": (message([question(WWW), question(WWW)]), {}),
    "a question": (asking(WWW), {}),
    "an update": (message([question(WWW)], flags=dns.ANSWER | 5 << 11), {}),
    "another port of the client": (GENUINE, {"port": dns.PORT + 1}),
    "another client": (GENUINE, {"client": b"\x0a\0\0\3"}),
    "another server": (GENUINE, {"server": b"\x0a\0\0\3"}),
    "another family": (GENUINE, {"client": bytes(16), "server": bytes(16)}),
    "over loopback": (GENUINE, {"loopback": True}),
    "empty": (b"", {}),
    "half a header": (GENUINE[:11], {}),
    "half a question": (GENUINE[:20], {}),
    "question without its class": (GENUINE[:28], {}),
}


@pytest.mark.parametrize(("said", "others"), FORGED.values(), ids=FORGED)
def test_a_forged_answer(questions: Questions, said: bytes, others: dict[str, Any]) -> None:
    assert not answered(questions, said, **others)
    assert answered(questions, GENUINE), "the question is gone"


@pytest.mark.parametrize("error", range(16))
def test_the_first_answer_that_matches_is_the_last(questions: Questions, error: int) -> None:
    # Also one that says no: whoever asks again sends another question.
    assert answered(questions, message([question(WWW)], flags=dns.ANSWER | error))
    assert not answered(questions, GENUINE)
    assert len(questions) == 0


def test_case_does_not_matter(questions: Questions) -> None:
    assert answered(questions, answering("WwW.eXAMPLE", "192.0.2.1"))
    assert questions.asked(ENDS, asking("wWW.exAMPLE"))
    assert answered(questions, GENUINE)


def test_it_is_too_late(questions: Questions, clock: Clock) -> None:
    clock.now += PATIENCE + 0.001
    assert not answered(questions, GENUINE)


def test_it_is_just_in_time(questions: Questions, clock: Clock) -> None:
    clock.now += PATIENCE
    assert answered(questions, GENUINE)


def test_a_question_sent_again(questions: Questions, clock: Clock) -> None:
    clock.now += 5
    assert questions.asked(ENDS, asking(WWW))
    assert len(questions) == 1
    clock.now += PATIENCE
    assert answered(questions, GENUINE)
    assert not answered(questions, GENUINE)


def test_a_question_sent_again_after_its_answer(questions: Questions) -> None:
    assert answered(questions, GENUINE)
    assert questions.asked(ENDS, asking(WWW))
    assert answered(questions, GENUINE)


def test_two_questions_with_one_id(questions: Questions) -> None:
    # glibc asks for both types from one port; here even with one id.
    assert questions.asked(ENDS, asking(WWW, AAAA))
    assert questions.asked(ENDS, asking("other.example"))
    assert answered(questions, answering(WWW, "2001:db8::1", kind=AAAA))
    assert answered(questions, GENUINE)
    assert answered(questions, answering("other.example", "192.0.2.1"))


NOT_TO_BE_LEARNED = {
    "an answer": GENUINE,
    "an update": message([question(WWW)], flags=RD | 5 << 11),
    "a truncated one": message([question(WWW)], flags=RD | dns.TC),
    "no question": message([], flags=RD),
    "two questions": message([question(WWW), question(WWW)], flags=RD),
    "with an answer": message([question(WWW)], [dns.record(WWW, A, "192.0.2.1")], flags=RD),
    "for text": asking(WWW, dns.TXT),
    "for anything": asking(WWW, 255),
    "of another class": message([question(WWW, A, dns.CHAOS)], flags=RD),
    "for the root": asking(""),
    "for no hostname": asking("_dmarc.example"),
    "for an address": asking("192.0.2.1"),
    "for a label with a dot": message([question(b"\x0bwww.example\0")], flags=RD),
    "for a label that ends late": message([question(b"\x0cwww.example\0")], flags=RD),
    "for a label of 64": message([question("a" * 64)], flags=RD),
    "with a pointer": message([question(b"\3www" + dns.pointer(12))], flags=RD),
    "empty": b"",
    "a header": asking(WWW)[:12],
    "without its class": message([question(WWW)], flags=RD)[:-1],
    # The root is missing: the first zero is the first byte of the type.
    "without an end of its name": message([b"\1a\0\1\0\1"], flags=RD),
}


@pytest.mark.parametrize("asked", NOT_TO_BE_LEARNED.values(), ids=NOT_TO_BE_LEARNED)
def test_a_question_that_does_not_matter(clock: Clock, asked: bytes) -> None:
    questions = Questions(clock)
    assert not questions.asked(ENDS, asked)
    questions.came_in(asked)
    assert len(questions) == 0


def test_what_is_passed_on_is_not_ours(clock: Clock) -> None:
    questions = Questions(clock)
    questions.came_in(asking(WWW))
    # From an address of ours, as a NAT gateway sends it.
    assert not questions.asked(ENDS, asking(WWW))
    assert not answered(questions, GENUINE)
    # Ours has another id, or is for another name.
    assert questions.asked(ENDS, asking(WWW, number=dns.ID ^ 1))
    assert questions.asked(ENDS, asking("other.example"))
    clock.now += PATIENCE + 0.001
    assert questions.asked(ENDS, asking(WWW))


def test_the_latest_are_remembered(clock: Clock) -> None:
    questions = Questions(clock, most=3)
    for number in range(5):
        assert questions.asked(ENDS, asking(WWW, number=number))
    assert len(questions) == 3
    matches = [answered(questions, answering(WWW, "192.0.2.1", number=each)) for each in range(5)]
    assert matches == [False, False, True, True, True]


def test_a_question_sent_again_is_the_latest(clock: Clock) -> None:
    questions = Questions(clock, most=3)
    for number in 1, 2, 3, 1, 4:
        assert questions.asked(ENDS, asking(WWW, number=number))
    matches = [answered(questions, answering(WWW, "192.0.2.1", number=each)) for each in range(5)]
    assert matches == [False, True, False, True, True]


def test_what_is_over_leaves_the_memory(clock: Clock) -> None:
    questions = Questions(clock)
    for number in range(100):
        assert questions.asked(ENDS, asking(WWW, number=number))
    clock.now += PATIENCE + 0.001
    for number in range(100, 150):
        assert questions.asked(ENDS, asking(WWW, number=number))
    assert len(questions) == 50
