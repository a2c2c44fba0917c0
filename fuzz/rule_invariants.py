"""What must hold for every rule and every name in a certificate. As in `invariants.py`.

It is apart from that file, for it needs the package cryptography, and the other targets do not.
"""

import hashlib
import ipaddress
import re
from base64 import b64encode
from typing import Final

from fuzz.invariants import DIGITS, LOWER, _check_readable, _obeys_every_rule
from mutual_tls.verify import Certificate, RuleError, matches, parse_rule

__all__ = ["check_rule", "pin_of"]

SEGMENT: Final = r"[A-Za-z0-9._-]+"
TRUST_DOMAIN_CHARACTERS: Final = frozenset(LOWER + DIGITS + b"._-")


def pin_of(names: list[str]) -> bytes:
    """Return the pin of the certificate that `check_rule` makes of `names`."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).digest()


def check_rule(data: bytes) -> None:
    """A rule and a certificate: admitted exactly if a plain reader says so, or RuleError.

    Args:
        data: lines in UTF-8: the rule, and then names, each of which the certificate has in every
            way that a name can have.
    """
    text, *names = data.decode("utf-8", "surrogateescape").split("\n")
    try:
        rule = parse_rule(text)
    except RuleError as refusal:
        _check_readable(str(refusal))
        return
    assert parse_rule(str(rule)) == rule, "the canonical form is another rule"
    _check_readable(str(rule))
    certificate = Certificate(
        dns=tuple(name.lower() for name in names if name.isascii()),
        uris=tuple(names),
        addresses=tuple(map(ipaddress.ip_address, filter(_is_address, names))),
        common_names=tuple(names),
        pin=pin_of(names),
        is_authority=False,
    )
    admitted = {}
    for is_server in (False, True):
        admitted[is_server] = matches([rule], certificate, is_server=is_server)
        expected = _admits_plainly(str(rule), names, is_server=is_server)
        assert admitted[is_server] is expected, f"is_server={is_server}: {expected} in another way"
        assert not matches([], certificate, is_server=is_server), "nobody was to be admitted"
        assert matches([rule, rule], certificate, is_server=is_server) is expected
    assert admitted[True] or not admitted[False], "a client is admitted, and the server is not"
    if names:
        # Of the rule itself, so that no rule, a pin of zeros least of all, is a rule for this pin.
        others = Certificate((), (), (), (), pin_of([str(rule)]), is_authority=False)
        assert not matches([rule], others, is_server=True), "admitted without any name"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return "%" not in name


def _admits_plainly(rule: str, names: list[str], *, is_server: bool) -> bool:
    """Say once more whom a canonical rule admits, by regular expressions, in no hurry."""
    if rule.startswith("spiffe://"):
        return len(names) == 1 and _is_spiffe_match(rule, names[0])
    if rule.startswith("cn:"):
        wanted = re.compile(re.escape(rule[3:].encode()), re.IGNORECASE)  # bytes: ASCII letters
        return any(wanted.fullmatch(name.encode("utf-8", "surrogateescape")) for name in names)
    if rule.startswith("pin-sha256:"):
        return rule == "pin-sha256:" + b64encode(pin_of(names)).decode()
    if _is_address(rule):
        wanted_address = ipaddress.ip_address(rule)
        return any(
            _is_address(name) and ipaddress.ip_address(name) == wanted_address for name in names
        )
    dns = [name.lower() for name in names if name.isascii()]
    if is_server and f"*.{rule.split('.', 1)[-1]}" in dns and rule.count(".") >= 2:
        return True
    if rule.startswith("*."):
        label = re.compile(r"[^.]+" + re.escape(rule[1:]))
        return any(label.fullmatch(name) and _obeys_every_rule(name.encode()) for name in dns)
    return rule in dns


def _is_spiffe_match(rule: str, uri: str) -> bool:
    pattern = re.escape(rule)
    pattern = pattern.replace(r"/\*\*", rf"(?:/{SEGMENT})+").replace(r"/\*", rf"/{SEGMENT}")
    return (
        re.fullmatch(pattern, uri) is not None
        and len(uri) <= 2048
        and not {".", "..", ""}.intersection(uri.split("/")[3:])
        and TRUST_DOMAIN_CHARACTERS.issuperset(uri.split("/")[2].encode())
    )
