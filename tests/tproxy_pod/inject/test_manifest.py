"""Manifests: what is added, that nothing else changes, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sniproxy import __version__
from tproxy_pod.inject import manifest
from tproxy_pod.inject.__main__ import main
from tproxy_pod.inject.manifest import ManifestError, inject
from tproxy_pod.inject.sidecar import CONTAINER, Sidecar

ROOT: Final = Path(__file__).parents[3]
KUBERNETES: Final = ROOT / "kubernetes"

# The oldest version whose schema has sidecars on, and the newest that there is.
VERSIONS: Final = ("1.29", kubernetes_validate.latest_version())

SIDECAR: Final = Sidecar("tproxy-pod:1", "tproxy-pod", egress="tproxy-pod-egress")
BY_CSI: Final = Sidecar(
    "tproxy-pod:1",
    csi_driver="spiffe.csi.cert-manager.io",
    csi_attributes={"a": "b"},
    probes=["10.0.0.1"],
    arguments=["--fail-closed"],
)

POD: Final = """\
apiVersion: v1
kind: Pod
metadata:
  name: web
spec:
  containers:
  - name: web
    image: web
"""


def pods_of(text: str) -> list[dict[str, Any]]:
    """Return the specifications of all pods in a manifest."""
    found = []
    for document in yaml.safe_load_all(text):
        for each in document.get("items", [document]):
            spec = each["spec"]
            while "containers" not in spec:
                spec = spec.get("jobTemplate", spec.get("template", {})).get("spec", {})
            found.append(spec)
    return found


def test_the_sidecar_begins_before_all_others_and_stays() -> None:
    text = inject(f"{POD}  initContainers:\n  - name: migrate\n".encode(), SIDECAR)
    [spec] = pods_of(text)
    assert [each["name"] for each in spec["initContainers"]] == [CONTAINER, "migrate"]
    sidecar = spec["initContainers"][0]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["startupProbe"]["httpGet"] == {"path": "/", "port": 15021}
    assert "--ready-port=15021" in sidecar["args"]
    assert sidecar["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["NET_ADMIN", "NET_RAW"],
    }
    assert [each["name"] for each in spec["containers"]] == ["web"]
    identity, egress = spec["volumes"]
    assert identity == {"name": "tproxy-pod-identity", "secret": {"secretName": "tproxy-pod"}}
    assert egress == {"name": "tproxy-pod-egress", "configMap": {"name": "tproxy-pod-egress"}}
    assert [each["mountPath"] for each in sidecar["volumeMounts"]] == [
        "/srv/tproxy-pod/pod/identity",
        "/srv/tproxy-pod/pod/egress",
    ]


def test_the_identity_may_come_from_a_driver() -> None:
    [spec] = pods_of(inject(POD.encode(), BY_CSI))
    csi = {
        "driver": "spiffe.csi.cert-manager.io",
        "readOnly": True,
        "volumeAttributes": {"a": "b"},
    }
    assert spec["volumes"] == [{"name": "tproxy-pod-identity", "csi": csi}]
    assert spec["initContainers"][0]["args"][-3:] == [
        "--probe-address=$(HOST_IP)",
        "--probe-address=10.0.0.1",
        "--fail-closed",
    ]


def test_the_command_line_of_the_sidecar_is_understood() -> None:
    """By tproxy-pod, after Kubernetes has put the address in."""
    [spec] = pods_of(inject(POD.encode(), BY_CSI))
    arguments = [
        each.replace("$(HOST_IP)", "192.0.2.1") for each in spec["initContainers"][0]["args"]
    ]
    command = [sys.executable, "-m", "tproxy_pod", *arguments, "--check-options"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


KINDS: Final = {
    "Pod": "{}",
    "PodTemplate": "template: {}",
    "Deployment": "spec: {template: {}}",
    "DaemonSet": "spec: {template: {}}",
    "StatefulSet": "spec: {template: {}}",
    "ReplicaSet": "spec: {template: {}}",
    "ReplicationController": "spec: {template: {}}",
    "Job": "spec: {template: {}}",
    "CronJob": "spec: {jobTemplate: {spec: {template: {}}}}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_makes_pods(kind: str) -> None:
    template = {"spec": {"containers": [{"name": "a"}]}}
    document = yaml.safe_load(KINDS[kind].replace("{}", str(template)))
    text = inject(yaml.safe_dump({"kind": kind, **document}).encode(), SIDECAR)
    assert text.count(f"name: {CONTAINER}\n") == 1
    assert inject(text.encode(), SIDECAR) == text


def test_lists_and_several_documents() -> None:
    items = yaml.safe_dump({"kind": "List", "items": [yaml.safe_load(POD)] * 2})
    text = inject(f"{POD}---\n{items}---\nkind: Service\nspec: {{}}\n---\n".encode(), SIDECAR)
    assert text.count(f"- name: {CONTAINER}\n") == 2  # the two of the list are one, and an alias
    assert [each["kind"] for each in yaml.safe_load_all(text) if each] == ["Pod", "List", "Service"]
    loaded = list(yaml.safe_load_all(text))[1]
    for each in loaded["items"]:
        assert each["spec"]["initContainers"][0]["name"] == CONTAINER


TRAPS: Final = """\
# a comment
kind: ConfigMap
data: {on: off, yes: "yes", n: 0777, o: 0o17, f: 1e3, d: 2001-01-01, z: ~, s: 'it''s', b: "a\\tb"}
block: |
  one
    two

