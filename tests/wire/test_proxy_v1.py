"""The header, read back by a reader that was made from the grammar alone."""

import ipaddress
import re
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.wire import Address, proxy_v1_header
from tests.support import strategies

# proxy-protocol.txt, section 2.1: single spaces, no leading zeros, CR LF.
PORT = r"(0|[1-9][0-9]{0,4})"
TCP4 = re.compile(rf"PROXY TCP4 ([0-9.]+) ([0-9.]+) {PORT} {PORT}\r\n")
TCP6 = re.compile(rf"PROXY TCP6 ([0-9a-fA-F:]+) ([0-9a-fA-F:]+) {PORT} {PORT}\r\n")
IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
UNKNOWN = b"PROXY UNKNOWN\r\n"


def read_back(header: bytes) -> tuple[int, Address, Address]:
    text = header.decode("ascii")
    for version, line in ((4, TCP4), (6, TCP6)):
        if match := line.fullmatch(text):
            source, destination, source_port, destination_port = match.groups()
            for host in (source, destination):
                assert ipaddress.ip_address(host).version == version
            return version, (source, int(source_port)), (destination, int(destination_port))
    raise AssertionError(f"not in the grammar: {text!r}")


@pytest.mark.parametrize(
    ("source", "destination", "header"),
    [
        pytest.param("192.0.2.1", "198.51.100.7", "TCP4 192.0.2.1 198.51.100.7", id="IPv4"),
        pytest.param("2001:db8::1", "2001:db8::443", "TCP6 2001:db8::1 2001:db8::443", id="IPv6"),
        pytest.param(
            "::ffff:192.0.2.1",
            "::ffff:198.51.100.7",
            "TCP4 192.0.2.1 198.51.100.7",
            id="IPv4 on a dual-stack listener",
        ),
        pytest.param(
            "::ffff:c000:201", "::FFFF:C000:202", "TCP4 192.0.2.1 192.0.2.2", id="the same in hex"
        ),
        pytest.param(
            "::ffff:192.0.2.1", "192.0.2.2", "TCP4 192.0.2.1 192.0.2.2", id="one of them mapped"
        ),
        pytest.param("fe80::1%eth0", "fe80::2%2", "TCP6 fe80::1 fe80::2", id="link-local scope"),
        pytest.param("::1", "::", "TCP6 ::1 ::", id="loopback"),
        pytest.param(
            "::ffff:1", "::ffff:0:1.2.3.4", "TCP6 ::ffff:1 ::ffff:0:102:304", id="not mapped at all"
        ),
    ],
)
def test_header(source: str, destination: str, header: str) -> None:
    expected = f"PROXY {header} 56324 443\r\n".encode()
    assert proxy_v1_header((source, 56324), (destination, 443)) == expected
    read_back(expected)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (None, None),
        (("192.0.2.1", 1), None),
        (None, ("192.0.2.1", 1)),
        (("192.0.2.1", 1), ("2001:db8::1", 443)),
        (("2001:db8::1", 1), ("::ffff:192.0.2.1", 443)),
    ],
)
def test_what_has_no_form_in_the_grammar_is_unknown(
    source: Address | None, destination: Address | None
) -> None:
    assert proxy_v1_header(source, destination) == UNKNOWN


@pytest.mark.parametrize("host", ["", "localhost", "192.0.2.01", "1.2.3.4\r\nPROXY", ":", "::g"])
def test_a_host_that_is_no_address_never_reaches_a_backend(host: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        proxy_v1_header((host, 1), ("192.0.2.1", 443))


def test_the_longest_header_fits_the_107_bytes_that_a_receiver_must_take() -> None:
    host = ":".join(["ffff"] * 8)
    assert len(proxy_v1_header((host, 65535), (host, 65535))) == 104


ports = st.integers(0, 65535)


ipv4 = st.tuples(st.ip_addresses(v=4), ports)
ipv6 = st.tuples(st.ip_addresses(v=6), ports)
ends = st.tuples(ipv4, ipv4) | st.tuples(ipv6, ipv6)


@strategies.steady
@given(ends)
def test_every_address_comes_back(ends: tuple[tuple[IP, int], tuple[IP, int]]) -> None:
    (source, source_port), (destination, destination_port) = ends
    header = proxy_v1_header((str(source), source_port), (str(destination), destination_port))
    if header == UNKNOWN:
        mapped = [ipaddress.IPv6Address(str(a)).ipv4_mapped for a in (source, destination)]
        assert sum(m is not None for m in mapped) == 1
        return
    assert len(header) <= 107
    _, read_source, read_destination = read_back(header)
    assert read_source[1] == source_port
    assert read_destination[1] == destination_port
    for sent, read in ((source, read_source[0]), (destination, read_destination[0])):
        mapped_or_not = getattr(sent, "ipv4_mapped", None) or sent
        assert ipaddress.ip_address(read) == mapped_or_not
