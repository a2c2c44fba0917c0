"""What a pod needs to have tproxy-pod in it, as operations of JSON Patch, RFC 6902.

Law: a pod in, operations out; nothing is read or written. A pod that has the container already
needs none. What is asked of Kubernetes here, it has had since 1.29: containers among the init
containers that go on running, "Sidecar Containers" in its documentation. All others, init
containers too, begin when the startup probe of the one before has succeeded. So ours is the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CONTAINER", "OPT_OUT", "InjectionError", "Operation", "Sidecar"]

# JSON, as Python has it; and an operation, which adds something.
Json = Any
Operation = dict[str, Json]

CONTAINER: Final = "tproxy-pod"

# A label with the value "false" says that a pod is to be left as it is. A label, because a webhook
# can select by it what it is asked about.
OPT_OUT: Final = "tproxy-pod/inject"

_IDENTITY: Final = "tproxy-pod-identity"
_EGRESS: Final = "tproxy-pod-egress"

# Where it runs, in our image. Only what is mounted there has a meaning.
_PLACE: Final = "/srv/tproxy-pod"

# High ports: below 1024 it would take one capability more. Whoever reads "15..." in the list of
# sockets of a pod thinks of a sidecar, since those of Istio are there.
_TCP_PORT: Final = 15001
_TLS_PORT: Final = 15006
_READY_PORT: Final = 15021

# Seconds, and how often: a minute until a certificate has to be there, and looked for every second,
# since the pod waits for it.
_STARTUP_EVERY: Final = 1
_STARTUP_TRIES: Final = 60


class InjectionError(Exception):
    """A pod can't have it; the message says why."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is added.

    Attributes:
        image: the container image.
        secret: the name of the secret that has tls.crt, tls.key and ca.crt; None if there is a
            driver for them.
        csi_driver: the name of the CSI driver whose volume has these files.
        csi_attributes: what it wants to know.
        egress: the name of the ConfigMap whose entries are those of pod/egress; None for what is
            taken by default.
        probes: addresses whose probes are allowed beside the node's own.
        arguments: of tproxy-pod, beside those that it has from us.
    """

    image: str
    secret: str | None = None
    csi_driver: str | None = None
    csi_attributes: Mapping[str, str] | None = None
    egress: str | None = None
    probes: Sequence[str] = ()
    arguments: Sequence[str] = ()

    def operations(self, pod: Mapping[str, Json]) -> list[Operation]:
        """Return what makes a pod, or the template of one, have it; nothing if it is not to.

        Args:
            pod: with `metadata` and `spec`. Of scalars only text is looked at, so that they may be
                what they are in JSON, or all of them text.

        Raises:
            InjectionError: it can't have it.
        """
        metadata, spec = _member(pod, "metadata"), _member(pod, "spec")
        if str(_member(metadata, "labels").get(OPT_OUT)).lower() == "false":
            return []
        containers = _list(spec, "initContainers")
        if any(_name(each) == CONTAINER for each in containers):
            return []
        if any(_name(each) == CONTAINER for each in _list(spec, "containers")):
            raise InjectionError(f"it has a container {CONTAINER} that is no init container")
        if not _is_false(spec.get("hostNetwork")):
            detail = "it has the network of its node, all of which would be redirected"
            raise InjectionError(f'{detail}; the label {OPT_OUT}: "false" leaves it as it is')
        volumes = _list(spec, "volumes")
        if any(_name(each) in (_IDENTITY, _EGRESS) for each in volumes):
            raise InjectionError(f"it has a volume {_IDENTITY} or {_EGRESS}")
        return [
            *_insert(spec, "initContainers", containers, [self._container()], at="0"),
            *_insert(spec, "volumes", volumes, self._volumes(), at="-"),
        ]

    def _container(self) -> Json:
        mounts = [{"name": _IDENTITY, "mountPath": f"{_PLACE}/pod/identity", "readOnly": True}]
        if self.egress is not None:
            mounts.append({"name": _EGRESS, "mountPath": f"{_PLACE}/pod/egress", "readOnly": True})
        return {
            "name": CONTAINER,
            "image": self.image,
            "restartPolicy": "Always",
            "workingDir": _PLACE,
            "command": ["tproxy-pod"],
            "args": [
                f"--tcp-port={_TCP_PORT}",
                f"--tls-port={_TLS_PORT}",
                f"--ready-port={_READY_PORT}",
                *(f"--probe-address={each}" for each in ("$(HOST_IP)", *self.probes)),
                *self.arguments,
            ],
            "env": [{"name": "HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}],
            "startupProbe": {
                **_probe(),
                "periodSeconds": _STARTUP_EVERY,
                "failureThreshold": _STARTUP_TRIES,
            },
            "readinessProbe": _probe(),
            # Root, who has nothing but the two rights that it takes to change the network.
            "securityContext": {
                "runAsUser": 0,
                "runAsNonRoot": False,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
            },
            "volumeMounts": mounts,
        }

    def _volumes(self) -> list[Json]:
        if self.secret is not None:
            source: Json = {"secret": {"secretName": self.secret}}
        else:
            csi: dict[str, Json] = {"driver": self.csi_driver, "readOnly": True}
            if self.csi_attributes:
                csi["volumeAttributes"] = dict(self.csi_attributes)
            source = {"csi": csi}
        volumes = [{"name": _IDENTITY, **source}]
        if self.egress is not None:
            volumes.append({"name": _EGRESS, "configMap": {"name": self.egress}})
        return volumes


def _probe() -> Json:
    return {"httpGet": {"path": "/", "port": _READY_PORT}}


def _member(value: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """Return a member that is an object; an empty one if it is absent.

    Raises:
        InjectionError: it is something else.
    """
    member = value.get(name)
    if _is_absent(member):
        return {}
    if not isinstance(member, Mapping):
        raise InjectionError(f"its {name} is no object")
    return member


def _list(value: Mapping[str, Json], name: str) -> Sequence[Json]:
    member = value.get(name)
    if _is_absent(member):
        return []
    if not isinstance(member, list):
        raise InjectionError(f"its {name} is no list")
    return member


def _is_absent(member: Json) -> bool:
    # As text, null is what YAML has for it.
    return member is None or member in ("", "~", "null", "Null", "NULL")


def _is_false(member: Json) -> bool:
    # In YAML 1.1, which kubectl reads, `yes` and `on` are true. Whatever is not known to be false
    # counts as true.
    return _is_absent(member) or str(member).lower() in ("false", "no", "off", "n")


def _name(entry: Json) -> Json:
    return entry.get("name") if isinstance(entry, Mapping) else None


def _insert(
    spec: Mapping[str, Json], name: str, there: Sequence[Json], new: Sequence[Json], *, at: str
) -> list[Operation]:
    path = f"/spec/{name}"
    if not there:
        # RFC 6902 §4.1: "If the target location specifies an object member that does exist, that
        # member's value is replaced." It is null, or empty.
        return [{"op": "add", "path": path, "value": list(new)}]
    return [{"op": "add", "path": f"{path}/{at}", "value": each} for each in new]
