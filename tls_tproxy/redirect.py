"""The rules that redirect connections of this machine's own programs to us.

Two tables of family inet, so IPv4 and IPv6 alike. The one that redirects lasts as long as we do.
Its rule is in the output hook, which all packets pass that begin here, those to ourselves, too.
There `redirect` means the loopback address: it suffices to listen on 127.0.0.1 and ::1. Where
nobody listens, connections are refused.

With `fail_closed` there is another table, which belongs to nobody, and so outlives us whatever
happens. It resets connections to the same ports that nobody has redirected to this machine, new and
established ones. Its name has our listening port in it, which a new start has again, and no other
instance: `tls_tproxy_refuse_PORT`. The next start takes it over; `stop_refusing` removes it. Others
can, too, and `flush ruleset` does, which each start of nftables.service runs; `look_after` makes it
anew.

Connections that carry our mark, of whichever instance, pass both. Packets that are forwarded, of
containers above all, do not come here: theirs is another network namespace.

A client that is bound to a device, SO_BINDTODEVICE in socket(7), or that wants a link-local
address, is not served: the kernel keeps its packets on that device, where there is no loopback
address. It gets no answer.
"""

import os
from collections.abc import Collection
from typing import Final

from mutual_tls.netfilter.command import Cgroup, Command, Name
from mutual_tls.netfilter.mark import MARK, MASK
from mutual_tls.netfilter.memory import Memory
from mutual_tls.netfilter.table import (
    Nft,
    NftEndedError,
    NftError,
    create_table,
    remove_table,
    replace_elements,
)

_PORTS: Final = Name("ports")


class Redirection:
    """Connections to some TCP ports come to our listening port, as long as this lasts.

    Args:
        nft: the session whose end ends it.
        listening_port: ours, on the loopback addresses.
        ports: which are redirected.
        users: user ids, of whose programs alone; none: of all, root's too.
        cgroup: of whose programs alone.
        fail_closed: whether to refuse those connections from now on when we are gone.

    Attributes:
        listening_port: as above.
        ports: Which are redirected.
        remembers: Whether half-closed connections are remembered for long, see `memory`.

    Raises:
        ValueError: a port is none, or is the listening one.
        NftError: nft refuses it, and nothing has changed.
        NftEndedError: nft has ended.
    """

    def __init__(
        self,
        nft: Nft,
        listening_port: int,
        ports: Collection[int],
        *,
        users: Collection[int] = (),
        cgroup: Cgroup | None = None,
        fail_closed: bool = False,
    ) -> None:
        self._nft = nft
        self.listening_port = listening_port
        _check_ports([listening_port])
        self._check(ports)
        # The process id, because the next copy may begin while this one drains.
        self._table = Name(f"tls_tproxy_{listening_port}_{os.getpid()}")
        self._who = _who(users, cgroup)
        self._fail_closed = fail_closed
        self.ports = frozenset(ports)
        memory = Memory(nft)
        self.remembers = bool(memory.rules)
        table = _redirecting_table(self._table, listening_port, self._who, memory)
        nft.run(*table, *self._replace(ports))

    def replace_ports(self, ports: Collection[int]) -> None:
        """Redirect these and no others from now on. Connections that are established stay.

        Raises:
            ValueError, NftError, NftEndedError: as above.
        """
        self._check(ports)
        self._nft.run(*self._replace(ports))
        self.ports = frozenset(ports)

    def look_after(self) -> None:
        """Make the table that refuses anew, if somebody has removed it. To be called now and then.

        Raises:
            NftError, NftEndedError: as above.
        """
        if not self._fail_closed:
            return
        table = _name_of_refusing(self.listening_port)
        try:
            self._nft.run(Command("list set inet $table $ports", table=table, ports=_PORTS))
        except NftEndedError:
            raise
        except NftError:
            self._nft.run(*self._refuse(self.ports))

    def stop(self) -> None:
        """Redirect no new connection from now on; with `fail_closed` they are refused.

        Those that are established stay. They do not when the session ends: where nobody else's
        rules translate addresses the kernel then ceases to, for them as well.

        Raises:
            NftError, NftEndedError: as above.
        """
        self._nft.run(*replace_elements(self._table, _PORTS, ()), *self._refuse(self.ports))

    def _check(self, ports: Collection[int]) -> None:
        _check_ports(ports)
        if self.listening_port in ports:
            raise ValueError(f"port {self.listening_port} is the one that listens here")

    def _replace(self, ports: Collection[int]) -> list[Command]:
        elements = sorted(set(ports))
        return [*replace_elements(self._table, _PORTS, elements), *self._refuse(elements)]

    def _refuse(self, ports: Collection[int]) -> list[Command]:
        """Return the commands for the table that refuses; it may be another one's, or be gone."""
        if not self._fail_closed:
            return []
        table = _name_of_refusing(self.listening_port)
        elements = replace_elements(table, _PORTS, sorted(set(ports)))
        return [*_refusing_table(table, self._who), *elements]


