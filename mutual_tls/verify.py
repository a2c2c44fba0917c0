"""Who the other side may be: rules, and what a certificate says of its holder.

The chain is verified first, by OpenSSL; the rules decide whether this holder, of all whom the
authority vouches for, is the one that is wanted. A rule is one line of text:

    a.example.com           a DNS name, which the certificate has as a subject alternative name
    *.example.com           any name that has one label more than example.com
    192.0.2.1, 2001:db8::1  an address, which it has as a subject alternative name
    spiffe://domain/ns/*/sa a SPIFFE ID; `*` stands for one whole segment,
    spiffe://domain/ns/**   and `**` at the end for all the rest, of at least one segment
    cn:NAME                 the common name of the subject, which no other kind looks at
    pin-sha256:BASE64       the SHA-256 of the public key, as in RFC 7469 §2.4

Law: no rule matches by accident. A rule that isn't understood is an error; a name in a certificate
that isn't in its one canonical form is not taken for any other, and matches nothing.
"""

import binascii
import hashlib
import hmac
import ipaddress
import re
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Self, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from sniproxy_hostname import Hostname, InvalidHostname

__all__ = ["Certificate", "CertificateError", "Rule", "RuleError", "matches", "parse_rule"]

Address: TypeAlias = IPv4Address | IPv6Address

_SPIFFE = "spiffe://"
_COMMON_NAME = "cn:"
_PIN = "pin-sha256:"

# SPIFFE-ID §2.3: the most bytes of an ID, and of its trust domain (RFC 3986 §3.2.2).
_LONGEST_ID = 2048
_LONGEST_TRUST_DOMAIN = 255

# SPIFFE-ID §2.1 and §2.2, as later versions have them: there is one spelling only, in letters,
# digits and these three. So there is no `%`, and none of what RFC 3986 has for userinfo, port,
# query and fragment.
_is_trust_domain = re.compile(r"[a-z0-9._-]+").fullmatch
_is_segment = re.compile(r"(?!\.{1,2}\Z)[a-zA-Z0-9._-]+").fullmatch

# X.690 §8.1.2 and §8.9: identifiers in the DER of a certificate, RFC 5280 §4.1.
_SEQUENCE = 0x30
_VERSION = 0xA0

_SHA256_SIZE = hashlib.sha256().digest_size


class RuleError(ValueError):
    """A rule is not understood. The message says why, for a person to read."""


