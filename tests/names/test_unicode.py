"""What a person types → Hostname: UTS #46, and nothing but InvalidHostname when it fails."""

# ruff: noqa: RUF001 - characters that look like others are what these tests are about

import contextlib
import sys
import time
import unicodedata

import idna
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sniproxy_hostname import Hostname, InvalidHostname
from sniproxy_hostname._unicode import from_unicode

EMPTY_LABEL = "a label is empty: the name begins with a dot, or two dots meet"
LONGEST_NAME = ".".join(["a" * 63] * 3 + ["a" * 61])
NUMBER = "the last label is a number, as in an IPv4 address, and an address is not a hostname"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        pytest.param("🕸💍.ws", "xn--sr8hvo.ws", id="emoji"),
        pytest.param("xn--sr8hvo.ws", "xn--sr8hvo.ws", id="an A-label"),
        pytest.param("XN--SR8HVO.WS", "xn--sr8hvo.ws", id="an A-label in capitals"),
        pytest.param("ｘn--sr8hvo.ws", "xn--sr8hvo.ws", id="an A-label after mapping"),
        pytest.param("faß.de", "xn--fa-hia.de", id="sharp s is kept"),
        pytest.param("FAẞ.de", "xn--fa-hia.de", id="capital sharp s"),
        pytest.param("EXAMPLE.com.", "example.com", id="ASCII"),
        pytest.param("Bücher.example", "xn--bcher-kva.example", id="capital and umlaut"),
        pytest.param("Bu\u0308cher.example", "xn--bcher-kva.example", id="decomposed"),
        pytest.param("例え。テスト．", "xn--r8jz45g.xn--zckzah", id="ideographic dots"),
        pytest.param("ｅｘａｍｐｌｅ．ｃｏｍ", "example.com", id="fullwidth"),
        pytest.param("exam\u00adple.com", "example.com", id="soft hyphen is ignored"),
        pytest.param("r3---sn-abc.example", "r3---sn-abc.example", id="-- in ASCII"),
        pytest.param("ab--ß", "xn--ab---yna", id="-- in Unicode"),
        pytest.param("क्\u200dष.example", "xn--11b2ezcw70k.example", id="joiner after virama"),
        pytest.param("نامه\u200cای.com", "xn--mgba3gch31f060k.com", id="non-joiner, Persian"),
        pytest.param("א1.example", "xn--1-zhc.example", id="right to left"),
        pytest.param("א.", "xn--4db", id="right to left and a trailing dot"),
        pytest.param("a_b.example", "a_b.example", id="underscore"),
        pytest.param("ß_ß.example", "xn--_-pfab.example", id="underscore beside Unicode"),
        pytest.param("xn--_-pfab.example", "xn--_-pfab.example", id="underscore in an A-label"),
        pytest.param("a\N{FULLWIDTH LOW LINE}b", "a_b", id="fullwidth underscore"),
        pytest.param("\u00ad" * 1023 + "a", "a", id="1024 characters that mean one"),
        pytest.param(LONGEST_NAME + ".", LONGEST_NAME, id="253 bytes and a dot"),
    ],
)
def test_accepted(typed: str, name: str) -> None:
    assert from_unicode(typed) == name


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        # What Hostname refuses is refused after mapping too.
        pytest.param("", "the name is empty", id="empty"),
        pytest.param("\u00ad", "the name is empty", id="nothing but a soft hyphen"),
        pytest.param("a。。b", EMPTY_LABEL, id="dots meet"),
        pytest.param("example。.", EMPTY_LABEL, id="two trailing dots"),
        pytest.param("_a.example", "the label '_a' begins with an underscore", id="_ first"),
        pytest.param(
            "ß_.example",
            r"the label '\xdf_' begins or ends with - or _",
            id="_ last beside Unicode",
        ),
        pytest.param(
            "xn--__-gia",
            r"the label '_\xdf_' begins or ends with - or _",
            id="A-label of _ß_",
        ),
        pytest.param("ａ／ｂ", "'/' is not allowed in a hostname", id="fullwidth slash"),
        pytest.param("℀", "'/' is not allowed in a hostname", id="a slash made by mapping"),
        pytest.param("a b", "' ' is not allowed in a hostname", id="space"),
        pytest.param(
            "a\u00a0b",
            "' ' is not allowed in a hostname",
            id="a space made by mapping",
        ),
        pytest.param("１２７.0.0.1", NUMBER, id="fullwidth IPv4"),
        pytest.param(
            "a" * 64,
            f"the label '{'a' * 64}' is 64 bytes long, and 63 is the most",
            id="a label of 64",
        ),
        pytest.param(
            "ä" * 60,
            f"the label 'xn--4c{'a' * 60}' is 66 bytes long, and 63 is the most",
            id="a label of 60, in Punycode",
        ),
        # Punycode.
        pytest.param(
            "xn--", "the label 'xn--' has no character that needs Punycode", id="A-label of nothing"
        ),
        pytest.param(
            "xn--abc-",
            "the label 'xn--abc-' has no character that needs Punycode",
            id="A-label of ASCII",
        ),
        pytest.param(
            "xn--0", "the label 'xn--0' is not valid Punycode", id="Punycode that ends too soon"
        ),
        pytest.param(
            "xn--ß", r"the label 'xn--\xdf' is not valid Punycode", id="Punycode in Unicode"
        ),
        pytest.param(
            "xn---bbk",
            "the label 'xn---bbk' does not encode back to itself",
            id="second spelling of xn--bbk",
        ),
        pytest.param(
            "xn--kkg",
            r"the label '\u1e9e' is not in its mapped and normalised form",
            id="A-label of a capital",
        ),
        pytest.param(
            "xn--ux-uub",
            r"the label 'u\u0308x' is not in its mapped and normalised form",
            id="A-label not in NFC",
        ),
        pytest.param("xn--1ch", r"'\u2260' is not allowed in a hostname", id="A-label of ≠"),
        pytest.param(
            "xn----qfa",
            r"the label '-\xdf' begins or ends with - or _",
            id="A-label of -ß",
        ),
        pytest.param(
            "xn--xn---epa",
            r"the label 'xn--\xe9' was decoded, and begins with xn-- again",
            id="A-label of an A-label",
        ),
        # Characters and their order.
        pytest.param(
            "-ß",
            r"the label '-\xdf' begins or ends with - or _",
            id="hyphen first",
        ),
        pytest.param(
            "ß-",
            r"the label '\xdf-' begins or ends with - or _",
            id="hyphen last",
        ),
        pytest.param("ß\0", r"'\x00' is not allowed in a hostname", id="NUL"),
        pytest.param("≠", r"'\u2260' is not allowed in a hostname", id="≠"),
        pytest.param("≮", r"'\u226e' is not allowed in a hostname", id="≮"),
        pytest.param("≯", r"'\u226f' is not allowed in a hostname", id="≯"),
        pytest.param("=\u0338", r"'\u2260' is not allowed in a hostname", id="≠ in two parts"),
        pytest.param(
            "a\u200db",
            r"'\u200d' joins nothing at its place in 'a\u200db'",
            id="joiner between letters",
        ),
        pytest.param(
            "a\u200cb",
            r"'\u200c' joins nothing at its place in 'a\u200cb'",
            id="non-joiner between letters",
        ),
        pytest.param(
            "👩\u200d💻",
            r"'\u200d' joins nothing at its place in '\U0001f469\u200d\U0001f4bb'",
            id="joiner between emoji",
        ),
        pytest.param(
            "\U00017000\u200d",
            r"'\u200d' joins nothing at its place in '\U00017000\u200d'",
            id="joiner after Tangut",
        ),
        # Length.
        pytest.param(
            ".".join(["a" * 63] * 4), "the name is longer than 253 bytes", id="255 characters"
        ),
        pytest.param(
            "\ufdfa" * 100, "the name is longer than 253 bytes", id="mapping makes it long"
        ),
        pytest.param(
            "a" * 1025,
            "the name is 1025 characters long, far more than any name",
            id="more than anyone types",
        ),
    ],
)
def test_refused(typed: str, reason: str) -> None:
    with pytest.raises(InvalidHostname) as caught:
        from_unicode(typed)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        pytest.param("xn--a", "U+0080 not allowed", id="A-label of a control character"),
        pytest.param("xn--ib9b", "U+D800 not allowed", id="A-label of a surrogate"),
        pytest.param("xn--a-wbb", "combining character", id="A-label with a mark first"),
        pytest.param("\u0301a", "combining character", id="mark first"),
        pytest.param("\ud800", "U+D800 not allowed", id="surrogate"),
        pytest.param("a\u2024b", "U+2024 not allowed", id="one dot leader"),
        pytest.param("אa.example", "direction", id="both directions in a label"),
        pytest.param("1a.א", "First codepoint", id="digit first beside Hebrew"),
        pytest.param("1a.xn--4db", "First codepoint", id="digit first beside Hebrew's A-label"),
        pytest.param("1a.ا", "First codepoint", id="digit first beside Arabic"),
        pytest.param("١.example", "First codepoint", id="Arabic digit first"),
    ],
)
def test_refused_by_idna_in_its_own_words(typed: str, reason: str) -> None:
    with pytest.raises(InvalidHostname) as caught:
        from_unicode(typed)
    assert reason in str(caught.value)
    assert isinstance(caught.value.__cause__, idna.IDNAError)


