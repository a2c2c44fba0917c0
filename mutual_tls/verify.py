"""Who the other side may be: rules, and the certificate that they are held against.

A rule is one line. It is one of:

- a DNS name, as in the certificate's SANs: `db.example.com`; `*.example.com` for one label;
- an IP address, as in the SANs;
- a SPIFFE id: `spiffe://example.org/ns/*/sa/web`, where `*` is one segment and `**` the rest;
- `cn:NAME`: the subject's common name, for authorities that write no SANs;
- `pin-sha256:BASE64`: the public key, as in RFC 7469 §2.4.

The chain has been verified before, whatever the rule: a pin does not replace an authority.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from sniproxy_hostname import Hostname, InvalidHostname

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# SPIFFE-ID §2.1 and §2.2: of a trust domain "lowercase letters, numbers, dots, dashes, and
# underscores", of a segment of the path "letters, numbers, dots, dashes, and underscores". So
# there is nothing that could be written in two ways: no percent-encoding, no port, no query.
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT: Final = re.compile(r"(?!\.{1,2}\Z)[a-zA-Z0-9._-]+")
_LONGEST_SPIFFE_ID: Final = 2048  # §2.3: "up to 2048 bytes"
_SPIFFE: Final = "spiffe://"

_SHA256: Final = 32  # bytes


class RuleError(ValueError):
    """A rule can't be understood; the message says why."""


class CertificateError(Exception):
    """A certificate can't be understood."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says of its holder.

    Attributes:
        dns: SANs of the type dNSName, in lower case.
        uris: SANs of the type URI.
        addresses: SANs of the type iPAddress.
        common_names: of the subject.
        pin: the SHA-256 of the SubjectPublicKeyInfo.
    """

    dns: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    addresses: tuple[IPAddress, ...] = ()
    common_names: tuple[str, ...] = ()
    pin: bytes = b""

    @classmethod
    def parse(cls, der: bytes) -> "Certificate":
        """Read a certificate.

        Raises:
            CertificateError: it can't be read.
        """
        try:
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            common_names = tuple(str(name.value) for name in names)
            try:
                extension = certificate.extensions.get_extension_for_class(
                    x509.SubjectAlternativeName
                )
            except x509.ExtensionNotFound:
                return cls(common_names=common_names, pin=hashlib.sha256(spki).digest())
            sans = extension.value
            dns = sans.get_values_for_type(x509.DNSName)
            addresses = sans.get_values_for_type(x509.IPAddress)
            return cls(
                dns=tuple(name.lower() for name in dns),
                uris=tuple(sans.get_values_for_type(x509.UniformResourceIdentifier)),
                addresses=tuple(
                    each
                    for each in addresses
                    if isinstance(each, (ipaddress.IPv4Address, ipaddress.IPv6Address))
                ),
                common_names=common_names,
                pin=hashlib.sha256(spki).digest(),
            )
        except Exception as error:  # noqa: BLE001 - whatever a stranger's certificate provokes
            raise CertificateError(str(error) or type(error).__name__) from None


@dataclass(frozen=True, slots=True)
class Rule:
    """Somebody who is allowed. Only `parse_rule` makes one. One field is set."""

    dns: str | None = None
    wildcard: str | None = None  # what follows the first label, with its dot
    address: IPAddress | None = None
    spiffe: tuple[str, ...] = field(default=())  # the trust domain, and the segments
    common_name: str | None = None
    pin: bytes | None = None

    def matches(self, certificate: Certificate, *, is_server: bool) -> bool:
        """Tell whether the certificate is that of whom the rule means.

        Args:
            certificate: whose chain has been verified.
            is_server: whether its holder is a server, whose certificate may have a wildcard for
                names. For a client that would be no identity.
        """
        if self.dns is not None:
            return any(_is_name(self.dns, san, is_server=is_server) for san in certificate.dns)
        if self.wildcard is not None:
            return any(_is_below(san, self.wildcard) for san in certificate.dns)
        if self.address is not None:
            return self.address in certificate.addresses
        if self.spiffe:
            return _is_spiffe_id(self.spiffe, certificate.uris)
        if self.common_name is not None:
            # Several would be several answers to the question who it is.
            names = [name.lower() for name in certificate.common_names]
            return names == [self.common_name]
        return self.pin is not None and hmac.compare_digest(self.pin, certificate.pin)


