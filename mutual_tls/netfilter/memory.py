"""How long connection tracking remembers half-closed connections of TCP.

Where the kernel has changed an address, or a rule goes by the mark of a connection, a connection
can only go on while that is remembered. By itself the kernel remembers one that is half closed for
a minute or two without a packet (Linux, Documentation/networking/nf_conntrack-sysctl.rst), and an
answer may take longer to begin. So connections are given a longer time when they begin: nft(8),
`ct timeout`. It takes a kernel with CONFIG_NF_CONNTRACK_TIMEOUT.
"""

from collections.abc import Mapping
from typing import Final, LiteralString

from mutual_tls.netfilter.command import Command, Name
from mutual_tls.netfilter.table import Nft, NftEndedError, NftError, create_table

# Seconds; by itself it is 60, and 120. Our own connections have a packet each minute, of
# `CLIENT_OPTIONS`. Those of others have the hour that kube-proxy grants them elsewhere on their
# way: conntrack.tcpCloseWaitTimeout.
_SECONDS: Final = 3600

# As nft has them for policies, and for packets. It has no policy for both.
_FAMILIES: Final[Mapping[LiteralString, LiteralString]] = {"ip": "ipv4", "ip6": "ipv6"}

_QUESTION: Final = Name("of_a_question")

# What to tell where it can't be done.
NO_MEMORY: Final = (
    "the kernel forgets half-closed connections after a minute of silence, and can't be told not to"
    " (CONFIG_NF_CONNTRACK_TIMEOUT)"
)


class Memory:
    """What the tables of a session have for it; nothing, where the kernel can't be told.

    Args:
        nft: the session.

    Attributes:
        rules: For the first packet of a connection, where it is tracked. They decide nothing else.

    Raises:
        NftEndedError: nft has ended.
    """

    def __init__(self, nft: Nft) -> None:
        self.rules: tuple[Command, ...] = ()
        try:
            nft.run(create_table(_QUESTION), *_policies(_QUESTION))
        except NftEndedError:
            raise
        except NftError:
            return
        nft.run(Command("delete table inet $table", table=_QUESTION))
        self.rules = tuple(
            Command(
                f'meta nfproto {protocol} meta l4proto tcp ct timeout set "half_closed_{family}"'
            )
            for family, protocol in _FAMILIES.items()
        )

    def policies(self, table: Name) -> list[Command]:
        """Return the commands by which a table has what the rules name."""
        return _policies(table) if self.rules else []


def _policies(table: Name) -> list[Command]:
    return [
        Command(f"add ct timeout inet $table half_closed_{family} {{", table=table)
        + Command(f"protocol tcp; l3proto {family};")
        + Command("policy = { close_wait: $seconds, fin_wait: $seconds }; }", seconds=_SECONDS)
        for family in _FAMILIES
    ]
