"""DNS messages and the packets that carry them, built by hand: what is wrong in them is on purpose.

Nothing in here is shared with what reads them, or taken from dnslib.
"""

import socket
import struct
from ipaddress import ip_address
from typing import Final

A, NS, CNAME, TXT, AAAA, OPT = 1, 2, 5, 16, 28, 41
IN, CHAOS = 1, 3

QR: Final = 0x8000
TC: Final = 0x0200
RD, RA = 0x0100, 0x0080
ANSWER: Final = QR | RD | RA

CLIENT: Final = "10.0.0.1"
SERVER: Final = "10.0.0.2"
PORT: Final = 40_000
ID: Final = 0x1234


def name(text: str) -> bytes:
    """Return a name in wire form, without compression. "" is the root."""
    labels = text.encode("latin-1").split(b".") if text else []
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def pointer(offset: int) -> bytes:
    return struct.pack("!H", 0xC000 | offset)


def question(text: str | bytes, kind: int = A, of_class: int = IN) -> bytes:
    wire = text if isinstance(text, bytes) else name(text)
    return wire + struct.pack("!HH", kind, of_class)


def record(
    owner: str | bytes,
    kind: int,
    rdata: str | bytes,
    ttl: int = 300,
    *,
    of_class: int = IN,
    length: int | None = None,
) -> bytes:
    """Return a resource record; `rdata` may be an address or a name, as fits the type."""
    wire = owner if isinstance(owner, bytes) else name(owner)
    if isinstance(rdata, str):
        rdata = name(rdata) if kind in {CNAME, NS} else ip_address(rdata).packed
    size = len(rdata) if length is None else length
    return wire + struct.pack("!HHIH", kind, of_class, ttl, size) + rdata


def message(
    questions: list[bytes],
    answers: list[bytes] | None = None,
    *,
    number: int = ID,
    flags: int = ANSWER,
    authorities: list[bytes] | None = None,
    additionals: list[bytes] | None = None,
    counts: tuple[int, int, int, int] | None = None,
    trailing: bytes = b"",
) -> bytes:
    """Return a message; `counts` may say something else about the sections than what is there."""
    sections = [questions, answers or [], authorities or [], additionals or []]
    header = struct.pack("!6H", number, flags, *(counts or map(len, sections)))
    return header + b"".join(map(b"".join, sections)) + trailing


def asking(text: str, kind: int = A, *, number: int = ID) -> bytes:
    """Return a question as a stub resolver sends it, with EDNS."""
    opt = record("", OPT, b"", 0, of_class=1232)
    return message([question(text, kind)], flags=RD, number=number, additionals=[opt])


def answering(text: str, *addresses: str, kind: int = A, number: int = ID, ttl: int = 300) -> bytes:
    """Return the plain answer to `asking`."""
    records = [record(text, kind, address, ttl) for address in addresses]
    return message([question(text, kind)], records, number=number)


def packet(source: str, source_port: int, destination: str, port: int, payload: bytes) -> bytes:
    """Return an IP packet with a UDP datagram in it. The checksum of UDP is left out, as 0."""
    ends = [ip_address(source).packed, ip_address(destination).packed]
    udp = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload
    if len(ends[0]) == 16:
        return (
            struct.pack("!IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64) + b"".join(ends) + udp
        )
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0)
    return header + b"".join(ends) + udp
