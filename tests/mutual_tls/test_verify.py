"""Who is admitted, and by which rule; and what looks like a match and is none."""

# ruff: noqa: RUF001 - characters that look like others are what some rules are about

import hashlib
import ipaddress
import subprocess
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from mutual_tls.verify import (
    Certificate,
    CertificateError,
    Rule,
    RuleError,
    matches,
    parse_rule,
)

PIN = bytes(range(224, 256))
PIN_RULE = "pin-sha256:" + b64encode(PIN).decode()
KEY = ec.derive_private_key(1, ec.SECP256R1())


def holder(
    *dns: str,
    uris: tuple[str, ...] = (),
    addresses: tuple[str, ...] = (),
    common_names: tuple[str, ...] = (),
    is_authority: bool = False,
) -> Certificate:
    return Certificate(
        dns=dns,
        uris=uris,
        addresses=tuple(map(ipaddress.ip_address, addresses)),
        common_names=common_names,
        pin=PIN,
        is_authority=is_authority,
    )


def spiffe(uri: str) -> Certificate:
    return holder(uris=(uri,))


def admits(rule: str, certificate: Certificate, *, is_server: bool = False) -> bool:
    return matches([parse_rule(rule)], certificate, is_server=is_server)


# --- rules


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a.example.com", "a.example.com"),
        ("A.Example.COM.", "a.example.com"),
        ("localhost", "localhost"),
        ("Bücher.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("*.Example.com.", "*.example.com"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", str(ipaddress.ip_address("::ffff:192.0.2.1"))),
        ("spiffe://example.org/ns/Prod/sa/a_b-c.d", "spiffe://example.org/ns/Prod/sa/a_b-c.d"),
        ("spiffe://example.org/*", "spiffe://example.org/*"),
        ("spiffe://example.org/**", "spiffe://example.org/**"),
        ("spiffe://example.org/*/sa/**", "spiffe://example.org/*/sa/**"),
        ("spiffe://example.org/...", "spiffe://example.org/..."),
        ("cn:Jane Doe: admin", "cn:Jane Doe: admin"),
        (PIN_RULE, PIN_RULE),
    ],
)
def test_a_rule(text: str, canonical: str) -> None:
    rule = parse_rule(text)
    assert str(rule) == rule.text == canonical
    assert parse_rule(canonical) == rule


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the name is empty"),
        (".", "the name is empty"),
        ("a..b", "a label is empty"),
        ("a.example..", "a label is empty"),
        ("a b.example", "' ' is not allowed"),
        (" a.example", "' ' is not allowed"),
        ("a\0.example", r"'\\x00' is not allowed"),
        ("a/b", "'/' is not allowed"),
        ("%61.example", "'%' is not allowed"),
        ("127.1", "the last label is a number"),
        ("192.0.2.01", "the last label is a number"),
        ("１９２.0.2.1", "the last label is a number"),
        ("192.0.2.0/24", "'/' is not allowed"),
        ("[::1]", "is no kind of rule"),
        ("fe80::1%eth0", "no scope"),
        ("≠.example", "is not a name"),
        ("\ud800.example", "is not a name"),
        # Wildcards
        ("*", "the whole first label"),
        ("*.", "the name is empty"),
        ("f*o.example.com", "the whole first label"),
        ("*o.example.com", "the whole first label"),
        ("a.*.com", "the whole first label"),
        ("*.*.com", "'[*]' is not allowed"),
        ("**.example.com", "the whole first label"),
        ("*.2.0.192", "the last label is a number"),
        # SPIFFE IDs
        ("spiffe://", "a trust domain"),
        ("spiffe:///a", "a trust domain"),
        ("spiffe://Example.org/a", "a trust domain"),
        ("spiffe://*.org/a", "a trust domain"),
        ("spiffe://example.org:443/a", "a trust domain"),
        ("spiffe://user@example.org/a", "a trust domain"),
        ("spiffe://example%2eorg/a", "a trust domain"),
        ("spiffe://" + "a" * 256 + "/a", "a trust domain"),
        ("spiffe://example.org", r"no path; spiffe://example.org/\*\* is every"),
        ("spiffe://example.org/", "the segment '' is none"),
        ("spiffe://example.org/a/", "the segment '' is none"),
        ("spiffe://example.org//a", "the segment '' is none"),
        ("spiffe://example.org/./a", "the segment '.' is none"),
        ("spiffe://example.org/a/..", "the segment '..' is none"),
        ("spiffe://example.org/%61", "the segment '%61' is none"),
        ("spiffe://example.org/a?b", "is none"),
        ("spiffe://example.org/a#b", "is none"),
        ("spiffe://example.org/a\n", "is none"),
        ("spiffe://example.org/ü", "is none"),
        ("spiffe://example.org/a*", "is none"),
        ("spiffe://example.org/***", "is none"),
        ("spiffe://example.org/**/a", "nothing can follow"),
        ("spiffe://example.org/**/**", "nothing can follow"),
        ("spiffe://example.org/" + "a" * 2028, "more than 2048 bytes"),
        ("SPIFFE://example.org/a", "is no kind of rule"),
        ("https://example.org/a", "is no kind of rule"),
        # Common names and pins
        ("cn:", "no common name"),
        ("cn: a", "white space"),
        ("cn:a\0", "can't be shown"),
        ("CN:a", "is no kind of rule"),
        ("pin-sha256:", "the pin has 0 bytes"),
        (PIN_RULE[:-1], "not base64"),
        (PIN_RULE + "=", "(not base64|does not encode back)"),
        (PIN_RULE + "\n", "not base64"),
        (PIN_RULE.replace(":", ": "), "not base64"),
        (PIN_RULE[:20] + "\u00e9", "not base64"),
        (PIN_RULE.replace("/", "_"), "not base64"),
        (PIN_RULE[:-2] + "9=", "does not encode back"),
        ("pin-sha256:" + b64encode(bytes(33)).decode(), "the pin has 33 bytes"),
        ("pin-sha256:" + PIN.hex(), "the pin has 48 bytes"),
        ("pin-sha1:" + b64encode(bytes(20)).decode(), "is no kind of rule"),
    ],
)
def test_what_is_no_rule(text: str, why: str) -> None:
    with pytest.raises(RuleError, match=why) as caught:
        parse_rule(text)
    assert str(caught.value).isprintable()


