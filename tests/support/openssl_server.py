"""What OpenSSL's server reads in a flight: the oracle for what a router must read there too.

Law: imports nothing of `sniproxy`, and judges nothing. Bytes in, and what a backend would know of
its client's wish out.

How the name is got out of OpenSSL with nothing lost on the way:

- `sni_callback` is given the bytes of `SSL_get_servername` decoded as ASCII, strictly, so encoding
  gives them back. (The older `set_servername_callback` decodes IDNA on top of that: not used.)
- If they are not ASCII, the `ssl` module has no str to call us with. It hands its
  UnicodeDecodeError to `sys.unraisablehook`, with the bytes in it, and breaks the handshake off
  with an alert of its own. OpenSSL did read that name; a backend written in C would have been told.
- `SSL_get_servername` is a C string, which could hide what follows a NUL; but OpenSSL refuses names
  with a NUL in them (PACKET_contains_zero_byte, "Reject names containing embedded NUL").

The server is as lenient as OpenSSL can be made, so that odd hellos get as far as they can: all
ciphers, security level 0, and every version of the protocol that the library still has.
"""

import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import Unused

# Pumps between two ends: a full handshake with its session tickets takes four.
_TURNS = 8


@dataclass(frozen=True)
class Sight:
    """What the server saw.

    Attributes:
        names: One for each time that `sni_callback` was called: what the host_name was, or None
            if there was none. Empty if the handshake did not get that far.
        refusal: OpenSSL's word for why it broke off; None if it did not.
    """

    names: tuple[bytes | None, ...]
    refusal: str | None = None

    @property
    def waiting(self) -> bool:
        """Whether it wants to read more before it says anything."""
        return not self.names and self.refusal is None


class OpenSSLServer:
    """Servers over memory, one for each flight, all with the same context.

    Args:
        context: A server's, with a certificate; from now on it belongs to this object.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
        context.sni_callback = self._called
        self._context = context
        self._names: list[bytes | None] = []

    def look(self, flight: bytes) -> Sight:
        """Let a new server read these bytes and no others."""
        incoming = ssl.MemoryBIO()
        incoming.write(flight)
        server = self._context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
        with self._watching():
            refusal = _step(server)
        return Sight(tuple(self._names), refusal)

    def converse(
        self, client: ssl.SSLContext, name: str | None, session: ssl.SSLSession | None = None
    ) -> tuple[bytes, Sight, ssl.SSLObject]:
        """Shake hands with a real client.

        Returns:
            The client's first flight, what the server saw, and the client, which by now has been
            given a session to come back with.
        """
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = self._context.wrap_bio(to_server, to_client, server_side=True)
        ours = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
        _step(ours)
        first_flight = to_server.read()
        to_server.write(first_flight)
        with self._watching():
            for _ in range(_TURNS):
                refusal = _step(server)
                _step(ours)
        return first_flight, Sight(tuple(self._names), refusal), ours

    def _called(self, _server: "Unused", name: str | None, _context: "Unused") -> None:
        self._names.append(None if name is None else name.encode("ascii"))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Begin with no names, and take also those that are not ASCII."""

        def take(unraisable: "sys.UnraisableHookArgs") -> None:
            if isinstance(unraisable.exc_value, UnicodeDecodeError):
                self._names.append(unraisable.exc_value.object)
            else:
                others(unraisable)

        self._names.clear()
        others, sys.unraisablehook = sys.unraisablehook, take
        try:
            yield
        finally:
            sys.unraisablehook = others


def _step(end: ssl.SSLObject) -> str | None:
    """Go on as far as the bytes there are allow; return why it broke off, if it did."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return None
    except ssl.SSLError as error:
        return error.reason or str(error)
    return None
