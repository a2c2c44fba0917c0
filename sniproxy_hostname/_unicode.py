"""What a person types → `Hostname`, by UTS #46 (Unicode IDNA Compatibility Processing).

The parameters are those of non-transitional processing, and each has its place below:

- UseSTD3ASCIIRules, in `Hostname`: Punycode keeps ASCII characters as they are, so a name's bytes
  are letters, digits and hyphens if and only if every ASCII character typed or mapped to was. The
  underscore is let pass as well, as browsers do, who ask for it;
- CheckHyphens is narrower than its name: no label begins or ends with a hyphen (or an underscore),
  in Unicode or in ASCII. Hyphens in the third and fourth place pass, for there are hosts such as
  `r3---sn-abc` that browsers ask for and the daemon routes; only `xn--` there has a meaning, and is
  checked;
- CheckJoiners and CheckBidi, by the idna package.

`idna.encode()` is not used: it is strict IDNA 2008, which has no emoji. A name that needs a
newer Unicode than Python or idna know is refused, since nothing can be said about it.
"""

import unicodedata

import idna

from ._name import LONGEST_NAME, Hostname, InvalidHostname

# RFC 5890 §2.3.2.1: the prefix that makes a label an A-label, "ACE prefix" in its words.
_ACE_PREFIX = "xn--"

# A bound on our work, not a rule. Mapping may shrink a text (decomposed letters are composed,
# soft hyphens dropped), and four characters for one byte of the longest name are ample.
_LONGEST_TEXT = 1024

# ≠ ≮ ≯ are `=`, `<`, `>` and a stroke, composed. Where the parts are refused, so is the whole;
# the tables of UTS #46 said so themselves until they left STD3 rules to the caller.
_STD3_COMPOSED = frozenset("\N{NOT EQUAL TO}\N{NOT LESS-THAN}\N{NOT GREATER-THAN}")

_ZERO_WIDTH_JOINERS = frozenset("\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}")

# RFC 5893 §1.4: "An RTL label is a label that contains at least one character of type R, AL,
# or AN."
_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})


def from_unicode(text: str) -> Hostname:
    """Map `text` to the name that the daemon would see, or raise `InvalidHostname`."""
    if len(text) > _LONGEST_TEXT:
        raise InvalidHostname(f"the name is {len(text)} characters long, far more than any name")
    try:
        return _process(text)
    except idna.IDNAError as error:
        raise InvalidHostname(str(error)) from error


def _process(text: str) -> Hostname:
    # UTS #46 §4, the four steps: map, normalise (the package does both), break, convert.
    mapped = idna.uts46_remap(text, std3_rules=False)
    # No character costs less than a byte on the wire. (The 1 is for a trailing dot.)
    if len(mapped) > LONGEST_NAME + 1:
        raise InvalidHostname(f"the name is longer than {LONGEST_NAME} bytes")
    labels = [_unicode_label(label) for label in mapped.split(".")]
    # Back from Unicode even where an A-label was typed: _unicode_label saw that it is the same.
    hostname = Hostname(".".join(map(_ascii_label, labels)).encode("ascii"))
    _check_bidi([label for label in labels if label])  # the one empty label is the trailing dot
    return hostname


def _ascii_label(label: str) -> str:
    return label if label.isascii() else _ACE_PREFIX + label.encode("punycode").decode("ascii")


def _unicode_label(label: str) -> str:
    """Return `label` in Unicode, checked. Plain ASCII is left for `Hostname` to judge."""
    if label.startswith(_ACE_PREFIX):
        label = _decode(label)
    if not label.isascii():
        _check_validity(label)
    return label


def _decode(a_label: str) -> str:
    try:
        decoded = a_label.removeprefix(_ACE_PREFIX).encode("ascii").decode("punycode")
    except (UnicodeError, OverflowError) as error:
        # Python 3.13 reports where the error is, and overflows if that is far beyond the label.
        raise InvalidHostname(f"the label {a_label!a} is not valid Punycode") from error
    # RFC 5890 §2.3.2.1 calls these "fake A-labels": they would be second names for one host.
    if decoded.isascii():
        raise InvalidHostname(f"the label {a_label!a} has no character that needs Punycode")
    if _ascii_label(decoded) != a_label:
        raise InvalidHostname(f"the label {a_label!a} does not encode back to itself")
    return decoded


def _check_validity(label: str) -> None:
    """Check a Unicode label by the validity criteria, UTS #46 §4.1."""
    # Valid characters map to themselves, and mapping ends in NFC: this is two criteria in one.
    if idna.uts46_remap(label, std3_rules=False) != label:
        raise InvalidHostname(f"the label {label!a} is not in its mapped and normalised form")
    if label[0] in "-_" or label[-1] in "-_":
        raise InvalidHostname(f"the label {label!a} begins or ends with - or _")
    if label.startswith(_ACE_PREFIX):
        raise InvalidHostname(f"the label {label!a} was decoded, and begins with xn-- again")
    idna.check_initial_combiner(label)
    for position, character in enumerate(label):
        if character in _STD3_COMPOSED:
            raise InvalidHostname(f"{character!a} is not allowed in a hostname")
        if unicodedata.category(character) == "Cn":
            version = unicodedata.unidata_version
            raise InvalidHostname(f"{character!a} is unknown to Unicode {version}, this Python's")
        if character in _ZERO_WIDTH_JOINERS and not _joins(label, position):
            raise InvalidHostname(f"{character!a} joins nothing at its place in {label!a}")


def _joins(label: str, position: int) -> bool:
    """Tell whether the joiner at `position` obeys RFC 5892, Appendix A.1 and A.2."""
    try:
        return idna.valid_contextj(label, position)
    except ValueError:  # its neighbour has no name in Python's tables, so it is no virama either
        return False


def _check_bidi(labels: list[str]) -> None:
    # RFC 5893 §2: the rule "applies to labels in Bidi domain names", to all of them: those without
    # a right-to-left character too. §1.4: one RTL label makes the name a Bidi domain name.
    if any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for label in labels for c in label):
        for label in labels:
            idna.check_bidi(label, check_ltr=True)