def test_only_parse_rule_makes_one() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Rule("a.example")  # type: ignore[abstract]


def test_the_longest_spiffe_rule() -> None:
    rule = "spiffe://example.org/" + "a" * 2027
    assert admits(rule, spiffe(rule))


# --- DNS names


@pytest.mark.parametrize("is_server", [False, True])
@pytest.mark.parametrize(
    ("rule", "name", "admitted"),
    [
        ("a.example.com", "a.example.com", True),
        ("A.EXAMPLE.COM.", "a.example.com", True),
        ("bücher.example", "xn--bcher-kva.example", True),
        ("bücher.example", "bücher.example", False),
        ("a.example.com", "a.example.com.", False),  # RFC 5280: no trailing dot there
        ("a.example.com", "b.example.com", False),
        ("a.example.com", "example.com", False),
        ("a.example.com", "xa.example.com", False),
        ("a.example.com", "a.example.com.evil", False),
        ("a.example.com", "a.example.com\0.evil", False),
        ("a.example.com", "a.example.com\n", False),
        ("a.example.com", "f*.example.com", False),
        ("foo.example.com", "f*o.example.com", False),
        ("foo.example.com", "f*.example.com", False),
        ("foo.example.com", "*o.example.com", False),
        ("a.b.example.com", "*.example.com", False),
        ("example.com", "*.example.com", False),
        ("example.com", "*.com", False),
        ("a.b.example.com", "*.*.example.com", False),
        ("a.b.example.com", "a.*.example.com", False),
        ("example", "*", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "xn--bcher-kva.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", ".example.com", False),
        ("*.example.com", "a\0.example.com", False),
        ("*.example.com", "f*.example.com", False),
        ("*.example.com", "-a.example.com", False),
        ("*.example.com", "a.example.com.", False),
        ("*.example.com", "ü.example.com", False),
        ("*.com", "*.com", False),
    ],
)
def test_dns(rule: str, name: str, admitted: bool, is_server: bool) -> None:
    assert admits(rule, holder(name), is_server=is_server) is admitted
    assert admits(rule, holder("other.example", name), is_server=is_server) is admitted


