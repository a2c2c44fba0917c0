"""/etc/hosts: the names of an address that nobody looks up in the DNS, hosts(5).

Law: what can't be read in full names nothing, and says why; a bad line is skipped. It is read anew
when stat(2) shows a change, and not before.

It is not read as `mutual_tls.settings` reads: here a `#` begins a comment wherever it stands, a
comment in another encoding does no harm, and it is often larger than a setting.
"""

import os
import socket
import stat
import time
from typing import Final

from mutual_tls.settings import StrPath
from mutual_tls.signature import Signature, signature
from sniproxy_hostname import Hostname, InvalidHostname
from tls_tproxy.names.cache import MOST_NAMES

__all__ = ["HOSTS_FILE", "LARGEST", "HostsFile"]

HOSTS_FILE: Final = "/etc/hosts"

# Bytes: some 8,000 lines, which take 20 ms to read, once after a change. Lists of thousands of
# names that are to be blocked are larger; they name no address that anybody connects to.
LARGEST: Final = 256 * 1024

# Seconds within which a file may be changed again without a trace: its times are those of the
# kernel's clock, whose ticks take up to 10 ms.
_SETTLED: Final = 1.0

# A FIFO without a writer opens at once, fifo(7); a terminal must not become ours, open(2).
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_MAPPED: Final = bytes(10) + b"\xff\xff"  # IPv4-mapped IPv6 addresses, RFC 4291 §2.5.5.2


class HostsFile:
    """The names in a file such as /etc/hosts.

    Attributes:
        trouble: Why the file names nothing, for a person to read; None if it is well, or absent.
    """

    def __init__(self, path: StrPath = HOSTS_FILE) -> None:
        self.trouble: str | None = None
        self._path = path
        self._seen: Signature | None = None
        self._known: dict[bytes, list[str]] = {}

    def names(self, address: bytes) -> list[str]:
        """Return the names of `address`, in the order of the file, at most `MOST_NAMES`.

        Args:
            address: 4 or 16 bytes, as inet_pton(3) packs them.
        """
        try:
            self._read_if_changed()
        except OSError as error:
            self._forget(f"unable to read {self._path}: {error.strerror}")
        return list(self._known.get(address, ()))

    def _read_if_changed(self) -> None:
        try:
            if signature(os.stat(self._path)) == self._seen:
                return
            fd = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            self._forget(None)
            return
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                self._forget(f"unable to read {self._path}: it is not a regular file")
                return
            content = _read(fd)
        finally:
            os.close(fd)
        if len(content) > LARGEST:
            self._forget(f"unable to read {self._path}: there are more than {LARGEST} bytes")
        else:
            self.trouble, self._known = None, _parse(content)
        if abs(time.time() - status.st_ctime) >= _SETTLED:
            self._seen = signature(status)

    def _forget(self, trouble: str | None) -> None:
        self.trouble, self._known, self._seen = trouble, {}, None


def _read(fd: int) -> bytes:
    content = b""
    while len(content) <= LARGEST and (piece := os.read(fd, LARGEST + 1 - len(content))):
        content += piece
    return content


def _parse(content: bytes) -> dict[bytes, list[str]]:
    known: dict[bytes, list[str]] = {}
    for line in content.split(b"\n"):
        # hosts(5): "Text from a "#" character until the end of the line is a comment"
        fields = line.partition(b"#")[0].split()
        if len(fields) < 2 or (address := _packed(fields[0])) is None:
            continue
        names = known.setdefault(address, [])
        for field in fields[1:]:
            try:
                name = str(Hostname(field))
            except InvalidHostname:
                continue
            if name not in names and len(names) < MOST_NAMES:
                names.append(name)
    return known


def _packed(text: bytes) -> bytes | None:
    try:
        if b":" not in text:
            return socket.inet_pton(socket.AF_INET, text.decode("ascii"))
        # An address with a scope, fe80::1%eth0, is not one of any interface.
        return socket.inet_pton(socket.AF_INET6, text.decode("ascii")).removeprefix(_MAPPED)
    except (OSError, ValueError):
        return None
