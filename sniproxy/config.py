"""What can be set, and what is fixed for a reason that is not found in one module alone."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """How the daemon behaves. The defaults are the contract; tests make the times shorter."""

    # Whether the directories are named by the BLAKE3 of the hostname.
    hashed: bool = False

    # Processes that serve. One keeps a processor busy at ten thousand connections a second.
    workers: int = 1

    # Connections that may be open at a time; None for as many as there are descriptors for.
    max_connections: int | None = None

    # Whether the hosts directory becomes the root directory, and which user the process becomes.
    chroot: bool = False
    user: str | None = None

    # Whether to give up, where the kernel lets us, all rights that serving does without.
    sandbox: bool = True

    # Whether a listener has to belong to the owner of the directory that its socket is in.
    check_owner: bool = True

    # Whether to write a line for each connection that has ended, not only for those refused.
    log_connections: bool = False

    # Seconds from accept to a connected backend, however the client spaces its bytes. A hello of
    # two packets, each lost twice, is across in six: TCP sends again after one second, then two.
    hello_seconds: float = 10.0

    # Seconds that a refused client is listened to after its alert, and bytes: to close with bytes
    # unread would send a reset, which can overtake the alert. One second is three round trips
    # around the world; 64 KiB is more than a client sends before it has heard of us.
    alert_seconds: float = 1.0
    alert_bytes: int = 1 << 16

    # Seconds that a drain waits for the last connection to end.
    drain_seconds: float = 10.0

    # Seconds between two attempts at a backend whose backlog is full: the first soon, since servers
    # accept within a millisecond if they live, the last seldom enough to cost nothing.
    first_retry: float = 0.001
    last_retry: float = 0.1
