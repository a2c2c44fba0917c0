"""A DNS answer: which addresses it gives for the name that was asked for.

Law: bytes in, values out; no clock, no socket. Whatever the bytes are, nothing is raised, and the
time is bounded by `LARGEST`. What is not sound in every part says nothing at all.

dnslib reads the header, the question and the RDATA; names are read here, and RDLENGTH is checked.
dnslib follows compression pointers by recursion, in circles too until Python's stack ends, sets no
bound to a name's length, takes the reserved label types for lengths, and does not look at the
RDLENGTH of an address.
"""

from typing import Any, Final, NamedTuple

from dnslib import AAAA, CNAME, QTYPE, A, DNSError, DNSHeader, DNSQuestion
from dnslib.buffer import BufferError as EndOfMessageError
from dnslib.label import DNSBuffer, DNSLabel

from sniproxy_hostname import Hostname, InvalidHostname

__all__ = ["LARGEST", "Address", "Answer", "read_answer"]

# Bytes of a message. RFC 6891 §6.2.5 names 4096 as what a requestor may begin with, and nobody
# is known to ask for more but systemd-resolved, over loopback, for answers that are small all the
# same. It bounds the time: some 340 records fit.
LARGEST: Final = 4096

# CNAMEs from the question's name to an address. Resolvers follow no more than about ten.
MOST_CNAMES: Final = 16

# Compression pointers in one name. A name that ends with a pointer to one that ends with a pointer
# has one for each label at most; sixteen labels are more than names of hosts have.
MOST_POINTERS: Final = 16

# RFC 1035 §2.3.4: "names 255 octets or less", with the length octets and the root's.
_LONGEST_NAME: Final = 255

# The two bits in front of a length octet. RFC 1035 §4.1.4: "The 10 and 01 combinations are reserved
# for future use."
_POINTER: Final = 0b11
_LABEL: Final = 0b00

_CLASS_IN: Final = 1

_Labels = tuple[bytes, ...]


class Address(NamedTuple):
    """An address that an answer gives.

    Attributes:
        packed: 4 or 16 bytes.
        ttl: seconds, the least on the way to it.
        aliases: how many CNAMEs lie on the way to it.
    """

    packed: bytes
    ttl: int
    aliases: int


class Answer(NamedTuple):
    """What a DNS answer says.

    Attributes:
        name: the name that was asked for.
        kind: the type that was asked for, `dnslib.QTYPE.A` or `dnslib.QTYPE.AAAA`.
        aliases: the targets of the CNAMEs, from that name on; None for one that is no hostname.
        addresses: of that type.
    """

    name: Hostname
    kind: int
    aliases: tuple[Hostname | None, ...]
    addresses: tuple[Address, ...]


class _MalformedError(Exception):
    """The message is not sound."""


class _Buffer(DNSBuffer):  # type: ignore[misc] # dnslib ships no types
    """A message, read from its begin to its end."""

    offset: int

    def decode_name(self, last: int = -1) -> DNSLabel:
        """Read a name, and go on behind it. dnslib's own `last` is of no use here.

        Raises:
            EndOfMessageError: the message ends in it.
            _MalformedError: it is no name, or has too many pointers.
        """
        labels: list[bytes] = []
        size = 1  # the root's length octet
        begin = self.offset  # of the part that is being read
        behind = None  # where the first pointer ends
        for _ in range(MOST_POINTERS + 1):
            while (length := self.get(1)[0]) >> 6 == _LABEL:
                if length == 0:
                    if behind is not None:
                        self.offset = behind
                    return DNSLabel(labels)
                size += 1 + length
                if size > _LONGEST_NAME:
                    raise _MalformedError
                labels.append(self.get(length))
            if length >> 6 != _POINTER:
                raise _MalformedError
            target = (length & 0x3F) << 8 | self.get(1)[0]
            behind = behind or self.offset
            # RFC 1035 §4.1.4: "a pointer to a prior occurance of the same name". So every part
            # begins before the one that has led to it, and there are no circles.
            if target >= begin:
                raise _MalformedError
            self.offset = begin = target
        raise _MalformedError


