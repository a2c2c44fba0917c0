"""What an answer says, and everything that makes it say nothing."""

from collections.abc import Callable
from itertools import permutations

import dnslib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import dns, strategies
from tests.support.dns import AAAA, CNAME, NS, OPT, TXT, A, message, name, pointer, question, record
from tls_tproxy.names.answers import LARGEST, MOST_CNAMES, MOST_POINTERS, Answer, read_answer

WWW = "www.example"


def addresses(read: Answer | None) -> list[bytes]:
    return [] if read is None else [each.packed for each in read.addresses]


def test_an_address() -> None:
    read = read_answer(dns.answering(WWW, "192.0.2.1", "192.0.2.2", ttl=7))
    assert read is not None
    assert (read.name, read.kind, read.aliases) == (WWW, A, ())
    assert read.addresses == ((b"\xc0\0\2\1", 7, 0), (b"\xc0\0\2\2", 7, 0))


def test_an_ipv6_address() -> None:
    read = read_answer(dns.answering(WWW, "2001:db8::1", kind=AAAA))
    assert addresses(read) == [b" \x01\r\xb8" + bytes(11) + b"\1"]


def label(text: str) -> dnslib.DNSLabel:
    # Not from text: dnslib would compare it with bytes, which `python -bb` forbids.
    return dnslib.DNSLabel([each for each in text.encode().split(b".") if each])


def test_what_dnslib_packs() -> None:
    asked = dnslib.DNSRecord(q=dnslib.DNSQuestion(label("WWW.Example"), AAAA))
    answer = asked.reply()
    alias = dnslib.CNAME(label("a.example"))
    answer.add_answer(dnslib.RR(label(WWW), CNAME, ttl=60, rdata=alias))
    answer.add_answer(dnslib.RR(label("a.example"), AAAA, ttl=7, rdata=dnslib.AAAA("2001:db8::1")))
    answer.add_ar(dnslib.EDNS0(label(""), udp_len=4096))
    read = read_answer(answer.pack())
    assert read is not None
    assert (read.name, read.aliases) == (WWW, ("a.example",))
    assert [(each.ttl, each.aliases) for each in read.addresses] == [(7, 1)]


CHAIN = [
    record(WWW, CNAME, "a.example", 100),
    record("a.example", CNAME, "b.example.net", 5),
    record("b.example.net", A, "192.0.2.1", 50),
    record("b.example.net", A, "192.0.2.2", 2),
]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_a_chain_in_any_order(order: tuple[int, ...]) -> None:
    read = read_answer(message([question(WWW)], [CHAIN[at] for at in order]))
    assert read is not None
    assert (read.name, read.aliases) == (WWW, ("a.example", "b.example.net"))
    assert sorted(read.addresses) == [(b"\xc0\0\2\1", 5, 2), (b"\xc0\0\2\2", 2, 2)]


def test_case_does_not_matter() -> None:
    records = [record("wWw.example", CNAME, "A.eXample"), record("a.EXAMPLE", A, "192.0.2.1")]
    read = read_answer(message([question("WWW.Example")], records))
    assert read is not None
    assert (read.name, read.aliases) == (WWW, ("a.example",))


def test_compression() -> None:
    # The question's name is at 12, and its "example" at 16.
    records = [
        record(pointer(12), CNAME, b"\1a" + pointer(16)),
        record(b"\1a" + pointer(16), A, "192.0.2.1"),
    ]
    read = read_answer(message([question(WWW)], records))
    assert read is not None
    assert (read.name, read.aliases, addresses(read)) == (WWW, ("a.example",), [b"\xc0\0\2\1"])


@pytest.mark.parametrize("ttl", [2**31, 2**32 - 1])
def test_a_ttl_with_the_highest_bit_is_zero(ttl: int) -> None:
    read = read_answer(dns.answering(WWW, "192.0.2.1", ttl=ttl))
    assert read is not None
    assert read.addresses[0].ttl == 0


def test_an_alias_that_is_no_hostname() -> None:
    records = [record(WWW, CNAME, "*.example"), record("*.example", A, "192.0.2.1")]
    read = read_answer(message([question(WWW)], records))
    assert read is not None
    assert (read.aliases, addresses(read)) == ((None,), [b"\xc0\0\2\1"])


