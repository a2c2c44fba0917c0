"""Manifests in YAML, with tproxy-pod in all pods that they make.

A manifest is not understood and written anew: YAML 1.1 and 1.2, and the libraries of Kubernetes, do
not agree on what a plain `on` or `0777` is. It is read to the level of nodes, where a scalar is its
text and its style, changed there, and written. So all of it remains but comments and white space.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tproxy_pod.inject.sidecar import InjectionError, Operation, Sidecar

# Where in a document the template of its pods is, by its kind.
_TEMPLATE: Final = ("spec", "template")
_PODS: Final[Mapping[str, tuple[str, ...]]] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "CronJob": ("spec", "jobTemplate", *_TEMPLATE),
    **dict.fromkeys(
        (
            *("DaemonSet", "Deployment", "Job", "ReplicaSet", "ReplicationController"),
            "StatefulSet",
        ),
        _TEMPLATE,
    ),
}

# The longest manifest in bytes, and the most nodes of it, each counted as often as it is referred
# to: etcd takes 1.5 MB for one object. By aliases, some lines can stand for billions of nodes.
_LONGEST: Final = 16 << 20
_MOST_NODES: Final = 1 << 20

# The most levels: by aliases, a flat file can have any number, and Python's stack ends at 1000
# calls. The deepest schemas of Kubernetes have about 20.
_MOST_LEVELS: Final = 200


class ManifestError(Exception):
    """A manifest can't be read, or a pod can't have it; the message says which and why."""


def inject(manifest: bytes, sidecar: Sidecar) -> str:
    """Return a manifest whose pods have tproxy-pod.

    Args:
        manifest: YAML, in UTF-8; any number of documents. JSON is YAML, too.
        sidecar: what is added.

    Raises:
        ManifestError: it can't be done; then there is no part of it.
    """
    if len(manifest) > _LONGEST:
        raise ManifestError(f"unable to read the manifest: it has more than {_LONGEST} bytes")
    try:
        documents = list(yaml.compose_all(manifest, yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ManifestError(f"unable to read the manifest: {detail}") from None
    for number, document in enumerate(documents, 1):
        if document is not None:
            _count(document)
            objects = [each for each in _objects(document) if _text(each, "kind") in _PODS]
            # All of them first: what one takes from another by an alias or `<<` is what the
            # manifest says, not what is added there.
            for each in objects:
                each.value = [(key, _unshared(value)) for key, value in each.value]
            for each in objects:
                _inject_object(each, sidecar, number)
    return yaml.serialize_all(
        documents,
        Dumper=_Dumper,
        explicit_start=len(documents) > 1,
        allow_unicode=True,
        width=float("inf"),
    )


class _Dumper(yaml.SafeDumper):
    """Writes nodes, with no aliases where the manifest had none."""


def _count(node: Node) -> None:
    """Raise a ManifestError if there are too many nodes or levels, or a key is there twice."""
    left = _MOST_NODES
    open_nodes: list[Node] = []

    def visit(node: Node) -> None:
        nonlocal left
        left -= 1
        if left < 0 or any(each is node for each in open_nodes):
            raise ManifestError("unable to read the manifest: it has too many nodes")
        if len(open_nodes) >= _MOST_LEVELS:
            raise ManifestError("unable to read the manifest: it has too many levels")
        if isinstance(node, MappingNode):
            _refuse_twins(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, SequenceNode):
            children = node.value
        else:
            return
        open_nodes.append(node)
        for child in children:
            visit(child)
        open_nodes.pop()

    visit(node)


def _refuse_twins(node: MappingNode) -> None:
    # YAML 1.2.2 §3.2.1.1: "with the restriction that each of the keys is unique". Libraries differ
    # in which of two they take, so we might look at another hostNetwork than Kubernetes.
    keys: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode):
            if key.value in keys:
                raise ManifestError(f"unable to read the manifest: {key.value!a} is there twice")
            keys.add(key.value)


def _unshared(node: Node) -> Node:
    """Return a copy of a node, in which nothing that can be changed is there twice.

    Scalars are not copied: a long one that many aliases refer to stays one.
    """
    if isinstance(node, MappingNode):
        pairs = [(key, _unshared(value)) for key, value in node.value]
        return MappingNode(node.tag, pairs, flow_style=node.flow_style)
    if isinstance(node, SequenceNode):
        entries = [_unshared(each) for each in node.value]
        return SequenceNode(node.tag, entries, flow_style=node.flow_style)
    return node


def _objects(document: Node) -> Iterator[MappingNode]:
    """Yield the objects of a document: itself, or those of a list."""
    if not isinstance(document, MappingNode):
        return
    items = _find(document, "items")
    if _text(document, "kind").endswith("List") and isinstance(items, SequenceNode):
        for each in items.value:
            yield from _objects(each)
    else:
        yield document


def _inject_object(node: MappingNode, sidecar: Sidecar, number: int) -> None:
    kind = _text(node, "kind")
    path = _PODS[kind]
    pod: Node | None = node
    for name in path:
        pod = _find(pod, name) if isinstance(pod, MappingNode) else None
    metadata = _find(node, "metadata")
    name = _text(metadata, "name") if isinstance(metadata, MappingNode) else ""
    what = f"unable to inject into the {kind} {name or 'without a name'} of document {number}"
    if not isinstance(pod, MappingNode):
        raise ManifestError(f"{what}: there is no {'.'.join(path)}")
    try:
        operations = sidecar.operations(_plain(pod))
    except InjectionError as error:
        raise ManifestError(f"{what}: {error}") from None
    for operation in operations:
        _add(pod, operation)


def _plain(node: Node) -> Any:
    """Return what a node holds, with all scalars as text."""
    if isinstance(node, MappingNode):
        return {key: _plain(value) for key, value in reversed(list(_members(node)))}
    if isinstance(node, SequenceNode):
        return [_plain(each) for each in node.value]
    return node.value


def _members(node: MappingNode) -> Iterator[tuple[str, Node]]:
    """Yield the members of an object; its own, and then those that it takes from others by `<<`."""
    merged: list[Node] = []
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, SequenceNode) else [value]
        elif isinstance(key, ScalarNode):
            yield key.value, value
    for each in merged:
        if isinstance(each, MappingNode):
            yield from _members(each)


def _find(node: MappingNode, name: str) -> Node | None:
    return next((value for key, value in _members(node) if key == name), None)


def _text(node: MappingNode, name: str) -> str:
    found = _find(node, name)
    return str(found.value) if isinstance(found, ScalarNode) else ""


def _add(pod: MappingNode, operation: Operation) -> None:
    """Do one of the operations of a `Sidecar`: they add members of `spec`, or entries to these."""
    _, _, name, *where = operation["path"].split("/")
    spec = _find(pod, "spec")
    if not isinstance(spec, MappingNode):
        raise ManifestError("unable to inject: the pod has no spec")
    there: Any = _find(spec, name)
    # Within the braces and brackets of a style like that of JSON there can be no other.
    is_json = bool(spec.flow_style or (where and there is not None and there.flow_style))
    new = _node(operation["value"], is_json=is_json)
    if where:
        assert isinstance(there, SequenceNode)
        entries = list(there.value)
        entries.insert(0 if where == ["0"] else len(entries), new)
        # Another list, since others may refer to that one.
        new = SequenceNode(there.tag, entries, flow_style=there.flow_style)
    for number, (key, _) in enumerate(spec.value):
        if isinstance(key, ScalarNode) and key.value == name:
            spec.value[number] = key, new
            return
    spec.value.append((_node(name, is_json=is_json), new))


def _node(value: Any, *, is_json: bool) -> Any:
    text = json.dumps(value) if is_json else yaml.safe_dump(value, sort_keys=False)
    return yaml.compose(text, yaml.SafeLoader)
