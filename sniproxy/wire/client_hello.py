"""ClientHello → the few things a router wants to know of it.

Law: a whole message in, a value out. Everything that the message consists of is checked to the
last byte, though little of it is kept: a hello that two parsers could read in two ways must not be
routed by one and served by the other.

    struct {                                          RFC 8446 section 4.1.2
        ProtocolVersion legacy_version;               ignored: supported_versions decides
        Random random;                                32 bytes, skipped
        opaque legacy_session_id<0..32>;
        CipherSuite cipher_suites<2..2^16-2>;
        opaque legacy_compression_methods<1..2^8-1>;
        Extension extensions<8..2^16-1>;              <0..2^16-1> or absent before TLS 1.3
    } ClientHello;

Extensions that are not read here are stepped over, whatever they are: "Servers MUST ignore
unrecognized extensions." (RFC 8446 section 4.1.2). That covers GREASE (RFC 8701), and Encrypted
ClientHello too, whose outer server_name is the one to route by. The same body travels in QUIC's
CRYPTO frames without any record around it (RFC 9001 section 4), hence a function of its own.
"""

from struct import Struct
from typing import Final, NamedTuple

from .alert import Alert
from .errors import HelloError, Reason
from .reader import Reader, entries, malformed, opaque8, opaque16

__all__ = ["ClientHello", "parse_client_hello"]

_LEGACY_VERSION: Final = 2  # bytes
_RANDOM: Final = 32  # bytes
_EXTENSION: Final = Struct("!HH")  # ExtensionType, length of extension_data
_NAME: Final = Struct("!BH")  # NameType, length of the name
_UINT16: Final = Struct("!H")
_TLS13: Final = (0x0304,)  # as _UINT16 unpacks it
_HOST_NAME: Final = 0  # NameType, RFC 6066 section 3
_HOST_NAMES: Final = {_HOST_NAME: "host_name"}

# ExtensionType, RFC 8446 section 4.2: those that are read.
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_READ: Final = {
    _SERVER_NAME: "server_name",
    _ALPN: "application_layer_protocol_negotiation",
    _SUPPORTED_VERSIONS: "supported_versions",
}


class ClientHello(NamedTuple):
    """What a client said first.

    Attributes:
        server_name: The host_name as on the wire, not judged yet; None where there was none.
        alpn_protocols: The protocol names of ALPN, most wanted first; empty where there were none.
        offers_tls13: Whether supported_versions lists TLS 1.3.
    """

    server_name: bytes | None = None
    alpn_protocols: tuple[bytes, ...] = ()
    offers_tls13: bool = False

    def required_server_name(self) -> bytes:
        """Return the host_name, for a server that is lost without it.

        Raises:
            HelloError: no_server_name. "Servers requiring this extension SHOULD respond to a
                ClientHello lacking a "server_name" extension by terminating the connection with a
                "missing_extension" alert." (RFC 8446 section 9.2). A client that knows no TLS 1.3
                has never heard of that alert and gets RFC 6066's unrecognized_name.
        """
        if self.server_name is None:
            raise HelloError(
                Alert.MISSING_EXTENSION if self.offers_tls13 else Alert.UNRECOGNIZED_NAME,
                Reason.NO_SERVER_NAME,
                "no host_name in the ClientHello",
            )
        return self.server_name


def parse_client_hello(body: bytes | bytearray | memoryview) -> ClientHello:
    """Read the body of a ClientHello.

    Args:
        body: The handshake message without its header of four bytes, all of it and nothing more.

    Returns:
        What was read, in copies: the buffer may be reused.

    Raises:
        HelloError: malformed_hello (decode_error), or duplicate_extension or
            duplicate_name (illegal_parameter).
    """
    hello = Reader(bytes(body), "ClientHello")
    hello.skip(_LEGACY_VERSION + _RANDOM)
    hello.opaque8("legacy_session_id", maximum=32)
    if len(hello.opaque16("cipher_suites", minimum=2)) % 2:
        raise _odd("cipher_suites")
    hello.opaque8("legacy_compression_methods", minimum=1)
    # RFC 5246 section 7.4.1.2: "The presence of extensions can be detected by determining whether
    # there are bytes following the compression_methods at the end of the ClientHello."
    if not (rest := hello.rest()):
        return ClientHello()
    extensions = opaque16(rest, "ClientHello", "extensions", minimum=0)
    # RFC 8446 section 4.2: "There MUST NOT be more than one extension of the same type in a given
    # extension block." Which of two would the backend believe?
    found = entries(extensions, "extensions", _EXTENSION, _READ, Reason.DUPLICATE_EXTENSION)
    return ClientHello(
        _server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else None,
        _alpn_protocols(found[_ALPN]) if _ALPN in found else (),
        _SUPPORTED_VERSIONS in found and _offers_tls13(found[_SUPPORTED_VERSIONS]),
    )


def _odd(what: str) -> HelloError:
    # RFC 8446 section 3.4: "The length of an encoded vector must be an exact multiple of the
    # length of a single element (e.g., a 17-byte vector of uint16 would be illegal)."
    return malformed(f"odd length of {what}")


def _server_name(extension: bytes) -> bytes | None:
    """Read `struct { ServerName server_name_list<1..2^16-1>; } ServerNameList;`, RFC 6066."""
    names = opaque16(extension, "server_name", "server_name_list", minimum=1)
    # RFC 6066 section 3: "For backward compatibility, all future data structures associated with
    # new NameTypes MUST begin with a 16-bit length field." So they can be stepped over. "The
    # ServerNameList MUST NOT contain more than one name of the same name_type."
    found = entries(names, "server_name_list", _NAME, _HOST_NAMES, Reason.DUPLICATE_NAME)
    # opaque HostName<1..2^16-1>;
    if (host_name := found.get(_HOST_NAME)) == b"":
        raise malformed("host_name of 0 bytes")
    return host_name


def _alpn_protocols(extension: bytes) -> tuple[bytes, ...]:
    """Read `struct { ProtocolName protocol_name_list<2..2^16-1> } ProtocolNameList;`, RFC 7301."""
    protocol_name_list = opaque16(extension, _READ[_ALPN], "protocol_name_list", minimum=2)
    protocols = []
    position, end = 0, len(protocol_name_list)
    while position < end:
        start = position + 1
        position = start + protocol_name_list[position]
        # RFC 7301 section 3.1: "Empty strings MUST NOT be included"
        if position == start or position > end:
            raise malformed("a protocol_name is empty, or longer than its list")
        protocols.append(protocol_name_list[start:position])
    return tuple(protocols)


def _offers_tls13(extension: bytes) -> bool:
    """Read `ProtocolVersion versions<2..254>`, RFC 8446 section 4.2.1."""
    versions = opaque8(extension, "supported_versions", "versions", minimum=2)
    if len(versions) % 2:
        raise _odd("versions")
    return _TLS13 in _UINT16.iter_unpack(versions)
