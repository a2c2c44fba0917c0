"""What can be set for tproxy-pod."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from mutual_tls.identity import Files
from mutual_tls.session import SessionOptions


@dataclass(frozen=True, slots=True)
class Config(SessionOptions):
    """How it behaves. The defaults are the contract; tests make the times shorter."""

    # Whom we show, beside what the directory says.
    identity: Files | None = None

    # Where connections arrive that leave the pod, on the loopback addresses; and those that come to
    # it, on all addresses. As the first tproxy-pod had it: nobody else wants such ports.
    tcp_port: int = 1
    tls_port: int = 2

    # Where it is asked whether we are ready; None for nowhere.
    ready_port: int | None = None

    # Who may connect in plaintext, beside what the directory says: the kubelet.
    probes: tuple[IPv4Network | IPv6Network, ...] = ()

    # Whether connections are refused when we are gone, and neither leave nor come in plaintext.
    fail_closed: bool = False

    # Seconds from our hello until a server that is not known to speak TLS has to be done with the
    # handshake. Whoever speaks no TLS may wait for us to say more, and who connected is to hear of
    # it within a second. A handshake takes one or two round trips, and a millisecond.
    first_handshake_seconds: float = 0.9
