"""What must hold for every input whatever: shared by the fuzz targets and the tests.

Law: bytes or text in, nothing out, or an exception. An `AssertionError` says which promise was
broken; any other exception is one that the code under test promised not to raise. No atheris and
no hypothesis in here, and no clock and no chance: one input always has one outcome, so that a
corpus file is a test.
"""

import os
import re
import socket
import unicodedata
from pathlib import PurePosixPath
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

import idna

from sniproxy.wire import (
    MAX_WIRE,
    Address,
    Alert,
    ClientHello,
    HelloError,
    HelloReader,
    Reason,
    proxy_v1_header,
    proxy_v2_header,
)
from sniproxy.wire.hello import MAX_HANDSHAKE
from sniproxy_hostname import Hostname, InvalidHostname, directory_namer
from sniproxy_hostname._unicode import from_unicode

__all__ = [
    "check_hello",
    "check_hostname",
    "check_proxy_header",
    "check_typed",
    "read_proxy_v2",
    "read_tlvs",
]

# The hello.

Verdict: TypeAlias = ClientHello | tuple[Alert, Reason] | None
Read: TypeAlias = tuple[bytes | None, tuple[bytes, ...], bool]

RECORD_HEADER: Final = 5
HANDSHAKE_HEADER: Final = 4

# Byte by byte is slow, and what is far into a large hello has been seen in a small one.
SINGLY: Final = 512

# Verdicts on the message: they stay the same in whichever records the message comes. (The other
# reasons are about the records themselves, or about how large both together are.)
ON_THE_BODY: Final = {Reason.MALFORMED_HELLO, Reason.DUPLICATE_EXTENSION, Reason.DUPLICATE_NAME}
ON_THE_MESSAGE: Final = ON_THE_BODY | {Reason.NOT_CLIENT_HELLO}


def check_hello(stream: bytes) -> None:
    """Read a client's stream in every way: one verdict, at one place, and only ever HelloError."""
    verdict, end = _walk(stream, singly=0)
    if not stream:
        return
    seed = crc32(stream)  # a place to cut that is different for every stream, and always the same

    # No segmentation changes the verdict, or the byte that brings it.
    assert _walk(stream, singly=SINGLY) == (verdict, end), "byte by byte is different"
    assert _read(stream) == verdict, "in one piece is different"
    place = seed % (len(stream) + 1)
    assert _read(stream[:place], stream[place:]) == verdict, f"cut at {place} is different"
    _check_missing(stream[: min(place, end - 1)], stream)

    fragments = _fragments(stream[:end])
    message = b"".join(fragments)
    body_end = HANDSHAKE_HEADER + int.from_bytes(message[1:4])
    if verdict is None:
        assert end == len(stream) < MAX_WIRE, "no verdict, though the limit is reached"
        if len(message) >= HANDSHAKE_HEADER:
            assert body_end <= HANDSHAKE_HEADER + MAX_HANDSHAKE, "waits for too large a message"
            assert body_end + RECORD_HEADER * len(fragments) <= MAX_WIRE, "waits beyond the limit"
        return

    # Nothing before that byte brings it, and nothing after it changes it.
    assert _read(stream[: end - 1]) is None, "the verdict falls earlier when cut there"
    for behind in (b"\x15\x03\x03\x00\x02\x02\x28", stream, _flipped(stream)):
        assert _read(stream[:end] + behind) == verdict, "what comes later is looked at"

    hello, reason = (verdict, None) if isinstance(verdict, ClientHello) else (None, verdict[1])
    if hello or reason in ON_THE_MESSAGE:
        assert _read(_in_records(message, seed)) == verdict, "in other records is different"
    if hello or reason in ON_THE_BODY:
        assert all(fragments), "an empty record was accepted"
        assert message[0] == 1, "a message of another type was accepted"
        read = hello and (hello.server_name, hello.alpn_protocols, hello.offers_tls13)
        assert _read_plainly(message[HANDSHAKE_HEADER:body_end]) == read, "read in another way"
    if hello:
        assert end <= MAX_WIRE, "longer than the limit"
        alert = Alert.MISSING_EXTENSION if hello.offers_tls13 else Alert.UNRECOGNIZED_NAME
        assert _required(hello) == (hello.server_name or (alert, Reason.NO_SERVER_NAME))
        check_hostname(hello.server_name or b"")


