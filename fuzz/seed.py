"""Writes the seeds of the corpus: `python -m fuzz.seed`. What fuzzing found stays as it is.

The hellos are built by the tests' builder, which shares nothing with the reader. Every row of the
table of alerts is there once, so that a change to any of them has an input that shows it.
"""

# ruff: noqa: RUF001 - characters that look like others are what some seeds are about

import ssl
from base64 import b64encode
from pathlib import Path

from fuzz.rule_invariants import pin_of
from tests.support import dns, hellos
from tests.support.hellos import client_hello, handshake, record, records, server_name

MESSAGE = handshake(hellos.hello_body("a.example", protocols=["h2", "http/1.1"]))

HELLO = {
    "openssl": hellos.genuine_hello("a.example", protocols=["h2", "http/1.1"]),
    "openssl-tls12": hellos.genuine_hello("a.example", maximum=ssl.TLSVersion.TLSv1_2),
    "chromium-like": hellos.chromium_hello("a.example"),
    "chromium-like-in-two-records": records(hellos.chromium_hello("a.example")[5:], [700]),
    "small": record(MESSAGE),
    "no-extensions": record(handshake(client_hello(None))),
    "records-of-one-byte": records(MESSAGE, [1]),
    "records-of-1-2-3-50": records(MESSAGE, [1, 2, 3, 50]),
    "incomplete": record(MESSAGE)[:-1],
    "something-behind-in-the-record": record(MESSAGE + handshake(b"", msg_type=20)),
    "early-data-behind": record(MESSAGE) + record(b"GET /", content_type=23, version=0x0303),
    "other-name-type-first": record(
        handshake(client_hello([server_name(hellos.name_entry("?", 7), "a.example")]))
    ),
    # Alert 10, unexpected_message.
    "http": b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "an-alert": record(b"\2\0", content_type=hellos.ALERT),
    "not-handshake-between-fragments": record(MESSAGE[:10]) + record(b"\2\0", content_type=21),
    "not-client-hello": record(handshake(b"", msg_type=2)),
    # Alert 22, record_overflow.
    "record-overflow": record(b"", length=2**14 + 1),
    # Alert 50, decode_error.
    "empty-record": record(b""),
    "empty-record-between-fragments": record(MESSAGE[:10]) + record(b"") + record(MESSAGE[10:]),
    "message-one-byte-short": record(handshake(MESSAGE[4:], length=len(MESSAGE) - 5)),
    "message-one-byte-over": record(handshake(MESSAGE[4:] + b"\0")),
    "session-id-of-33": record(handshake(client_hello(session_id=bytes(33)))),
    "cipher-suites-odd": record(handshake(client_hello(cipher_suites=bytes(3)))),
    "cipher-suites-empty": record(handshake(client_hello(cipher_suites=b""))),
    "no-compression-method": record(handshake(client_hello(compression_methods=b""))),
    "extensions-end-early": record(handshake(client_hello(trailing=b"\0"))),
    "extensions-overrun": record(handshake(client_hello(extensions_length=1))),
    "extension-overruns": record(handshake(client_hello([hellos.extension(35, length=1)]))),
    "name-list-empty": record(handshake(client_hello([server_name()]))),
    "name-list-overruns": record(handshake(client_hello([server_name("a", length=5)]))),
    "name-empty": record(handshake(client_hello([server_name("")]))),
    "name-overruns": record(
        handshake(client_hello([server_name(hellos.name_entry("a", length=2))]))
    ),
    "name-list-ends-early": record(
        handshake(client_hello([hellos.extension(0, server_name("a")[4:] + b"\0")]))
    ),
    "protocol-overruns": record(handshake(client_hello([hellos.extension(16, b"\0\2\2h")]))),
    "protocol-empty": record(handshake(client_hello([hellos.alpn("h2", "")]))),
    "versions-end-early": record(handshake(client_hello([hellos.extension(43, b"\2\3\4\0")]))),
    "versions-odd": record(handshake(client_hello([hellos.extension(43, b"\3\3\4\3")]))),
    # Alert 47, illegal_parameter.
    "two-server-names": record(handshake(client_hello([server_name("a"), server_name("b")]))),
    "two-host-names": record(handshake(client_hello([server_name("a", "b")]))),
    # Alert 80, internal_error: announced too large; and the largest that isn't.
    "announced-too-large": record(handshake(b"", length=65_537)),
    "largest-message": records(hellos.hello_of_size(65_536), [1, 2**14]),
    "longer-on-the-wire": records(hellos.hello_of_size(65_536), [1])[:40_000],
    # Alerts 109 missing_extension and 112 unrecognized_name.
    "no-name-tls13": hellos.hello_bytes(None),
    "no-name-tls12": hellos.hello_bytes(None, versions=()),
    "address-as-name": hellos.hello_bytes("192.0.2.1"),
    "path-as-name": hellos.hello_bytes("../../etc"),
}

