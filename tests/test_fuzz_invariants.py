"""The fuzz targets' invariants: for every file of the corpus, and for inputs made to get far."""

# ruff: noqa: RUF001 - characters that look like others have rules of their own

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import dns_invariants, invariants, rule_invariants
from tests.support import dns, hellos, strategies

CORPUS = Path(__file__).parent.parent / "fuzz" / "corpus"


def check_typed_bytes(data: bytes) -> None:
    invariants.check_typed(data.decode("utf-8", "surrogateescape"))


CHECKS: dict[str, Callable[[bytes], None]] = {
    "hello": invariants.check_hello,
    "hostname": invariants.check_hostname,
    "typed": check_typed_bytes,
    "proxy_header": invariants.check_proxy_header,
    "rule": rule_invariants.check_rule,
    "dns_answer": dns_invariants.check_dns_answer,
}
FILES = [path.relative_to(CORPUS) for path in sorted(CORPUS.glob("*/*"))]


def test_every_target_has_its_corpus() -> None:
    assert {path.parts[0] for path in FILES} == set(CHECKS)
    assert {path.stem for path in CORPUS.parent.glob("fuzz_*.py")} == {f"fuzz_{t}" for t in CHECKS}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_corpus(path: Path) -> None:
    CHECKS[path.parts[0]]((CORPUS / path).read_bytes())


# Reading one hello in every way is a hundred reads: fewer examples than usual.
few = settings(strategies.steady, max_examples=50)


@few
@given(st.data())
def test_a_spoilt_hello(data: st.DataObject) -> None:
    stream = data.draw(strategies.streams())
    invariants.check_hello(stream)
    invariants.check_hello(data.draw(strategies.mutations(stream)))


@few
@given(st.data())
def test_a_spoilt_message_in_sound_records(data: st.DataObject) -> None:
    body = hellos.hello_body("a.example", protocols=["h2"])
    message = hellos.handshake(data.draw(strategies.mutations(body)))
    invariants.check_hello(hellos.records(message, data.draw(strategies.sizes)))


# Characters that have rules of their own, and a few that have none.
nearly_names = st.text("aZ09-.\n_/\0ßÄ\u00ad\u0301\u200dא1≠。ｘ", max_size=20)
long_names = st.lists(st.sampled_from(["a" * 62, "b", "-", ".", "1", "xn--"]), max_size=12)


@strategies.steady
@given(nearly_names | long_names.map("".join))
def test_a_name_from_anywhere(text: str) -> None:
    invariants.check_hostname(text.encode())
    invariants.check_hostname(text.encode("latin-1", "replace"))
    invariants.check_typed(text)


@strategies.steady
@given(st.text(st.characters(min_codepoint=0x80), min_size=1, max_size=5))
def test_an_a_label(text: str) -> None:
    punycode = text.encode("punycode", "surrogatepass").decode("ascii")
    invariants.check_typed(f"xn--{punycode}.example")


# Whole inputs, from the parts of the layout: most bytes at random would be addresses of no family.
spellings = st.sampled_from([bytes([kind]) for kind in range(8)])
packed = st.binary(min_size=16, max_size=16) | st.binary(min_size=4, max_size=4).map(
    lambda ipv4: bytes(10) + b"\xff\xff" + ipv4
)
ends = st.tuples(spellings, packed, st.binary(min_size=2, max_size=2)).map(b"".join)
texts = st.binary(max_size=10) | st.sampled_from([b"eth0", b"192.0.2.1", b"::1", b"::1\r\n"])


@strategies.steady
@given(ends, ends, texts)
def test_addresses(source: bytes, destination: bytes, text: bytes) -> None:
    invariants.check_proxy_header(source + destination + text)


# A rule and a name that is nearly one whom it admits: of the same parts, in the same order.
parts = st.sampled_from(
    ["a", "B", "*", "**", "", ".", "..", "%61", "a*", "xn--a", "\0", "\u00fc", "1", "\u212a"]
)
prefixes = st.sampled_from(["spiffe://a/", "spiffe://", "cn:", "pin-sha256:", "", "*.", "1.2.3."])


@strategies.steady
@given(prefixes, st.sampled_from("./"), st.lists(parts, max_size=4), st.data())
def test_a_rule_and_a_name(prefix: str, dot: str, pieces: list[str], data: st.DataObject) -> None:
    others = [data.draw(st.just(piece) | parts) for piece in pieces]
    names = data.draw(st.sampled_from([prefix, "*.", "", "spiffe://a/"])) + dot.join(others)
    rule = prefix + dot.join(pieces)
    rule_invariants.check_rule(f"{rule}\n{names}".encode())
    rule_invariants.check_rule(f"{rule}\n{names}\n{rule}".encode())


# Answers of few names, so that they often lead to each other, by pointers too.
dns_names = st.sampled_from(["a", "B", "a.b", "", "*"]).map(dns.name) | st.builds(
    lambda label, at: label + dns.pointer(at), st.sampled_from([b"", b"\1a"]), st.integers(0, 60)
)
dns_records = st.builds(
    dns.record,
    dns_names,
    st.sampled_from([dns.A, dns.CNAME, dns.CNAME, dns.AAAA, dns.TXT, dns.OPT]),
    dns_names | st.binary(max_size=5) | st.just(bytes(4)) | st.just(bytes(16)),
    st.sampled_from([0, 300, 2**31]),
)
dns_questions = st.builds(dns.question, dns_names, st.sampled_from([dns.A, dns.AAAA]))


@strategies.steady
@given(
    dns_questions,
    st.lists(dns_records, max_size=5),
    st.lists(dns_records, max_size=2),
    st.data(),
)
def test_a_dns_answer(
    question: bytes, answers: list[bytes], others: list[bytes], data: st.DataObject
) -> None:
    message = dns.message([question], answers, additionals=others)
    dns_invariants.check_dns_answer(message)
    dns_invariants.check_dns_answer(data.draw(strategies.mutations(message)))