def _read(*pieces: bytes) -> Verdict:
    reader = HelloReader()
    for piece in pieces:
        if (verdict := _feed(reader, piece)) is not None:
            return verdict
    return None


def _feed(reader: HelloReader, piece: bytes) -> Verdict:
    try:
        verdict: Verdict = reader.feed(piece)
    except HelloError as error:
        _check_readable(str(error))
        verdict = error.alert, error.reason
    assert (reader.missing == 0) is (verdict is not None), "missing is 0 after the verdict only"
    return verdict


def _walk(stream: bytes, *, singly: int) -> tuple[Verdict, int]:
    """Read the first bytes one by one, then as many as are missing; return what came, and where.

    So the verdict falls at the end of a step, if `missing` is honest, and that is checked too.
    """
    reader = HelloReader()
    while reader.size < len(stream):
        missing = reader.missing
        assert reader.size + missing <= MAX_WIRE, "waits for more than a receive buffer holds"
        step = 1 if reader.size < singly else missing
        piece = stream[reader.size : reader.size + step]
        verdict = _feed(reader, piece)
        if len(piece) < missing:
            assert verdict is None, f"a verdict at {reader.size}, though more was missing"
            assert reader.missing == missing - len(piece), "missing changed, with no news"
        if verdict is not None:
            return verdict, reader.size
    return None, reader.size


def _check_missing(prefix: bytes, anything: bytes) -> None:
    """Without a verdict so far, fewer bytes than are missing bring none, whatever they are."""
    reader = HelloReader()
    assert _feed(reader, prefix) is None, f"a verdict before {len(prefix) + 1}"
    missing = reader.missing
    for other in (anything, _flipped(anything), bytes(missing)):
        assert _read(prefix, other[: missing - 1]) is None, f"a verdict, though {missing} miss"


def _flipped(piece: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in piece)


def _fragments(stream: bytes) -> list[bytes]:
    fragments = []
    at = 0
    while at + RECORD_HEADER < len(stream):
        start = at + RECORD_HEADER
        at = start + int.from_bytes(stream[start - 2 : start])
        fragments.append(stream[start:at])
    return fragments


def _in_records(message: bytes, seed: int) -> bytes:
    """Put the message in records of two sizes in turn, down to one byte where the limit allows."""
    smallest = 1 if len(message) * (RECORD_HEADER + 1) <= MAX_WIRE else 11
    sizes = smallest + seed % 7, smallest + seed % 2000
    stream = bytearray()
    at = 0
    while at < len(message):
        fragment = message[at : at + sizes[0]]
        stream += b"\x16\x03\x01" + len(fragment).to_bytes(2) + fragment
        at += len(fragment)
        sizes = sizes[1], sizes[0]
    return bytes(stream)


def _required(hello: ClientHello) -> bytes | tuple[Alert, Reason]:
    try:
        return hello.required_server_name()
    except HelloError as error:
        return error.alert, error.reason


def _read_plainly(body: bytes) -> Read | None:
    """Read a ClientHello with slices and no cleverness at all; None if anything is wrong."""
    try:
        return _slice(body)
    except ValueError:
        return None