def read_answer(message: bytes) -> Answer | None:
    """Return what a DNS message answers; None if nothing can be taken from it.

    Counts: an answer without error to one question, of class IN and type A or AAAA, for a name that
    is a `Hostname`, with addresses of that type whose owner is that name, or is reached from it by
    the CNAMEs in the answer section, in whatever order they come.

    None for a truncated one: RFC 2181 §9: "When a DNS client receives a reply with TC set, it
    should ignore that response, and query again, using a mechanism, such as a TCP connection". What
    comes over TCP is not seen, so what the client will use is not known.
    """
    if len(message) > LARGEST:
        return None
    try:
        return _read(_Buffer(message))
    except (EndOfMessageError, DNSError, _MalformedError):
        return None


def _read(buffer: _Buffer) -> Answer | None:
    header = DNSHeader.parse(buffer)
    if not header.qr or header.opcode or header.rcode or header.tc or header.q != 1:
        return None
    question = DNSQuestion.parse(buffer)
    kind = question.qtype
    if question.qclass != _CLASS_IN or kind not in {QTYPE.A, QTYPE.AAAA}:
        return None
    if (name := _hostname(question.qname)) is None:
        return None
    found: list[tuple[_Labels, bytes, int]] = []  # owner, address, TTL
    cnames: dict[_Labels, tuple[DNSLabel, int]] = {}  # target, TTL
    for _ in range(header.a):
        owner, of_kind, ttl, rdata = _read_record(buffer)
        if of_kind == kind:
            found.append((owner, bytes(rdata.data), ttl))
        elif of_kind == QTYPE.CNAME:
            target = rdata.label
            # RFC 2181 §10.1: "There may be only one such canonical name for any one alias."
            if cnames.setdefault(owner, (target, ttl))[0] != target:
                return None
    for _ in range(header.auth + header.ar):
        _read_record(buffer)
    if buffer.remaining():
        return None
    return _follow(name, kind, _folded(question.qname), found, cnames)


def _read_record(buffer: _Buffer) -> tuple[_Labels, int | None, int, Any]:
    """Read a resource record; return its owner, type, TTL and RDATA.

    The type is None for one that doesn't matter here: of another class or type.

    Raises:
        EndOfMessageError, DNSError, _MalformedError: it is not sound.
    """
    owner = _folded(buffer.decode_name())
    kind, of_class, ttl, length = buffer.unpack("!HHIH")
    # RFC 6891 §6.1.3: the TTL of OPT begins with the "upper 8 bits of extended 12-bit RCODE".
    if kind == QTYPE.OPT and ttl >> 24:
        raise _MalformedError
    # RFC 2181 §8: "Implementations should treat TTL values received with the most significant bit
    # set as if the entire value received was zero."
    if ttl >> 31:
        ttl = 0
    reader = {QTYPE.A: A, QTYPE.AAAA: AAAA, QTYPE.CNAME: CNAME}.get(kind)
    if reader is None or of_class != _CLASS_IN:
        buffer.get(length)
        return owner, None, ttl, None
    end = buffer.offset + length
    rdata = reader.parse(buffer, length)
    if buffer.offset != end:
        raise _MalformedError
    return owner, kind, ttl, rdata


def _follow(
    name: Hostname,
    kind: int,
    owner: _Labels,
    found: list[tuple[_Labels, bytes, int]],
    cnames: dict[_Labels, tuple[DNSLabel, int]],
) -> Answer | None:
    """Follow the CNAMEs from the question's name, and keep the addresses on the way."""
    reached: dict[_Labels, tuple[int, int]] = {}  # CNAMEs on the way there, and the least TTL
    aliases: list[Hostname | None] = []
    least = 2**31 - 1  # the largest TTL, RFC 2181 §8
    while owner not in reached:
        reached[owner] = len(aliases), least
        if owner not in cnames:
            break
        if len(aliases) == MOST_CNAMES:
            return None
        target, ttl = cnames[owner]
        owner, least = _folded(target), min(least, ttl)
        aliases.append(_hostname(target))
    else:
        return None  # a circle
    addresses = tuple(
        Address(packed, min(ttl, reached[owner][1]), reached[owner][0])
        for owner, packed, ttl in found
        if owner in reached
    )
    return Answer(name, kind, tuple(aliases), addresses) if addresses else None


def _folded(label: DNSLabel) -> _Labels:
    return tuple(each.lower() for each in label.label)


def _hostname(label: DNSLabel) -> Hostname | None:
    # A dot inside of a label is no separator: joined, it would be another name.
    if any(b"." in each for each in label.label):
        return None
    try:
        return Hostname(b".".join(label.label))
    except InvalidHostname:
        return None
