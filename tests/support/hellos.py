"""ClientHellos for tests: built by hand, field by field, or taken from a real TLS client.

Law: imports nothing of `sniproxy`, so that an error on one side cannot hide an error on the other.
Every function returns bytes; each layer takes the bytes of the layer inside it, and every length
can be told to lie:

    hello_bytes("example.com")                                one hello, ready to be sent
    record(handshake(client_hello([server_name("a", "b")])))  the same by hand, with two names
    records(handshake(client_hello()), [1, 2, 3])             records of 1, 2, 3, 3, 3 ... bytes
    handshake(client_hello(), length=70_000)                  a lie
    genuine_hello("example.com")                              what OpenSSL sends
"""

import ssl
from collections.abc import Iterable, Sequence

HANDSHAKE = 22
ALERT = 21
APPLICATION_DATA = 23

TLS12 = 0x0303
TLS13 = 0x0304
GREASE = 0x2A2A  # one of RFC 8701's sixteen

SERVER_NAME = 0
SUPPORTED_GROUPS = 10
ALPN = 16
PADDING = 21
SUPPORTED_VERSIONS = 43
KEY_SHARE = 51
ENCRYPTED_CLIENT_HELLO = 0xFE0D


# Numbers and vectors, RFC 8446 section 3.


def u8(number: int) -> bytes:
    return number.to_bytes(1, "big")


def u16(number: int) -> bytes:
    return number.to_bytes(2, "big")


def u24(number: int) -> bytes:
    return number.to_bytes(3, "big")


def vector8(content: bytes, length: int | None = None) -> bytes:
    return u8(len(content) if length is None else length) + content


def vector16(content: bytes, length: int | None = None) -> bytes:
    return u16(len(content) if length is None else length) + content


# Extensions.