class CertificateError(ValueError):
    """A certificate can't be read. The message says why, for a person to read."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says of its holder. Only what was verified is to be believed.

    Attributes:
        dns: subject alternative names of the type dNSName (RFC 5280 §4.2.1.6), in lower case.
        uris: those of the type uniformResourceIdentifier, as they stand.
        addresses: those of the type iPAddress.
        common_names: common names of the subject, as they stand.
        pin: the SHA-256 of its SubjectPublicKeyInfo, in DER.
        is_authority: whether it may sign others: the cA flag, or keyCertSign or cRLSign.
    """

    dns: tuple[str, ...]
    uris: tuple[str, ...]
    addresses: tuple[Address, ...]
    common_names: tuple[str, ...]
    pin: bytes
    is_authority: bool

    def show_names(self) -> str:
        """Return the names, each once, for a person to read; nothing if it has none."""
        names = (*self.dns, *self.uris, *map(str, self.addresses), *self.common_names)
        return ", ".join(dict.fromkeys(names))

    @classmethod
    def parse(cls, der: bytes) -> "Certificate":
        """Read a certificate, as `SSLObject.getpeercert(binary_form=True)` gives it.

        Whom we know already is not read again.

        Raises:
            CertificateError: it is no certificate, or has names of a kind that can't be read.
        """
        try:
            return _parse_certificate(der)
        except (
            ValueError,
            TypeError,
            UserWarning,  # where the program makes errors of warnings
            UnsupportedAlgorithm,
            x509.DuplicateExtension,
            x509.InvalidVersion,
            x509.UnsupportedGeneralNameType,
        ) as error:
            raise CertificateError(f"unable to read the certificate: {error!a}") from error

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Read a parsed certificate.

        Raises:
            ValueError and others of the package cryptography: as in `parse`.
        """
        dns: list[str] = []
        uris: list[str] = []
        addresses: list[Address] = []
        is_authority = False
        for extension in certificate.extensions:
            match extension.value:
                case x509.SubjectAlternativeName() as names:
                    dns = [_ascii(n).lower() for n in names.get_values_for_type(x509.DNSName)]
                    uris = list(
                        map(_ascii, names.get_values_for_type(x509.UniformResourceIdentifier))
                    )
                    values = names.get_values_for_type(x509.IPAddress)
                    addresses = [_address(value) for value in values]
                case x509.BasicConstraints(ca=True):
                    is_authority = True
                case x509.KeyUsage() as usage:
                    is_authority |= usage.key_cert_sign or usage.crl_sign
                case _:
                    pass  # what it is good for is OpenSSL's to judge
        common_names = [
            attribute.value
            for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
        if not all(isinstance(name, str) for name in common_names):
            raise ValueError("a common name is not text")
        return cls(
            dns=tuple(dns),
            uris=tuple(uris),
            addresses=tuple(addresses),
            common_names=tuple(map(str, common_names)),
            pin=hashlib.sha256(_public_key_info(certificate.tbs_certificate_bytes)).digest(),
            is_authority=is_authority,
        )


def _ascii(name: str) -> str:
    # RFC 5280 §4.2.1.6: both are an IA5String, but cryptography decodes UTF-8. lower() would make
    # a k of a Kelvin sign then, and so one name of another.
    if not name.isascii():
        raise ValueError("a subject alternative name is not ASCII")
    return name


def _address(value: object) -> Address:
    # In name constraints the same type holds a network, of twice the bytes, and cryptography
    # takes one here, too. RFC 5280 §4.2.1.6: "MUST contain exactly four octets", or sixteen.
    if not isinstance(value, IPv4Address | IPv6Address):
        raise ValueError("an address is a network")  # noqa: TRY004 - what was read has the fault
    return value


def _public_key_info(tbs_certificate: bytes) -> bytes:
    """Find the subjectPublicKeyInfo of RFC 5280 §4.1, byte for byte.

    The package cryptography would encode a key anew, in another form where there are several
    (a compressed point, RSASSA-PSS), and only if it knows the algorithm.
    """
    start, end = _element(tbs_certificate, 0, _SEQUENCE)
    if tbs_certificate[start] == _VERSION:  # optional, and the only one that is tagged so
        _, start = _element(tbs_certificate, start, _VERSION)
    # serialNumber, signature, issuer, validity, subject
    for _ in range(5):
        _, start = _element(tbs_certificate, start, tbs_certificate[start])
    _, end = _element(tbs_certificate, start, _SEQUENCE)
    return tbs_certificate[start:end]


def _element(der: bytes, at: int, identifier: int) -> tuple[int, int]:
    """Return where the content of the element at `at` begins, and where it ends.

    The whole was read by a strict parser before; so it is sound, and no length is checked.
    """
    if der[at] != identifier:
        raise ValueError("the certificate is not in the order of RFC 5280")
    length = der[at + 1]
    start = at + 2
    if length & 0x80:  # X.690 §8.1.3.5, the long form: so many bytes hold the length
        size = length & 0x7F
        length = int.from_bytes(der[start : start + size])
        start += size
    return start, start + length


@dataclass(frozen=True, slots=True)
class Rule(ABC):
    """Whom one line admits. `parse_rule` makes it, and nothing else.

    Attributes:
        text: the rule in its canonical form, which `parse_rule` makes the same rule of.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    @abstractmethod
    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        """Tell whether the holder of `certificate` is one whom the rule names.

        Args:
            certificate: what the other side has shown, verified.
            is_server: whether the other side is the server. A wildcard in a certificate stands
                for any host of a site that may answer; it tells no client from another.
        """


