"""Which names an address was looked up under, by watching DNS answers on this machine.

A program connects in plaintext to an address, and is wrapped in TLS for the name that it has just
looked up. So the law of this room: no name is ever learned that nobody here has asked for. What is
dropped or forged leads to a client that is refused, never to one that is wrapped under a wrong
name.

It needs the package dnslib.
"""

import socket
import time
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from mutual_tls.settings import StrPath
from sniproxy.engine.loop import EventLoop
from sniproxy_hostname import Hostname
from tls_tproxy.names.cache import Cache
from tls_tproxy.names.hosts_file import HOSTS_FILE, HostsFile
from tls_tproxy.names.watch import Counts, Watch, open_packet_socket

__all__ = ["Counts", "Names", "open_packet_socket"]


_hostname = lru_cache(maxsize=1024)(Hostname)


class Names:
    """What addresses are called here.

    Args:
        sock: from `open_packet_socket`, which takes a privilege; it is ours from now on.
        accept_cname: see `Watch`: it lets others choose names.
        hosts: a file such as /etc/hosts.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        accept_cname: Callable[[Hostname], bool] = lambda name: False,
        hosts: StrPath = HOSTS_FILE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = Cache(clock)
        self._watch = Watch(sock, self._cache, accept_cname=accept_cname, clock=clock)
        self._hosts = HostsFile(hosts)

    def start(self, loop: EventLoop) -> None:
        """Read packets from now on, whenever they come.

        Raises:
            OSError: as `EventLoop.watch`.
        """
        self._watch.start(loop)

    def close(self) -> None:
        """Close the packet socket. What is known stays until it expires."""
        self._watch.close()

    def of(self, address: IPv4Address | IPv6Address) -> list[Hostname]:
        """Return the names of `address`: those of the DNS, newest first, then those of /etc/hosts.

        What is in the socket's queue is read before. So it knows what a client was told who has
        just connected, but for a flood: then it is worth while to ask again a little later.

        Args:
            address: an IPv4-mapped IPv6 address is the IPv4 address.
        """
        self._watch.read_now()
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        names = self._cache.names(address.packed)
        names += [name for name in self._hosts.names(address.packed) if name not in names]
        # They were hostnames when they were learned; as plain text they take less memory.
        return [_hostname(name.encode()) for name in names]

    @property
    def counts(self) -> Counts:
        """What has been seen so far, on the packet socket."""
        return self._watch.counts

    @property
    def hosts_trouble(self) -> str | None:
        """Why /etc/hosts names nothing, as of the last call of `of`; None if nothing is wrong."""
        return self._hosts.trouble