@pytest.mark.parametrize("rule", ["a.example.com", "*.example.com"])
def test_a_wildcard_names_servers_and_no_client(rule: str) -> None:
    assert admits(rule, holder("*.example.com"), is_server=True)
    assert not admits(rule, holder("*.example.com"), is_server=False)


@pytest.mark.parametrize("is_server", [False, True])
def test_a_dns_rule_looks_at_dns_names_only(is_server: bool) -> None:
    name = "a.example.com"
    other = holder(common_names=(name,), uris=(name, f"https://{name}"))
    assert not admits(name, other, is_server=is_server)


# --- addresses


def test_addresses() -> None:
    certificate = holder("192.0.2.9", addresses=("192.0.2.1", "2001:db8::1"))
    assert admits("192.0.2.1", certificate)
    assert admits("2001:DB8:0:0::1", certificate)
    assert not admits("::ffff:192.0.2.1", certificate)
    assert not admits("192.0.2.9", certificate)  # as a DNS name it is no address
    assert not admits("*.example", holder("192.0.2.9", addresses=("192.0.2.1",)))


# --- SPIFFE IDs


@pytest.mark.parametrize(
    ("rule", "uri", "admitted"),
    [
        ("spiffe://a/b", "spiffe://a/b", True),
        ("spiffe://a/b", "spiffe://a/bc", False),
        ("spiffe://a/bc", "spiffe://a/b", False),
        ("spiffe://a/b", "spiffe://a/b/c", False),
        ("spiffe://a/b/c", "spiffe://a/b", False),
        ("spiffe://a/b", "spiffe://a/B", False),
        ("spiffe://a/b", "spiffe://A/b", False),
        ("spiffe://a/b", "SPIFFE://a/b", False),
        ("spiffe://a/b", "spiffe://a/b/", False),
        ("spiffe://a/b", "spiffe://a//b", False),
        ("spiffe://a/b", "spiffe://a/./b", False),
        ("spiffe://a/b", "spiffe://a/c/../b", False),
        ("spiffe://a/b", "spiffe://a/%62", False),
        ("spiffe://a/b", "spiffe://a/b?c", False),
        ("spiffe://a/b", "spiffe://a/b#c", False),
        ("spiffe://a/b", "spiffe://a/b\0", False),
        ("spiffe://a/b", "spiffe://a/b\n", False),
        ("spiffe://a/b", "spiffe://u@a/b", False),
        ("spiffe://a/b", "spiffe://a:1/b", False),
        ("spiffe://a/b", "spiffe://a./b", False),
        ("spiffe://a/b", "https://a/b", False),
        ("spiffe://a/*", "spiffe://a/b", True),
        ("spiffe://a/*", "spiffe://a/b/c", False),
        ("spiffe://a/*", "spiffe://a/", False),
        ("spiffe://a/*", "spiffe://a", False),
        ("spiffe://a/*", "spiffe://a/%2e%2e", False),
        ("spiffe://a/*", "spiffe://a/..", False),
        ("spiffe://a/*", "spiffe://a/*", False),
        ("spiffe://a/*/c", "spiffe://a/b/c", True),
        ("spiffe://a/*/c", "spiffe://a//c", False),
        ("spiffe://a/*/c", "spiffe://a/b/d", False),
        ("spiffe://a/**", "spiffe://a/b", True),
        ("spiffe://a/**", "spiffe://a/b/c/d", True),
        ("spiffe://a/**", "spiffe://a", False),
        ("spiffe://a/**", "spiffe://a/", False),
        ("spiffe://a/**", "spiffe://a/b/", False),
        ("spiffe://a/**", "spiffe://a/b//c", False),
        ("spiffe://a/**", "spiffe://a/b/../c", False),
        ("spiffe://a/**", "spiffe://a/b%2fc", False),
        ("spiffe://a/**", "spiffe://ab/c", False),
        ("spiffe://a/**", "spiffe:///a/c", False),
        ("spiffe://a/**", "spiffe://a/" + "b" * 2037, True),
        ("spiffe://a/**", "spiffe://a/" + "b" * 2038, False),
        ("spiffe://a/b/**", "spiffe://a/b", False),
        ("spiffe://a/b/**", "spiffe://a/b/c", True),
        ("spiffe://a/b/**", "spiffe://a/bc/d", False),
        ("spiffe://a/*/**", "spiffe://a/b", False),
        ("spiffe://a/*/**", "spiffe://a/b/c/d", True),
    ],
)
def test_spiffe(rule: str, uri: str, admitted: bool) -> None:
    assert admits(rule, spiffe(uri)) is admitted
    assert admits(rule, spiffe(uri), is_server=True) is admitted


