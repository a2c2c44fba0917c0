"""Watching DNS go by: a packet socket, and what is learned from it.

Law: a name is learned only from an answer that has come in to this machine, to a question that this
machine has sent. The kernel says which is which: PACKET_OUTGOING or PACKET_HOST, packet(7). What is
lost or can't be read is not learned, so its client is refused.

Not seen, and so not learned: DNS over TCP, TLS, HTTPS and other ports than 53, fragments, what is
behind an IPv6 extension header, and questions that this machine's own NAT sends to another port, as
Docker does for its resolver. A packet with a VLAN tag is left to the VLAN's own interface, which
shows it without. Over loopback every packet is seen twice, when it leaves and when it comes in:
questions count when they leave, answers when they come in, as everywhere. Guests that share an
interface and its MAC address with this machine, by ipvlan, are taken for this machine.

The kernel shows a packet here before it gives it to anybody else. So when a client connects to an
address that it has been told, the answer is in our queue already, and `Watch.read_now` finds it.
"""

import ctypes
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from select import EPOLLIN
from typing import Final

from sniproxy.engine.loop import EventLoop
from sniproxy.service import libc
from sniproxy.service.bpf import SO_LOCK_FILTER, Program
from sniproxy_hostname import Hostname
from tls_tproxy.names.answers import LARGEST, read_answer
from tls_tproxy.names.cache import Cache
from tls_tproxy.names.packets import read_datagram
from tls_tproxy.names.questions import Exchange, Questions

__all__ = ["Counts", "Watch", "open_packet_socket"]

_PORT: Final = 53  # of DNS, RFC 1035 §4.2

# --- The filter, linux/filter.h and bpf_common.h

# Instructions: load a word, a half or a byte from a fixed place, or from one behind the index;
# set the index, to a constant or to the length of an IPv4 header; skip so many; compare; return.
_LOAD_WORD: Final = 0x20
_LOAD_HALF: Final = 0x28
_LOAD_BYTE: Final = 0x30
_LOAD_HALF_BEHIND_INDEX: Final = 0x48
_INDEX_CONSTANT: Final = 0x01
_INDEX_IPV4_HEADER_LENGTH: Final = 0xB1
_SKIP: Final = 0x05
_IF_EQUAL: Final = 0x15
_IF_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06

# Places that are not in the packet: what the kernel knows about it.
_ABOUT: Final = 0xFFFFF000  # SKF_AD_OFF
_PROTOCOL: Final = _ABOUT + 0
_PACKET_TYPE: Final = _ABOUT + 4
_HARDWARE_TYPE: Final = _ABOUT + 28
_VLAN_TAG_PRESENT: Final = _ABOUT + 48

_ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
_ETH_P_IP: Final = 0x0800
_ETH_P_IPV6: Final = 0x86DD
_ARPHRD_LOOPBACK: Final = 772  # linux/if_arp.h
_UDP: Final = 17

_MORE_FRAGMENTS_OR_OFFSET: Final = 0x3FFF

# Where in the packet. Ports are behind the index, which is the length of the IP header.
_IPV4_FRAGMENT, _IPV4_PROTOCOL = 6, 9
_IPV6_NEXT_HEADER, _IPV6_HEADER_LENGTH = 6, 40
_SOURCE_PORT, _DESTINATION_PORT = 0, 2

# What is kept of a packet: the longest IPv4 header, that of UDP, and the largest message that
# counts. What is cut off shows in the lengths.
_LARGEST_PACKET: Final = 60 + 8 + LARGEST

_SO_RCVBUFFORCE: Final = 33  # asm/socket.h
_SOL_PACKET: Final = 263  # linux/socket.h
_PACKET_STATISTICS: Final = 6  # linux/if_packet.h
_STATISTICS: Final = struct.Struct("@II")

# Bytes of packets that may wait for us; the kernel takes twice as many, to count its own overhead.
# A small packet counts as 0.8 kB there. So 10,000 of them fit: a second of a flood of 10,000 a
# second, which is longer than anything that may hold up the loop.
_QUEUE: Final = 4 * 1024 * 1024

# Packets read at a turn of the loop: 0.3 ms if they are forged, 2 ms if every second one is an
# answer that is learned. Then the others have their turn.
_BATCH: Final = 64

# And before a decision: what comes in 50 ms of a flood of 10,000 a second. They take 2 ms.
_LARGEST_BATCH: Final = 512

