"""Does a backend speak TLS for a name? Ask it, as the daemon and a client together would.

Law: knows nothing of directories and of reports. A way to connect in, one answer out.

The bytes go through memory (`ssl.MemoryBIO`), because a backend that does not speak TLS is best
described by what it said instead.

A certificate is judged without an authority: a backend may have one that we do not know, and that
is no fault. `ssl` tells nothing of a certificate that it has not verified; so a first handshake
only takes the certificate, and a further one takes it as its own trust anchor. What OpenSSL can
still object to is the name, and what the certificate may be used for.
"""

import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from sniproxy.wire import authority_tlv, proxy_v1_header, proxy_v2_header

# Who renews in time, by ACME or by hand, does so a month before the end. A certificate with two
# weeks left is one whose renewal fails, and there still is time to repair that.
SOON = 14 * 24 * 3600

# The largest message that OpenSSL's client takes is a Certificate of 100 KiB
# (SSL_CTX_set_max_cert_list(3)). This is that, and room for the rest of the handshake.
_MOST = 128 << 10

# As much as recv(2) may give at once: a whole record, RFC 8446, section 5.1, with its header.
_AT_ONCE = (16 << 10) + 5

# What people are shown of a backend's words: one line of a terminal.
_SHOWN = 64

# How many of a certificate's names they are shown. There are certificates with a hundred.
_NAMES_SHOWN = 8

# X509_VERIFY_PARAM_set_flags(3), X509_V_FLAG_NO_CHECK_TIME, for which Python has no name. Without
# it an expired certificate could not be read. The dates are compared here.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)

# openssl-verification-options(1), X509_V_ERR_HOSTNAME_MISMATCH; Python has no name for it either.
_HOSTNAME_MISMATCH = 62

# RFC 8446, section 5.1: ContentType, of what a server may begin with.
_ALERT, _HANDSHAKE = 21, 22

# What OpenSSL calls an alert that it got: by the protocol that first had it, or, newer, by both.
_ALERT_PREFIX = re.compile(r"(SSLV3|TLSV13?|SSL/TLS)[_ ](ALERT[_ ])?", re.IGNORECASE)

# The addresses in the header. A backend need only be able to read them; this host is the source.
_HERE = ("127.0.0.1", 443)


class Answer(StrEnum):
    """What became of it; words for reports."""

    # It is for the name, as far as can be told without an authority.
    SPEAKS_TLS = "speaks_tls"
    # It accepts, and closes without a byte.
    CLOSES_AT_ONCE = "closes_at_once"
    # It answers a ClientHello with an HTTP response.
    SPEAKS_PLAIN_HTTP = "speaks_plain_http"
    # It says something else, such as the greeting of SSH or SMTP.
    NOT_TLS = "not_tls"
    # It says nothing in the time it has. Often it waits for a line of its own protocol.
    SILENT = "silent"
    # It speaks TLS, but sends an alert, or does not come to the end.
    HANDSHAKE_FAILED = "handshake_failed"
    # It was sent no header, and fails; it speaks TLS after one.
    WANTS_PROXY_HEADER = "wants_proxy_header"
    # It was sent a header, and fails; it speaks TLS without one.
    REFUSES_PROXY_HEADER = "refuses_proxy_header"
    # It was sent a header, and fails; it speaks TLS after one of the other version.
    WANTS_OTHER_PROXY_HEADER = "wants_other_proxy_header"
    # Its certificate has other names than the one that was asked for.
    CERTIFICATE_FOR_OTHERS = "certificate_for_others"
    # The end of its certificate has passed.
    CERTIFICATE_EXPIRED = "certificate_expired"
    # Its certificate begins in the future; or the clock here is wrong.
    CERTIFICATE_NOT_YET_VALID = "certificate_not_yet_valid"
    # Its certificate is good, but not for long.
    CERTIFICATE_EXPIRES_SOON = "certificate_expires_soon"


class Probe(NamedTuple):
    """What a backend is like.

    Attributes:
        answer: In one word.
        detail: More, for people: one line of printable ASCII; maybe empty.
        protocol: What it chose by ALPN (RFC 7301); None if nothing, or if it speaks no TLS.
        expires: The end of its certificate in Unix time; None if that could not be read.
        wants: The version of the PROXY header with which it speaks TLS, if it has none; 0 is none.
    """

    answer: Answer
    detail: str
    protocol: str | None = None
    expires: float | None = None
    wants: int = 0


class _FailedError(Exception):
    """There was no handshake; the arguments are the answer and its detail."""

    def __init__(self, answer: Answer, detail: str) -> None:
        super().__init__(answer, detail)
        self.answer = answer
        self.detail = detail


class _Shake(Protocol):
    """Shake hands over a connection of its own, with a PROXY header of that version, or 0."""

    def __call__(self, context: ssl.SSLContext, *, header: int) -> ssl.SSLObject: ...