@pytest.mark.parametrize("other", ["spiffe://a/b", "spiffe://a/c", "https://a/"])
def test_several_uris_are_no_spiffe_id(other: str) -> None:
    assert not admits("spiffe://a/**", holder(uris=("spiffe://a/b", other)))
    assert not admits("spiffe://a/**", holder(uris=(other, "spiffe://a/b")))


def test_an_authority_is_no_workload() -> None:
    assert not admits("spiffe://a/**", holder(uris=("spiffe://a/b",), is_authority=True))


def test_a_spiffe_id_may_stand_beside_dns_names() -> None:
    assert admits("spiffe://a/b", holder("a.example", uris=("spiffe://a/b",)))


# --- common names and pins


@pytest.mark.parametrize(
    ("name", "admitted"),
    [
        ("Kay.example", True),
        ("KAY.EXAMPLE", True),
        ("\N{KELVIN SIGN}ay.example", False),
        ("kay.example.", False),
        ("kay.example\0", False),
        (" kay.example", False),
        ("*.example", False),
    ],
)
def test_common_names(name: str, admitted: bool) -> None:
    for is_server in (False, True):
        assert (
            admits("cn:kay.example", holder(common_names=(name,)), is_server=is_server) is admitted
        )
    assert admits("cn:kay.example", holder(common_names=("x", name))) is admitted
    assert not admits("cn:kay.example", holder("kay.example"))


def test_a_common_name_with_a_star_is_no_pattern() -> None:
    assert not admits("cn:*", holder(common_names=("a",)))
    assert admits("cn:*", holder(common_names=("*",)))


def test_pins() -> None:
    assert admits(PIN_RULE, holder())
    assert not admits("pin-sha256:" + b64encode(bytes(32)).decode(), holder())


# --- several rules


def test_any_rule_suffices_and_none_admits_nobody() -> None:
    certificate = holder("a.example")
    rules = [parse_rule("b.example"), parse_rule("a.example")]
    assert matches(rules, certificate, is_server=False)
    assert not matches(rules[:1], certificate, is_server=False)
    assert not matches([], certificate, is_server=True)


# --- certificates


def der(
    *names: x509.GeneralName,
    subject: x509.Name | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def pin_of(key: ec.EllipticCurvePublicKey) -> bytes:
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def test_what_a_certificate_says() -> None:
    leaf = trustme.CA().issue_cert("A.Example.COM", "*.b.example", "192.0.2.1", "2001:db8::1")
    parsed = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    certificate = Certificate.parse(parsed.public_bytes(Encoding.DER))
    assert set(certificate.dns) == {"a.example.com", "*.b.example"}
    assert certificate.uris == ()
    assert set(map(str, certificate.addresses)) == {"192.0.2.1", "2001:db8::1"}
    public_key = parsed.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert certificate.pin == pin_of(public_key)
    assert not certificate.is_authority


def test_names_as_they_stand() -> None:
    common_names = ["One", "Zwei ü"]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])
    certificate = Certificate.parse(
        der(
            x509.DNSName("a.example\0.evil"),
            x509.DNSName("192.0.2.1"),
            x509.DNSName("b.example."),
            x509.UniformResourceIdentifier("spiffe://A/%62"),
            x509.RFC822Name("a@example.com"),
            x509.DirectoryName(subject),
            x509.OtherName(ObjectIdentifier("1.2.3"), b"\x05\x00"),
            subject=subject,
        )
    )
    assert certificate.dns == ("a.example\0.evil", "192.0.2.1", "b.example.")
    assert certificate.uris == ("spiffe://A/%62",)
    assert certificate.addresses == ()
    assert certificate.common_names == ("One", "Zwei ü")
    assert certificate.pin == pin_of(KEY.public_key())
    for rule in ("a.example", "192.0.2.1", "b.example", "*.example", "spiffe://a/b"):
        assert not admits(rule, certificate, is_server=True)