folded: >-
  three
  four
plain: no
big: 123456789012345678901234567890
sexagesimal: 1:20:30
unicode: grüße 🕸
empty: ""
"""


def scalars(text: str) -> list[tuple[str | None, str, str | None]]:
    """Return all scalars: what YAML takes them for, their text, and how they are quoted."""
    events = yaml.parse(text, yaml.SafeLoader)
    return [(e.tag, e.value, e.style) for e in events if isinstance(e, yaml.ScalarEvent)]


def test_what_is_no_pod_stays_as_it_is_but_for_comments() -> None:
    """Not even how numbers and words are written, which libraries take for different things."""
    text = inject(TRAPS.encode(), SIDECAR)
    assert scalars(text) == scalars(TRAPS)
    assert "#" not in text


SCALARS: Final = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=20),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner),
    max_leaves=20,
)


@given(annotations=VALUES, extra=VALUES, flow=st.sampled_from([True, False, None]))
def test_nothing_else_changes_and_twice_is_once(annotations: Any, extra: Any, flow: Any) -> None:
    pod = yaml.safe_load(POD)
    pod["extra"], pod["metadata"]["annotations"] = extra, annotations
    before = yaml.safe_dump(pod, default_flow_style=flow, allow_unicode=True)
    text = inject(before.encode(), SIDECAR)
    assert inject(text.encode(), SIDECAR) == text
    after = yaml.safe_load(text)
    assert after["spec"].pop("initContainers")[0]["name"] == CONTAINER
    assert len(after["spec"].pop("volumes")) == 2
    assert after == yaml.safe_load(before)


def test_what_is_merged_is_seen_and_what_others_refer_to_is_left() -> None:
    text = """\
kind: List
base: &base
  initContainers: &init
  - name: migrate
  volumes: [{name: data}]
items:
- kind: Pod
  spec:
    <<: *base
    containers: [{name: a}]
"""
    after = yaml.safe_load(inject(text.encode(), SIDECAR))
    assert after["base"] == yaml.safe_load(text)["base"]
    spec = after["items"][0]["spec"]
    assert [each["name"] for each in spec["initContainers"]] == [CONTAINER, "migrate"]
    assert spec["volumes"][0] == {"name": "data"}


@pytest.mark.parametrize(
    "second",
    [
        # It is left as it is, though it takes its spec from one that is not.
        'metadata: {labels: {tproxy-pod/inject: "false"}}\n  spec: *spec',
        'metadata: {labels: {tproxy-pod/inject: "false"}}\n  spec: {<<: *spec}',
        'metadata: {labels: {tproxy-pod/inject: "false"}}\n  <<: *pod',
    ],
)
def test_what_one_pod_gets_another_does_not_take_from_it(second: str) -> None:
    first = "- &pod\n  kind: Pod\n  spec: &spec\n    containers: [{name: a}]\n"
    text = f"kind: List\nitems:\n{first}- kind: Pod\n  {second}\n"
    if "*pod" in second:
        text = text.replace("- kind: Pod\n  metadata", "- metadata")
    after = yaml.safe_load(inject(text.encode(), SIDECAR))["items"]
    assert after[0]["spec"]["initContainers"][0]["name"] == CONTAINER
    assert after[1] == yaml.safe_load(text)["items"][1]


def test_a_pod_with_volumes_of_its_own_has_ours_too_if_it_takes_the_rest_from_another() -> None:
    text = """kind: List
items:
- kind: Pod
  spec: &spec
    containers: [{name: a}]
- kind: Pod
  spec: {<<: *spec, volumes: [{name: data}]}
