"""The rules by which connections of this pod, and to it, come to us.

One table of family inet, IPv4 and IPv6 alike, which lasts as long as we do.

Out: what a program here sends to an address that is taken stays on this machine, by a mark and
`mutual_tls.netfilter.route`, and TPROXY hands it to our socket on the loopback address, whose peers
see the address they asked for as its own (Linux, Documentation/networking/tproxy.rst).

In: what comes from elsewhere to a port that is taken is redirected to our port. TPROXY would do for
that as well, and was rejected: the socket of the client's connection would have the very address
and port of the program's. Our connection to the program has the client's address, so two sockets
here were mirror images, but for a port that the kernel chooses; and where that is one that the same
client has in use, or will, the packets of the one come to the other.

Our connection to the program has the client's port, too, where that is free. In the eyes of
connection tracking it would be the client's own. So it is in a zone of its own; but its replies are
not: they come from a program that knows nothing of that. They are led back here by the mark of the
connection.

Loopback, and what the pod sends to its own addresses, is left alone. So are connections that carry
our mark, of whichever instance.

All of this rests on what connection tracking remembers. If it forgot one that is half closed, the
answer of a program would leave in plaintext, to a client who has spoken TLS; and an answer from
elsewhere would come to our port. So whatever begins here is remembered longer, by `memory`.

With `fail_closed` there is another table, which belongs to nobody, and so outlives us whatever
happens. It resets what this one would have taken. The next start takes it over; `stop_refusing`
removes it. Others can, too, and `flush ruleset` does; `look_after` makes it anew.
"""

import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Final, LiteralString

from mutual_tls.netfilter.command import Command, Name
from mutual_tls.netfilter.mark import FOR_CLIENT, MARK, MASK, STAYS_HERE
from mutual_tls.netfilter.memory import Memory
from mutual_tls.netfilter.table import Nft, NftEndedError, NftError, create_table, remove_table
from tproxy_pod.pod import Overview

_TABLE: Final = Name("tproxy_pod")
_REFUSING: Final = Name("tproxy_pod_refuse")

# Of connection tracking, for our connections in the name of a client. Others number from 1.
_ZONE: Final = 1443

# Seconds in which one that has just ended may still have its table, and between two tries.
_PATIENCE: Final = 2.0
_TRY_EVERY: Final = 0.05

Network = IPv4Network | IPv6Network

_ACCEPT: Final = Command("accept")
_RESET: Final = Command("reject with tcp reset")
_OWN_ZONE: Final = Command("ct original zone set $zone", zone=_ZONE)
_KEEP_HERE: Final = Command("ct mark set $mark meta mark set $mark accept", mark=STAYS_HERE)

# The chains of the two tables: what they are for, where they hook, and in which order among others,
# nft(8). Connection tracking has -200.
_TAKING: Final[Mapping[LiteralString, LiteralString]] = {
    "tracking": "filter hook output priority -300",
    "outwards": "route hook output priority -150",
    "arriving": "filter hook prerouting priority -150",
    # A connection gets its destination from the first chain that has one for it. Those of others
    # have the priority dstnat, -100.
    "inwards": "nat hook prerouting priority -101",
}
_REFUSES: Final[Mapping[LiteralString, LiteralString]] = {
    # After the nat chains.
    "outwards": "filter hook output priority 0",
    "inwards": "filter hook input priority 0",
}

# Of what leaves: connections to programs here in the name of a client, and the programs' replies;
# what goes on of a connection that was taken; and what is of one that was not.
_KEPT_HERE: Final = (
    Command("meta mark & $mask == $mark ct mark set $mark accept", mask=MASK, mark=FOR_CLIENT),
    Command("ct mark $client ct direction reply", client=FOR_CLIENT)
    + Command("meta mark set $here accept", here=STAYS_HERE),
    Command("ct mark $here ct direction original meta mark set $here accept", here=STAYS_HERE),
    # What is not of one that connection tracking knows is not left to go on.
    Command("ct state established accept"),
)


