"""The PROXY header for a program that wants one: the client's address, and who it is in TLS.

Version 2 has PP2_TYPE_SSL, with the version of TLS, the cipher suite and the common name, and a
TLV of our own with the subject alternative names. Both are of the certificate that was verified.

Where several names stand in one value, a name must not be able to look like two. So what can be
misread is left out: it is not shortened and not escaped.
"""

import ssl
from typing import Final

from mutual_tls.verify import Certificate
from sniproxy.wire import (
    TLV,
    Address,
    parse_host,
    proxy_v1_header,
    proxy_v2_header,
    ssl_tlv,
)

__all__ = ["NAMES_TYPE", "destination_for", "proxy_header", "tls_information"]

# For subject alternative names no type is registered. Types from 0xE0 to 0xEF (PP2_TYPE_MIN_CUSTOM,
# PP2_TYPE_MAX_CUSTOM) are "for application-specific data". Taken are 0xE0 by Google, 0xEA by Amazon
# and 0xEE by Microsoft, for what their networks know of a client.
NAMES_TYPE: Final = 0xE5

# RFC 5280 appendix A.1: "ub-common-name INTEGER ::= 64", characters.
_LONGEST_COMMON_NAME: Final = 64

# No host name and no SPIFFE ID has a comma. A line feed would not do: whoever puts the value into
# a field of HTTP, or a line of a log, would begin another one with it.
_SEPARATOR: Final = ","


def proxy_header(
    version: int, source: Address | None, destination: Address | None, tls: ssl.SSLObject | None
) -> bytes:
    """Return the header for a connection that is passed on.

    Args:
        version: 1 or 2.
        source: the client's address; None if it is not known.
        destination: where the client has connected to; None likewise.
        tls: of the client, as for `tls_information`; None if it has come without TLS.

    Raises:
        ValueError: a host is no IP address.
        CertificateError: the certificate can't be read.
    """
    if version == 1:
        return proxy_v1_header(source, destination)
    return proxy_v2_header(source, destination, [] if tls is None else tls_information(tls))


def destination_for(source: Address, destination: Address | None, port: int) -> Address:
    """Return a destination that a header can have beside `source`, whose address is asked for.

    Args:
        source: the client's address.
        destination: where the client has connected to; None if that is no IP address.
        port: what it wants there.

    Returns:
        `destination`, if it is of the same family; else the unspecified address, with `port`.

    Raises:
        ValueError: a host is no IP address.
    """
    family = parse_host(source[0])[0]
    if destination is not None and parse_host(destination[0])[0] == family:
        return destination
    return ("0.0.0.0" if family == 4 else "::"), port


def tls_information(tls: ssl.SSLObject) -> list[TLV]:
    """Return what a PROXY header has to say of a client's TLS connection.

    Args:
        tls: of a server whose handshake is over, and whose context demands a certificate.

    Raises:
        CertificateError: the certificate can't be read.
    """
    shown = tls.getpeercert(binary_form=True)
    cipher, version = tls.cipher(), tls.version()
    assert shown is not None
    assert cipher is not None
    assert version is not None
    certificate = Certificate.parse(shown)
    is_resumed = bool(tls.session_reused)
    tlvs = [ssl_tlv(version, cipher[0], _common_name(certificate), is_resumed=is_resumed)]
    if names := _names(certificate):
        tlvs.append((NAMES_TYPE, _SEPARATOR.join(names).encode("ascii")))
    return tlvs


def _common_name(certificate: Certificate) -> str | None:
    """Return the common name, if there is one and no other, and nobody can misread it."""
    # Of several, programs take the first or the last. A NUL would be the end of it for some.
    match certificate.common_names:
        case [name] if name.isprintable() and 0 < len(name) <= _LONGEST_COMMON_NAME:
            return name
        case _:
            return None


def _names(certificate: Certificate) -> list[str]:
    """Return the subject alternative names with their kinds, without those that can be misread."""
    names = [f"URI:{uri}" for uri in certificate.uris]
    names += [f"DNS:{name}" for name in certificate.dns]
    names += [f"IP:{address}" for address in certificate.addresses]
    return [name for name in names if _is_plain(name)]


def _is_plain(name: str) -> bool:
    # It is ASCII, or `Certificate` would have refused it.
    return name.isprintable() and " " not in name and _SEPARATOR not in name
