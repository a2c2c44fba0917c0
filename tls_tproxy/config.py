"""What can be set for tls-tproxy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mutual_tls.identity import Files
from mutual_tls.netfilter.command import Cgroup
from mutual_tls.session import SessionOptions


@dataclass(frozen=True, slots=True)
class Config(SessionOptions):
    """How it behaves. The defaults are the contract; tests make the times shorter."""

    # Ports that are taken, and where they lead; whom we show; and who is asked about certificates:
    # for all names, beside what the directory says.
    ports: Mapping[int, int] = field(default_factory=dict)
    identity: Files | None = None
    checker: str | None = None

    # Whose programs are meant: user ids, none for all; and a control group.
    users: tuple[int, ...] = ()
    cgroup: Cgroup | None = None

    # Where redirected connections arrive, on the loopback addresses; 0 for any port.
    port: int = 0

    # Whether connections are refused when we are gone, and do not leave in plaintext.
    fail_closed: bool = False
