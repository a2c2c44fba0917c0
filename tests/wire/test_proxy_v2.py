"""The header, read back by the reader of the fuzzer, which was made from the text alone."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.invariants import read_proxy_v2, read_tlvs
from sniproxy.wire import (
    TLV,
    Address,
    alpn_tlv,
    authority_tlv,
    parse_host,
    proxy_v2_header,
    ssl_tlv,
)
from sniproxy.wire.crc32c import crc32c
from tests.support import strategies

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4 = bytes.fromhex("c0000201 c6336407 dc04 01bb")
SOURCE, DESTINATION = ("192.0.2.1", 56324), ("198.51.100.7", 443)
LONGEST = 1024


@pytest.mark.parametrize(
    ("source", "destination", "rest"),
    [
        pytest.param("192.0.2.1", "198.51.100.7", b"\x21\x11\x00\x0c" + IPV4, id="IPv4"),
        pytest.param(
            "2001:db8::1",
            "2001:db8::443",
            bytes.fromhex(
                "21210024 20010db800000000000000000000000120010db8000000000000000000000443 dc0401bb"
            ),
            id="IPv6",
        ),
        pytest.param(
            "::ffff:192.0.2.1",
            "::FFFF:C633:6407",
            b"\x21\x11\x00\x0c" + IPV4,
            id="IPv4 on a dual-stack listener",
        ),
        pytest.param(
            "::ffff:192.0.2.1",
            "198.51.100.7",
            b"\x21\x11\x00\x0c" + IPV4,
            id="one of them mapped",
        ),
        pytest.param(
            "fe80::1%eth0",
            "fe80::2%2",
            bytes.fromhex(
                "21210024 fe800000000000000000000000000001fe800000000000000000000000000002 dc0401bb"
            ),
            id="link-local scope",
        ),
    ],
)
def test_header(source: str, destination: str, rest: bytes) -> None:
    assert proxy_v2_header((source, 56324), (destination, 443)) == SIGNATURE + rest


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (None, None),
        (SOURCE, None),
        (None, DESTINATION),
        (SOURCE, ("2001:db8::1", 443)),
        (("2001:db8::1", 1), ("::ffff:192.0.2.1", 443)),
    ],
)
def test_what_has_no_form_is_unspecified_and_relayed_all_the_same(
    source: Address | None, destination: Address | None
) -> None:
    assert proxy_v2_header(source, destination) == SIGNATURE + b"\x21\x00\x00\x00"
    with_more = proxy_v2_header(source, destination, [(0xE5, b"more")])
    assert with_more == SIGNATURE + b"\x21\x00\x00\x07\xe5\x00\x04more"


@pytest.mark.parametrize("host", ["", "localhost", "192.0.2.01", "1.2.3.4\r\nPROXY", ":", "::g"])
def test_a_host_that_is_no_address_never_reaches_a_backend(host: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        proxy_v2_header((host, 1), DESTINATION)
    with pytest.raises(ValueError, match=r".*"):
        proxy_v2_header(SOURCE, (host, 1))


def test_a_tlv_that_does_not_fit_is_left_out_as_a_whole() -> None:
    start = len(proxy_v2_header(SOURCE, DESTINATION))
    fits = (0xE5, bytes(LONGEST - start - 3))
    header = proxy_v2_header(SOURCE, DESTINATION, [fits])
    assert len(header) == LONGEST
    assert read_proxy_v2(header).tlvs == [fits]
    too_long = (0xE5, bytes(LONGEST - start - 2))
    beyond_its_own_length = (0xE6, bytes(1 << 16))
    later = (0x02, b"a.example")
    header = proxy_v2_header(SOURCE, DESTINATION, [too_long, beyond_its_own_length, later])
    assert read_proxy_v2(header).tlvs == [later]


@pytest.mark.parametrize(("is_resumed", "client"), [(False, 0x07), (True, 0x05)])
def test_tls(is_resumed: bool, client: int) -> None:
    kind, value = ssl_tlv("TLSv1.3", "TLS_AES_128_GCM_SHA256", "f\u00fc", is_resumed=is_resumed)
    assert kind == 0x20
    assert value[:5] == bytes([client, 0, 0, 0, 0])
    assert read_tlvs(value[5:]) == [
        (0x21, b"TLSv1.3"),
        (0x23, b"TLS_AES_128_GCM_SHA256"),
        (0x22, b"f\xc3\xbc"),
    ]


def test_tls_without_a_common_name() -> None:
    _, value = ssl_tlv("TLSv1.2", "X", None, is_resumed=False)
    assert value[5:] == b"\x21\x00\x07TLSv1.2\x23\x00\x01X"


ports = st.integers(0, 65535)
ipv4 = st.tuples(st.ip_addresses(v=4).map(str), ports)
ipv6 = st.tuples(st.ip_addresses(v=6).map(str), ports)
tlvs = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=600)), max_size=4)


@strategies.steady
@given(st.tuples(ipv4, ipv4) | st.tuples(ipv6, ipv6), tlvs)
def test_every_address_comes_back_and_tlvs_in_their_order(
    ends: tuple[Address, Address], given_tlvs: list[TLV]
) -> None:
    header = proxy_v2_header(*ends, given_tlvs)
    assert len(header) <= LONGEST
    read = read_proxy_v2(header)
    if read.ends is not None:
        for (packed, port), (host, given_port) in zip(read.ends, ends, strict=True):
            sent = ipaddress.ip_address(host)
            assert ipaddress.ip_address(packed) == (getattr(sent, "ipv4_mapped", None) or sent)
            assert port == given_port
    else:
        assert {parse_host(host)[0] for host, _ in ends} == {4, 6}
    rest = iter(given_tlvs)
    assert all(tlv in rest for tlv in read.tlvs)


@pytest.mark.parametrize("ends", [(SOURCE, DESTINATION), (None, None)])
def test_a_checksum_is_that_of_the_header_with_zeros_in_its_place(
    ends: tuple[Address | None, Address | None],
) -> None:
    tlvs = [authority_tlv(b"one.example"), alpn_tlv(b"\x02h2")]
    header = proxy_v2_header(*ends, tlvs, is_checked=True)
    (kind, checksum), *others = read_proxy_v2(header).tlvs
    assert (kind, len(checksum)) == (0x03, 4)
    assert others == [(0x02, b"one.example"), (0x01, b"\x02h2")]
    at = header.index(b"\x03\x00\x04" + checksum) + 3
    assert int.from_bytes(checksum) == crc32c(header[:at] + bytes(4) + header[at + 4 :])
    assert read_proxy_v2(proxy_v2_header(*ends, tlvs)).tlvs == others


def test_a_name_that_does_not_fit_is_left_out_and_the_checksum_is_not() -> None:
    header = proxy_v2_header(SOURCE, DESTINATION, [authority_tlv(b"x" * 2000)], is_checked=True)
    [(kind, _)] = read_proxy_v2(header).tlvs
    assert kind == 0x03