def chain_of(count: int) -> bytes:
    owners = [WWW, *(f"{number}.example" for number in range(count))]
    records = [record(owners[at], CNAME, owners[at + 1]) for at in range(count)]
    return message([question(WWW)], [*records, record(owners[-1], A, "192.0.2.1")])


def test_the_longest_chain() -> None:
    assert addresses(read_answer(chain_of(MOST_CNAMES))) == [b"\xc0\0\2\1"]
    assert read_answer(chain_of(MOST_CNAMES + 1)) is None


OK = record(WWW, A, "192.0.2.1")
OTHER = record("other.example", A, "192.0.2.66")
SOA_LIKE = record("example", NS, "ns.example")

# What else may be in an answer, of which nothing is taken.
BESIDE = {
    "another owner": message([question(WWW)], [OTHER, OK]),
    "a chain of another owner": message(
        [question(WWW)], [record("other.example", CNAME, WWW), OTHER, OK]
    ),
    "another class": message(
        [question(WWW)], [OK, record(WWW, A, "192.0.2.66", of_class=dns.CHAOS)]
    ),
    "a CNAME of another class": message(
        [question(WWW)],
        [OK, OTHER, record(WWW, CNAME, "other.example", of_class=dns.CHAOS)],
    ),
    "another type": message([question(WWW)], [OK, record(WWW, AAAA, "2001:db8::66")]),
    "text": message([question(WWW)], [record(WWW, TXT, b"\xff\0\xff"), OK]),
    "empty": message([question(WWW)], [record(WWW, TXT, b""), OK]),
    "authority": message([question(WWW)], [OK], authorities=[record(WWW, A, "192.0.2.66")]),
    "additional": message([question(WWW)], [OK], additionals=[record(WWW, A, "192.0.2.66")]),
    "a CNAME in the authority section": message(
        [question(WWW)], [OK, OTHER], authorities=[record(WWW, CNAME, "other.example")]
    ),
    # RFC 6891 §6.1.3: version 0, and the flag DO, in what is the TTL of others.
    "EDNS with a flag": message([question(WWW)], [OK], additionals=[record("", OPT, b"", 0x8000)]),
    "the same CNAME twice": message(
        [question(WWW)], [record(WWW, CNAME, "a.example"), record(WWW, CNAME, "A.example"), OK]
    ),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_is_beside_is_not_taken(beside: bytes) -> None:
    read = read_answer(beside)
    assert read is not None
    assert (read.name, addresses(read)) == (WWW, [b"\xc0\0\2\1"])


def at(offset: int, after: bytes) -> bytes:
    """Return an answer whose one record begins with a name at `offset`."""
    made = message([question(WWW)], [after])
    assert made.index(after) == offset
    return made


# Where the first record begins.
FIRST = 12 + len(question(WWW))
LONGEST = ".".join(["a" * 63] * 3 + ["a" * 61])

NOTHING = {
    "empty": b"",
    "half a header": dns.answering(WWW, "192.0.2.1")[:11],
    "a header alone": dns.answering(WWW, "192.0.2.1")[:12],
    "a question": message([question(WWW)], [OK], flags=dns.RD),
    "opcode STATUS": message([question(WWW)], [OK], flags=dns.ANSWER | 2 << 11),
    "opcode UPDATE": message([question(WWW)], [OK], flags=dns.ANSWER | 5 << 11),
    "SERVFAIL": message([question(WWW)], [OK], flags=dns.ANSWER | 2),
    "NXDOMAIN": message([question(WWW)], [OK], flags=dns.ANSWER | 3),
    "an extended rcode": message(
        [question(WWW)], [OK], additionals=[record("", OPT, b"", 1 << 24)]
    ),
    "truncated": message([question(WWW)], [OK], flags=dns.ANSWER | dns.TC),
    "no question": message([], [OK]),
    "two questions": message([question(WWW), question("other.example")], [OK]),
    "class CHAOS": message([question(WWW, A, dns.CHAOS)], [OK]),
    "type ANY": message([question(WWW, 255)], [OK]),
    "type CNAME": message([question(WWW, CNAME)], [record(WWW, CNAME, "a.example"), OK]),
    "no answers": message([question(WWW)]),
    "an alias alone": message([question(WWW)], [record(WWW, CNAME, "a.example")]),
    "another owner alone": message([question(WWW)], [OTHER]),
    "AAAA to a question for A": message([question(WWW)], [record(WWW, AAAA, "2001:db8::1")]),
    "A to a question for AAAA": message([question(WWW, AAAA)], [OK]),
    "authority alone": message([question(WWW)], authorities=[OK]),
    "additional alone": message([question(WWW)], additionals=[OK]),
    "an alias of itself": message([question(WWW)], [record(WWW, CNAME, WWW), OK]),
    "a circle of aliases": message(
        [question(WWW)], [record(WWW, CNAME, "a.example"), record("a.example", CNAME, WWW), OK]
    ),
    "two aliases of one name": message(
        [question(WWW)], [record(WWW, CNAME, "a.example"), record(WWW, CNAME, "b.example"), OK]
    ),
    "the name of the root": message([question("")], [record("", A, "192.0.2.1")]),
    "a name that is no hostname": message([question("*.a")], [record("*.a", A, "192.0.2.1")]),
    "an address as a name": message([question("1.2.3.4")], [record("1.2.3.4", A, "192.0.2.1")]),
    "a dot in a label": message(
        [question(b"\x0bwww.example\0")], [record(b"\x0bwww.example\0", A, "192.0.2.1")]
    ),
    "a zero in a label": message([question(b"\2a\0\0")], [record(b"\2a\0\0", A, "192.0.2.1")]),
    "a dot in a label of the owner": message(
        [question(WWW)], [record(b"\x0bwww.example\0", A, "192.0.2.1")]
    ),
    "trailing bytes": message([question(WWW)], [OK], trailing=b"\0"),
    "a record more": message([question(WWW)], [OK], trailing=OK),
    "one record announced too many": message([question(WWW)], [OK], counts=(1, 2, 0, 0)),
    "65535 records announced": message([question(WWW)], [OK], counts=(1, 65535, 0, 0)),
    "65535 of all sorts announced": message([question(WWW)], [OK], counts=(65535,) * 4),
    "an address of 3 bytes": message([question(WWW)], [OK, record(WWW, A, b"abc")]),
    "an address of 5 bytes": message([question(WWW)], [OK, record(WWW, A, b"abcde")]),
    "an address of 0 bytes": message([question(WWW)], [OK, record(WWW, A, b"")]),
    "RDLENGTH beyond the end": message([question(WWW)], [record(WWW, TXT, b"", length=1)]),
    "RDLENGTH that swallows the next record": message(
        [question(WWW)], [record(WWW, TXT, b"", length=len(OK)), OK], counts=(1, 2, 0, 0)
    ),
    "an alias longer than its RDLENGTH": message(
        [question(WWW)], [record(WWW, CNAME, name("a.example"), length=3), OK]
    ),
    "an alias shorter than its RDLENGTH": message(
        [question(WWW)], [record(WWW, CNAME, name("a.example") + b"\0"), OK]
    ),
    "a pointer to itself": at(FIRST, record(pointer(FIRST), A, "192.0.2.1")),
    "a pointer forwards": at(FIRST, record(pointer(FIRST + 2), A, "192.0.2.1")),
    "a pointer beyond the end": at(FIRST, record(pointer(0x3FFF), A, "192.0.2.1")),
    "half a pointer": message([question(WWW)], [OK, b"\xc0"], counts=(1, 2, 0, 0)),
    "a pointer to the begin of its own name": at(
        FIRST, record(b"\1a" + pointer(FIRST), A, "192.0.2.1")
    ),
    # It jumps over the first pointer, of which the second byte is the length of a label.
    "pointers in a circle of two": at(
        FIRST, pointer(FIRST + 1) + b"x" * (FIRST + 1) + pointer(FIRST) + b"\0" * 14
    ),
    "a label type 01": at(FIRST, record(b"\x41" + b"a" * 0x41 + b"\0", A, "192.0.2.1")),
    "a label type 10": at(FIRST, record(b"\x81" + b"a" * 0x81 + b"\0", A, "192.0.2.1")),
    "a name of 256 bytes": message([question(WWW)], [OK, record(f"{LONGEST}a", A, "192.0.2.1")]),
    "too large": message([question(WWW)], [OK, record(WWW, TXT, bytes(LARGEST))]),
}


@pytest.mark.parametrize("said", NOTHING.values(), ids=NOTHING)
def test_nothing_is_taken(said: bytes) -> None:
    assert read_answer(said) is None


def test_every_message_that_ends_early() -> None:
    whole = message([question(WWW)], CHAIN, authorities=[SOA_LIKE])
    assert read_answer(whole) is not None
    assert all(read_answer(whole[:end]) is None for end in range(len(whole)))


def test_the_longest_name() -> None:
    read = read_answer(message([question(LONGEST)], [record(pointer(12), A, "192.0.2.1")]))
    assert read is not None
    assert read.name == LONGEST


@pytest.mark.parametrize(("count", "counts"), [(MOST_POINTERS, True), (MOST_POINTERS + 1, False)])
def test_pointers_to_pointers(count: int, counts: bool) -> None:
    # In the RDATA of a text, each to the one before; the first to the question's name.
    begin = FIRST + len(record(WWW, TXT, b""))
    pointers = [pointer(12), *(pointer(begin + 2 * number) for number in range(count - 1))]
    records = [record(WWW, TXT, b"".join(pointers[:-1])), record(pointers[-1], A, "192.0.2.1")]
    assert (read_answer(message([question(WWW)], records)) is not None) is counts


def test_the_largest() -> None:
    filled = record(WWW, TXT, bytes(LARGEST - len(dns.answering(WWW, "192.0.2.1")) - 23))
    largest = message([question(WWW)], [OK, filled])
    assert len(largest) == LARGEST
    assert read_answer(largest) is not None


def worst() -> bytes:
    """As many names as there can be, each as long as it can be, over as many pointers."""
    labels = b"\1a" * 100 + b"\0"
    begin = FIRST + len(record(WWW, TXT, b""))
    chain = [pointer(begin + len(labels) + 2 * number) for number in range(MOST_POINTERS - 2)]
    text = labels + pointer(begin) + b"".join(chain)
    made = [record(WWW, TXT, text)]
    while len(message([], made)) < LARGEST - 100:
        made.append(record(chain[-1], TXT, b""))
    return message([question(WWW)], [*made, OK])


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    get: Callable[[dnslib.buffer.Buffer, int], bytes] = dnslib.buffer.Buffer.get

    def counting(buffer: dnslib.buffer.Buffer, length: int) -> bytes:
        nonlocal taken
        taken += 1
        return get(buffer, length)

    monkeypatch.setattr(dnslib.buffer.Buffer, "get", counting)
    said = worst()
    assert addresses(read_answer(said)) == [b"\xc0\0\2\1"]
    # Each record has one name, of 127 labels at most, each taken in two pieces.
    assert taken < LARGEST / 12 * 300


labels = st.sampled_from(["a", "b", "C", "example", "*", "x" * 63])
names = st.lists(labels, max_size=3).map(".".join)
records = st.builds(record, names, st.just(CNAME), names) | st.builds(
    record, names, st.just(A), st.sampled_from(["192.0.2.1", "192.0.2.2"])
)


@strategies.steady
@given(names, st.lists(records, max_size=6))
def test_an_address_is_reached_from_the_question(asked: str, said: list[bytes]) -> None:
    whole = message([question(asked)], said)
    read = read_answer(whole)
    if read is None:
        return
    assert read.name == asked.lower()
    parsed = dnslib.DNSRecord.parse(whole)
    known = {asked.lower()}
    for _ in said:
        known |= {
            str(each.rdata).lower().rstrip(".")
            for each in parsed.rr
            if each.rtype == CNAME and str(each.rname).lower().rstrip(".") in known
        }
    reached = [
        bytes(each.rdata.data)
        for each in parsed.rr
        if each.rtype == A and str(each.rname).lower().rstrip(".") in known
    ]
    assert addresses(read) == reached
