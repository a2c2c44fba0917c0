"""docs/tproxy-pod-security.md: a test behind each of its sentences, here or where it was before."""

import socket
import ssl
from pathlib import Path
from typing import Final

import pytest

from mutual_tls.netfilter.mark import OPTION
from tests.support import sentences
from tests.support.bridge import authority
from tests.support.daemon import PATIENCE
from tests.support.network import why_no_network
from tests.support.pods import Pod, Pods, ask, running

_why_not: Final = why_no_network(("nft", "nftables"))
needs_network = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs/tproxy-pod-security.md"

BETWEEN, CHANGES = "tproxy_pod/test_between_pods.py", "tproxy_pod/test_changes.py"

# Which tests are behind a sentence: FILE::TEST, the file below tests/; without one it is this file.
TESTS: Final = {
    # On the way.
    "Whoever is on the way sees TLS, and how much is said.": [
        f"{BETWEEN}::test_what_leaves_is_encrypted",
        "test_no_name_is_in_the_hello",
    ],
    "Who answers in the server's place gets neither our certificate nor a byte of the program.": [
        "test_an_impostor_is_not_shown_our_certificate",
        f"{BETWEEN}::test_a_pod_with_the_wrong_certificate_is_refused_by_its_client",
    ],
    "Who connects without a certificate of our authority does not reach a program.": [
        f"{BETWEEN}::test_an_outsider_without_a_certificate_is_refused",
        f"{BETWEEN}::test_a_client_of_tls_without_a_certificate_is_refused",
        f"{BETWEEN}::test_a_pod_with_the_wrong_certificate_is_refused_by_its_server",
    ],
    "A certificate of the authority is not enough where there are rules.": [
        f"{CHANGES}::test_servers_may_be_named",
        f"{CHANGES}::test_clients_may_be_named",
    ],
    "A connection that was cut off does not look like one that has ended.": [
        "tproxy_pod/test_trouble.py::test_a_truncated_stream_is_a_reset_for_the_program"
    ],
    "A late answer does not leave in plaintext.": [
        "tproxy_pod/test_forgotten.py::test_a_late_answer_is_encrypted_and_arrives"
    ],
    "What is of no connection does not leave.": [
        "tproxy_pod/test_forgotten.py::test_what_is_of_no_connection_does_not_leave"
    ],
    # Modes.
    "With `permissive` whoever is on the way can have a connection go on in plaintext.": [
        f"{CHANGES}::test_permissive_reaches_plain_servers"
    ],
    "Who has shown a certificate that is refused is not spoken to in plaintext.": [
        f"{CHANGES}::test_permissive_is_no_way_around_a_certificate"
    ],
    "Nor is who has spoken TLS in the last ten minutes.": [
        f"{CHANGES}::test_who_has_spoken_tls_is_not_talked_into_plaintext"
    ],
    "What can't be read or understood is refused, and not left alone.": [
        f"{CHANGES}::test_what_is_not_understood_is_refused",
        f"{CHANGES}::test_an_entry_that_is_no_prefix_refuses_what_it_may_have_meant",
    ],
    # Probes.
    "Who has an address in `pod/probes` may connect in plaintext.": [
        "tproxy_pod/test_probes.py::test_a_probe_by_http",
        "tproxy_pod/test_probes.py::test_a_probe_by_tcp",
    ],
    "Others may not.": ["tproxy_pod/test_probes.py::test_a_probe_by_http"],
    # Within the pod.
    "All programs of the pod speak with its certificate.": [
        f"{BETWEEN}::test_between_pods_is_mutual_tls"
    ],
    "Without a right nobody has our mark, with which one gets past the rules.": [
        "tls_tproxy/test_redirect.py::test_the_mark_is_not_to_be_had_without_rights"
    ],
    "Who has the mark gets past.": ["test_who_has_our_mark_gets_past"],
    "Nobody gets anywhere by connecting to our own ports.": [
        f"{BETWEEN}::test_who_connects_to_our_own_ports_is_refused"
    ],
    "Loopback and the pod's own addresses are left alone.": [
        f"{BETWEEN}::test_loopback_and_a_pod_that_talks_to_itself_are_left_alone"
    ],
    # Plaintext.
    "UDP, and addresses that are not taken.": [
        f"{BETWEEN}::test_udp_is_left_alone",
        f"{BETWEEN}::test_public_addresses_are_left_alone",
    ],
    "Everything, before tproxy-pod has started and after it has ended.": [
        "tproxy_pod/test_lifetime.py::test_nothing_is_left_behind"
    ],
    "With `--fail-closed` it is refused from the first start on, until the pod ends.": [
        "tproxy_pod/test_lifetime.py::test_fail_closed_refuses_when_it_is_gone",
        "tproxy_pod/test_lifetime.py::test_a_table_that_refuses_comes_back",
    ],
    # Itself.
    "After its start it has the right to set marks and to take addresses, and no other.": [
        "tproxy_pod/test_trouble.py::test_in_a_root_directory_of_its_own_and_as_nobody",
        "service/test_systemd_pod.py::test_it_has_no_right_but_the_one",
    ],
    "Nothing is left behind when it has ended, however that was.": [
        "tproxy_pod/test_lifetime.py::test_nothing_is_left_behind",
        "tproxy_pod/test_lifetime.py::test_five_starts_leave_one_rule",
    ],
}