class Interception:
    """Connections come to us, as long as this lasts.

    Args:
        nft: the session whose end ends it.
        outward_port: where those arrive that leave the pod, on the loopback addresses.
        inward_port: where those arrive that come to it, on all addresses.
        has_ipv6: whether IPv6 can be led to us. If not, what would be taken of it is reset.
        untaken_port: one that is left alone, beside what the directory says.
        fail_closed: whether to reset those connections from now on when we are gone.

    Attributes:
        overview: What is taken.
        remembers: Whether half-closed connections are remembered for long, see `memory`.

    Raises:
        NftError: nft refuses it, and nothing has changed; there may be another instance.
        NftEndedError: nft has ended.
    """

    def __init__(
        self,
        nft: Nft,
        *,
        outward_port: int,
        inward_port: int,
        has_ipv6: bool,
        untaken_port: int | None = None,
        fail_closed: bool = False,
    ) -> None:
        self._nft = nft
        self._outward_port = outward_port
        self._inward_port = inward_port
        self._has_ipv6 = has_ipv6
        self._untaken_ports = [] if untaken_port is None else [untaken_port]
        self._fail_closed = fail_closed
        self.overview: Overview | None = None
        self._memory = Memory(nft)
        self.remembers = bool(self._memory.rules)
        nft.run(*self._memory.policies(_TABLE))

    @staticmethod
    def claim(nft: Nft) -> None:
        """Make the table, in which there is no rule yet: from now on nobody else can.

        Raises:
            NftError, NftEndedError: as above.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return nft.run(create_table(_TABLE))
            except NftEndedError:
                raise
            except NftError:
                if not _is_there(nft, _TABLE):
                    raise
            if time.monotonic() > deadline:
                raise NftError("another tproxy-pod runs in this network namespace")
            time.sleep(_TRY_EVERY)

    def take(self, overview: Overview) -> None:
        """Take this, and nothing else, from now on. Connections that are established stay.

        Raises:
            NftError, NftEndedError: as above.
        """
        self._nft.run(
            *_chains(_TABLE, _TAKING),
            *_rules(_TABLE, "tracking", [_ours(FOR_CLIENT) + _OWN_ZONE]),
            *_rules(
                _TABLE,
                "outwards",
                [
                    Command("meta l4proto != tcp accept"),
                    *self._memory.rules,
                    *_KEPT_HERE,
                    *self._outwards(overview, _KEEP_HERE),
                ],
            ),
            *_rules(_TABLE, "arriving", self._arriving()),
            *_rules(_TABLE, "inwards", self._inwards(overview, self._redirect())),
            *self._refuse(overview),
        )
        self.overview = overview

    def look_after(self) -> None:
        """Make the table that refuses anew, if somebody has removed it. To be called now and then.

        Raises:
            NftError, NftEndedError: as above.
        """
        if not self._fail_closed or self.overview is None:
            return
        if not _is_there(self._nft, _REFUSING):
            self._nft.run(*self._refuse(self.overview))

    def _outwards(self, overview: Overview, take: Command) -> list[Command]:
        """Return the rules for packets that leave, but for those that are led back here."""
        return [
            _ours(MARK) + _ACCEPT,
            Command("fib daddr type local accept"),
            *(
                _within("daddr", network) + (self._take(network, take) if is_taken else _ACCEPT)
                for network, is_taken in overview.egress
            ),
        ]

    def _take(self, network: Network, take: Command) -> Command:
        return _RESET if network.version == 6 and not self._has_ipv6 else take

    def _arriving(self) -> list[Command]:
        """Return the rules for all that arrives: what was kept here is handed to our socket."""
        kept = Command("meta l4proto tcp iif lo ct direction original")
        kept += Command("meta mark $mark ct mark $mark", mark=STAYS_HERE)
        port = self._outward_port
        return [
            *self._memory.rules,
            kept + Command("meta nfproto ipv4 tproxy ip to 127.0.0.1:$port accept", port=port),
            kept + Command("meta nfproto ipv6 tproxy ip6 to [::1]:$port accept", port=port),
            # Nobody listens, while we drain. By itself the kernel would not answer in the name of
            # an address that is not its own.
            kept + _RESET,
        ]

    def _redirect(self) -> Command:
        return Command("redirect to :$port", port=self._inward_port)

    def _inwards(self, overview: Overview, take: Command) -> list[Command]:
        """Return the rules for packets that arrive from elsewhere."""
        left_alone = sorted({*self._untaken_ports, *overview.plain_ports})
        taken = sorted(overview.taken_ports)
        rules = [
            Command("iif lo accept"),
            Command("meta l4proto != tcp accept"),
            Command("fib daddr type != local accept"),
            *(_within("saddr", network) + _ACCEPT for network in overview.probes),
        ]
        if left_alone:
            rules.append(Command("tcp dport { $ports } accept", ports=left_alone))
        if not overview.is_default_plain:
            rules.append(Command("meta l4proto tcp") + take)
        elif taken:
            rules.append(Command("tcp dport { $ports }", ports=taken) + take)
        return rules

    def _refuse(self, overview: Overview) -> list[Command]:
        """Return the commands for the table that refuses; it may be another one's, or be gone."""
        if not self._fail_closed:
            return []
        return [
            *remove_table(_REFUSING),
            Command("add table inet $table", table=_REFUSING),
            *_chains(_REFUSING, _REFUSES),
            *_rules(
                _REFUSING,
                "outwards",
                [
                    Command("meta l4proto != tcp accept"),
                    # A program here that serves somebody who was let in.
                    Command("ct direction reply accept"),
                    _ours(FOR_CLIENT) + _ACCEPT,
                    _ours(STAYS_HERE) + _ACCEPT,
                    *self._outwards(overview, _RESET),
                ],
            ),
            *_rules(
                _REFUSING,
                "inwards",
                [
                    Command("ct direction reply accept"),
                    # What was redirected.
                    Command("ct status dnat accept"),
                    *self._inwards(overview, _RESET),
                ],
            ),
        ]


def stop_refusing(nft: Nft) -> None:
    """Remove what `fail_closed` has left behind, if there is anything.

    Raises:
        NftError: nft refuses it.
        NftEndedError: nft has ended.
    """
    nft.run(*remove_table(_REFUSING))


def _is_there(nft: Nft, table: Name) -> bool:
    try:
        nft.run(Command("list table inet $table", table=table))
    except NftEndedError:
        raise
    except NftError:
        return False
    return True


def _chains(table: Name, chains: Mapping[LiteralString, LiteralString]) -> list[Command]:
    """Return the commands after which the table has these chains, with no rules in them."""
    return [
        *(
            Command("add chain inet $table", table=table) + Command(f"{name} {{ type {kind}; }}")
            for name, kind in chains.items()
        ),
        Command("flush table inet $table", table=table),
    ]


def _rules(table: Name, chain: LiteralString, rules: Iterable[Command]) -> list[Command]:
    return [Command(f"add rule inet $table {chain}", table=table) + rule for rule in rules]


def _ours(mark: int) -> Command:
    return Command("meta mark & $mask == $mark", mask=MASK, mark=mark)


def _within(which: LiteralString, network: Network) -> Command:
    family: LiteralString = "ip" if network.version == 4 else "ip6"
    return Command(f"{family} {which} $network", network=network)