# Certificates, and rules, that are remembered, for those who come again and again. To read a
# certificate takes half as long as to resume a session.
_MOST_KNOWN: Final = 256


@lru_cache(maxsize=_MOST_KNOWN)
def _parse_certificate(der: bytes) -> Certificate:
    return Certificate.of(x509.load_der_x509_certificate(der))


@lru_cache(maxsize=_MOST_KNOWN)
def parse_rule(text: str) -> Rule:
    """Read one rule; see the module for its kinds.

    Args:
        text: the rule, without white space around it. A DNS name may be in Unicode.

    Raises:
        RuleError: it is none of these kinds, or not well-formed.
    """
    if text.startswith(_SPIFFE):
        return _parse_spiffe(text)
    if text.startswith(_COMMON_NAME):
        return _parse_common_name(text)
    if text.startswith(_PIN):
        return _parse_pin(text)
    if (address := _parse_address(text)) is not None:
        return _AddressRule(str(address), address)
    if ":" in text:
        raise RuleError(
            f"{text!a} is no kind of rule: there are names, addresses,"
            f" {_SPIFFE}, {_COMMON_NAME} and {_PIN}"
        )
    if text.startswith("*."):
        parent = _hostname(text, text[2:])
        return _WildcardRule(f"*.{parent}", parent)
    if "*" in text:
        raise RuleError(f"{text!a}: '*' stands for the whole first label, as in *.example.com")
    name = _hostname(text, text)
    return _NameRule(name, name)


def matches(rules: Sequence[Rule], certificate: Certificate, *, is_server: bool) -> bool:
    """Tell whether any of `rules` admits the holder of `certificate`. Without rules, nobody is.

    Args:
        rules: whom to admit.
        certificate: what the other side has shown, verified.
        is_server: whether the other side is the server, see `Rule.admits`.
    """
    return any(rule.admits(certificate, is_server=is_server) for rule in rules)


# DNS names and addresses.


def _hostname(text: str, name: str) -> Hostname:
    """Canonicalise `name`, which is the whole of the rule `text` or its end."""
    try:
        if name.isascii():
            return Hostname(name.encode())
        # Only here: it loads the tables of idna, and few rules need them.
        from sniproxy_hostname._unicode import from_unicode

        return from_unicode(name)
    except InvalidHostname as error:
        raise RuleError(f"{text!a} is not a name: {error}") from None


def _is_canonical(name: str) -> bool:
    """Tell whether a name from a certificate is a hostname, and the canonical spelling of it.

    RFC 5280 §4.2.1.6 asks for the "preferred name syntax", which has no trailing dot. An address
    is no hostname, and neither is what holds a NUL.
    """
    try:
        return Hostname(name.encode()) == name
    except InvalidHostname:
        return False


@dataclass(frozen=True, slots=True)
class _NameRule(Rule):
    name: str

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        if self.name in certificate.dns:
            return True
        # RFC 9525 §6.3: a wildcard is the complete left-most label, and stands for one label. As
        # OpenSSL has it, two labels have to follow (X509_check_host(3)): *.com is no site's.
        _, _, parent = self.name.partition(".")
        return is_server and "." in parent and f"*.{parent}" in certificate.dns


@dataclass(frozen=True, slots=True)
class _WildcardRule(Rule):
    parent: str

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        # A certificate for any host below the parent is one for a host that this rule names.
        if is_server and "." in self.parent and self.text in certificate.dns:
            return True
        return any(
            name.partition(".")[2] == self.parent and _is_canonical(name)
            for name in certificate.dns
        )


@dataclass(frozen=True, slots=True)
class _AddressRule(Rule):
    address: Address

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        return self.address in certificate.addresses


def _parse_address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise RuleError(f"{text!a}: a certificate has no scope in an address")
    return address


# SPIFFE IDs.