"""
    for spec in pods_of(inject(text.encode(), SIDECAR)):
        assert [each["name"] for each in spec["initContainers"]] == [CONTAINER]
        assert "tproxy-pod-identity" in [each["name"] for each in spec["volumes"]]


def test_a_pod_in_the_network_of_its_node_can_not_hide_behind_another() -> None:
    first = "kind: List\nitems:\n- kind: Pod\n  spec: &spec\n    containers: [{name: a}]\n"
    text = f"{first}- kind: Pod\n  spec: {{<<: *spec, hostNetwork: true}}\n"
    with pytest.raises(ManifestError, match="network of its node"):
        inject(text.encode(), SIDECAR)


@pytest.mark.parametrize("word", ["false", "no", "Off", "null", "~", ""])
def test_a_pod_with_a_network_of_its_own_may_say_so(word: str) -> None:
    [spec] = pods_of(inject(f"{POD}  hostNetwork: {word}\n".encode(), SIDECAR))
    assert spec["initContainers"][0]["name"] == CONTAINER


def test_json_stays_json() -> None:
    text = json.dumps(yaml.safe_load(POD))
    assert json.loads(inject(text.encode(), SIDECAR))["spec"]["initContainers"]


@pytest.mark.parametrize("label", ['"false"', "'false'", '"False"'])
def test_a_label_opts_out(label: str) -> None:
    text = POD.replace("  name: web\nspec", f"  labels: {{tproxy-pod/inject: {label}}}\nspec")
    assert yaml.safe_load(inject(text.encode(), SIDECAR)) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{POD}  hostNetwork: true\n", "it has the network of its node"),
        # True in YAML 1.1.
        (f"{POD}  hostNetwork: yes\n", "it has the network of its node"),
        (f"{POD}  hostNetwork: On\n", "it has the network of its node"),
        (f"{POD}  hostNetwork: false\n  hostNetwork: true\n", "'hostNetwork' is there twice"),
        (POD.replace("name: web\n    ", f"name: {CONTAINER}\n    "), "no init container"),
        (f"{POD}  volumes: [{{name: tproxy-pod-identity}}]\n", "it has a volume tproxy-pod-"),
        (f"{POD}  volumes: 5\n", "its volumes is no list"),
        ("kind: Pod\nspec: 5\n", "its spec is no object"),
        ("kind: Deployment\nspec: {}\n", "there is no spec.template"),
        ("kind: Pod\nmetadata: {name: x}\n", "the pod has no spec"),
        ("a: [", "unable to read the manifest: while parsing"),
        ("a: &a [*a]", "unable to read the manifest: it has too many nodes"),
        ("[" * 5000, "unable to read the manifest: "),
    ],
)
def test_what_can_not_be_done_is_told(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        inject(text.encode(), SIDECAR)
    assert message in str(caught.value)


def test_a_manifest_has_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ManifestError, match="too many nodes"):
        inject("\n".join(lines).encode(), SIDECAR)
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]
    with pytest.raises(ManifestError, match="too many levels"):
        inject("\n".join(lines).encode(), SIDECAR)
    monkeypatch.setattr(manifest, "_LONGEST", 100)
    with pytest.raises(ManifestError, match="it has more than 100 bytes"):
        inject(b" " * 101, SIDECAR)


def test_nothing_is_printed_of_what_can_not_be_done() -> None:
    command = [sys.executable, "-m", "tproxy_pod.inject", "--image=i", "--secret=s"]
    text = f"{POD}---\n{POD}  hostNetwork: true\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "tproxy-pod-inject: unable to inject into the Pod web of document 2: "
        "it has the network of its node, all of which would be redirected; "
        'the label tproxy-pod/inject: "false" leaves it as it is\n'
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--secret=s"], "--image is missing"),
        (["--image=i"], "one of --secret and --csi-driver has to be given"),
        (["--image=i", "--secret=s", "--csi-driver=d"], "one of --secret and --csi-driver"),
        (["--image=i", "--secret=s", "--csi-attribute=a=b"], "--csi-attribute goes with"),
        (["--image=i", "--csi-driver=d", "--csi-attribute=a"], "'a' is not NAME=VALUE"),
        (["--image=i", "--secret=s", "--webhook"], "--webhook, --cert and --key go together"),
        (["--image=i", "--secret=s", "--cert=c"], "--webhook, --cert and --key go together"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_a_bad_option_is_told(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 100
    error = capfd.readouterr().err
    assert error.startswith("tproxy-pod-inject: fatal: unable to understand the options: ")
    assert message in error


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"tproxy-pod-inject {__version__}\n"
    assert main(["--help"]) == 0
    assert "<web.yaml" in capfd.readouterr().out


# --- what is in kubernetes/


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_fit_the_schema(path: Path, version: str) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("pods-secret", ["--secret=tproxy-pod"]),
        ("pods-spiffe", ["--csi-driver=spiffe.csi.cert-manager.io"]),
    ],
)
def test_the_manifests_are_what_is_made_today(name: str, identity: list[str]) -> None:
    command = [sys.executable, "-m", "tproxy_pod.inject", "--image=tproxy-pod:1", *identity]
    done = subprocess.run(
        [*command, "--egress=tproxy-pod-egress"],
        input=(KUBERNETES / "pods.yaml").read_text(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    assert done.stdout == (KUBERNETES / f"{name}.yaml").read_text()