def test_a_digit_may_begin_a_label_where_nothing_runs_right_to_left() -> None:
    assert from_unicode("1a.ß") == "1a.xn--zca"


def too_new_for_python() -> str | None:
    """A character that is valid by idna's tables and that Python's do not have."""
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character) == "Cn":
            with contextlib.suppress(idna.IDNAError):
                if idna.uts46_remap(character) == character:
                    return character
    return None


def test_a_character_unknown_to_python_is_refused() -> None:
    if (character := too_new_for_python()) is None:
        pytest.skip("this Python knows every character that idna knows")
    with pytest.raises(InvalidHostname) as caught:
        from_unicode(character)
    version = unicodedata.unidata_version
    assert str(caught.value) == f"{character!a} is unknown to Unicode {version}, this Python's"


# A name from random characters is nearly always refused for its first odd one. So: few
# alphabets, mixed, with the characters that have rules of their own.
special = "-.ßς≠\u00ad\u0300\u0301\u0338\u093f\u094d\u200c\u200dא1١۱a=_。ｘｎ"
anything = st.characters(exclude_categories=())
characters = st.sampled_from(special) | st.characters(max_codepoint=0x24F) | anything
a_labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", max_size=12).map("xn--{}".format)
encoded = st.text(st.characters(min_codepoint=0x80), min_size=1, max_size=5).map(
    lambda text: "xn--" + text.encode("punycode").decode("ascii")
)
typed_names = st.text(characters, max_size=30) | a_labels | encoded