def _parse_spiffe(text: str) -> Rule:
    if len(text) > _LONGEST_ID:
        raise RuleError(f"a SPIFFE ID has no more than {_LONGEST_ID} bytes")
    trust_domain, *segments = text.removeprefix(_SPIFFE).split("/")
    if not _is_trust_domain(trust_domain) or len(trust_domain) > _LONGEST_TRUST_DOMAIN:
        raise RuleError(
            f"{text!a}: a trust domain has 1 to {_LONGEST_TRUST_DOMAIN} characters"
            " of a to z, 0 to 9, '.', '-' and '_'"
        )
    if not segments:
        raise RuleError(f"{text!a} has no path; {text}/** is every workload of the trust domain")
    for place, segment in enumerate(segments, 1):
        if segment == "**" and place < len(segments):
            raise RuleError(f"{text!a}: '**' stands for all the rest, so nothing can follow")
        if segment not in ("*", "**") and not _is_segment(segment):
            raise RuleError(
                f"{text!a}: the segment {segment!a} is none: it is '*' or '**', or has characters"
                " of a to z, A to Z, 0 to 9, '.', '-' and '_', and is not '.' or '..'"
            )
    return _SpiffeRule(text, trust_domain, tuple(segments))


def _spiffe_id(certificate: Certificate) -> tuple[str, list[str]] | None:
    """Return the trust domain and the segments of the path; None if it is no X.509-SVID's."""
    # X509-SVID §2: "SVIDs containing more than one URI SAN" are rejected, and by §5.2 so are
    # certificates of an authority.
    if len(certificate.uris) != 1 or certificate.is_authority:
        return None
    uri = certificate.uris[0]
    if not uri.startswith(_SPIFFE) or len(uri) > _LONGEST_ID:
        return None
    trust_domain, *segments = uri.removeprefix(_SPIFFE).split("/")
    if not _is_trust_domain(trust_domain) or len(trust_domain) > _LONGEST_TRUST_DOMAIN:
        return None
    if not segments or not all(map(_is_segment, segments)):
        return None
    return trust_domain, segments


@dataclass(frozen=True, slots=True)
class _SpiffeRule(Rule):
    trust_domain: str
    segments: tuple[str, ...]

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        spiffe_id = _spiffe_id(certificate)
        if spiffe_id is None:
            return False
        trust_domain, segments = spiffe_id
        wanted = self.segments
        if wanted[-1] == "**":
            wanted = wanted[:-1]
            if len(segments) <= len(wanted):
                return False
            segments = segments[: len(wanted)]
        return (
            trust_domain == self.trust_domain
            and len(segments) == len(wanted)
            and all(one in ("*", other) for one, other in zip(wanted, segments, strict=True))
        )


# Common names and pins.


def _folded(name: str) -> bytes:
    """Fold the case of ASCII letters, and of no others: a Kelvin sign is no k."""
    return name.encode("utf-8", "surrogatepass").lower()


def _parse_common_name(text: str) -> Rule:
    name = text.removeprefix(_COMMON_NAME)
    if not name or name != name.strip() or not name.isprintable():
        raise RuleError(f"{text!a}: no common name, or white space around, or what can't be shown")
    return _CommonNameRule(text, _folded(name))


@dataclass(frozen=True, slots=True)
class _CommonNameRule(Rule):
    folded: bytes

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        return any(_folded(name) == self.folded for name in certificate.common_names)


def _parse_pin(text: str) -> Rule:
    encoded = text.removeprefix(_PIN)
    try:
        pin = b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RuleError(f"{text!a}: the pin is not base64 with padding") from None
    if len(pin) != _SHA256_SIZE:
        raise RuleError(f"{text!a}: the pin has {len(pin)} bytes, and SHA-256 has {_SHA256_SIZE}")
    # Bits that the last character holds in vain, and padding beyond need: a mistake in copying.
    if b64encode(pin).decode() != encoded:
        raise RuleError(f"{text!a}: the pin does not encode back to itself")
    return _PinRule(text, pin)


@dataclass(frozen=True, slots=True)
class _PinRule(Rule):
    pin: bytes

    def admits(self, certificate: Certificate, *, is_server: bool) -> bool:
        return hmac.compare_digest(self.pin, certificate.pin)