def _slice(body: bytes) -> Read:
    session_id, rest = _vector(body[2 + 32 :], 1)
    cipher_suites, rest = _vector(rest, 2)
    compression_methods, rest = _vector(rest, 1)
    _require(len(session_id) <= 32 and _are_pairs(cipher_suites) and compression_methods)
    block, rest = _vector(rest, 2) if rest else (b"", b"")
    _require(not rest)

    found: dict[int, bytes] = {}
    while block:
        kind = int.from_bytes(block[:2])
        data, block = _vector(block[2:], 2)
        _require(kind not in found or kind not in {0, 16, 43})
        found[kind] = data

    names: list[bytes] = []
    entries = _only_vector(found[0], 2) if 0 in found else b""
    while entries:
        kind = entries[0]
        name, entries = _vector(entries[1:], 2)
        _require(name or kind)
        names += [] if kind else [name]
    _require(len(names) <= 1)

    protocols: list[bytes] = []
    entries = _only_vector(found[16], 2) if 16 in found else b""
    while entries:
        protocol, entries = _vector(entries, 1)
        _require(protocol)
        protocols.append(protocol)

    versions = _only_vector(found[43], 1) if 43 in found else b"\0\0"
    _require(_are_pairs(versions))
    offers_tls13 = b"\x03\x04" in (versions[at : at + 2] for at in range(0, len(versions), 2))
    return names[0] if names else None, tuple(protocols), offers_tls13


def _require(condition: object) -> None:
    if not condition:
        raise ValueError


def _vector(data: bytes, length_size: int) -> tuple[bytes, bytes]:
    """Return the inside of the vector that `data` begins with, and what comes after it."""
    end = length_size + int.from_bytes(data[:length_size])
    _require(end <= len(data))
    return data[length_size:end], data[end:]


def _only_vector(data: bytes, length_size: int) -> bytes:
    inside, rest = _vector(data, length_size)
    _require(inside and not rest)
    return inside


def _are_pairs(content: bytes) -> bool:
    return len(content) >= 2 and len(content) % 2 == 0


def _check_readable(refusal: str) -> None:
    assert refusal.isprintable(), "the message may do things to a terminal"


# Names.

LOWER: Final = b"abcdefghijklmnopqrstuvwxyz"
DIGITS: Final = b"0123456789"
ALLOWED: Final = frozenset(LOWER + DIGITS + b"-_.")


def check_hostname(wire: bytes) -> None:
    """A name from the wire: a safe path component by every rule, or InvalidHostname."""
    name = _hostname(wire)
    assert (name is not None) is _obeys_every_rule(wire), "the rules say otherwise"
    assert _hostname(wire.swapcase()) == name, "case makes a difference"
    if name is None:
        return
    _check_is_safe(name)
    assert name.encode() == wire.lower().removesuffix(b"."), "another name"
    if not wire.endswith(b"."):
        assert _hostname(wire + b".") == name, "a trailing dot makes a difference"
        assert _hostname(wire + b"..") is None, "two trailing dots"


def _hostname(wire: bytes) -> Hostname | None:
    try:
        return Hostname(wire)
    except InvalidHostname as refusal:
        _check_readable(str(refusal))
        return None


def _obeys_every_rule(wire: bytes) -> bool:
    """Say the rules once more, one by one, in no hurry."""
    name = wire[:-1] if wire[-1:] == b"." else wire
    labels = name.split(b".")
    return (
        1 <= len(name) <= 253
        and all(1 <= len(label) <= 63 for label in labels)
        and all(byte in LOWER + LOWER.upper() + DIGITS + b"-_." for byte in name)
        and not any(label[:1] in (b"-", b"_") or label[-1:] in (b"-", b"_") for label in labels)
        and not all(byte in DIGITS for byte in labels[-1])
    )


def _check_is_safe(name: Hostname) -> None:
    """A Hostname is one path component, its own canonical form, and names one directory."""
    assert PurePosixPath("/hosts", name).parent == PurePosixPath("/hosts"), "leaves the directory"
    assert PurePosixPath("/hosts", name).name == name, "is not one component"
    assert name not in ("", ".", ".."), "is a directory that is always there"
    assert "\0" not in name, "holds a NUL"
    assert 1 <= len(os.fsencode(name)) <= 253, "is longer than a name may be"
    assert Hostname(name.encode()) == name, "is not canonical"
    assert directory_namer(hashed=False)(name) == name
    assert re.fullmatch(r"[0-9a-f]{64}", directory_namer(hashed=True)(name))