def probe(
    connect: Callable[[], socket.socket],
    name: str,
    *,
    proxy: int,
    seconds: float = 5.0,
    on_hello: Callable[[socket.socket], None] | None = None,
) -> Probe:
    """Find out how a backend answers a client that wants a name.

    Args:
        connect: Returns a new stream socket to it each time, to be closed here. It is called two
            or three times.
        name: The server name that the client sends, in its ASCII form (A-labels).
        proxy: The version of the PROXY header that the daemon sends it; 0 for none.
        seconds: How long one connection may take. Two that fail may so take twice as long.
        on_hello: Called each time when that socket has sent all up to the end of its ClientHello.

    Raises:
        Exception: What the first call of `connect` or of `on_hello` raised, as it was. Later ones
            are spoken of in the detail.
        ValueError: `name` can be no server name.
    """

    def shake(context: ssl.SSLContext, *, header: int) -> ssl.SSLObject:
        return _shake_hands(connect, name, context, seconds, header=header, on_hello=on_hello)

    try:
        tls = shake(_lenient(), header=proxy)
    except _FailedError as failed:
        return _the_other_way(shake, failed, sent=proxy)
    certificate = tls.getpeercert(binary_form=True)
    assert certificate  # every cipher suite that is offered authenticates the server
    answer, detail, expires = _judge(shake, certificate, header=proxy)
    told = "; ".join(filter(None, [tls.version(), detail]))
    return Probe(answer, told, tls.selected_alpn_protocol(), expires)


def _the_other_way(shake: _Shake, failed: _FailedError, *, sent: int) -> Probe:
    """Look whether it was the header, or that there was none."""
    for wants in (0, 1, 2):
        if wants == sent:
            continue
        try:
            tls = shake(_lenient(), header=wants)
        except Exception:  # noqa: BLE001, S112  # of `connect`; the first failure is the answer
            continue
        if not sent:
            answer = Answer.WANTS_PROXY_HEADER
        else:
            answer = Answer.WANTS_OTHER_PROXY_HEADER if wants else Answer.REFUSES_PROXY_HEADER
        way = f"with a header of version {sent}" if sent else "without a header"
        told = ": ".join(filter(None, [f"{way} {failed.answer}", failed.detail]))
        return Probe(answer, told, tls.selected_alpn_protocol(), wants=wants)
    return Probe(failed.answer, failed.detail)


def _judge(shake: _Shake, certificate: bytes, *, header: int) -> tuple[Answer, str, float | None]:
    """Return the answer, the detail and the end of a certificate (DER)."""
    for_others = False
    try:
        try:
            tls = shake(_trusting(certificate, check_hostname=True), header=header)
        except ssl.SSLCertVerificationError as refused:
            if refused.verify_code != _HOSTNAME_MISMATCH:
                raise
            for_others = True
            tls = shake(_trusting(certificate, check_hostname=False), header=header)
        fields: dict[str, Any] = tls.getpeercert() or {}
        begins = ssl.cert_time_to_seconds(fields["notBefore"])
        ends = ssl.cert_time_to_seconds(fields["notAfter"])
    except ssl.SSLCertVerificationError as refused:
        return Answer.SPEAKS_TLS, f"clients refuse its certificate: {_words(refused)}", None
    except Exception as error:  # noqa: BLE001  # of `connect`, and of ssl for fields it can't read
        if for_others:
            return Answer.CERTIFICATE_FOR_OTHERS, f"its names are not known: {_words(error)}", None
        return Answer.SPEAKS_TLS, f"its certificate could not be judged: {_words(error)}", None

    # The name comes first: a certificate that is renewed for others is of no use.
    now = time.time()
    date = None
    if now > ends:
        date = Answer.CERTIFICATE_EXPIRED, f"it ended {fields['notAfter']}", ends
    elif now < begins:
        date = Answer.CERTIFICATE_NOT_YET_VALID, f"it begins {fields['notBefore']}", ends
    elif ends - now < SOON:
        date = Answer.CERTIFICATE_EXPIRES_SOON, f"it ends {fields['notAfter']}", ends
    if for_others:
        told = _names(fields.get("subjectAltName", ()))
        return Answer.CERTIFICATE_FOR_OTHERS, f"{told}; {date[1]}" if date else told, ends
    return date or (Answer.SPEAKS_TLS, "", ends)


def _names(alternatives: Sequence[tuple[str, str]]) -> str:
    """Say for whom a certificate is."""
    names = [_printable(name) for kind, name in alternatives if kind in {"DNS", "IP Address"}]
    if not names:
        # RFC 9525, section 6.3: the client "MUST NOT" look for a name in the common name.
        return "its certificate has no subjectAltName for hosts; clients ignore the common name"
    more = len(names) - _NAMES_SHOWN
    others = f" and {more} more" if more > 0 else ""
    return f"its certificate is for {', '.join(names[:_NAMES_SHOWN])}{others}"