def parse_rule(text: str) -> Rule:
    """Understand a rule.

    Raises:
        RuleError: it can't be understood.
    """
    if text.startswith(_SPIFFE):
        return Rule(spiffe=_spiffe_pattern(text.removeprefix(_SPIFFE)))
    if text.startswith("cn:"):
        if not (name := text.removeprefix("cn:")):
            raise RuleError("there is no name behind cn:")
        return Rule(common_name=name.lower())
    if text.startswith("pin-sha256:"):
        return Rule(pin=_pin(text.removeprefix("pin-sha256:")))
    try:
        return Rule(address=ipaddress.ip_address(text))
    except ValueError:
        pass
    if text.startswith("*."):
        return Rule(wildcard=f".{_hostname(text.removeprefix('*.'))}")
    return Rule(dns=_hostname(text))


def matches(rules: Sequence[Rule], certificate: Certificate, *, is_server: bool) -> bool:
    """Tell whether any of the rules means the holder of the certificate; none means nobody."""
    return any(rule.matches(certificate, is_server=is_server) for rule in rules)


def _hostname(text: str) -> str:
    try:
        return Hostname(text.encode("ascii"))
    except (UnicodeEncodeError, InvalidHostname) as error:
        why = "only ASCII is allowed" if isinstance(error, UnicodeEncodeError) else str(error)
        raise RuleError(f"{text!a} is no hostname: {why}") from None


def _pin(text: str) -> bytes:
    try:
        pin = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RuleError("what follows pin-sha256: is not base64") from None
    # Base64 has several ways to write some bytes; one is enough.
    if len(pin) != _SHA256 or base64.b64encode(pin).decode() != text:
        raise RuleError(f"what follows pin-sha256: is not the base64 of {_SHA256} bytes")
    return pin


def _spiffe_pattern(text: str) -> tuple[str, ...]:
    domain, *segments = text.split("/")
    if not _TRUST_DOMAIN.fullmatch(domain):
        raise RuleError(f"{domain!a} is no trust domain of a SPIFFE id")
    for number, segment in enumerate(segments):
        is_last = number == len(segments) - 1
        if segment == "*" or (segment == "**" and is_last) or _SEGMENT.fullmatch(segment):
            continue
        raise RuleError(f"{segment!a} is no segment of a SPIFFE id, nor * nor, at its end, **")
    return (domain, *segments)


def _is_spiffe_id(pattern: tuple[str, ...], uris: Sequence[str]) -> bool:
    # X509-SVID §2: "An X.509 SVID MUST contain exactly one URI SAN".
    if len(uris) != 1 or len(uris[0]) > _LONGEST_SPIFFE_ID or not uris[0].startswith(_SPIFFE):
        return False
    domain, *segments = uris[0].removeprefix(_SPIFFE).split("/")
    if not (_TRUST_DOMAIN.fullmatch(domain) and all(map(_SEGMENT.fullmatch, segments))):
        return False
    wanted_domain, *wanted = pattern
    if domain != wanted_domain:
        return False
    if wanted and wanted[-1] == "**":
        *wanted, _ = wanted
        # The rest has one segment at the least.
        if len(segments) <= len(wanted):
            return False
        segments = segments[: len(wanted)]
    return len(segments) == len(wanted) and all(
        want in ("*", segment) for want, segment in zip(wanted, segments, strict=True)
    )


def _is_name(name: str, san: str, *, is_server: bool) -> bool:
    """Tell whether a SAN is that name, or for a server, a wildcard for it.

    RFC 9525 §6.3: "the wildcard is the entire left-most label", and it stands for one label.
    """
    san = san.removesuffix(".")
    if san.startswith("*."):
        # A wildcard right below the root would be for every domain.
        return is_server and "." in san[2:] and _is_below(name, san[1:])
    return san == name


def _is_below(name: str, suffix: str) -> bool:
    """Tell whether a name has one label more than `suffix`, which begins with a dot."""
    name = name.removesuffix(".")
    label = name.removesuffix(suffix)
    return label != name and bool(label) and "." not in label and "*" not in label