def check_typed(text: str) -> None:
    """What a person typed: a name that the daemon accepts as it stands, or InvalidHostname."""
    try:
        name = from_unicode(text)
    except InvalidHostname as refusal:
        _check_readable(str(refusal))
        name = None
    if text.isascii() and "xn--" not in text.lower():
        assert name == _hostname(text.encode()), "plain ASCII, and the daemon says otherwise"
    if name is None:
        return
    _check_is_safe(name)
    if text.isascii():
        assert name == text.lower().removesuffix("."), "ASCII, and another name"
    shown = ".".join(map(_shown, name.split(".")))
    assert from_unicode(name) == name, "is not a fixed point"
    assert from_unicode(shown) == name, "typed as it is shown, it is another name"
    ascii_parts = [c for c in unicodedata.normalize("NFD", shown) if c.isascii()]
    assert ALLOWED.issuperset("".join(ascii_parts).encode()), "in parts, it breaks STD3 rules"
    assert from_unicode(name.upper() + ".") == name, "capitals or a dot make a difference"
    try:
        strict = idna.encode(text, uts46=True, std3_rules=True).decode().removesuffix(".")
    except ValueError:
        return  # it is IDNA 2008, and refuses more than UTS #46 does
    assert name == strict, "strict IDNA gives another name"


def _shown(label: str) -> str:
    return label[4:].encode().decode("punycode") if label.startswith("xn--") else label


# The PROXY header.

UNKNOWN: Final = b"PROXY UNKNOWN\r\n"
LONGEST_HEADER: Final = 107  # proxy-protocol.txt, section 2.1
PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")
LONGEST_V2: Final = 1024  # what nginx reads of a connection before it has understood anything
SIGNATURE: Final = bytes.fromhex("0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A")  # section 2.2
MAPPED: Final = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2


class End(NamedTuple):
    """One end of a connection: as the kernel may spell it, and as bytes, which have one spelling.

    Attributes:
        address: What the header is made of; None where the kernel can't say.
        packed: 4 or 16 bytes in network order; None where `address` is None or may be no address.
    """

    address: Address | None
    packed: bytes | None


def check_proxy_header(data: bytes) -> None:
    """Addresses made from the bytes, put in a header, read back: the same, or UNKNOWN.

    In version 2 as in version 1, and there with the text in TLVs.

    Args:
        data: Spelling (1), address (16) and port (2) of the source, the same 19 bytes of the
            destination, and a text: a scope id, or what stands where an address should. Zeros
            stand for what is not there.
    """
    text = data[38:].decode("latin-1")
    data = data.ljust(38, b"\0")
    source, destination = _end(data[:19], text), _end(data[19:38], text)
    try:
        header = proxy_v1_header(source.address, destination.address)
    except ValueError:
        strangers = [end for end in (source, destination) if end.address and not end.packed]
        assert strangers, "refused what is an address"
        _check_proxy_v2(source, destination, data, None)
        return
    _check_proxy_v2(source, destination, data, header)
    assert len(header) <= LONGEST_HEADER
    assert header.endswith(b"\r\n")
    assert header.count(b"\r") == header.count(b"\n") == 1, "a line break inside"
    if header == UNKNOWN:
        families = {end.packed and len(end.packed) for end in (source, destination)}
        assert families != {4}, "says UNKNOWN of IPv4"
        assert families != {16}, "says UNKNOWN of IPv6"
        return
    for end, (packed, port) in zip((source, destination), _read_header(header), strict=True):
        assert end.address, "an address from nowhere"
        assert end.packed in (packed, None), "another address"
        assert end.address[1] == port, "another port"


class ProxyV2(NamedTuple):
    """A header of version 2, read.

    Attributes:
        ends: Packed address and port of the source, and of the destination; None for AF_UNSPEC.
        tlvs: Types and values.
    """

    ends: list[tuple[bytes, int]] | None
    tlvs: list[tuple[int, bytes]]


