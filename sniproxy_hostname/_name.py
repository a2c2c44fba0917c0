"""Wire bytes → `Hostname`. Nothing else makes one, so having one is proof.

A `Hostname` is in canonical form, and it is one safe path component: its characters are
a to z, 0 to 9, `-`, `_` and `.`; it neither begins nor ends with `.` or `_`, and no two dots meet.
So it holds no slash and no NUL, it is not empty, not `.` and not `..`, and it is shorter than
NAME_MAX, 255. Whoever takes a `Hostname` needs no check of their own.

The accepted path is one pass of one regular expression, for it is run on every connection.
Only a name that was refused is looked at again, to say why.
"""

import re
from typing import Self

# RFC 1035 §2.3.4 gives a label "63 octets or less" and a name "255 octets or less". The 255 count
# a length byte before each label and the empty root label: 253 remain for a name with dots.
LONGEST_LABEL = 63
LONGEST_NAME = 253

# RFC 952: "The last character must not be a minus sign or period." RFC 1123 §2.1 lets the first
# one be "either a letter or a digit". The underscore is in neither, but browsers ask for names that
# have one inside a label. At its begin it would be a name such as _dmarc, which is no host's.
#
# No label contains a dot, so there is one way to match, and a name that fails is retried within one
# label at a time. (Possessive repeats would say so, but in Python up to 3.11.4 they go wrong beside
# lookarounds.)
_LABEL = rb"(?![-_])[a-z0-9_-]{1,%d}(?<![-_])" % LONGEST_LABEL
_is_hostname = re.compile(rb"(?:%b\.)*(?![0-9]+\Z)%b" % (_LABEL, _LABEL)).fullmatch


class InvalidHostname(ValueError):  # noqa: N818 - the name says what is wrong; Error adds nothing
    """What was given is not a hostname. The message says why, for a person to read."""


class Hostname(str):
    """A canonical hostname, fit to be the name of a directory."""

    __slots__ = ()

    def __new__(cls, wire: bytes) -> Self:
        """Canonicalise `wire`, or raise `InvalidHostname`."""
        # RFC 4343 §3: ASCII letters compare without case, other bytes as they are. That is what
        # bytes.lower() folds; str.lower() would fold Unicode too, and make a k of the Kelvin sign.
        #
        # RFC 6066 §3: "represented as a byte string using ASCII encoding without a trailing dot".
        # Clients send one all the same, so one is dropped.
        name = wire.lower().removesuffix(b".")
        if len(name) > LONGEST_NAME or _is_hostname(name) is None:
            raise InvalidHostname(_what_is_wrong(name))
        return super().__new__(cls, name, "ascii")


def _what_is_wrong(name: bytes) -> str:
    """Say which rule `name` breaks, for one that does break a rule."""
    if not name:
        return "the name is empty"
    if len(name) > LONGEST_NAME:
        return f"the name is {len(name)} bytes long, and {LONGEST_NAME} is the most"
    for label in name.split(b"."):
        if wrong := _what_is_wrong_with_label(label):
            return wrong
    # RFC 6066 §3: "Literal IPv4 and IPv6 addresses are not permitted in "HostName"."
    # No top-level domain is a number, so a last label of digits can only be an IPv4 address in
    # one of its spellings (127.0.0.1, 127.1, 2130706433). IPv6 fails earlier, by its colons.
    return "the last label is a number, as in an IPv4 address, and an address is not a hostname"


def _what_is_wrong_with_label(label: bytes) -> str | None:
    if not label:
        return "a label is empty: the name begins with a dot, or two dots meet"
    if stranger := re.search(rb"[^a-z0-9_-]", label):
        # Latin-1 gives every byte a character, and !a makes it fit for any terminal.
        return f"{stranger[0].decode('latin-1')!a} is not allowed in a hostname"
    shown = label.decode("ascii")
    if len(label) > LONGEST_LABEL:
        return f"the label '{shown}' is {len(label)} bytes long, and {LONGEST_LABEL} is the most"
    for character, called in (b"-", "a hyphen"), (b"_", "an underscore"):
        if label.startswith(character):
            return f"the label '{shown}' begins with {called}"
        if label.endswith(character):
            return f"the label '{shown}' ends with {called}"
    return None
