"""Addresses and more → the first bytes of a connection, PROXY protocol version 2.

Law: values in, at most `_LONGEST` bytes out. Source: proxy-protocol.txt at haproxy.org, section
2.2, "Binary header format". It says what version 1 says, and behind the addresses there is room
for more: a sequence of type, length and value.
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final, TypeAlias

from .addresses import Address, parse_host
from .crc32c import crc32c

__all__ = ["TLV", "alpn_tlv", "authority_tlv", "proxy_v2_header", "ssl_tlv"]

# A type, of one byte, and a value.
TLV: TypeAlias = tuple[int, bytes]

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_AND_PROXY: Final = 0x21

# "AF_UNSPEC ... the connection is forwarded for an unknown, unspecified or unsupported protocol."
# The command LOCAL would be a lie: that the connection is our own, and relays nobody's; and its
# receiver "must discard" what else we know.
_UNSPEC: Final = 0x00
# The family, AF_INET or AF_INET6, and STREAM.
_FAMILIES: Final = {4: 0x11, 6: 0x21}

# Bytes of a whole header. Its length would allow 65,551, but receivers want it in a buffer that
# they have: HAProxy 2.6 in 16,384 bytes, nginx 1.22 for HTTP in 1,024 (client_header_buffer_size),
# and both close the connection if it is longer.
_LONGEST: Final = 1024

# Signature, version and command, family, length; type and length; client and verify.
_START: Final = Struct("!12sBBH")
_TLV: Final = Struct("!BH")
_SSL: Final = Struct("!BI")

# Section 2.2.1 to 2.2.3: PP2_TYPE_ALPN, PP2_TYPE_AUTHORITY, PP2_TYPE_CRC32C.
_TYPE_ALPN: Final = 0x01
_TYPE_AUTHORITY: Final = 0x02
_TYPE_CRC32C: Final = 0x03
_CHECKSUM: Final = Struct("!I")

# Section 2.2.6, "The PP2_TYPE_SSL type and subtypes".
_TYPE_SSL: Final = 0x20
_SUBTYPE_SSL_VERSION: Final = 0x21
_SUBTYPE_SSL_CN: Final = 0x22
_SUBTYPE_SSL_CIPHER: Final = 0x23
_CLIENT_SSL: Final = 0x01
_CLIENT_CERT_CONN: Final = 0x02
_CLIENT_CERT_SESS: Final = 0x04
_VERIFIED: Final = 0  # "zero if the client presented a certificate and it was ... verified"


def proxy_v2_header(
    source: Address | None,
    destination: Address | None,
    tlvs: Iterable[TLV] = (),
    *,
    is_checked: bool = False,
) -> bytes:
    """Return the header for a connection.

    Args:
        source: The client's address, or None where the kernel can't say.
        destination: The address the client connected to, or None likewise.
        tlvs: What else is known, the most important first. One that does not fit any more is
            left out, as a whole.
        is_checked: Whether there is a checksum, PP2_TYPE_CRC32C, before them.

    Returns:
        1024 bytes at most. It is without addresses where one is missing, or where the two are not
        of one family: there is no mixture.

    Raises:
        ValueError: A host is no IP address. A bug of the caller's; the kernel gives no others.
    """
    family, body = _UNSPEC, b""
    if source is not None and destination is not None:
        version, _, client = parse_host(source[0])
        server_version, _, server = parse_host(destination[0])
        if version == server_version:
            family = _FAMILIES[version]
            body = client + server + source[1].to_bytes(2) + destination[1].to_bytes(2)
    checksum_at = 0
    if is_checked:
        body += _encode(_TYPE_CRC32C, bytes(_CHECKSUM.size))
        checksum_at = _START.size + len(body) - _CHECKSUM.size
    for kind, value in tlvs:
        if _START.size + len(body) + _TLV.size + len(value) <= _LONGEST:
            body += _encode(kind, value)
    header = _START.pack(_SIGNATURE, _VERSION_AND_PROXY, family, len(body)) + body
    if not is_checked:
        return header
    # "The sender must: initialize the checksum field to '0's. Calculate the CRC32c checksum of the
    # PROXY header ... Put the resultant value into the checksum field".
    checksum = _CHECKSUM.pack(crc32c(header))
    return header[:checksum_at] + checksum + header[checksum_at + _CHECKSUM.size :]


def authority_tlv(server_name: bytes) -> TLV:
    """Return PP2_TYPE_AUTHORITY: "the host name value passed by the client"."""
    return _TYPE_AUTHORITY, server_name


def alpn_tlv(protocol_name_list: bytes) -> TLV:
    """Return PP2_TYPE_ALPN: the "copy of the ALPN extension of TLS as defined by RFC7301".

    Args:
        protocol_name_list: What the client offers, each name behind its length. Which of them is
            going to be used only the backend will know.
    """
    return _TYPE_ALPN, protocol_name_list


def ssl_tlv(version: str, cipher: str, common_name: str | None, *, is_resumed: bool) -> TLV:
    """Return PP2_TYPE_SSL, of a client that has shown a certificate which was verified.

    Args:
        version: Of TLS, as OpenSSL calls it: "TLSv1.3".
        cipher: What OpenSSL calls the cipher suite.
        common_name: Of the subject of the certificate; None leaves it out.
        is_resumed: Whether it was shown in an earlier connection of the same session.
    """
    # PP2_CLIENT_CERT_CONN: "over the current connection"; PP2_CLIENT_CERT_SESS: "at least once
    # over the TLS session this connection belongs to".
    client = _CLIENT_SSL | _CLIENT_CERT_SESS
    if not is_resumed:
        client |= _CLIENT_CERT_CONN
    value = _SSL.pack(client, _VERIFIED)
    value += _encode(_SUBTYPE_SSL_VERSION, version.encode())
    value += _encode(_SUBTYPE_SSL_CIPHER, cipher.encode())
    if common_name is not None:
        value += _encode(_SUBTYPE_SSL_CN, common_name.encode())
    return _TYPE_SSL, value


def _encode(kind: int, value: bytes) -> bytes:
    return _TLV.pack(kind, len(value)) + value