LONGEST_LABEL = "a" * 63

# From the wire and from a keyboard: the files hold the name, and no newline.
HOSTNAME = {
    "plain": "www.example.com",
    "capitals-and-dot": "WWW.eXample.COM.",
    "a-label": "xn--sr8hvo.ws",
    "single-label": "localhost",
    "longest-label": LONGEST_LABEL,
    "longest-name": ".".join([LONGEST_LABEL] * 3 + ["a" * 61]),
    "one-byte-too-long": ".".join([LONGEST_LABEL] * 3 + ["a" * 62]),
    "empty": "",
    "root": ".",
    "parent-directory": "..",
    "path": "../../etc/passwd",
    "two-dots": "a..b",
    "nul": "a\0b",
    "newline": "a\n",
    "underscore": "a_b.example",
    "underscore-first": "_dmarc.example",
    "underscore-last": "a_.example",
    "wildcard": "*.example.com",
    "hyphen-first": "-a.example",
    "hyphen-last": "a-.example",
    "ipv4": "127.0.0.1",
    "ipv4-short": "127.1",
    "ipv6-in-brackets": "[::1]",
    "number-not-last": "1.2.3.4.in-addr.arpa",
    "utf8": "faß.de",
    "kelvin-sign": "\N{KELVIN SIGN}.example",
}

TYPED = HOSTNAME | {
    "emoji": "🕸💍.ws",
    "umlaut-capital": "Bücher.example",
    "umlaut-decomposed": "Bu\u0308cher.example",
    "ideographic-dots": "例え。テスト\N{FULLWIDTH FULL STOP}",
    "fullwidth": "\uff45\uff58\uff41.\uff43\uff4f\uff4d",
    "fullwidth-slash": "a\N{FULLWIDTH SOLIDUS}b",
    "soft-hyphen": "exam\u00adple.com",
    "joiner-after-virama": "क्\u200dष.example",
    "non-joiner-persian": "نامه\u200cای.com",
    "joiner-between-emoji": "👩\u200d💻",
    "right-to-left": "א1.example",
    "both-directions": "אa.example",
    "digit-first-beside-hebrew": "1a.א",
    "mark-first": "\u0301a",
    "not-equal": "=\u0338",
    "a-label-of-nothing": "xn--",
    "a-label-of-ascii": "xn--abc-",
    "a-label-of-capital": "xn--kkg",
    "a-label-of-a-label": "xn--xn---epa",
    "a-label-second-spelling": "xn---bbk",
    "mapping-makes-it-long": "\ufdfa" * 100,
}


def _ends(source: bytes, destination: bytes, text: bytes = b"") -> bytes:
    """The layout that `check_proxy_header` reads: spelling and address, then a port for each."""
    return b"".join(end.ljust(17, b"\0") + b"\xdc\x04" for end in (source, destination)) + text


_V4 = bytes([192, 0, 2, 1])
_V6 = bytes.fromhex("20010db8") + bytes(11) + b"\1"
_LINK_LOCAL = bytes.fromhex("fe80") + bytes(13) + b"\2"
_MAPPED = bytes(10) + b"\xff\xff" + _V4

