"""An IP packet with a UDP datagram in it, as AF_PACKET shows it.

Law: bytes in, values out. A packet counts only if it is whole: no fragment, no extension header
between IPv6 and UDP, and every length in it says the same. Checksums are not looked at: in packets
that leave, and in those over loopback, the kernel leaves them to the network card.
"""

import struct
from typing import Final, NamedTuple

__all__ = ["Datagram", "read_datagram"]

_UDP: Final = 17

# RFC 791 §3.1, up to the protocol: version and header length, total length, flags and fragment
# offset, protocol; then the addresses.
_IPV4: Final = struct.Struct("!BxHxxHxBxx4s4s")
_MORE_FRAGMENTS_OR_OFFSET: Final = 0x3FFF

# RFC 8200 §3: version, payload length, next header; then the addresses.
_IPV6: Final = struct.Struct("!BxxxHBx16s16s")

# RFC 768: ports, length.
_UDP_HEADER: Final = struct.Struct("!HHHxx")


class Datagram(NamedTuple):
    """A UDP datagram, with the addresses of its packet.

    Attributes:
        source: 4 or 16 bytes.
        source_port: 0 to 65535.
        destination: as long as the source.
        destination_port: 0 to 65535.
        payload: what it carries.
    """

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    payload: bytes


def read_datagram(packet: bytes) -> Datagram | None:
    """Return the datagram in an IP packet; None if it is no whole one.

    Args:
        packet: from the IP header on. What is behind the packet's own length is padding: Ethernet
            fills up what is shorter than 46 bytes.
    """
    if len(packet) < _IPV4.size + _UDP_HEADER.size:
        return None
    version = packet[0] >> 4
    if version == 4:
        first, end, fragment, protocol, source, destination = _IPV4.unpack_from(packet)
        begin = 4 * (first & 0xF)
        if begin < _IPV4.size or fragment & _MORE_FRAGMENTS_OR_OFFSET:
            return None
    elif version == 6 and len(packet) >= _IPV6.size:
        _, length, protocol, source, destination = _IPV6.unpack_from(packet)
        begin = _IPV6.size
        end = begin + length
    else:
        return None
    if protocol != _UDP or not begin + _UDP_HEADER.size <= end <= len(packet):
        return None
    source_port, destination_port, length = _UDP_HEADER.unpack_from(packet, begin)
    if length != end - begin:
        return None
    payload = packet[begin + _UDP_HEADER.size : end]
    return Datagram(source, source_port, destination, destination_port, payload)