def check_is_readable(refusal: InvalidHostname) -> None:
    assert str(refusal).isprintable()


@given(typed_names)
@example("\ud800")
@example("\0")
@example("xn--\ud800")
@example("xn--99999999")
@example("\u200d")
def test_any_text_is_a_fixed_point_or_refused(typed: str) -> None:
    try:
        name = from_unicode(typed)
    except InvalidHostname as refusal:
        check_is_readable(refusal)
    else:
        assert from_unicode(name) == name
        assert Hostname(name.encode()) == name


# Letters of one alphabet make labels that idna mostly accepts, whichever letters they are.
alphabets = [
    "a0-ÀöÿŠſ",
    "Αασςώ",
    "Жжйђ",
    "אבת1",
    "ابپ\u200c",
    "कष\u094d\u200d",
    "一龥々",
    "ｆＡ９ﬁ",
]
one_label = st.sampled_from(alphabets).flatmap(lambda letters: st.text(letters, min_size=1))


@given(one_label | encoded)
@example("faß")
@example("xn--fa-hia")
def test_what_strict_idna_accepts_is_the_same_name_here(typed: str) -> None:
    # One label beside a Latin one: idna checks the direction label by label, we check the name's.
    name = f"{typed}.example"
    try:
        expected = idna.encode(name, uts46=True, std3_rules=True)
    except idna.IDNAError:
        return  # strict: it refuses more than we do
    assert from_unicode(name).encode() == expected


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param("".join(map(chr, range(0x4E00, 0x4E00 + 254))), id="254 different"),
        pytest.param("\ufdfa" * 1024, id="a mapping of 18 characters each"),
        pytest.param("\u094d\u200c" * 127, id="joiners"),
        pytest.param("xn--" + "a" * 250, id="one huge number"),
        pytest.param("ä" * 10**6, id="a million"),
    ],
)
def test_hostile_names_are_refused_at_once(typed: str) -> None:
    start = time.process_time()
    with pytest.raises(InvalidHostname):
        from_unicode(typed)
    assert time.process_time() - start < 0.5  # ten times what the slowest takes
