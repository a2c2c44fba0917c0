"""The webhook: AdmissionReviews over TLS, from curl and from clients that do not behave."""

import base64
import copy
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest

from tests.support.bridge import authority
from tests.support.daemon import PATIENCE, eventually
from tproxy_pod.inject import webhook
from tproxy_pod.inject.sidecar import CONTAINER, Sidecar
from tproxy_pod.inject.webhook import ReviewError, answer

SIDECAR: Final = Sidecar("tproxy-pod:1", csi_driver="spiffe.csi.cert-manager.io")

NAME: Final = "tproxy-pod-inject.tproxy-pod.svc"

# As an API server of 1.31 sends it for a pod of a Deployment, but for what it says of the user.
REVIEW: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "review.json").read_text())


def ask(review: dict[str, Any]) -> dict[str, Any]:
    """Return the response to a review."""
    whole = json.loads(answer(json.dumps(review).encode(), SIDECAR))
    assert (whole["apiVersion"], whole["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response: dict[str, Any] = whole["response"]
    assert response["uid"] == review["request"]["uid"]
    return response


def changed(**what: Any) -> dict[str, Any]:
    """Return the review with another pod: members of `spec` or `metadata` replaced."""
    review = copy.deepcopy(REVIEW)
    review["request"]["object"]["spec"].update(what)
    return review


def apply(pod: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """Apply the patch of a response as RFC 6902 says."""
    assert response["patchType"] == "JSONPatch"
    pod = copy.deepcopy(pod)
    for operation in json.loads(base64.b64decode(response["patch"])):
        assert operation["op"] == "add"
        target: Any = pod
        *path, last = operation["path"].split("/")[1:]
        for each in path:
            target = target[each]
        if isinstance(target, list):
            target.insert(len(target) if last == "-" else int(last), operation["value"])
        else:
            target[last] = operation["value"]
    return pod


def test_a_pod_gets_its_sidecar() -> None:
    pod = REVIEW["request"]["object"]
    response = ask(REVIEW)
    assert response["allowed"] is True
    after = apply(pod, response)
    assert [each["name"] for each in after["spec"]["initContainers"]] == [CONTAINER, "migrate"]
    assert len(after["spec"]["volumes"]) == len(pod["spec"]["volumes"]) + 1
    kubernetes_validate.validate(after, "1.31", strict=True)
    # Asked again about it, as other webhooks cause, it adds nothing.
    review = copy.deepcopy(REVIEW)
    review["request"]["object"] = after
    assert ask(review) == {"uid": REVIEW["request"]["uid"], "allowed": True}


@pytest.mark.parametrize("nothing", [{}, {"initContainers": None}, {"initContainers": []}])
def test_a_pod_without_init_containers(nothing: dict[str, Any]) -> None:
    review = changed()
    del review["request"]["object"]["spec"]["initContainers"]
    del review["request"]["object"]["spec"]["volumes"]
    review["request"]["object"]["spec"].update(nothing)
    after = apply(review["request"]["object"], ask(review))
    assert [each["name"] for each in after["spec"]["initContainers"]] == [CONTAINER]
    kubernetes_validate.validate(after, "1.31", strict=True)


def test_the_network_of_a_node_is_refused() -> None:
    response = ask(changed(hostNetwork=True))
    assert response["allowed"] is False
    assert response["status"]["code"] == 403
    assert "the network of its node" in response["status"]["message"]


def test_a_label_opts_out() -> None:
    review = changed(hostNetwork=True)
    review["request"]["object"]["metadata"]["labels"]["tproxy-pod/inject"] = "false"
    assert ask(review) == {"uid": REVIEW["request"]["uid"], "allowed": True}


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "UPDATE"},
        {"operation": "DELETE", "object": None},
        {"subResource": "ephemeralcontainers"},
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
    ],
)
def test_what_is_not_asked_about_is_allowed(change: dict[str, Any]) -> None:
    review = copy.deepcopy(REVIEW)
    review["request"].update(change)
    assert ask(review) == {"uid": REVIEW["request"]["uid"], "allowed": True}


def test_what_is_no_pod_is_refused() -> None:
    for wrong in None, 5, {}, {"spec": 5}:
        review = copy.deepcopy(REVIEW)
        review["request"]["object"] = wrong
        assert ask(review)["allowed"] is False


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"5", "it is no AdmissionReview"),
        (b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1beta1"}', "apiVersion"),
        (b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}', "no request"),
    ],
)
def test_what_is_no_review_is_told(body: bytes, message: str) -> None:
    with pytest.raises(ReviewError, match=message):
        answer(body, SIDECAR)


