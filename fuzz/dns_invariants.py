"""What must hold for every DNS message. As in `invariants.py`.

It is apart from that file, for it needs the package dnslib, and the other targets do not.
"""

from typing import Final, NamedTuple

from fuzz.invariants import _obeys_every_rule
from tls_tproxy.names.answers import LARGEST, MOST_CNAMES, MOST_POINTERS, Answer, read_answer
from tls_tproxy.names.questions import Exchange, Questions

__all__ = ["check_dns_answer"]

A, CNAME, OPT, AAAA, IN = 1, 5, 41, 28, 1

EXCHANGE: Final = Exchange(loopback=False, client=b"\x0a\0\0\1", port=1024, server=b"\x0a\0\0\2")

Labels = tuple[bytes, ...]


class Malformed(Exception):  # noqa: N818 - it says what the message is
    """The plain reader has given up."""


class Record(NamedTuple):
    """A resource record, with the target of a CNAME."""

    owner: Labels
    kind: int
    of_class: int
    ttl: int
    rdata: bytes
    target: Labels


def check_dns_answer(data: bytes) -> None:
    """A message: nothing is raised, and what is taken from it is what a plain reader finds."""
    read = read_answer(data)
    plain = _answer(data)
    assert (None if read is None else tuple(read)) == plain, f"{plain} in another way"
    if read is None:
        return
    assert _obeys_every_rule(read.name.encode()), "a name that is no hostname"
    assert len(data) <= LARGEST
    assert all(len(each.packed) == (4 if read.kind == A else 16) for each in read.addresses)
    _check_matching(data, read)


def _check_matching(data: bytes, read: Answer) -> None:
    """An answer belongs to its question, once, and to no other one."""
    question = _question(read.name, data[:2], read.kind)
    for other in (
        _question(read.name, bytes([data[0] ^ 1, data[1]]), read.kind),
        _question(read.name, data[:2], A + AAAA - read.kind),
        _question("x" + read.name[1:] if read.name[0] != "x" else "y", data[:2], read.kind),
    ):
        questions = Questions(lambda: 0)
        assert questions.asked(EXCHANGE, other), "a question does not matter"
        assert not questions.is_answered_by(EXCHANGE, data), "it answers another question"
    questions = Questions(lambda: 0)
    assert not questions.is_answered_by(EXCHANGE, data), "it answers what nobody asked"
    assert questions.asked(EXCHANGE, question), "the question does not matter"
    assert not questions.is_answered_by(EXCHANGE._replace(port=1025), data), "at another port"
    assert questions.is_answered_by(EXCHANGE, data), "it does not answer its question"
    assert not questions.is_answered_by(EXCHANGE, data), "it answers a second time"


def _question(name: str, number: bytes, kind: int) -> bytes:
    labels = [label.encode() for label in name.split(".")]
    wire = b"".join(bytes([len(label)]) + label for label in labels)
    return number + b"\1\0\0\1" + bytes(6) + wire + bytes([0, 0, kind, 0, IN])


def _answer(data: bytes) -> tuple[object, ...] | None:
    """Read a message once more, in no hurry and without any library."""
    try:
        return _read_plainly(data)
    except (Malformed, IndexError):
        return None


def _read_plainly(data: bytes) -> tuple[object, ...] | None:
    if len(data) < 12 or len(data) > LARGEST:
        return None
    flags, *counts = (_number(data, place, 2) for place in range(2, 12, 2))
    # QR and opcode 0; neither TC nor an rcode.
    if flags >> 11 != 0b10000 or flags & 0x020F or counts[0] != 1:
        return None
    asked, at = _name(data, 12)
    kind, of_class, at = _number(data, at, 2), _number(data, at + 2, 2), at + 4
    if of_class != IN or kind not in {A, AAAA} or _hostname(asked) is None:
        return None
    records = []
    for _ in range(sum(counts[1:])):
        record, at = _record(data, at)
        records.append(record)
    if at != len(data) or any(each.kind == OPT and each.ttl >> 24 for each in records):
        return None
    said = [each for each in records[: counts[1]] if each.of_class == IN]
    chain, ttls = [asked], [2**31 - 1]
    targets = {(each.owner, each.target) for each in said if each.kind == CNAME}
    if len({owner for owner, _ in targets}) < len(targets):
        return None
    while following := [each for each in said if (each.kind, each.owner) == (CNAME, chain[-1])]:
        chain.append(following[0].target)
        ttls.append(min(ttls[-1], _ttl(following[0])))
        if len(set(chain)) < len(chain) or len(chain) > MOST_CNAMES + 1:
            return None
    addresses = tuple(
        (each.rdata, min(_ttl(each), ttls[chain.index(each.owner)]), chain.index(each.owner))
        for each in said
        if each.kind == kind and each.owner in chain
    )
    if not addresses:
        return None
    return _hostname(asked), kind, tuple(map(_hostname, chain[1:])), addresses


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise Malformed
    return int.from_bytes(data[at : at + size], "big")


def _ttl(record: Record) -> int:
    return record.ttl if record.ttl < 2**31 else 0


def _name(data: bytes, at: int) -> tuple[Labels, int]:
    labels: list[bytes] = []
    begin, end, pointers = at, 0, 0
    while (length := data[at]) != 0:
        if length >= 0xC0:
            target = _number(data, at, 2) & 0x3FFF
            end = end or at + 2
            pointers += 1
            if target >= begin or pointers > MOST_POINTERS:
                raise Malformed
            at = begin = target
        elif length > 63 or at + 1 + length > len(data):
            raise Malformed
        else:
            labels.append(data[at + 1 : at + 1 + length].lower())
            at += 1 + length
            if sum(map(len, labels)) + len(labels) > 254:
                raise Malformed
    return tuple(labels), end or at + 1


def _record(data: bytes, at: int) -> tuple[Record, int]:
    owner, at = _name(data, at)
    kind, of_class = _number(data, at, 2), _number(data, at + 2, 2)
    ttl, length = _number(data, at + 4, 4), _number(data, at + 8, 2)
    begin, end = at + 10, at + 10 + length
    if end > len(data):
        raise Malformed
    target: Labels = ()
    if of_class == IN and kind == CNAME:
        target, behind = _name(data, begin)
        if behind != end:
            raise Malformed
    if of_class == IN and length != {A: 4, AAAA: 16}.get(kind, length):
        raise Malformed
    return Record(owner, kind, of_class, ttl, data[begin:end], target), end


def _hostname(labels: Labels) -> str | None:
    name = b".".join(labels)
    if any(b"." in label for label in labels) or not _obeys_every_rule(name):
        return None
    return name.decode()
