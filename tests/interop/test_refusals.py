"""What clients say when there is no host for them. To be told is all they can get, so they are."""

import re
from functools import partial

import pytest

from tests.interop.clients import CLIENTS, Client, Visit, openssl

# How each client words an alert.
WORDS = {
    109: r"alert missing extension|alert number 109|alert \[109\]",
    112: r"unrecognized name|alert number 112|alert \[112\]",
}

each_client = pytest.mark.parametrize("client", CLIENTS)


@each_client
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_an_unknown_name(client: Client, version: str, visit: partial[Visit]) -> None:
    outcome = client(visit("unknown.example", version))
    assert outcome.code == (35 if client.__name__ == "curl" else 1)
    assert re.search(WORDS[112], outcome.output)


@each_client
# RFC 8446 section 9.2 has an alert for this: "Servers MAY require clients to send a valid
# "server_name" extension ... terminating the connection with a "missing_extension" alert." TLS 1.2
# does not know it.
@pytest.mark.parametrize(
    ("version", "alert"),
    [("TLSv1.2", 112), ("TLSv1.3", 109), pytest.param(None, 109, id="both versions")],
)
def test_no_name(client: Client, version: str | None, alert: int, visit: partial[Visit]) -> None:
    outcome = client(visit(None, version))
    assert outcome.code != 0
    assert re.search(WORDS[alert], outcome.output)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_is_no_name(address: str, visit: partial[Visit]) -> None:
    # RFC 6066 section 3: "Literal IPv4 and IPv6 addresses are not permitted in "HostName"."
    # openssl sends them all the same; the other two clients leave the extension out.
    outcome = openssl(visit(address))
    assert outcome.code == 1
    assert re.search(WORDS[112], outcome.output)
