"""tls-tproxy as a whole: clients, a resolver and servers, on machines that are namespaces.

"Observed" are the faults of the first tls-tproxy that are not to be here.
"""

import socket
import ssl
import struct
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from sniproxy.engine.tcp import LINGER_0
from tests.support.bridge import authority, write, write_identity
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.dns import ID as DNS_ID
from tests.support.dns import answering, asking
from tests.support.network import why_no_network
from tests.support.wrapping import (
    AT_ONCE,
    CLIENT,
    ROUTER,
    TAKEN,
    End,
    Name,
    Site,
    is_reset,
    options,
    receive_all,
    server_context,
    works,
)
from tls_tproxy.wrap import _OVERVIEW_FOR

_why_not: Final = why_no_network(("nft", "nftables"), ("dnsmasq", "dnsmasq-base"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

FAMILIES: Final = pytest.mark.parametrize("version", [4, 6])
VERSIONS: Final = pytest.mark.parametrize(
    "tls", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"]
)

# Another port that the first instance takes, and where it leads; and that of the second.
TAKEN_TOO, PORT_TOO = 9443, 9444
TAKEN_BY_WRAP: Final = 8444

MEBIBYTE: Final = 1 << 20


class Wrapped(NamedTuple):
    """A running instance, and its working directory."""

    daemon: Daemon
    run: Path

    def add(self, name: str, **entries: str) -> Path:
        """Make the directory of a name, with files in it; `a/b` is `a__b` here."""
        place = self.run / "wrap/names" / name
        place.mkdir(parents=True, exist_ok=True)
        for entry, content in entries.items():
            write(place / entry.replace("__", "/"), content)
        return place

    def line(self, *words: str) -> str:
        """Return the line of the log that has all these words, once it is there."""

        def find() -> list[str]:
            return [each for each in self.daemon.log() if set(words) <= set(each.split())]

        try:
            eventually(find)
        except AssertionError:
            log = "\n".join(self.daemon.log())
            raise AssertionError(f"no line has {words}:\n{log}") from None
        return find()[0]

    def refused(self, name: Name, reason: str) -> str:
        """Return the line that says so."""
        return self.line("refused", f"name={name.name}", f"reason={reason}")


@pytest.fixture(scope="module")
def simple(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrapped]:
    """One that was started as the first tls-tproxy is: by options, in an empty directory."""
    place = tmp_path_factory.mktemp("simple")
    ports = f"--portMap={TAKEN}:443,{TAKEN_TOO}:{PORT_TOO}"
    with site.start(place, *options(place), ports) as daemon:
        yield Wrapped(daemon, place / "run")


@pytest.fixture(scope="module")
def wrap(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrapped]:
    """Another one beside it, by a directory."""
    place = tmp_path_factory.mktemp("wrap")
    run = place / "run"
    write(run / f"wrap/ports/{TAKEN_BY_WRAP}", "443\n")
    (run / "wrap/names").mkdir()
    write_identity(run / "identity", CLIENT)
    with site.start(place, "--log=connections") as daemon:
        yield Wrapped(daemon, run)


def subject(end: End) -> str:
    """Return whom the certificate is for that the server has seen."""
    assert end.certificate is not None
    certificate = x509.load_der_x509_certificate(end.certificate)
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


# --- Who is wrapped


@FAMILIES
@pytest.mark.parametrize("user", [0, 1000])
def test_a_connection_is_wrapped(site: Site, simple: Wrapped, version: int, user: int) -> None:
    """Observed: IPv6 left in plaintext; no SNI was sent; and root was never wrapped."""
    name = site.new_name()
    with site.serve(name.addresses[version], server_context(name.name)) as server:
        assert works(site.visit(name, version=version, user=user))
        end = server.end()
        assert end.sni == name.name
        assert subject(end) == CLIENT
        assert (bytes(end.received), end.version) == (b"hello", "TLSv1.3")
        # Else no test here could tell that it was not shown.
        assert end.is_certificate_seen
    assert " up=5 down=5 " in simple.line("connection", f"name={name.name}", "ending=finished")


def test_two_ports_at_once(site: Site, simple: Wrapped) -> None:
    name = site.new_name()
    context = server_context(name.name)
    with (
        site.serve(name.address, context) as one,
        site.serve(name.address, context, port=PORT_TOO) as other,
    ):
        assert works(site.visit(name, TAKEN_TOO))
        assert (len(one.ends), len(other.ends)) == (0, 1)
        assert works(site.visit(name))
        assert (len(one.ends), len(other.ends)) == (1, 1)


def test_a_port_that_is_not_taken_is_left_alone(site: Site, simple: Wrapped) -> None:
    name = site.new_name()
    with site.serve(name.address, server_context(name.name), port=8888) as server:
        with site.visit(name, 8888) as client:
            client.sendall(b"hello")
            receive_all(client)
        assert server.end().raw == b"hello"


def test_two_instances_side_by_side(site: Site, simple: Wrapped, wrap: Wrapped) -> None:
    name = site.new_name()
    wrap.add(name.name)
    with site.serve(name.address, server_context(name.name)):
        assert works(site.visit(name, TAKEN_BY_WRAP))
        assert works(site.visit(name, TAKEN))
    for one, other in (simple, wrap), (wrap, simple):
        one.line("connection", f"name={name.name}")
        port = {id(simple): TAKEN, id(wrap): TAKEN_BY_WRAP}[id(other)]
        assert f":{port} name={name.name}" not in "".join(one.daemon.log())
    assert len(site.tables()) == 2


def test_who_connects_to_our_own_port_is_refused(site: Site, simple: Wrapped) -> None:
    address = simple.daemon.wait_for_log("listening").partition("address=")[2].split()[0]
    port = int(address.rpartition(":")[2])
    assert is_reset(lambda: site.connect("127.0.0.1", port))
    simple.line("refused", "reason=not_redirected")


# --- Names


@pytest.mark.parametrize("server", [ROUTER[4], "127.0.0.1"], ids=["another's", "loopback"])
@pytest.mark.parametrize("prefix", ["", "brief-", "alias-"], ids=["plain", "TTL 0", "CNAMEs"])
def test_names_that_are_looked_up(site: Site, simple: Wrapped, prefix: str, server: str) -> None:
    """Observed: each of these failed. A CNAME's target counted as a name: any certificate did."""
    name = site.new_name()
    asked = f"{prefix}{name.name}"
    with site.serve(name.address, server_context(asked)) as served:
        site.look_up(asked, server=server)
        assert works(site.connect(name.address))
        assert served.end().sni == asked


def test_the_case_of_a_name(site: Site, simple: Wrapped) -> None:
    """Resolvers that draft-vixie-dnsext-dns0x20 has persuaded ask in any."""
    name = site.new_name()
    with site.serve(name.address, server_context(name.name)) as server:
        site.look_up(name.name.upper())
        assert works(site.connect(name.address))
        assert server.end().sni == name.name


def test_the_target_of_a_cname_is_no_name(site: Site, simple: Wrapped) -> None:
    """Observed: a forged CNAME, and any valid certificate, passed."""
    name = site.new_name()
    with site.serve(name.address, server_context(name.name)) as server:
        site.look_up(f"alias-{name.name}")
        assert is_reset(lambda: site.connect(name.address))
        assert server.end().sni == f"alias-{name.name}"
        assert not server.end().is_certificate_seen
    simple.line("refused", f"name=alias-{name.name}", "reason=wrong_name")


def test_accept_cname(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    wrap.add(f"alias-{name.name}", **{"accept-cname": ""})
    wrap.add(name.name)
    with site.serve(name.address, server_context(name.name)):
        site.look_up(f"alias-{name.name}")
        assert works(site.connect(name.address, TAKEN_BY_WRAP))


@FAMILIES
def test_no_name(site: Site, simple: Wrapped, version: int) -> None:
    address = site.new_name().addresses[version]
    with site.serve(address, server_context("any.example")) as server:
        assert is_reset(lambda: site.connect(address))
        assert server.ends == []
    shown = f"[{address}]" if version == 6 else address
    simple.line("refused", f"destination={shown}:{TAKEN}", "reason=no_name")


def test_a_forged_answer_names_nobody(site: Site, simple: Wrapped) -> None:
    """Observed: whatever looked like an answer was learned."""
    name = site.new_name()
    played = "10.77.9.9"  # a resolver that the test plays

    def ask_for(number: int) -> None:
        server = site.router.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        client = site.here.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        with server, client:
            server.bind((played, 53))
            for sock in server, client:
                sock.settimeout(PATIENCE)
            client.connect((played, 53))
            client.send(asking(name.name))
            _, where = server.recvfrom(4096)
            server.sendto(answering(name.name, name.address, number=number), where)
            client.recv(4096)

    with site.serve(name.address, server_context(name.name)):
        ask_for(DNS_ID ^ 1)
        assert is_reset(lambda: site.connect(name.address))
        simple.line("refused", f"destination={name.address}:{TAKEN}", "reason=no_name")
        ask_for(DNS_ID)
        assert works(site.connect(name.address))


def test_several_names_of_one_address(site: Site, simple: Wrapped) -> None:
    """The server shows a certificate for the name that was not looked up last."""
    name = site.new_name()
    with site.serve(name.address, server_context(name.name)) as server:
        site.look_up(name.name)
        site.look_up(name.other)
        assert works(site.connect(name.address))
        assert [end.sni for end in server.ends] == [name.other, name.name]
        assert [end.is_certificate_seen for end in server.ends] == [False, True]


def test_several_names_that_lead_to_several_ports(site: Site, wrap: Wrapped) -> None:
    """Nobody listens on the port of the first candidate."""
    name = site.new_name()
    wrap.add(name.other, **{f"ports__{TAKEN_BY_WRAP}": "4430\n"})
    wrap.add(name.name)
    with site.serve(name.address, server_context(name.name)):
        site.look_up(name.name)
        site.look_up(name.other)
        assert works(site.connect(name.address, TAKEN_BY_WRAP))


def test_an_unknown_name(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    with site.serve(name.address, server_context(name.name)) as server:
        assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
        assert server.ends == []
    wrap.line("refused", f"destination={name.address}:{TAKEN_BY_WRAP}", "reason=unknown_name")


def test_also(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    wrap.add("also.example", **{f"also__{name.name}": ""})
    time.sleep(_OVERVIEW_FOR)
    with site.serve(name.address, server_context(name.name)) as server:
        assert works(site.visit(name, TAKEN_BY_WRAP))
        assert server.end().sni == name.name


def test_fixed_addresses(site: Site, wrap: Wrapped) -> None:
    name, elsewhere = site.new_name(), site.new_name()
    wrap.add(name.name, addresses=f"{elsewhere.address}\n{elsewhere.addresses[6]}\n")
    time.sleep(_OVERVIEW_FOR)
    context = server_context(name.name)
    for version in 4, 6:
        with site.serve(elsewhere.addresses[version], context) as server:
            # Nobody has looked it up.
            assert works(site.connect(elsewhere.addresses[version], TAKEN_BY_WRAP))
            assert server.end().sni == name.name
    # And whatever the DNS says, it is nowhere else.
    assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
    wrap.line(
        "refused", f"destination={name.address}:{TAKEN_BY_WRAP}", "reason=address_not_allowed"
    )


# --- Ports


def test_ports_added_and_removed(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    place = wrap.add(name.name)
    port, for_all = 8445, 8446
    with site.serve(name.address, server_context(name.name)):
        write(place / f"ports/{port}", "443\n")
        write(wrap.run / f"wrap/ports/{for_all}", "443\n")
        wrap.line("redirecting", f"ports={TAKEN_BY_WRAP},{port},{for_all}")
        assert works(site.visit(name, port))
        # Its own list counts, and not the one for all.
        assert is_reset(lambda: site.visit(name, for_all))
        wrap.refused(name, "port_not_allowed")
        (place / f"ports/{port}").unlink()
        wrap.line("redirecting", f"ports={TAKEN_BY_WRAP},{for_all}")
        with pytest.raises(ConnectionRefusedError):
            site.visit(name, port)
        (place / "ports").rmdir()
        assert works(site.visit(name, for_all))
    before = len(wrap.daemon.log())
    (wrap.run / f"wrap/ports/{for_all}").unlink()
    eventually(lambda: any("redirecting" in line for line in wrap.daemon.log()[before:]))


# --- Whom we connect to


@VERSIONS
@pytest.mark.parametrize("kind", ["wrong_name", "untrusted", "expired"])
def test_a_server_that_is_not_the_one(
    site: Site, simple: Wrapped, kind: str, tls: ssl.TLSVersion
) -> None:
    """Observed: none; but our certificate must not be shown to such a one."""
    name = site.new_name()
    context = {
        "wrong_name": lambda: server_context("another.example", version=tls),
        "untrusted": lambda: server_context(name.name, ca=authority("strangers"), version=tls),
        "expired": lambda: server_context(
            version=tls,
            certificate=authority().issue_cert(
                name.name,
                not_before=datetime.now(UTC) - timedelta(days=2),
                not_after=datetime.now(UTC) - timedelta(days=1),
            ),
        ),
    }[kind]()
    with site.serve(name.address, context) as server:
        assert is_reset(lambda: site.visit(name))
        simple.refused(name, kind)
        end = server.end()
    assert end.sni == name.name
    assert not end.is_certificate_seen
    assert "ALERT" in str(end.failure)
    assert end.received == b""


def test_a_server_that_asks_for_no_certificate(site: Site, simple: Wrapped) -> None:
    """It is who it should be, and what is said to it is encrypted: so it is served."""
    name = site.new_name()
    with site.serve(name.address, server_context(name.name, asks=False)) as server:
        assert works(site.visit(name))
        assert server.end().certificate is None


@VERSIONS
def test_a_server_that_rejects_our_certificate(
    site: Site, simple: Wrapped, tls: ssl.TLSVersion
) -> None:
    """In TLS 1.3 that is known only after the handshake, so it may be the relay that hears it."""
    name = site.new_name()
    context = server_context(name.name, asks=False, version=tls)
    authority("strangers").configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with site.serve(name.address, context) as server:
        with pytest.raises(ConnectionError), site.visit(name) as client:  # EPIPE, too
            client.settimeout(AT_ONCE)
            client.sendall(b"hello")
            client.recv(1)
        assert server.end().received == b""
    if tls is ssl.TLSVersion.TLSv1_2:
        simple.refused(name, "rejected")
    else:
        line = simple.line("connection", f"name={name.name}")
        # The server has not read all when it leaves, so a reset may overtake its alert.
        assert line.split()[-1] in {"ending=tls_failed", "ending=tls_reset"}


def test_a_closed_port(site: Site, simple: Wrapped) -> None:
    name = site.new_name()
    assert is_reset(lambda: site.visit(name))
    simple.refused(name, "refused")


@pytest.mark.parametrize("says", [b"220 ready\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_plain_server(site: Site, simple: Wrapped, says: bytes) -> None:
    name = site.new_name()
    listening = site.router.do(socket.create_server, (name.address, 443))
    with listening, site.visit(name) as client:
        listening.settimeout(PATIENCE)
        server, _ = listening.accept()
        with server:
            server.recv(1 << 16)
            server.sendall(says)
        assert is_reset(lambda: client)
    simple.refused(name, "not_tls" if says else "tls_closed")


def test_who_is_silent_for_ten_seconds(site: Site, simple: Wrapped) -> None:
    """A server that says nothing, and one that is not there: all at once, since that takes time."""
    silent, lost = site.new_name(), site.new_name()
    site.router.run("ip", "route", "add", "blackhole", lost.address, "table", "local")
    listening = site.router.do(socket.create_server, (silent.address, 443))
    with listening, site.visit(silent) as one, site.visit(lost) as other:
        for client in one, other:
            client.settimeout(10 + PATIENCE)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    for name in silent, lost:
        simple.refused(name, "server_silent")


# --- Identities, rules, checkers


def test_an_identity_for_each_service(site: Site, wrap: Wrapped) -> None:
    one, other = site.new_name(), site.new_name()
    write_identity(wrap.add(one.name) / "identity", "one.example")
    wrap.add(other.name)
    for name, shown in (one, "one.example"), (other, CLIENT):
        with site.serve(name.address, server_context(name.name)) as server:
            assert works(site.visit(name, TAKEN_BY_WRAP))
            assert subject(server.end()) == shown


def test_an_identity_is_swapped_and_then_broken(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    identity = wrap.add(name.name) / "identity"
    write_identity(identity, "before.example")
    with site.serve(name.address, server_context(name.name)) as server:
        assert works(site.visit(name, TAKEN_BY_WRAP))
        write_identity(identity, "after.example")
        assert works(site.visit(name, TAKEN_BY_WRAP))
        write(identity / "cert.pem", "half\n")
        assert works(site.visit(name, TAKEN_BY_WRAP))
        assert works(site.visit(name, TAKEN_BY_WRAP))
        shown = [subject(end) for end in server.ends]
    assert shown == ["before.example", "after.example", "after.example", "after.example"]
    told = [line for line in wrap.daemon.log() if str(identity.relative_to(wrap.run)) in line]
    assert sum("identity_broken" in line for line in told) == 1, told


def test_no_identity(site: Site, wrap: Wrapped) -> None:
    name = site.new_name()
    (wrap.add(name.name) / "identity").mkdir()
    with site.serve(name.address, server_context(name.name)) as server:
        assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
        assert server.ends == []
    wrap.refused(name, "misconfigured")


def pin(der: bytes) -> str:
    key = x509.load_der_x509_certificate(der).public_key()
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"pin-sha256:{b64encode(sha256(encoded).digest()).decode()}"


OTHER_PIN: Final = f"pin-sha256:{b64encode(bytes(32)).decode()}"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        # Who it may be: whatever its name is.
        ({"servers": "real.example\n"}, ""),
        ({"servers": "another.example\n*.real.example\n"}, "wrong_name"),
        ({"servers": "PIN\n"}, ""),
        ({"servers": f"{OTHER_PIN}\n"}, "wrong_name"),
        ({"servers": "spiffe://\n"}, "misconfigured"),
        # Checkers, beside it.
        ({"servers": "real.example\n", "verify": "san\n"}, "certificate_rejected"),
        ({"servers": "real.example\n", "verify": "spki-pin\n", "pins": "PIN\n"}, ""),
        (
            {"servers": "real.example\n", "verify": "spki-pin\n", "pins": f"{OTHER_PIN}\n"},
            "certificate_rejected",
        ),
        ({"servers": "real.example\n", "verify": "spki-pin\n"}, "certificate_rejected"),
        ({"servers": "real.example\n", "verify": "none-such\n"}, "unknown_checker"),
    ],
)
def test_rules_and_checkers(
    site: Site, wrap: Wrapped, entries: dict[str, str], reason: str
) -> None:
    name = site.new_name()
    leaf = authority().issue_cert("real.example")
    der = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
    for entry, text in entries.items():
        wrap.add(name.name, **{entry: pin(der) if text == "PIN\n" else text})
    with site.serve(name.address, server_context(certificate=leaf)) as server:
        if not reason:
            assert works(site.visit(name, TAKEN_BY_WRAP))
        else:
            assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
            wrap.refused(name, reason)
            assert not any(end.is_certificate_seen for end in server.ends)


def test_rules_that_become_stricter(site: Site, wrap: Wrapped) -> None:
    """Whoever was let in before is not, be it by a session that TLS could resume."""
    name = site.new_name()
    place = wrap.add(name.name)
    with site.serve(name.address, server_context(name.name)) as server:
        for _ in range(3):
            assert works(site.visit(name, TAKEN_BY_WRAP))
        write(place / "servers", f"{OTHER_PIN}\n")
        assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
        wrap.refused(name, "wrong_name")
        assert not server.end(3).is_certificate_seen
        (place / "servers").unlink()
        write(place / "verify", "spki-pin\n")
        write(place / "pins", f"{OTHER_PIN}\n")
        assert is_reset(lambda: site.visit(name, TAKEN_BY_WRAP))
        wrap.refused(name, "certificate_rejected")


# --- What is relayed


@VERSIONS
def test_the_client_ends_first(site: Site, simple: Wrapped, tls: ssl.TLSVersion) -> None:
    name = site.new_name()

    def answer_after_the_end(end: End) -> None:
        while end.receive():
            pass
        end.send(b"answer" * 10_000)
        end.end_half()

    context = server_context(name.name, version=tls)
    with site.serve(name.address, context, answer_after_the_end) as server:
        with site.visit(name) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"answer" * 10_000
        assert server.end().received == b"question"
    simple.line("connection", f"name={name.name}", "ending=finished")


@VERSIONS
def test_the_server_ends_first(site: Site, simple: Wrapped, tls: ssl.TLSVersion) -> None:
    name = site.new_name()

    def speak_and_listen(end: End) -> None:
        end.send(b"all")
        end.end_half()
        while end.receive():
            pass

    context = server_context(name.name, version=tls)
    with site.serve(name.address, context, speak_and_listen) as server:
        with site.visit(name) as client:
            assert receive_all(client) == b"all"
            client.sendall(b"late" * 10_000)
            client.shutdown(socket.SHUT_WR)
            eventually(lambda: simple.line("connection", f"name={name.name}", "ending=finished"))
        assert server.end().received == b"late" * 10_000


@VERSIONS
def test_the_server_is_cut_off(site: Site, simple: Wrapped, tls: ssl.TLSVersion) -> None:
    """The end of its TCP connection is not the end of what it says, RFC 8446 §6.1."""
    name = site.new_name()

    def begin(end: End) -> None:
        end.receive()
        end.send(b"half")

    context = server_context(name.name, version=tls)
    with site.serve(name.address, context, begin), site.visit(name) as client:
        client.sendall(b"question")
        with pytest.raises(ConnectionResetError):
            receive_all(client)
    simple.line("connection", f"name={name.name}", "ending=truncated")


@VERSIONS
def test_the_client_is_cut_off(site: Site, simple: Wrapped, tls: ssl.TLSVersion) -> None:
    name = site.new_name()
    endings: list[str] = []

    def listen(end: End) -> None:
        try:
            while end.receive():
                pass
            endings.append("finished")
        except OSError:
            endings.append("broken")
            raise

    context = server_context(name.name, version=tls)
    with site.serve(name.address, context, listen) as server:
        client = site.visit(name)
        client.sendall(b"half")
        eventually(lambda: server.ends and server.ends[0].received == b"half")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        client.close()
        eventually(lambda: endings == ["broken"])
    simple.line("connection", f"name={name.name}", "ending=plain_reset")


@VERSIONS
def test_much_both_ways(site: Site, simple: Wrapped, tls: ssl.TLSVersion) -> None:
    name = site.new_name()
    size = 20 * MEBIBYTE
    # So that no piece is another one.
    content = b"".join(struct.pack("!Q", n) for n in range(size // 8))
    received = sha256()
    context = server_context(name.name, version=tls)
    with site.serve(name.address, context), site.visit(name) as client:

        def receive() -> None:
            while data := client.recv(1 << 18):
                received.update(data)

        thread = threading.Thread(target=receive)
        thread.start()
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        thread.join(3 * PATIENCE)
        assert not thread.is_alive()
    assert received.digest() == sha256(content).digest()
    simple.line("connection", f"name={name.name}", f"up={size}", f"down={size}")


def test_many_at_once(site: Site, simple: Wrapped) -> None:
    name = site.new_name()
    with site.serve(name.address, server_context(name.name)), ExitStack() as stack:
        clients = [stack.enter_context(site.visit(name)) for _ in range(50)]
        for n, client in enumerate(clients):
            client.sendall(b"%d" % n * 10_000)
            client.shutdown(socket.SHUT_WR)
        for n, client in enumerate(clients):
            assert receive_all(client) == b"%d" % n * 10_000


def test_the_server_speaks_first(site: Site, simple: Wrapped) -> None:
    name = site.new_name()

    def greet(end: End) -> None:
        end.send(b"220 ready\r\n")
        end.receive()
        end.end_half()

    with site.serve(name.address, server_context(name.name), greet), site.visit(name) as client:
        assert client.recv(100) == b"220 ready\r\n"
        client.sendall(b"QUIT\r\n")
        assert receive_all(client) == b""