# --- over TLS


class Running:
    """The webhook as a process."""

    def __init__(self, place: Path) -> None:
        self.place = place
        authority().cert_pem.write_to_path(str(place / "ca.crt"))
        self.issue()
        self.log = (place / "log").open("w+")
        command = [sys.executable, "-bb", "-X", "dev", "-W", "error", "-m", "tproxy_pod.inject"]
        options = ["--webhook", "--listen=127.0.0.1:0", f"--cert={place}/tls.crt"]
        options += [f"--key={place}/tls.key", "--image=tproxy-pod:1", "--secret=s"]
        self.process = subprocess.Popen([*command, *options], stderr=self.log)
        eventually(lambda: "listening on" in self.text())
        self.port = int(self.text().split()[-1])

    def issue(self, name: str = NAME) -> None:
        issued = authority().issue_cert(name)
        issued.cert_chain_pems[0].write_to_path(str(self.place / "tls.crt"))
        issued.private_key_pem.write_to_path(str(self.place / "tls.key"))

    def text(self) -> str:
        return (self.place / "log").read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def post(self, body: bytes | str, *options: str) -> tuple[int, bytes]:
        """Return the status, and the body, as curl has it."""
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed (Debian package curl)")
        (self.place / "body").write_bytes(body if isinstance(body, bytes) else body.encode())
        done = subprocess.run(
            [
                *("curl", "--silent", "--show-error", "--cacert", str(self.place / "ca.crt")),
                *("--resolve", f"{NAME}:{self.port}:127.0.0.1", "--max-time", "10"),
                *("--header", "Content-Type: application/json", "--write-out", "\n%{http_code}"),
                *("--data-binary", f"@{self.place}/body", *options),
                f"https://{NAME}:{self.port}/?timeout=10s",
            ],
            capture_output=True,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        said, _, status = done.stdout.rpartition(b"\n")
        return int(status), said

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    it = Running(tmp_path)
    yield it
    assert it.end() == 0
    it.log.close()
    assert "Traceback" not in it.text()


def test_curl_is_answered(running: Running) -> None:
    status, body = running.post(json.dumps(REVIEW))
    assert status == 200
    assert json.loads(body)["response"]["allowed"] is True
    # One that is long, for which curl waits to be asked.
    review = changed()
    review["request"]["object"]["metadata"]["annotations"] = {"a": "x" * (1 << 20)}
    status, body = running.post(json.dumps(review), "--header", "Expect: 100-continue")
    assert (status, json.loads(body)["response"]["allowed"]) == (200, True)


def test_what_is_no_review_is_answered(running: Running) -> None:
    assert running.post("nonsense") == (
        400,
        b"it is not JSON: Expecting value: line 1 column 1 (char 0)\n",
    )
    assert running.post("", "--get")[0] == 405
    assert running.post(b" " * (webhook._LONGEST + 1))[0] == 413
    assert running.post(json.dumps(REVIEW))[0] == 200


def test_a_new_certificate_is_used_and_a_broken_one_is_not(running: Running) -> None:
    def serial() -> str:
        context = ssl.create_default_context(cafile=running.place / "ca.crt")
        with running.connect() as plain, context.wrap_socket(plain, server_hostname=NAME) as tls:
            certificate = tls.getpeercert()
            assert certificate
            return str(certificate["serialNumber"])

    before = serial()
    running.issue()
    after = serial()
    assert after != before
    (running.place / "tls.crt").write_text("half a certif")
    assert serial() == after
    assert "unable to read the new certificate" in running.text()
    running.issue()
    assert serial() not in (before, after)


def test_who_is_slow_or_speaks_no_tls_keeps_nobody_out(running: Running) -> None:
    silent = [running.connect() for _ in range(20)]
    with running.connect() as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(100)
    with running.connect() as plain:
        context = ssl.create_default_context(cafile=running.place / "ca.crt")
        with context.wrap_socket(plain, server_hostname=NAME) as tls:
            tls.sendall(b"nonsense\r\n\r\n")
            tls.recv(100)
    eventually(lambda: running.text().count("unable to read a request") == 2)
    assert running.post(json.dumps(REVIEW))[0] == 200
    for each in silent:
        each.close()


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tproxy_pod.inject", "--webhook", "--image=i", "--secret=s"]
    command += [f"--cert={tmp_path}/c", f"--key={tmp_path}/k"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 100
    assert done.stderr == (
        "tproxy-pod-inject: fatal: unable to read the certificate and its key: "
        "No such file or directory\n"
    )
