"""Wire bytes → Hostname: what is accepted, what is refused, and what having one proves."""

import os
import time
from pathlib import PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sniproxy_hostname import Hostname, InvalidHostname

LONGEST_LABEL = b"a" * 63
LONGEST_NAME = b".".join([LONGEST_LABEL, LONGEST_LABEL, LONGEST_LABEL, b"a" * 61])

EMPTY_LABEL = "a label is empty: the name begins with a dot, or two dots meet"
NUMBER = "the last label is a number, as in an IPv4 address, and an address is not a hostname"


@pytest.mark.parametrize(
    ("wire", "name"),
    [
        pytest.param(b"www.example.com", "www.example.com", id="as it is"),
        pytest.param(b"WWW.eXample.COM", "www.example.com", id="case folds"),
        pytest.param(b"example.com.", "example.com", id="one trailing dot goes"),
        pytest.param(b"localhost", "localhost", id="a single label"),
        pytest.param(b"a", "a", id="a single letter"),
        pytest.param(b"1.2.3.4.in-addr.arpa", "1.2.3.4.in-addr.arpa", id="numbers, not last"),
        pytest.param(b"3com.com", "3com.com", id="digit first"),
        pytest.param(b"example.4a", "example.4a", id="last label has a letter"),
        pytest.param(b"example.1-1", "example.1-1", id="last label has a hyphen"),
        pytest.param(b"r3---sn-abc.example", "r3---sn-abc.example", id="hyphens in a row"),
        pytest.param(b"XN--SR8HVO.ws", "xn--sr8hvo.ws", id="an A-label"),
        pytest.param(b"xn--a", "xn--a", id="no A-label, but the wire is not decoded"),
        pytest.param(b"foo_bar.one.example", "foo_bar.one.example", id="underscore inside"),
        pytest.param(b"A__B_-_C.example.", "a__b_-_c.example", id="underscores and capitals"),
        pytest.param(b"a.1_2", "a.1_2", id="no number, for its underscore"),
        pytest.param(LONGEST_LABEL, LONGEST_LABEL.decode(), id="63 bytes"),
        pytest.param(LONGEST_NAME, LONGEST_NAME.decode(), id="253 bytes"),
        pytest.param(LONGEST_NAME + b".", LONGEST_NAME.decode(), id="253 bytes and a dot"),
    ],
)
def test_accepted(wire: bytes, name: str) -> None:
    assert Hostname(wire) == name


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        pytest.param(b"", "the name is empty", id="empty"),
        pytest.param(b".", "the name is empty", id="the root"),
        pytest.param(b"..", EMPTY_LABEL, id="the parent directory"),
        pytest.param(b"example.com..", EMPTY_LABEL, id="two trailing dots"),
        pytest.param(b".example.com", EMPTY_LABEL, id="leading dot"),
        pytest.param(b"a..b", EMPTY_LABEL, id="dots meet"),
        pytest.param(b"../etc", EMPTY_LABEL, id="upwards"),
        pytest.param(b"a/b", "'/' is not allowed in a hostname", id="slash"),
        pytest.param(b"a\0b", r"'\x00' is not allowed in a hostname", id="NUL"),
        pytest.param(b"a b", "' ' is not allowed in a hostname", id="space"),
        pytest.param(b"_dns.example", "the label '_dns' begins with an underscore", id="_ first"),
        pytest.param(b"a.b_", "the label 'b_' ends with an underscore", id="_ last"),
        pytest.param(b"_.example", "the label '_' begins with an underscore", id="_ alone"),
        pytest.param(b"a.-_b", "the label '-_b' begins with a hyphen", id="hyphen before _"),
        pytest.param(b"a.b_-", "the label 'b_-' ends with a hyphen", id="hyphen behind _"),
        pytest.param(b"*.example.com", "'*' is not allowed in a hostname", id="wildcard"),
        pytest.param(b"[::1]", "'[' is not allowed in a hostname", id="IPv6 in brackets"),
        pytest.param(b"::1", "':' is not allowed in a hostname", id="IPv6"),
        pytest.param(b"a\n", r"'\n' is not allowed in a hostname", id="newline at the end"),
        pytest.param(
            b"a\n.example",
            r"'\n' is not allowed in a hostname",
            id="newline inside",
        ),
        pytest.param(
            b"a.\n",
            r"'\n' is not allowed in a hostname",
            id="newline after the dot",
        ),
        pytest.param("faß.de".encode(), r"'\xc3' is not allowed in a hostname", id="UTF-8"),
        pytest.param(
            "\N{KELVIN SIGN}".encode(),
            r"'\xe2' is not allowed in a hostname",
            id="a K to str.lower()",
        ),
        pytest.param(
            b"\xb2",
            r"'\xb2' is not allowed in a hostname",
            id="a digit to str.isdigit()",
        ),
        pytest.param(b"-a.example", "the label '-a' begins with a hyphen", id="hyphen first"),
        pytest.param(b"a-.example", "the label 'a-' ends with a hyphen", id="hyphen last"),
        pytest.param(b"a.-", "the label '-' begins with a hyphen", id="only a hyphen"),
        pytest.param(
            b"a" * 64,
            f"the label '{'a' * 64}' is 64 bytes long, and 63 is the most",
            id="64 bytes in a label",
        ),
        pytest.param(
            LONGEST_NAME + b"a", "the name is 254 bytes long, and 253 is the most", id="254 bytes"
        ),
        pytest.param(
            b"-" + b"a" * 62,
            f"the label '-{'a' * 62}' begins with a hyphen",
            id="63 bytes are not what is wrong with a label",
        ),
        pytest.param(
            LONGEST_NAME[:-1] + b"/",
            "'/' is not allowed in a hostname",
            id="253 bytes are not what is wrong with a name",
        ),
        pytest.param(b"127.0.0.1", NUMBER, id="IPv4"),
        pytest.param(b"127.0.0.1.", NUMBER, id="IPv4 and a dot"),
        pytest.param(b"127.1", NUMBER, id="IPv4, short"),
        pytest.param(b"2130706433", NUMBER, id="IPv4, one number"),
        pytest.param(b"example.1", NUMBER, id="number last"),
    ],
)
def test_refused(wire: bytes, reason: str) -> None:
    with pytest.raises(InvalidHostname) as caught:
        Hostname(wire)
    assert str(caught.value) == reason