_PASS: Final = (_RETURN, 0, 0, _LARGEST_PACKET)
_DROP: Final = (_RETURN, 0, 0, 0)

_FILTER: Final = (
    (_LOAD_WORD, 0, 0, _VLAN_TAG_PRESENT),
    (_IF_EQUAL, 1, 0, 0),
    _DROP,
    (_LOAD_WORD, 0, 0, _PROTOCOL),
    (_IF_EQUAL, 0, 8, _ETH_P_IP),
    (_LOAD_BYTE, 0, 0, _IPV4_PROTOCOL),
    (_IF_EQUAL, 1, 0, _UDP),
    _DROP,
    (_LOAD_HALF, 0, 0, _IPV4_FRAGMENT),
    (_IF_ANY_BIT, 0, 1, _MORE_FRAGMENTS_OR_OFFSET),
    _DROP,
    (_INDEX_IPV4_HEADER_LENGTH, 0, 0, 0),
    (_SKIP, 0, 0, 6),
    (_IF_EQUAL, 1, 0, _ETH_P_IPV6),
    _DROP,
    (_LOAD_BYTE, 0, 0, _IPV6_NEXT_HEADER),
    (_IF_EQUAL, 1, 0, _UDP),
    _DROP,
    (_INDEX_CONSTANT, 0, 0, _IPV6_HEADER_LENGTH),
    (_LOAD_WORD, 0, 0, _PACKET_TYPE),
    (_IF_EQUAL, 0, 4, socket.PACKET_OUTGOING),
    # It leaves: a question.
    (_LOAD_HALF_BEHIND_INDEX, 0, 0, _DESTINATION_PORT),
    (_IF_EQUAL, 0, 1, _PORT),
    _PASS,
    _DROP,
    # It is for us, or passes by: an answer that is for us.
    (_IF_EQUAL, 0, 3, socket.PACKET_HOST),
    (_LOAD_HALF_BEHIND_INDEX, 0, 0, _SOURCE_PORT),
    (_IF_EQUAL, 0, 1, _PORT),
    _PASS,
    # Or somebody else's question. Over loopback nobody else asks.
    (_LOAD_WORD, 0, 0, _HARDWARE_TYPE),
    (_IF_EQUAL, 3, 0, _ARPHRD_LOOPBACK),
    (_LOAD_HALF_BEHIND_INDEX, 0, 0, _DESTINATION_PORT),
    (_IF_EQUAL, 0, 1, _PORT),
    _PASS,
    _DROP,
)


class _Address(ctypes.Structure):
    # struct sockaddr_ll, packet(7). No interface: all of them.
    _fields_ = (
        ("family", ctypes.c_uint16),
        ("protocol", ctypes.c_uint16),  # in network byte order
        ("interface", ctypes.c_int),
        ("hardware_type", ctypes.c_uint16),
        ("packet_type", ctypes.c_uint8),
        ("length", ctypes.c_uint8),
        ("address", ctypes.c_uint8 * 8),
    )


def open_packet_socket() -> socket.socket:
    """Return a socket that sees the DNS of this network namespace from now on, packet(7).

    It takes CAP_NET_RAW; afterwards no privilege is needed. Every packet of the machine passes
    through its filter, in the kernel. It is for one process: of two that read from it, each would
    see only a part.

    Raises:
        OSError: EPERM: no CAP_NET_RAW.
    """
    # No protocol yet: without its filter, the socket would see everything.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    try:
        Program.of(_FILTER).attach(sock)
        sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE)
        except PermissionError:  # no CAP_NET_ADMIN: as much as net.core.rmem_max allows
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE)
        # All protocols: the socket of a single one doesn't see what leaves. `socket.bind` wants the
        # name of an interface.
        address = _Address(socket.AF_PACKET, socket.htons(_ETH_P_ALL))
        libc.call("bind", sock.fileno(), ctypes.byref(address), ctypes.sizeof(address))
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass
class Counts:
    """What has been seen so far.

    Attributes:
        packets: that passed the filter.
        questions: that this machine asked, for an address of a name.
        answers: that belong to one of them.
        unasked: answers that belong to none.
        learned: addresses, each time that a name was learned for one.
        lost: packets for which the kernel's queue had no room.
        errors: of the socket.
    """

    packets: int = 0
    questions: int = 0
    answers: int = 0
    unasked: int = 0
    learned: int = 0
    lost: int = 0
    errors: int = 0


