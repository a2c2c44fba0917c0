"""What some protocols say in plaintext before TLS begins.

A protocol that begins TLS with words of its own can't be wrapped blindly: its server waits for
those words, and a hello is none. PostgreSQL's are known here. They are in the chapter "Frontend/
Backend Protocol" of its manual: "SSL Session Encryption", and "SSLRequest" in "Message Formats".

The law: of what a server says before TLS nothing is taken for what it says within, so that one byte
is read and no more. Of what a client says nothing is lost.
"""

from _socket import socket
from enum import StrEnum

from mutual_tls.end import receive_some, send_all
from mutual_tls.refusal import Refusal
from sniproxy.engine.story import Story
from tls_tproxy.refusal import WrapReason

# Int32(8), "Length of message contents in bytes, including self", and Int32(80877103): "chosen to
# contain 1234 in the most significant 16 bits, and 5679 in the least significant 16 bits"; 5680 for
# GSSAPI.
_SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
_GSSENC_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x30"
_SIZE = len(_SSL_REQUEST)


class StartTLS(StrEnum):
    """The protocols that are known."""

    POSTGRES = "postgres"


async def decline_encryption(story: Story, client: socket) -> bytes:
    """Tell a PostgreSQL client that asks for encryption that there is none, on its way to us.

    Clients speak first, so this may be done before the server is connected. By default they ask for
    GSSAPI encryption, or TLS, or one after the other, and go on in plaintext. Those who insist
    (sslmode=require and above) end here; those who begin TLS without asking
    (sslnegotiation=direct) are passed on.

    Returns:
        What the client has said beyond: what the server is to be told first. All that it has said,
        if it has ended meanwhile.

    Raises:
        OSError: the connection is broken.
    """
    # "To continue after N, send the usual StartupMessage and proceed without encryption.
    # (Alternatively, it is permissible to issue a GSSENCRequest message after an N response ...)"
    # Each is answered once: a second one is for the server to judge, and nobody keeps us here.
    expected = {_SSL_REQUEST, _GSSENC_REQUEST}
    said = b""
    while any(request.startswith(said) for request in expected):
        # Never beyond a request: so nothing has to be put back.
        piece = await receive_some(story, client, _SIZE - len(said))
        if not piece:
            break
        said += piece
        if said in expected:
            expected.remove(said)
            said = b""
            await send_all(story, client, b"N")
    return said


async def request_encryption(story: Story, server: socket) -> None:
    """Ask a PostgreSQL server to begin TLS; when this returns, the client's hello is next.

    Raises:
        Refusal: it does not.
    """
    try:
        await send_all(story, server, _SSL_REQUEST)
        # "Frontends should be coded either to read exactly one byte from the socket before turning
        # the socket over to their SSL library, or to treat it as a protocol violation if they find
        # they have read additional bytes." (CVE-2021-23222)
        answer = await receive_some(story, server, 1)
    except OSError as error:
        detail = error.strerror or str(error)
        raise Refusal(WrapReason.STARTTLS_FAILED, f"the server: {detail}") from None
    if answer == b"S":
        return
    if answer == b"N":
        raise Refusal(WrapReason.STARTTLS_DECLINED, "the server does not offer TLS")
    if not answer:
        raise Refusal(WrapReason.STARTTLS_FAILED, "the server ended without an answer")
    # It may be an ErrorResponse, E. "The frontend should not display this error message to the
    # user/application, since the server has not been authenticated (CVE-2024-10977)."
    raise Refusal(WrapReason.STARTTLS_FAILED, f"the server answered {answer!a}, and not S or N")