@pytest.mark.parametrize("text", ["example.com", Hostname(b"example.com")])
def test_text_is_a_mistake_of_the_caller(text: str) -> None:
    with pytest.raises(TypeError):
        Hostname(text)  # type: ignore[arg-type]  # the mistake under test


def test_a_hostname_is_a_string_that_carries_nothing_more() -> None:
    name = Hostname(b"example.com")
    assert isinstance(name, str)
    assert not hasattr(name, "__dict__")


def check_is_one_safe_path_component(name: Hostname) -> None:
    assert name not in ("", ".", "..")
    assert "/" not in name
    assert "\0" not in name
    assert len(os.fsencode(name)) <= 253
    assert PurePosixPath("/hosts", name).parent == PurePosixPath("/hosts")
    assert PurePosixPath("/hosts", name).name == name


def check_is_readable(refusal: InvalidHostname) -> None:
    assert str(refusal).isprintable()


# Bytes at random are never names: these are nearly names.
nearly_names = st.lists(
    st.sampled_from([b"a", b"Z", b"0", b"9", b"-", b".", b"xn--", b"a" * 62, b"\n", b"_", b"/"]),
    max_size=20,
).map(b"".join)


@given(st.binary(max_size=300) | nearly_names)
@example(b".")
@example(b"..")
def test_any_bytes_are_a_safe_path_component_or_refused(wire: bytes) -> None:
    try:
        name = Hostname(wire)
    except InvalidHostname as refusal:
        check_is_readable(refusal)
    else:
        check_is_one_safe_path_component(name)
        assert name == wire.decode("ascii").lower().removesuffix(".")
        assert Hostname(name.encode()) == name


def obeys_every_rule(wire: bytes) -> bool:
    """The rules once more, one by one, as slowly as you like."""
    name = wire[:-1] if wire[-1:] == b"." else wire
    labels = name.split(b".")
    allowed = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return (
        1 <= len(name) <= 253
        and all(1 <= len(label) <= 63 for label in labels)
        and all(byte in allowed for label in labels for byte in label)
        and not any(label[0] in b"-_" or label[-1] in b"-_" for label in labels)
        and not all(byte in b"0123456789" for byte in labels[-1])
    )


@given(nearly_names)
def test_the_expression_and_the_rules_agree(wire: bytes) -> None:
    try:
        Hostname(wire)
        accepted = True
    except InvalidHostname:
        accepted = False
    assert accepted is obeys_every_rule(wire)


@pytest.mark.parametrize(
    "wire", [b"a" * 10**6, b"a." * 10**6, b"1" * 10**6, b"-" * 10**6, b"a-" * 126 + b"_"]
)
def test_hostile_names_are_refused_at_once(wire: bytes) -> None:
    start = time.process_time()
    with pytest.raises(InvalidHostname):
        Hostname(wire)
    assert time.process_time() - start < 0.1  # a hundred times what it takes