def read_proxy_v2(header: bytes) -> ProxyV2:
    """Read a header, with nothing behind it, as section 2.2 has it."""
    assert header[:12] == SIGNATURE
    assert header[12] == 0x21, "not version 2, or not PROXY"
    body = header[16:]
    assert int.from_bytes(header[14:16]) == len(body), "another length"
    size = {0x00: 0, 0x11: 4, 0x21: 16}[header[13]]
    if not size:
        return ProxyV2(None, read_tlvs(body))
    hosts = body[:size], body[size : 2 * size]
    ports, rest = body[2 * size : 2 * size + 4], body[2 * size + 4 :]
    numbers = int.from_bytes(ports[:2]), int.from_bytes(ports[2:])
    return ProxyV2(list(zip(hosts, numbers, strict=True)), read_tlvs(rest))


def read_tlvs(data: bytes) -> list[tuple[int, bytes]]:
    """Read types and values until the end."""
    tlvs = []
    while data:
        size = int.from_bytes(data[1:3])
        assert len(data) >= 3 + size, "cut off"
        tlvs.append((data[0], data[3 : 3 + size]))
        data = data[3 + size :]
    return tlvs


def _check_proxy_v2(source: End, destination: End, data: bytes, v1: bytes | None) -> None:
    """Version 2 says what version 1 says, None if it refuses, and TLVs as far as they fit."""
    tlvs = [(at, data[38:] * 7 * at) for at in range(5)]
    try:
        header = proxy_v2_header(source.address, destination.address, tlvs)
    except ValueError:
        assert v1 is None, "refused by version 2 alone"
        return
    assert v1 is not None, "refused by version 1 alone"
    assert len(header) <= LONGEST_V2
    read = read_proxy_v2(header)
    assert read.ends == (None if v1 == UNKNOWN else _read_header(v1)), "another address"
    assert read.tlvs == tlvs[: len(read.tlvs)], "another TLV"
    for _, left_out in tlvs[len(read.tlvs) :]:
        assert len(header) + 3 + len(left_out) > LONGEST_V2, "left out what would fit"


def _end(data: bytes, text: str) -> End:
    kind, packed, port = data[0] % 8, data[1:17], int.from_bytes(data[17:19])
    groups = [packed[at : at + 2].hex() for at in range(0, 16, 2)]
    host: str
    match kind:
        case 0:
            return End(None, None)
        case 1:
            packed = packed[:4]
            host = socket.inet_ntop(socket.AF_INET, packed)
        case 2:  # as the kernel's numbers are usually spelt
            host = socket.inet_ntop(socket.AF_INET6, packed)
        case 3:
            host = ":".join(groups)
        case 4:
            host = ":".join(group.upper().lstrip("0") or "0" for group in groups)
        case 5:
            host = "::ffff:" + socket.inet_ntop(socket.AF_INET, packed[:4])
            packed = MAPPED + packed[:4]
        case 6:
            host = f"::FFFF:{groups[0]}:{groups[1]}"
            packed = MAPPED + packed[:4]
        case _:
            return End((text, port), None)
    if packed.startswith(MAPPED):
        packed = packed[12:]
    if ":" in host and text:
        host += f"%{text}"
    return End((host, port), packed)


def _read_header(header: bytes) -> list[tuple[bytes, int]]:
    """Read a header of TCP4 or TCP6 as a backend in C would, with inet_pton(3)."""
    protocol, family, *rest = header.decode("ascii").removesuffix("\r\n").split(" ")
    assert protocol == "PROXY"
    domain = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}[family]
    source, destination, *ports = rest
    assert all(map(PORT.fullmatch, ports)), "not a port"
    hosts = [socket.inet_pton(domain, host) for host in (source, destination)]
    assert not any(host.startswith(MAPPED) for host in hosts if len(host) == 16), "IPv4 in a coat"
    return list(zip(hosts, map(int, ports), strict=True))
