"""Where a client comes from, as others say."""

import pytest

from tls_bridge.forwarded import forwarded_for, read_proxy_v1, show_forwarded

LINE = b"PROXY TCP4 192.0.2.1 198.51.100.2 1234 443\r\n"
LONGEST = b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n"


@pytest.mark.parametrize("rest", [b"", b"\x16\x03\x01"])
@pytest.mark.parametrize(
    ("line", "source"),
    [
        (LINE, ("192.0.2.1", 1234)),
        (LONGEST, (":".join(["ffff"] * 8), 65535)),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
        (b"PROXY TCP4 300.0.2.1 198.51.100.2 1234 443\r\n", None),
    ],
)
def test_a_proxy_header_however_it_comes(
    line: bytes, source: tuple[str, int] | None, rest: bytes
) -> None:
    assert read_proxy_v1(line + rest) == (source, rest)
    for cut in range(len(line)):
        assert read_proxy_v1(line[:cut]) is None or cut == 0
    assert read_proxy_v1(line) == (source, b"")


@pytest.mark.parametrize("data", [b"\x16\x03\x01", b"PROXX", b"GET / HTTP/1.1\r\n", b"Q"])
def test_what_is_no_proxy_header_stays(data: bytes) -> None:
    assert read_proxy_v1(data) == (None, data)


def test_a_line_that_does_not_end_is_waited_for_no_longer_than_one_can_be() -> None:
    assert read_proxy_v1(b"PROXY ".ljust(106, b"x")) is None
    endless = b"PROXY ".ljust(107, b"x")
    assert read_proxy_v1(endless) == (None, endless)


@pytest.mark.parametrize(
    ("address", "value"),
    [
        (("192.0.2.1", 80), b'for="192.0.2.1:80"'),
        (("::ffff:192.0.2.1", 80, 0, 0), b'for="192.0.2.1:80"'),
        (("2001:db8::1", 80, 0, 0), b'for="[2001:db8::1]:80"'),
        (("fe80::1%eth0", 80, 0, 2), b'for="[fe80::1]:80"'),
    ],
)
def test_what_is_shown_is_read(
    address: tuple[str, int] | tuple[str, int, int, int], value: bytes
) -> None:
    assert show_forwarded(address) == (b"Forwarded", value)
    found = forwarded_for([(b"forwarded", value)])
    assert found is not None
    assert found[1] == 80


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'proto=https;FOR="192.0.2.1:1", for="192.0.2.2:2"', ("192.0.2.1", 1)),
        (b"for=unknown", None),
        (b"for=_hidden", None),
        (b"by=192.0.2.1:1", None),
        (b'for="example.com:1"', None),
        (b"for=\xff", None),
        (b"", None),
    ],
)
def test_other_peoples_fields(value: bytes, expected: tuple[str, int] | None) -> None:
    assert forwarded_for([(b"forwarded", value)]) == expected
