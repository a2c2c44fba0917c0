"""Packets: whole ones, and all that are not."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies
from tests.support.dns import packet
from tls_tproxy.names.packets import read_datagram

IPV4 = packet("10.0.0.1", 1234, "10.0.0.2", 53, b"payload")
IPV6 = packet("2001:db8::1", 53, "2001:db8::2", 1234, b"payload")


def changed(whole: bytes, at: int, byte: int) -> bytes:
    return whole[:at] + bytes([byte]) + whole[at + 1 :]


def test_ipv4() -> None:
    read = read_datagram(IPV4)
    assert read == (b"\x0a\0\0\1", 1234, b"\x0a\0\0\2", 53, b"payload")


def test_ipv6() -> None:
    read = read_datagram(IPV6)
    assert read is not None
    assert read.source + read.destination == IPV6[8:40]
    assert read[1::2] == (53, 53 + 1181)
    assert read.payload == b"payload"


def test_options_of_ipv4() -> None:
    options = struct.pack("!BxH", 0x46, len(IPV4) + 4) + IPV4[4:20] + b"\1\1\1\0" + IPV4[20:]
    assert read_datagram(options) == read_datagram(IPV4)


@pytest.mark.parametrize("whole", [IPV4, IPV6], ids=["IPv4", "IPv6"])
def test_padding_is_not_read(whole: bytes) -> None:
    assert read_datagram(whole + bytes(18)) == read_datagram(whole)


@pytest.mark.parametrize("whole", [IPV4, IPV6], ids=["IPv4", "IPv6"])
def test_an_empty_payload(whole: bytes) -> None:
    ends = ("10.0.0.1", 1, "10.0.0.2", 53) if whole == IPV4 else ("::1", 1, "::1", 53)
    read = read_datagram(packet(*ends, b""))
    assert read is not None
    assert read.payload == b""


@pytest.mark.parametrize("whole", [IPV4, IPV6], ids=["IPv4", "IPv6"])
def test_a_packet_that_ends_early(whole: bytes) -> None:
    assert all(read_datagram(whole[:end]) is None for end in range(len(whole)))


NONE = {
    "no version": changed(IPV4, 0, 0x05),
    "version 5": changed(IPV4, 0, 0x55),
    "IPv4 with a header of 16 bytes": changed(IPV4, 0, 0x44),
    "IPv4 with a header beyond its end": changed(IPV4, 0, 0x4F),
    "IPv4 with a length of 0": changed(IPV4, 3, 0),
    "IPv4 shorter than its datagram": changed(IPV4, 3, len(IPV4) - 1),
    "IPv4 longer than its datagram": changed(IPV4, 3, len(IPV4) + 1) + b"\0",
    "the first fragment": changed(IPV4, 6, 0x20),
    "a later fragment": changed(IPV4, 7, 1),
    "the last fragment": changed(IPV4, 6, 0x1F),
    "TCP": changed(IPV4, 9, 6),
    "UDP of 7 bytes": changed(IPV4, 25, 7),
    "UDP longer than its packet": changed(IPV4, 25, 16),
    "UDP shorter than its packet": changed(IPV4, 25, 14),
    "IPv6 with a length of 0": changed(IPV6, 5, 0),
    "IPv6 shorter than its datagram": changed(IPV6, 5, 14),
    "IPv6 longer than its datagram": changed(IPV6, 5, 16) + b"\0",
    "IPv6 TCP": changed(IPV6, 6, 6),
    "IPv6 with hop-by-hop options": changed(IPV6, 6, 0),
    "an IPv6 fragment": changed(IPV6, 6, 44),
    "IPv6 UDP shorter than its packet": changed(IPV6, 45, 14),
}


@pytest.mark.parametrize("broken", NONE.values(), ids=NONE)
def test_no_whole_datagram(broken: bytes) -> None:
    assert read_datagram(broken) is None


def test_do_not_fragment_is_no_fragment() -> None:
    assert read_datagram(changed(IPV4, 6, 0x40)) == read_datagram(IPV4)


@strategies.steady
@given(st.sampled_from([IPV4, IPV6]), st.data())
def test_a_spoilt_packet(whole: bytes, data: st.DataObject) -> None:
    spoilt = data.draw(strategies.mutations(whole))
    read = read_datagram(spoilt)
    assert read is None or read.payload in spoilt
