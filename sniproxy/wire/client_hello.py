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

The names are those of the TLS presentation language (RFC 8446 section 3): `opaque` is a vector, a
length and so many bytes.

Extensions that are not read here are stepped over, whatever they are: "Servers MUST ignore
unrecognized extensions." (RFC 8446 section 4.1.2). That covers GREASE (RFC 8701), and Encrypted
ClientHello too, whose outer server_name is the one to route by. The same body travels in QUIC's
CRYPTO frames without any record around it (RFC 9001 section 4), hence a function of its own.
"""

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct, error
from typing import Final

from .alert import Alert
from .errors import HelloError, Reason
from .vectors import malformed, not_one_vector, wrong_size

__all__ = ["ClientHello", "parse_client_hello"]

_LEGACY_SESSION_ID: Final = 2 + 32  # where it begins: after legacy_version and random
_LONGEST_SESSION_ID: Final = 32  # bytes
_read_name_header = Struct("!BH").unpack_from  # NameType, length of the name
_ONE_NAME: Final = 2 + 1 + 2  # length of server_name_list, NameType, length of the name
_VERSION: Final = Struct("!H")
_TLS13: Final = (0x0304,)  # as _VERSION unpacks it
_HOST_NAME: Final = 0  # NameType, RFC 6066 section 3
_ALPN: Final = "application_layer_protocol_negotiation"
# Nearly all clients offer one of a few lists of protocols, and a lookup takes a fifth of the time
# that reading one takes. Not many, as each may have 64 KB.
_REMEMBERED: Final = 32


@dataclass(slots=True, init=False)
class ClientHello:
    """What a client said first.

    Attributes:
        server_name: The host_name as on the wire, not judged yet; None where there was none.
        protocol_name_list: That of ALPN, checked and not taken apart; empty where there was none.
        versions: Those of supported_versions, as well.
    """

    server_name: bytes | None
    protocol_name_list: bytes
    versions: bytes

    def __init__(
        self,
        server_name: bytes | None = None,
        protocol_name_list: bytes = b"",
        versions: bytes = b"",
    ) -> None:
        self.server_name = server_name
        self.protocol_name_list = protocol_name_list
        self.versions = versions

    @property
    def alpn_protocols(self) -> tuple[bytes, ...]:
        """The protocol names of ALPN, most wanted first; empty where there were none."""
        protocols = []
        names = self.protocol_name_list
        while names:
            end = 1 + names[0]
            protocols.append(names[1:end])
            names = names[end:]
        return tuple(protocols)

    @property
    def offers_tls13(self) -> bool:
        """Whether supported_versions lists TLS 1.3."""
        return _TLS13 in _VERSION.iter_unpack(self.versions)

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


def parse_client_hello(message: bytes, body: int = 0) -> ClientHello:
    """Read the body of a ClientHello.

    Args:
        message: It ends with the body, all of it and nothing more.
        body: Where that begins, behind the four bytes of the handshake message's header.

    Returns:
        What was read.

    Raises:
        HelloError: malformed_hello (decode_error), or duplicate_extension or
            duplicate_name (illegal_parameter).
    """
    end = len(message)
    try:
        # Each vector begins where the one before ends, wherever that is: one that reaches beyond
        # the end is found out by the next byte that should follow, and is not.
        position = body + _LEGACY_SESSION_ID
        length = message[position]
        if length > _LONGEST_SESSION_ID:
            raise malformed(f"legacy_session_id of {length} bytes, more than {_LONGEST_SESSION_ID}")
        position += 1 + length
        length = message[position] << 8 | message[position + 1]
        if not length:
            raise malformed("no cipher_suites")
        if length % 2:
            raise _odd("cipher_suites")
        position += 2 + length
        length = message[position]
        if not length:
            raise malformed("no legacy_compression_methods")
        position += 1 + length
        # RFC 5246 section 7.4.1.2: "The presence of extensions can be detected by determining
        # whether there are bytes following the compression_methods at the end of the ClientHello."
        if position == end:
            return ClientHello()
        length = message[position] << 8 | message[position + 1]
        position += 2
    except IndexError:
        raise malformed("ClientHello ends before its extensions") from None
    if position + length != end:
        raise wrong_size("ClientHello", position + length - body, end - body)
    return _read_extensions(message, position)


def _read_extensions(message: bytes, position: int) -> ClientHello:
    """Read `Extension extensions<8..2^16-1>` from `position` to the end of the message.

    A hello has some twenty of them, and the loop is most of the time that it takes. So it does no
    more than it must for one that nobody reads. Whether the last ends where the message does is
    looked at once, behind it: before that, nothing in any of them has been looked at.
    """
    end = len(message)
    server_name = alpn = versions = None
    try:
        while position < end:
            start = position + 2 + 2
            end_of_data = start + (message[position + 2] << 8 | message[position + 3])
            # ExtensionType has two bytes; in those that are read here the first is 0. Numbers of
            # RFC 8446 section 4.2: names would be looked up each time. There: "There MUST NOT be
            # more than one extension of the same type in a given extension block." Which of two
            # would the backend believe?
            if not message[position]:
                extension_type = message[position + 1]
                if extension_type == 0:
                    if server_name is not None:
                        raise _duplicate(Reason.DUPLICATE_EXTENSION, "server_name", "extensions")
                    server_name = message[start:end_of_data]
                elif extension_type == 16:
                    if alpn is not None:
                        raise _duplicate(Reason.DUPLICATE_EXTENSION, _ALPN, "extensions")
                    alpn = message[start:end_of_data]
                elif extension_type == 43:
                    if versions is not None:
                        raise _duplicate(
                            Reason.DUPLICATE_EXTENSION, "supported_versions", "extensions"
                        )
                    versions = message[start:end_of_data]
            position = end_of_data
    except IndexError:
        raise _cut_off("extensions") from None
    if position != end:
        raise _cut_off("extensions")
    return ClientHello(
        None if server_name is None else _server_name(server_name),
        b"" if alpn is None else _protocol_name_list(alpn),
        b"" if versions is None else _versions(versions),
    )


def _duplicate(reason: Reason, entry: str, what: str) -> HelloError:
    return HelloError(Alert.ILLEGAL_PARAMETER, reason, f"two entries {entry} in {what}")


def _cut_off(what: str) -> HelloError:
    return malformed(f"{what} ends inside an entry")


def _odd(what: str) -> HelloError:
    # RFC 8446 section 3.4: "The length of an encoded vector must be an exact multiple of the
    # length of a single element (e.g., a 17-byte vector of uint16 would be illegal)."
    return malformed(f"odd length of {what}")


def _server_name(extension: bytes) -> bytes | None:
    """Read `struct { ServerName server_name_list<1..2^16-1>; } ServerNameList;`, RFC 6066."""
    size = len(extension)
    # One host_name and nothing else, as everyone writes it.
    if (
        size > _ONE_NAME
        and extension[3] << 8 | extension[4] == size - _ONE_NAME
        and extension[0] << 8 | extension[1] == size - 2
        and extension[2] == _HOST_NAME
    ):
        return extension[_ONE_NAME:]
    if size < 2 + 1 or extension[0] << 8 | extension[1] != size - 2:
        raise not_one_vector(extension, 2, "server_name", "server_name_list", minimum=1)
    # RFC 6066 section 3: "For backward compatibility, all future data structures associated with
    # new NameTypes MUST begin with a 16-bit length field." So they can be stepped over. "The
    # ServerNameList MUST NOT contain more than one name of the same name_type."
    host_name = None
    position = 2
    try:
        while position < size:
            name_type, length = _read_name_header(extension, position)
            position += 1 + 2 + length
            if name_type == _HOST_NAME:
                if host_name is not None:
                    raise _duplicate(Reason.DUPLICATE_NAME, "host_name", "server_name_list")
                host_name = extension[position - length : position]
    except error:
        raise _cut_off("server_name_list") from None
    if position != size:
        raise _cut_off("server_name_list")
    # opaque HostName<1..2^16-1>;
    if host_name == b"":
        raise malformed("host_name of 0 bytes")
    return host_name


@lru_cache(_REMEMBERED)
def _protocol_name_list(extension: bytes) -> bytes:
    """Read `struct { ProtocolName protocol_name_list<2..2^16-1> } ProtocolNameList;`, RFC 7301."""
    size = len(extension)
    if size < 2 + 2 or extension[0] << 8 | extension[1] != size - 2:
        raise not_one_vector(extension, 2, _ALPN, "protocol_name_list", minimum=2)
    position = 2
    while position < size:
        length = extension[position]
        # RFC 7301 section 3.1: "Empty strings MUST NOT be included"
        if not length:
            raise malformed("a protocol_name of 0 bytes")
        position += 1 + length
    if position != size:
        raise malformed("protocol_name_list ends inside a protocol_name")
    return extension[2:]


def _versions(extension: bytes) -> bytes:
    """Read `ProtocolVersion versions<2..254>`, RFC 8446 section 4.2.1."""
    size = len(extension)
    if size < 1 + 2 or extension[0] != size - 1:
        raise not_one_vector(extension, 1, "supported_versions", "versions", minimum=2)
    if size % 2 == 0:
        raise _odd("versions")
    return extension[1:]