def _lenient() -> ssl.SSLContext:
    """Return a client that takes everything, so that old backends are heard, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    # Without a certificate there would be nothing to judge, and no client takes that.
    context.set_ciphers("ALL:!aNULL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def _trusting(certificate: bytes, *, check_hostname: bool) -> ssl.SSLContext:
    """Return a client that takes this very certificate, and no other, at any time."""
    context = _lenient()
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = check_hostname
    # As browsers do. OpenSSL would look there if there is no subjectAltName.
    context.hostname_checks_common_name = False
    # It need not be self-signed, nor an authority, to be the end of the chain.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    context.load_verify_locations(cadata=certificate)
    return context


def _shake_hands(
    connect: Callable[[], socket.socket],
    name: str,
    context: ssl.SSLContext,
    seconds: float,
    *,
    header: int,
    on_hello: Callable[[socket.socket], None] | None,
) -> ssl.SSLObject:
    """Connect, shake hands, say good-bye.

    Raises:
        _FailedError: It didn't come to a handshake.
        ssl.SSLCertVerificationError: It did, and the context objects.
        Exception: What `connect` or `on_hello` raised.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    if header == 1:
        outgoing.write(proxy_v1_header(_HERE, _HERE))
    elif header:
        authority = authority_tlv(name.encode())
        outgoing.write(proxy_v2_header(_HERE, _HERE, [authority], is_checked=True))
    heard = bytearray()
    flights = 0
    with closing(connect()) as sock:
        deadline = time.monotonic() + seconds
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                raise
            except ssl.SSLError as error:
                told = _alert(error, flights)
                raise _failed(heard, told, Answer.HANDSHAKE_FAILED) from error
            else:
                # A connection that merely ends is an error in the log of many a server.
                with suppress(ssl.SSLError):
                    tls.unwrap()
                return tls
            finally:
                # Our own alerts, too.
                flight = outgoing.read()
                flights += bool(flight)
                _send(sock, flight, deadline)
            if not heard and on_hello is not None:
                on_hello(sock)
            try:
                chunk = _receive(sock, deadline)
            except TimeoutError as error:
                told = f"not at its end after {seconds:g} seconds"
                raise _failed(heard, told, Answer.SILENT) from error
            if not chunk:
                raise _failed(heard, "it closed before the end", Answer.CLOSES_AT_ONCE)
            heard += chunk
            if len(heard) > _MOST:
                raise _failed(heard, f"not at its end after {_MOST} bytes", Answer.NOT_TLS)
            incoming.write(chunk)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    """Send; whether it arrives is seen by what comes back, which may be there already."""
    with suppress(OSError):
        sock.settimeout(_left(deadline))
        sock.sendall(data)


def _receive(sock: socket.socket, deadline: float) -> bytes:
    """Return some bytes; none at the end, which is a reset if the other side has not read all."""
    sock.settimeout(_left(deadline))
    try:
        return sock.recv(_AT_ONCE)
    except ConnectionError:
        return b""


def _left(deadline: float) -> float:
    """Return the seconds that are left; a timeout of 0 would mean not to wait, settimeout(0)."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _failed(heard: bytearray, told: str, nothing: Answer) -> _FailedError:
    """Tell from its first bytes what it is that speaks there.

    Args:
        heard: All that it said.
        told: What to say of it if that was TLS.
        nothing: The answer if it said nothing.
    """
    if not heard:
        return _FailedError(nothing, "")
    line = heard.partition(b"\n")[0].rstrip(b"\r")[:_SHOWN]
    said = f"it says {_printable(line.decode('latin-1'))}"
    if heard.startswith(b"HTTP/"):
        return _FailedError(Answer.SPEAKS_PLAIN_HTTP, said)
    # RFC 8446, section 5.1: every record begins with its type and a legacy_record_version 3.x.
    if heard[0] not in {_ALERT, _HANDSHAKE} or not b"\x03".startswith(heard[1:2]):
        return _FailedError(Answer.NOT_TLS, said)
    return _FailedError(Answer.HANDSHAKE_FAILED, told)


def _alert(error: ssl.SSLError, flights: int) -> str:
    """Say why OpenSSL gave up, an alert by the name that the RFCs have for it."""
    reason = error.reason or str(error)
    prefix = _ALERT_PREFIX.match(reason)
    if not prefix:
        return _printable(reason.lower().replace("_", " "))
    alert = reason[prefix.end() :].lower().replace(" ", "_")
    # The second one has our answer to a CertificateRequest, if there was one. Up to TLS 1.2 that is
    # in the handshake; later a server objects to it only when we are done.
    if flights > 1:
        return f"alert {alert}, to our second flight: it may demand a client certificate"
    return f"alert {alert}"


def _words(error: Exception) -> str:
    """Say what an exception says."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _printable(error.verify_message)
    if isinstance(error, _FailedError):
        return ": ".join(filter(None, [error.answer, error.detail]))
    return _printable(str(error)) or type(error).__name__


def _printable(text: str) -> str:
    """Escape what a terminal would obey: these words are the backend's."""
    return text.encode("unicode_escape").decode("ascii")
