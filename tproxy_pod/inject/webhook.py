"""The webhook: the API server asks about each new pod, and is told what to add to it.

A request is an AdmissionReview, in JSON, by HTTP over TLS; so is the answer. Whatever goes wrong is
an answer as well: a pod that can't have tproxy-pod is not admitted, with the reason, and does not
run without it.

Each connection carries one request. The API server makes as many as it needs, which is one for each
pod that is made.
"""

import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import h11
import trio

from mutual_tls.signature import Signature, signature
from tproxy_pod.inject.sidecar import InjectionError, Sidecar

# Where it listens. Kubernetes' documentation has it so.
PORT: Final = 8443

# Bytes of a request: etcd takes 1.5 MB for one object, and a review may have two.
_LONGEST: Final = 4 << 20

# Seconds for a connection in all. The API server waits for ten, and thirty at the most
# (timeoutSeconds); nobody waits for what comes later.
_SECONDS: Final = 30.0

# Connections at a time, of 1024 descriptors that a process usually has. What an API server has
# under way is less; others wait until one of them ends.
_MOST: Final = 500

_API_VERSION: Final = "admission.k8s.io/v1"

# Told of what became of a request.
Report = Callable[[str], None]


class ReviewError(Exception):
    """A request is no AdmissionReview; the message says why."""


def answer(body: bytes, sidecar: Sidecar) -> bytes:
    """Return the answer to an AdmissionReview.

    Args:
        body: the review, in JSON.
        sidecar: what is added to a pod.

    Raises:
        ReviewError: it is none.
    """
    try:
        review = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ReviewError(f"it is not JSON: {error}") from None
    if not isinstance(review, dict) or review.get("kind") != "AdmissionReview":
        raise ReviewError("it is no AdmissionReview")
    if review.get("apiVersion") != _API_VERSION:
        raise ReviewError(f"its apiVersion is not {_API_VERSION}")
    request = review.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise ReviewError("it has no request with a uid")
    response = {"uid": request["uid"], **_respond(request, sidecar)}
    return json.dumps(
        {"apiVersion": _API_VERSION, "kind": "AdmissionReview", "response": response}
    ).encode()


def _respond(request: dict[str, Any], sidecar: Sidecar) -> dict[str, Any]:
    pod = request.get("object")
    is_pod = request.get("kind") == {"group": "", "version": "v1", "kind": "Pod"}
    # What else the configuration has it asked about is not its matter, nor is the end of a pod.
    if not is_pod or request.get("operation") != "CREATE" or request.get("subResource"):
        return {"allowed": True}
    try:
        if not isinstance(pod, dict) or not isinstance(pod.get("spec"), dict):
            raise InjectionError("it has no spec")
        operations = sidecar.operations(pod)
    except InjectionError as error:
        message = f"unable to add tproxy-pod to the pod: {error}"
        return {"allowed": False, "status": {"code": 403, "message": message}}
    if not operations:
        return {"allowed": True}
    patch = base64.b64encode(json.dumps(operations).encode()).decode()
    return {"allowed": True, "patchType": "JSONPatch", "patch": patch}


class Certificate:
    """The certificate of the webhook and its key, read again when they are other files.

    Args:
        certificate, key: their paths.
        report: told of new files that can't be used; the old ones stay in use.

    Raises:
        OSError, ssl.SSLError: they can't be read.
    """

    def __init__(self, certificate: Path, key: Path, report: Report) -> None:
        self._certificate = certificate
        self._key = key
        self._report = report
        self._seen = self._look()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the context for the next connection."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._load()
            except OSError as error:  # ssl.SSLError is one
                self._report(f"unable to read the new certificate: {error}")
        return self._context

    def _look(self) -> list[Signature | None]:
        return [_signature(path) for path in (self._certificate, self._key)]

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Without a password none is asked for at the terminal.
        context.load_cert_chain(self._certificate, self._key, password=lambda: b"")
        return context


def _signature(path: Path) -> Signature | None:
    try:
        return signature(path.stat())
    except OSError:
        return None


async def serve(
    listeners: list[trio.SocketListener],
    certificate: Certificate,
    sidecar: Sidecar,
    report: Report,
    is_over: Callable[[], Awaitable[object]],
) -> None:
    """Answer until `is_over`, an async function, returns; then let connections end."""
    room = trio.CapacityLimiter(_MOST)
    handle = partial(_handle, room, certificate, sidecar, report)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as listening:
            listening.start_soon(
                partial(trio.serve_listeners, handle, listeners, handler_nursery=connections)
            )
            await is_over()
            listening.cancel_scope.cancel()
        connections.cancel_scope.deadline = trio.current_time() + _SECONDS


async def _handle(
    room: trio.CapacityLimiter,
    certificate: Certificate,
    sidecar: Sidecar,
    report: Report,
    stream: trio.SocketStream,
) -> None:
    async with room, stream:
        with trio.move_on_after(_SECONDS):
            try:
                tls = trio.SSLStream(
                    stream, certificate.context(), server_side=True, https_compatible=True
                )
                report(await _converse(tls, sidecar))
                await tls.aclose()
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
                cause = error.__cause__ or error
                report(f"unable to read a request: {' '.join(str(cause).split())}")


async def _converse(tls: trio.SSLStream[trio.SocketStream], sidecar: Sidecar) -> str:
    """Read a request, and answer it; return what became of it."""
    connection = h11.Connection(h11.SERVER)
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            # RFC 9110 §10.1.1: curl waits for it with a long body.
            if connection.they_are_waiting_for_100_continue:
                await tls.send_all(
                    connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                )
            connection.receive_data(bytes(await tls.receive_some()))
        elif isinstance(event, h11.Request):
            is_post = event.method == b"POST"
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _LONGEST:
                return await _send(tls, connection, 413, f"it has more than {_LONGEST} bytes")
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            return "somebody has connected, and left without a request"
    if not is_post:
        return await _send(tls, connection, 405, "a review comes by POST")
    try:
        review = answer(body, sidecar)
    except ReviewError as error:
        return await _send(tls, connection, 400, str(error))
    return await _send(tls, connection, 200, review)


async def _send(
    tls: trio.SSLStream[trio.SocketStream],
    connection: h11.Connection,
    status: int,
    what: bytes | str,
) -> str:
    body = what if isinstance(what, bytes) else f"{what}\n".encode(errors="backslashreplace")
    kind = b"application/json" if isinstance(what, bytes) else b"text/plain; charset=utf-8"
    response = h11.Response(
        status_code=status,
        headers=[
            (b"Content-Type", kind),
            (b"Content-Length", str(len(body)).encode()),
            (b"Connection", b"close"),
        ],
    )
    data = connection.send(response) or b""
    data += connection.send(h11.Data(data=body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    await tls.send_all(data)
    return "a review was answered" if status == 200 else f"a request was refused: {what!s}"