def stop_refusing(nft: Nft, listening_port: int) -> None:
    """Remove what `fail_closed` has left behind for that listening port, if there is anything.

    Raises:
        ValueError: it is no port.
        NftError: nft refuses it.
        NftEndedError: nft has ended.
    """
    _check_ports([listening_port])
    nft.run(*remove_table(_name_of_refusing(listening_port)))


def _check_ports(ports: Collection[int]) -> None:
    for port in ports:
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is no port")


def _name_of_refusing(listening_port: int) -> Name:
    return Name(f"tls_tproxy_refuse_{listening_port}")


def _who(users: Collection[int], cgroup: Cgroup | None) -> Command:
    """Return the conditions for the packets of connections that are meant, but for the ports."""
    who = Command("meta mark & $mask != $mark", mask=MASK, mark=MARK)
    if users:
        who += Command("meta skuid { $users }", users=sorted(set(users)))
    if cgroup is not None:
        who += Command("socket cgroupv2 $cgroup", cgroup=cgroup)
    return who


def _redirecting_table(
    table: Name, listening_port: int, who: Command, memory: Memory
) -> list[Command]:
    rules = [*memory.rules, Command("redirect to :$port", port=listening_port)]
    return [
        create_table(table),
        *memory.policies(table),
        _add_ports(table),
        Command("add chain inet $table output", table=table)
        # A connection gets its destination from the first chain that has one for it. Those of
        # others, of Docker and Kubernetes above all, have the priority dstnat, -100, nft(8). Behind
        # them, connections to addresses that they translate would leave as they are.
        + Command("{ type nat hook output priority -101; }"),
        *(
            Command("add rule inet $table output tcp dport @$ports", table=table, ports=_PORTS)
            + who
            + rule
            for rule in rules
        ),
    ]


def _refusing_table(table: Name, who: Command) -> list[Command]:
    return [
        *remove_table(table),
        Command("add table inet $table", table=table),
        _add_ports(table),
        Command("add chain inet $table output", table=table)
        # After the nat chains.
        + Command("{ type filter hook output priority 0; }"),
        # A client from elsewhere may have such a port as its own.
        Command("add rule inet $table output ct direction reply accept", table=table),
        # What was redirected; these are the addresses of that.
        Command(
            "add rule inet $table output ct status dnat ip daddr 127.0.0.1 accept", table=table
        ),
        Command("add rule inet $table output ct status dnat ip6 daddr ::1 accept", table=table),
        # Another one's rule may have changed the port. And of a packet that is not tracked no
        # original one is known.
        *(
            Command("add rule inet $table output", table=table)
            + port
            + who
            + Command("reject with tcp reset")
            for port in (
                Command("tcp dport @$ports", ports=_PORTS),
                Command("meta l4proto tcp ct original proto-dst @$ports", ports=_PORTS),
            )
        ),
    ]


def _add_ports(table: Name) -> Command:
    return Command("add set inet $table $ports { type inet_service; }", table=table, ports=_PORTS)