class Watch:
    """Whoever reads the packet socket, and tells the cache. A `Watcher` for the loop.

    Args:
        sock: from `open_packet_socket`; it is ours from now on.
        cache: where names are learned.
        accept_cname: called with a name that was asked for; tells whether the targets of its CNAMEs
            are names of an address, too, after itself. Nobody here has asked for those: whoever
            forges a CNAME, or runs the zone that holds it, chooses a name, for which any server
            with a valid certificate will be accepted.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        sock: socket.socket,
        cache: Cache,
        *,
        accept_cname: Callable[[Hostname], bool] = lambda name: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = sock
        self._cache = cache
        self._accept_cname = accept_cname
        self._questions = Questions(clock)
        self._counts = Counts()
        self._loop: EventLoop | None = None
        # Whether everything was seen that came before what is in the queue.
        self._has_seen_all = True

    @property
    def counts(self) -> Counts:
        """What has been seen so far."""
        if self.is_open:
            self._has_lost_some()
        return self._counts

    @property
    def is_open(self) -> bool:
        """Whether anything is still learned."""
        return self._socket.fileno() >= 0

    def start(self, loop: EventLoop) -> None:
        """Read from now on, whenever something comes.

        Raises:
            OSError: as `EventLoop.watch`.
        """
        loop.watch(self._socket.fileno(), self, EPOLLIN)
        self._loop = loop

    def on_event(self, events: int) -> None:
        """Read a batch."""
        self._read(_BATCH)

    def abort(self) -> None:
        """Learn nothing any more."""
        if self._loop is None:
            self._socket.close()
        else:
            self._loop.close(self._socket)

    close = abort

    def read_now(self) -> None:
        """Read what is there already, without waiting; of a flood, a part."""
        if self.is_open:
            self._read(_LARGEST_BATCH)

    def _read(self, most: int) -> None:
        receive = self._socket.recvfrom
        for _ in range(most):
            try:
                packet, (_, _, kind, hardware, _) = receive(_LARGEST_PACKET)
            except BlockingIOError:
                self._has_seen_all = True
                return
            except OSError:  # ENETDOWN, or what else an interface has to say; the next may be well
                self._counts.errors += 1
                return
            self._counts.packets += 1
            self._look_at(packet, kind, loopback=hardware == _ARPHRD_LOOPBACK)

    def _look_at(self, packet: bytes, kind: int, *, loopback: bool) -> None:
        datagram = read_datagram(packet)
        if datagram is None:
            return
        source, source_port, destination, destination_port, message = datagram
        if kind == socket.PACKET_OUTGOING:
            if destination_port == _PORT and self._has_seen_all:
                exchange = Exchange(loopback, source, source_port, destination)
                self._counts.questions += self._questions.asked(exchange, message)
            return
        # A resolver may ask from port 53, too: so it may be either.
        if destination_port == _PORT and not loopback:
            self._questions.came_in(message)
        if source_port != _PORT or kind != socket.PACKET_HOST:
            return
        exchange = Exchange(loopback, destination, destination_port, source)
        if self._questions.is_answered_by(exchange, message):
            self._counts.answers += 1
            if not self._has_lost_some():
                self._learn(message)
        else:
            self._counts.unasked += 1

    def _has_lost_some(self) -> bool:
        """Tell whether packets were lost since the last call. Then no question is known to be ours.

        One that is passed on may have been seen when it left, and not when it came in: by a flood
        of packets somebody could bring that about. So all questions are forgotten, those in the
        queue too.
        """
        # struct tpacket_stats: packets, and how many were dropped, since it was last asked.
        got = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
        _, lost = _STATISTICS.unpack(got)
        if lost:
            self._counts.lost += lost
            self._questions.forget()
            self._has_seen_all = False
        return bool(lost)

    def _learn(self, message: bytes) -> None:
        answer = read_answer(message)
        if answer is None:
            return
        accepts_aliases = bool(answer.aliases) and self._accept_cname(answer.name)
        for address in answer.addresses:
            if accepts_aliases:
                # The last one is the newest, and the question's name is to be the first of all.
                for alias in reversed(answer.aliases[: address.aliases]):
                    if alias is not None:
                        self._cache.learn(address.packed, str(alias), address.ttl)
            self._cache.learn(address.packed, str(answer.name), address.ttl)
            self._counts.learned += 1