PROXY_HEADER = {
    "unknown": _ends(b"\0", b"\0"),
    "source-unknown": _ends(b"\0", b"\1" + _V4),
    "tcp4": _ends(b"\1" + _V4, b"\1" + _V4),
    "tcp6": _ends(b"\2" + _V6, b"\2" + _V6),
    "tcp6-every-digit": _ends(b"\3" + _V6, b"\4" + _V6),
    "longest": _ends(b"\2" + b"\xff" * 16, b"\3" + b"\xff" * 16),
    "mapped": _ends(b"\2" + _MAPPED, b"\2" + _MAPPED),
    "mapped-dotted-and-hex": _ends(b"\5" + _V4, b"\6" + _V4),
    "mapped-and-ipv4": _ends(b"\3" + _MAPPED, b"\1" + _V4),
    "two-families": _ends(b"\1" + _V4, b"\2" + _V6),
    "scope": _ends(b"\2" + _LINK_LOCAL, b"\3" + _LINK_LOCAL, b"eth0"),
    "scope-with-newline": _ends(b"\2" + _LINK_LOCAL, b"\3" + _LINK_LOCAL, b"eth0\r\nPROXY"),
    "no-address": _ends(b"\7", b"\1" + _V4, b"localhost"),
    "no-address-newline": _ends(b"\7", b"\1" + _V4, b"192.0.2.1\r\n"),
    "tlvs-that-do-not-fit": _ends(b"\1" + _V4, b"\1" + _V4, b"spiffe://a/" + b"b" * 30),
    "address-as-text": _ends(b"\7", b"\7", b"192.0.2.1"),
}

# The layout that `check_rule` reads: the rule, and the names of the certificate.
RULE = {
    "name": "a.example.com\na.example.com",
    "name-capitals-and-dots": "A.Example.COM.\na.example.com.",
    "name-unicode": "b\u00fccher.example\nxn--bcher-kva.example",
    "name-and-nul": "a.example.com\na.example.com\0.evil",
    "name-and-wildcard": "a.example.com\n*.example.com",
    "name-and-top-level-wildcard": "example.com\n*.com",
    "name-and-partial-wildcard": "foo.example.com\nf*o.example.com",
    "wildcard": "*.example.com\na.example.com\na.b.example.com\nexample.com",
    "wildcard-and-wildcard": "*.example.com\n*.example.com",
    "wildcard-and-empty-label": "*.example.com\n.example.com",
    "wildcard-partial": "f*o.example.com\nfoo.example.com",
    "address": "192.0.2.1\n192.0.2.1",
    "address-in-two-spellings": "2001:db8::1\n2001:DB8:0:0::1",
    "address-with-scope": "fe80::1%eth0\nfe80::1",
    "spiffe": "spiffe://a/b\nspiffe://a/b",
    "spiffe-prefix": "spiffe://a/b\nspiffe://a/bc",
    "spiffe-segment": "spiffe://a/*/c\nspiffe://a/b/c",
    "spiffe-empty-segment": "spiffe://a/*/c\nspiffe://a//c",
    "spiffe-rest": "spiffe://a/b/**\nspiffe://a/b/c/d",
    "spiffe-no-rest": "spiffe://a/b/**\nspiffe://a/b",
    "spiffe-dots": "spiffe://a/**\nspiffe://a/b/../c",
    "spiffe-percent": "spiffe://a/b\nspiffe://a/%62",
    "spiffe-capital": "spiffe://a/b\nspiffe://A/b",
    "spiffe-port": "spiffe://a:1/b\nspiffe://a:1/b",
    "spiffe-query": "spiffe://a/**\nspiffe://a/b?c",
    "spiffe-twice": "spiffe://a/b\nspiffe://a/b\nspiffe://a/b",
    "common-name": "cn:Kay \u00e9\nkay \u00e9",
    "common-name-kelvin-sign": "cn:kay\n\N{KELVIN SIGN}ay",
    "pin": f"pin-sha256:{b64encode(pin_of(['a'])).decode()}\na",
    "pin-without-padding": f"pin-sha256:{b64encode(pin_of(['a'])).decode()[:-1]}\na",
    "pin-spare-bits": "pin-sha256:" + "A" * 42 + "B=",
    "unknown-kind": "https://a/b\nhttps://a/b",
}

