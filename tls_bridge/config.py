"""What can be set for tls-bridge and tls-bridge-peer, and what is fixed for a reason."""

from dataclasses import dataclass
from pathlib import Path

from mutual_tls.session import SessionOptions


@dataclass(frozen=True, slots=True)
class Config(SessionOptions):
    """How the two behave. The defaults are the contract; tests make the times shorter."""

    # Where to listen, if the sockets are not passed; on the second one as if `sni` were set.
    listen: str | None = None
    listen_sni: str | None = None

    # Whether clients speak TLS to whoever carries them, and their server name is what they ask for.
    sni: bool = False

    # Patterns and peers, files of them, and how to meet peers that are given by their address.
    pairs: tuple[tuple[str, str], ...] = ()
    files: tuple[Path, ...] = ()
    identity: Path | None = None
    server_name: str | None = None

    # The longest body of an answer that is passed back. It is for people, who are told why.
    most_body: int = 1 << 16