def test_there_is_a_test_behind_each_sentence() -> None:
    sentences.check(PAGE, TESTS, __file__)


@needs_network
def test_no_name_is_in_the_hello(pods: Pods, tmp_path: Path, outsider: Pod) -> None:
    """RFC 6066 §3: "Literal IPv4 and IPv6 addresses are not permitted"."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(outsider.address).configure_cert(context)
    context.sni_callback = lambda tls, name, context: names.append(name)
    here = pods.pod()
    with (
        running(here, tmp_path),
        outsider.listen(8080) as listening,
        here.connect(outsider, 8080),
        listening.accept()[0] as plain,
    ):
        plain.settimeout(PATIENCE)
        context.wrap_socket(plain, server_side=True).close()
    assert names == [None]


@needs_network
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_impostor_is_not_shown_our_certificate(
    pods: Pods, tmp_path: Path, outsider: Pod, version: ssl.TLSVersion
) -> None:
    """Its certificate is of our authority, and for another address."""
    messages: list[int] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    authority().issue_cert("192.0.2.1").configure_cert(context)
    authority().configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED

    def note(tls: object, way: str, _: object, content: int, message: int, __: bytes) -> None:
        if (way, int(content)) == ("read", 22):  # RFC 8446 §5.1, handshake
            messages.append(int(message))

    context._msg_callback = note  # type: ignore[attr-defined]
    here = pods.pod()
    with running(here, tmp_path) as pod, outsider.listen(8080) as listening:
        with here.connect(outsider, 8080) as client, listening.accept()[0] as plain:
            client.sendall(b"a secret")
            plain.settimeout(PATIENCE)
            with pytest.raises(ssl.SSLError, match="BAD_CERTIFICATE"):
                context.wrap_socket(plain, server_side=True)
        pod.line("refused", "reason=wrong_name")
    # RFC 8446 §4: a ClientHello, and no Certificate (11).
    assert 1 in messages
    assert 11 not in messages


@needs_network
def test_who_has_our_mark_gets_past(pods: Pods, tmp_path: Path, outsider: Pod) -> None:
    here = pods.pod()

    def connect(*option: int) -> socket.socket:
        client = socket.socket()
        client.setsockopt(*option)
        client.connect((outsider.address, 8080))
        return client

    with running(here, tmp_path) as pod, outsider.listen(8080) as listening:
        client = here.machine.do(connect, *OPTION)
        name = client.getsockname()
        assert ask(client, listening) == name
        # And with another mark one does not.
        level, kind, mark = OPTION
        with here.machine.do(connect, level, kind, mark + 16), listening.accept()[0] as server:
            server.settimeout(PATIENCE)
            assert server.recv(1) == b"\x16"
        pod.line("refused", "direction=out")
