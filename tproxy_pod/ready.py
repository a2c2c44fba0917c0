"""Whether we are ready: an answer in HTTP, for the kubelet's probes and for people.

Whatever is asked, the answer is the same: 200 while connections can be served, 503 with the reason
while there is no identity. So a pod waits for its certificate, and is not sent connections that
would be refused.
"""

from _socket import socket
from typing import Final

from mutual_tls import session
from mutual_tls.end import listen_to_the_end, send_all
from mutual_tls.identity import IdentityError
from mutual_tls.refusal import Refusal
from sniproxy.engine.listener import Address
from tproxy_pod.pod import Pod

# RFC 9112 §9.6: "The server is going to close the connection after the final response".
_ANSWER: Final = (
    "HTTP/1.1 {status}\r\n"
    "Content-Type: text/plain; charset=utf-8\r\n"
    "Content-Length: {length}\r\n"
    "Connection: close\r\n"
    "\r\n"
)


def answer(pod: Pod) -> bytes:
    """Return the whole answer."""
    try:
        pod.identity().client_context()
    except (IdentityError, Refusal) as error:
        status, text = "503 Service Unavailable", f"{error}\n"
    else:
        status, text = "200 OK", "ready\n"
    body = text.encode(errors="backslashreplace")
    return _ANSWER.format(status=status, length=len(body)).encode("ascii") + body


class Ready(session.Session):
    """Somebody asks."""

    def __init__(
        self, shared: session.Sessions, client: socket, address: Address, *, pod: Pod
    ) -> None:
        super().__init__(shared, client, address)
        self._pod = pod

    async def tell(self) -> None:
        """Answer whatever is said. Who only connects, has learned that somebody is there."""
        if await self.hear():
            await send_all(self.story, self.client, answer(self._pod))
            await listen_to_the_end(self.story, self.client)

    async def refuse(self, refusal: Refusal) -> None:
        """Nothing: only who is silent is refused."""

    def report(self, refusal: Refusal) -> None:
        """Nothing: it was no connection to be served."""

    def fields(self) -> dict[str, object]:
        """Return nothing: there is no line."""
        return {}