def test_a_certificate_without_names() -> None:
    certificate = Certificate.parse(der())
    assert certificate.dns == certificate.uris == certificate.addresses == ()
    assert certificate.common_names == ()


def key_usage(**chosen: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**(dict.fromkeys(names.split(), False) | chosen))


@pytest.mark.parametrize(
    ("extension", "is_authority"),
    [
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.BasicConstraints(ca=False, path_length=None), False),
        (key_usage(key_cert_sign=True), True),
        (key_usage(crl_sign=True), True),
        (key_usage(digital_signature=True), False),
    ],
)
def test_an_authority(extension: x509.ExtensionType, is_authority: bool) -> None:
    assert Certificate.parse(der(extensions=(extension,))).is_authority is is_authority


def test_a_network_is_no_address() -> None:
    network = x509.IPAddress(ipaddress.ip_network("192.0.2.0/24"))
    with pytest.raises(CertificateError):
        Certificate.parse(der(network))


def raw_names(encoded: bytes) -> bytes:
    """A certificate with names as they stand: one element after the other, in DER."""
    value = b"\x30" + bytes([len(encoded)]) + encoded
    return der(extensions=(x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), value),))


@pytest.mark.parametrize(
    "encoded",
    [
        b"\x82\x02\xc3\xbc",  # a dNSName that is not ASCII
        b"\x82\x03\xe2\x84\xaa",  # the Kelvin sign, which str.lower() makes a k of
        b"\x86\x02\xc3\xbc",  # a URI that is not ASCII
        b"\x87\x03\x01\x02\x03",  # an address of three bytes
        b"\xa3\x02\x05\x00",  # an x400Address
        b"\xa5\x02\x05\x00",  # an ediPartyName
        b"\x82\x05a",  # a length beyond the end
        b"\x8f\x01a",  # a type that does not exist
    ],
)
def test_names_that_cannot_be_read(encoded: bytes) -> None:
    with pytest.raises(CertificateError) as caught:
        Certificate.parse(raw_names(encoded))
    assert str(caught.value).isprintable()


def test_every_prefix_and_every_changed_byte_of_a_certificate() -> None:
    whole = der(x509.DNSName("a.example"), extensions=(key_usage(digital_signature=True),))
    for at in range(len(whole)):
        with pytest.raises(CertificateError):
            Certificate.parse(whole[:at])
        for change in (0x01, 0x80, 0xFF):
            changed = whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :]
            with suppress(CertificateError):
                Certificate.parse(changed)
    with pytest.raises(CertificateError):
        Certificate.parse(whole + b"\0")


@pytest.mark.parametrize(
    "options",
    [
        ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-outform", "PEM"],
        ["-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"],
        ["-algorithm", "ED25519"],
    ],
    ids=["EC", "RSA-PSS", "Ed25519"],
)
def test_a_pin_is_the_one_that_openssl_shows(tmp_path: Path, options: list[str]) -> None:
    def openssl(*arguments: str, given: bytes = b"") -> bytes:
        command = ["openssl", *arguments]
        return subprocess.run(
            command, input=given, check=True, capture_output=True, cwd=tmp_path
        ).stdout

    openssl("genpkey", *options, "-out", "key.pem")
    if "EC" in options:  # in the form that would be encoded anew in another
        openssl("ec", "-in", "key.pem", "-conv_form", "compressed", "-out", "key.pem")
    pem = openssl("req", "-x509", "-key", "key.pem", "-subj", "/CN=a", "-days", "1")
    public_key = openssl("x509", "-pubkey", "-noout", given=pem)
    info = openssl("enc", "-d", "-base64", given=b"\n".join(public_key.splitlines()[1:-1]) + b"\n")
    certificate = Certificate.parse(openssl("x509", "-outform", "DER", given=pem))
    assert certificate.pin == hashlib.sha256(info).digest()
    assert certificate.common_names == ("a",)
