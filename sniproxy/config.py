"""What can be set, and what is fixed for a reason that is not found in one module alone."""

from dataclasses import dataclass

from sniproxy.service.options import ServiceOptions


@dataclass(frozen=True, slots=True)
class Config(ServiceOptions):
    """How the SNI router behaves. The defaults are the contract; tests make the times shorter."""

    # Whether the directories are named by the BLAKE3 of the hostname.
    hashed: bool = False

    # Whether a listener has to belong to the owner of the directory that its socket is in.
    check_owner: bool = True

    # Whether backends may have the clients' connections themselves.
    hands_over: bool = False

    # The path of the socket at which a new copy takes over from us; None for none.
    upgrade_socket: str | None = None

    # Whether we stay then, in the sight of a supervisor that knows no other process.
    stays: bool = False

    # Seconds from accept to a connected backend, however the client spaces its bytes. A hello of
    # two packets, each lost twice, is across in six: TCP sends again after one second, then two.
    hello_seconds: float = 10.0

    # Seconds that a refused client is listened to after its alert, and bytes: to close with bytes
    # unread would send a reset, which can overtake the alert. One second is three round trips
    # around the world; 64 KiB is more than a client sends before it has heard of us.
    alert_seconds: float = 1.0
    alert_bytes: int = 1 << 16

    # Seconds between two attempts at a backend whose backlog is full: the first soon, since servers
    # accept within a millisecond if they live, the last seldom enough to cost nothing.
    first_retry: float = 0.001
    last_retry: float = 0.1
