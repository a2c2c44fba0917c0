"""What a PROXY header says of a client, from a real handshake with a certificate made for it."""

import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fuzz.invariants import read_proxy_v2, read_tlvs
from mutual_tls.proxy import NAMES_TYPE, destination_for, proxy_header, tls_information
from sniproxy.wire import Address
from tests.support.tls import NAME

CLIENT, SERVER = ("192.0.2.1", 50000), ("198.51.100.7", 443)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Pair:
    """Contexts of a client with a certificate that says just this, and of a server."""

    def __init__(self, place: Path, common_names: list[str], names: list[x509.GeneralName]) -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(NAME).configure_cert(self.server)
        self.server.verify_mode = ssl.CERT_REQUIRED
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(self.client)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in common_names
        )
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = (
            x509.CertificateBuilder(subject, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.server.load_verify_locations(cadata=pem.decode())
        (place / "client.pem").write_bytes(
            pem
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        self.client.load_cert_chain(place / "client.pem")

    def shake_hands(
        self, session: ssl.SSLSession | None = None
    ) -> tuple[ssl.SSLObject, ssl.SSLObject]:
        """Return a client and a server whose handshake is over."""
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self.client.wrap_bio(down, up, server_hostname=NAME, session=session)
        server = self.server.wrap_bio(up, down, server_side=True)
        waiting = [client, server]
        while waiting:
            for each in list(waiting):
                try:
                    each.do_handshake()
                    waiting.remove(each)
                except ssl.SSLWantReadError:
                    pass
        with pytest.raises(ssl.SSLWantReadError):
            client.read()  # tickets of TLS 1.3 come behind the handshake
        return client, server


def said(place: Path, common_names: list[str], names: list[x509.GeneralName]) -> dict[int, bytes]:
    """Return the TLVs for such a client, those within PP2_TYPE_SSL too."""
    _, server = Pair(place, common_names, names).shake_hands()
    header = proxy_header(2, CLIENT, SERVER, server)
    tlvs = dict(read_proxy_v2(header).tlvs)
    return tlvs | dict(read_tlvs(tlvs[0x20][5:]))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_that_is_resumed_says_the_same_but_that_it_was_shown_earlier(
    version: ssl.TLSVersion, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, ["jane"], [x509.UniformResourceIdentifier("spiffe://a.example/jane")])
    pair.client.maximum_version = version
    client, server = pair.shake_hands()
    first = tls_information(server)
    again, server = pair.shake_hands(client.session)
    assert again.session_reused
    resumed = tls_information(server)
    values = [dict(each)[0x20] for each in (first, resumed)]
    assert [value[:5] for value in values] == [b"\7" + bytes(4), b"\5" + bytes(4)]
    assert values[0][5:] == values[1][5:]
    assert dict(read_tlvs(values[0][5:])) == {
        0x21: {VERSIONS[0]: b"TLSv1.2", VERSIONS[1]: b"TLSv1.3"}[version],
        0x22: b"jane",
        0x23: cipher_of(server),
    }
    assert first[1:] == resumed[1:] == [(NAMES_TYPE, b"URI:spiffe://a.example/jane")]


def cipher_of(tls: ssl.SSLObject) -> bytes:
    cipher = tls.cipher()
    assert cipher is not None
    return cipher[0].encode()


def test_names_of_every_kind(tmp_path: Path) -> None:
    tlvs = said(
        tmp_path,
        ["f\u00fc"],
        [
            x509.DNSName("A.example"),
            x509.DNSName("*.b.example"),
            x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
            x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
            x509.RFC822Name("jane@a.example"),
            x509.UniformResourceIdentifier("spiffe://a/b"),
        ],
    )
    assert tlvs[0x22] == b"f\xc3\xbc"
    assert tlvs[NAMES_TYPE] == (
        b"URI:spiffe://a/b,DNS:a.example,DNS:*.b.example,IP:192.0.2.1,IP:2001:db8::1"
    )


@pytest.mark.parametrize(
    "name",
    [
        x509.UniformResourceIdentifier("x:a,DNS:admin.example"),
        x509.UniformResourceIdentifier("x:a\nDNS:admin.example"),
        x509.UniformResourceIdentifier("x:a\r\nX-Admin: yes"),
        x509.DNSName("admin.example\0.evil.example"),
        x509.DNSName("a.example, DNS:admin.example"),
        x509.DNSName("admin.example .evil.example"),
    ],
    ids=lambda name: ascii(name.value),
)
def test_a_name_that_looks_like_two_or_like_another_is_left_out(
    name: x509.GeneralName, tmp_path: Path
) -> None:
    others = [x509.DNSName("a.example"), x509.DNSName("b.example")]
    assert said(tmp_path, ["jane"], [others[0], name, others[1]])[NAMES_TYPE] == (
        b"DNS:a.example,DNS:b.example"
    )
    assert NAMES_TYPE not in said(tmp_path, ["jane"], [name])


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")
@pytest.mark.parametrize(
    "common_names",
    [
        pytest.param([], id="none"),
        pytest.param(["jane", "admin"], id="several"),
        pytest.param(["admin\0.evil"], id="a NUL"),
        pytest.param(["jane\nadmin"], id="a line feed"),
        pytest.param(["x" * 65], id="too long"),
    ],
)
def test_a_common_name_that_can_be_misread_is_left_out(
    common_names: list[str], tmp_path: Path
) -> None:
    tlvs = said(tmp_path, common_names, [x509.DNSName("a.example")])
    assert set(tlvs) == {0x20, 0x21, 0x23, NAMES_TYPE}


@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")
def test_the_longest_common_name_leaves_room_for_names(tmp_path: Path) -> None:
    longest = "\U0001f600" * 64
    tlvs = said(tmp_path, [longest], [x509.DNSName("a.example")])
    assert tlvs[0x22] == longest.encode()
    assert tlvs[NAMES_TYPE] == b"DNS:a.example"


def test_names_that_do_not_fit_are_left_out_together(tmp_path: Path) -> None:
    tlvs = said(tmp_path, ["jane"], [x509.DNSName(f"{n:050}.example") for n in range(20)])
    assert set(tlvs) == {0x20, 0x21, 0x22, 0x23}


def test_without_tls_and_in_version_1_there_are_addresses_only(tmp_path: Path) -> None:
    _, server = Pair(tmp_path, ["jane"], []).shake_hands()
    line = b"PROXY TCP4 192.0.2.1 198.51.100.7 50000 443\r\n"
    assert proxy_header(1, CLIENT, SERVER, server) == line
    assert read_proxy_v2(proxy_header(2, CLIENT, SERVER, None)).tlvs == []
    assert proxy_header(1, None, None, server) == b"PROXY UNKNOWN\r\n"
    unknown = read_proxy_v2(proxy_header(2, None, None, server))
    assert unknown.ends is None
    assert unknown.tlvs == tls_information(server)


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("192.0.2.1", ("192.0.2.2", 8443), ("192.0.2.2", 8443)),
        ("192.0.2.1", ("::ffff:192.0.2.2", 8443), ("::ffff:192.0.2.2", 8443)),
        ("192.0.2.1", ("2001:db8::1", 8443), ("0.0.0.0", 80)),
        ("::ffff:192.0.2.1", ("2001:db8::1", 8443), ("0.0.0.0", 80)),
        ("::ffff:192.0.2.1", None, ("0.0.0.0", 80)),
        ("2001:db8::1", ("192.0.2.2", 8443), ("::", 80)),
        ("2001:db8::1", ("fe80::1%lo", 8443), ("fe80::1%lo", 8443)),
        ("2001:db8::1", None, ("::", 80)),
    ],
)
def test_a_destination_is_of_the_family_of_the_source(
    source: str, destination: Address | None, expected: Address
) -> None:
    assert destination_for((source, 1), destination, 80) == expected
    assert proxy_header(1, (source, 1), expected, None) != b"PROXY UNKNOWN\r\n"