def extension(extension_type: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return u16(extension_type) + vector16(data, length)


def name_entry(name: str | bytes, name_type: int = 0, *, length: int | None = None) -> bytes:
    return u8(name_type) + vector16(name.encode() if isinstance(name, str) else name, length)


def server_name(*entries: str | bytes, length: int | None = None) -> bytes:
    """The extension of RFC 6066; a `str` is a host_name, `bytes` are an entry ready made."""
    names = b"".join(name_entry(e) if isinstance(e, str) else e for e in entries)
    return extension(SERVER_NAME, vector16(names, length))


def alpn(*protocols: str) -> bytes:
    """The extension of RFC 7301."""
    return extension(ALPN, vector16(b"".join(vector8(p.encode()) for p in protocols)))


def supported_versions(*versions: int) -> bytes:
    return extension(SUPPORTED_VERSIONS, vector8(b"".join(map(u16, versions))))


# The message, its header, its records.


def client_hello(
    extensions: Sequence[bytes] | None = (),
    *,
    legacy_version: int = TLS12,
    random: bytes = bytes(range(32)),
    session_id: bytes = bytes(32),
    cipher_suites: bytes = u16(0x1301) + u16(0xC02F),
    compression_methods: bytes = b"\0",
    extensions_length: int | None = None,
    trailing: bytes = b"",
) -> bytes:
    """The body of a ClientHello. `extensions=None` leaves the block out, as SSL 3.0 did."""
    block = b"" if extensions is None else vector16(b"".join(extensions), extensions_length)
    return (
        u16(legacy_version)
        + random
        + vector8(session_id)
        + vector16(cipher_suites)
        + vector8(compression_methods)
        + block
        + trailing
    )


def handshake(body: bytes, *, msg_type: int = 1, length: int | None = None) -> bytes:
    return u8(msg_type) + u24(len(body) if length is None else length) + body


def record(
    fragment: bytes,
    *,
    content_type: int = HANDSHAKE,
    version: int = 0x0301,
    length: int | None = None,
) -> bytes:
    return u8(content_type) + u16(version) + vector16(fragment, length)


def records(message: bytes, sizes: Iterable[int] = (2**14,)) -> bytes:
    """The message in records of these sizes; the last size holds for all the rest."""
    return b"".join(record(fragment) for fragment in cut(message, sizes))


def cut(stream: bytes, sizes: Iterable[int]) -> list[bytes]:
    """The stream in pieces of these sizes; the last size, not 0, holds for all the rest."""
    pieces = []
    following = iter(sizes)
    size = next(following)
    at = 0
    while at < len(stream):
        pieces.append(stream[at : at + size])
        at += size
        size = next(following, size)
    return pieces


# Whole flights.


def hello_body(
    name: str | None = "example.com",
    *,
    protocols: Sequence[str] = (),
    versions: Sequence[int] = (TLS13, TLS12),
    extra: Sequence[bytes] = (),
) -> bytes:
    extensions = list(extra)
    if name is not None:
        extensions.append(server_name(name))
    if protocols:
        extensions.append(alpn(*protocols))
    if versions:
        extensions.append(supported_versions(*versions))
    return client_hello(extensions)


def hello_bytes(
    name: str | None = "example.com",
    *,
    protocols: Sequence[str] = (),
    versions: Sequence[int] = (TLS13, TLS12),
    extra: Sequence[bytes] = (),
    sizes: Iterable[int] = (2**14,),
) -> bytes:
    """All a client sends first, as it would: one record, unless `sizes` says otherwise.

    Args:
        name: The host_name; None leaves the extension out.
        protocols: ALPN names.
        versions: The list in supported_versions; empty leaves the extension out (TLS 1.2).
        extra: More extensions, ready made, put in front.
        sizes: Of the records, in bytes of handshake message; the last holds for all the rest.
    """
    body = hello_body(name, protocols=protocols, versions=versions, extra=extra)
    return records(handshake(body), sizes)


def hello_of_size(body_size: int, name: str = "example.com") -> bytes:
    """A handshake message whose body has so many bytes, filled with extensions of zeros."""
    missing = body_size - len(hello_body(name))
    padding: list[bytes] = []
    while missing:
        # 60,000 for all but the last, so that what is left never is too small for a header.
        size = missing if missing < 65_000 else 60_000
        padding.append(extension(PADDING + len(padding) * 1000, bytes(size - 4)))
        missing -= size
    return handshake(hello_body(name, extra=padding))


def chromium_hello(name: str = "example.com") -> bytes:
    """A flight in the likeness of a browser's: GREASE, a post-quantum key share, ECH, 1.8 KB."""
    key_share = (
        u16(GREASE) + vector16(b"\0") + u16(0x11EC) + vector16(bytes(1216)) + u16(29)
    ) + vector16(bytes(32))
    ech = b"\0" + u16(1) + u16(1) + b"\7" + vector16(bytes(32)) + vector16(bytes(208))
    return record(
        handshake(
            client_hello(
                [
                    extension(GREASE),
                    extension(ENCRYPTED_CLIENT_HELLO, ech),
                    extension(23),  # extended_master_secret
                    extension(65281, b"\0"),  # renegotiation_info
                    extension(SUPPORTED_GROUPS, vector16(u16(GREASE) + bytes(8))),
                    extension(11, vector8(b"\0")),  # ec_point_formats
                    extension(35),  # session_ticket
                    alpn("h2", "http/1.1"),
                    server_name(name),
                    extension(5, b"\1" + bytes(4)),  # status_request
                    extension(13, vector16(bytes(16))),  # signature_algorithms
                    extension(18),  # signed_certificate_timestamp
                    extension(KEY_SHARE, vector16(key_share)),
                    extension(45, vector8(b"\1")),  # psk_key_exchange_modes
                    supported_versions(GREASE, TLS13, TLS12),
                    extension(27, vector8(u16(2))),  # compress_certificate
                    extension(17613, vector16(vector8(b"h2"))),  # application_settings
                    extension(GREASE + 0x1010, b"\0"),
                ],
                cipher_suites=u16(GREASE) + bytes(30),
            )
        )
    )


def genuine_hello(
    name: str | None = "example.com",
    *,
    protocols: Sequence[str] = (),
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> bytes:
    """The first flight of the `ssl` module's OpenSSL, byte for byte, without a socket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # else it refuses to begin without a name
    context.minimum_version = minimum
    context.maximum_version = maximum
    if protocols:
        context.set_alpn_protocols(list(protocols))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without an answer")