_WWW = "www.example"
_ADDRESS = dns.record(_WWW, dns.A, "192.0.2.1")
_CHAIN = [
    dns.record(dns.pointer(12), dns.CNAME, b"\1a" + dns.pointer(16), 60),
    dns.record(b"\1a" + dns.pointer(16), dns.CNAME, "b.example.net", 5),
    dns.record("B.example.NET", dns.A, "192.0.2.1"),
]


def _saying(*records: bytes, flags: int = dns.ANSWER) -> bytes:
    return dns.message([dns.question(_WWW)], list(records), flags=flags)


DNS_ANSWER = {
    "a": dns.answering(_WWW, "192.0.2.1", "192.0.2.2"),
    "aaaa": dns.answering("WWW.Example", "2001:db8::1", kind=dns.AAAA),
    "question": dns.asking(_WWW),
    "chain": _saying(*_CHAIN),
    "chain-backwards": _saying(*reversed(_CHAIN[1:]), _CHAIN[0]),
    "circle": _saying(
        dns.record(_WWW, dns.CNAME, "a.example"), dns.record("a.example", dns.CNAME, _WWW), _ADDRESS
    ),
    "two-aliases": _saying(
        dns.record(_WWW, dns.CNAME, "a"), dns.record(_WWW, dns.CNAME, "b"), _ADDRESS
    ),
    "edns": dns.message(
        [dns.question(_WWW)],
        [_ADDRESS],
        additionals=[dns.record("", dns.OPT, b"\0\x0a\0\4abcd", of_class=1232)],
    ),
    "extended-rcode": dns.message(
        [dns.question(_WWW)], [_ADDRESS], additionals=[dns.record("", dns.OPT, b"", 1 << 24)]
    ),
    "sections": dns.message(
        [dns.question(_WWW)],
        [_ADDRESS, dns.record(_WWW, dns.TXT, b"\3abc")],
        authorities=[dns.record("example", dns.NS, "ns.example")],
        additionals=[dns.record("ns.example", dns.A, "192.0.2.66")],
    ),
    "truncated": _saying(_ADDRESS, flags=dns.ANSWER | dns.TC),
    "nxdomain": _saying(flags=dns.ANSWER | 3),
    "two-questions": dns.message([dns.question(_WWW)] * 2, [_ADDRESS]),
    "chaos": dns.message([dns.question(_WWW, dns.A, dns.CHAOS)], [_ADDRESS]),
    "ttl-of-2-31": dns.answering(_WWW, "192.0.2.1", ttl=2**31),
    "trailing": _saying(_ADDRESS) + b"\0",
    "pointer-to-itself": _saying(dns.record(dns.pointer(29), dns.A, "192.0.2.1")),
    "pointers-in-a-circle": _saying(
        dns.pointer(30) + b"x" * 30 + dns.pointer(29) + bytes(14),
    ),
    "dot-in-a-label": dns.message([dns.question(b"\3a.b\0")], [_ADDRESS]),
    "address-of-5-bytes": _saying(dns.record(_WWW, dns.A, b"abcde")),
}


def main() -> None:
    """Write every seed to `corpus/TARGET/NAME`."""
    texts = {"hostname": HOSTNAME, "typed": TYPED, "rule": RULE}
    corpus = {"hello": HELLO, "proxy_header": PROXY_HEADER, "dns_answer": DNS_ANSWER} | {
        target: {name: text.encode() for name, text in seeds.items()}
        for target, seeds in texts.items()
    }
    for target, seeds in corpus.items():
        directory = Path(__file__).parent / "corpus" / target
        directory.mkdir(parents=True, exist_ok=True)
        for name, seed in seeds.items():
            (directory / name).write_bytes(seed)


if __name__ == "__main__":
    main()
