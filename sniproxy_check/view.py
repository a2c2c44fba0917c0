"""With whose eyes hosts are looked at: which user, which root directory, which options.

Root can look as the daemon does, and does nothing for tenants before it has become somebody who
may as little: what backends say is read by that user alone. Nobody else can become another user;
for them it is worked out, from modes and access control lists, what that user may do.
"""

import errno
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sniproxy.service import privileges
from sniproxy.service.fatal import FatalError, UsageError, attempt
from sniproxy_check.entries import Listing

# acl(5) as it is kept, linux/posix_acl_xattr.h: a version, and entries: tag, permissions, id.
_ACL: Final = "system.posix_acl_access"
_ACL_VERSION: Final = struct.Struct("<I")
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 0x02, 0x04, 0x08, 0x10, 0x20

SEARCH: Final = 0o1
WRITE: Final = 0o2
READ: Final = 0o4


class View(NamedTuple):
    """How to look.

    Attributes:
        hosts: The hosts directory; None for that of the process.
        process: The daemon whose root and working directory are taken; None for our own.
        identity: Whom to become; None for nobody else.
        chroot: Whether the hosts directory is to be the root directory.
        hashed: Whether directories are named by hashes.
        check_owner: Whether the daemon checks who listens.
        hands_over: Whether it hands clients over.
    """

    hosts: str | None
    process: int | None
    identity: privileges.Identity | None
    chroot: bool
    hashed: bool
    check_owner: bool
    hands_over: bool = False

    def enter(self, names: Sequence[str] = ()) -> Listing:
        """Look that way from now on, with no way back.

        Args:
            names: the entries of the hosts directory that count; all where there are none.

        Returns:
            What is there, as far as whoever we have been may list it.

        Raises:
            FatalError: it can't be done; a UsageError if nobody may, or there is no such directory.
        """
        is_root = os.geteuid() == 0
        if self.process is not None and is_root:
            self._enter_process(self.process)
        if self.hosts is not None:
            with _usage(f"search the hosts directory {self.hosts!a}"):
                os.chdir(self.hosts)
        if self.chroot and is_root:
            with attempt("make the hosts directory the root directory"):
                os.chroot(".")
        listing = Listing.of(names)
        if self.identity is not None and is_root:
            with attempt("become another user"):
                privileges.become(self.identity)
            privileges.drop_capabilities()
        with _usage("search the hosts directory (the working directory)"):
            os.stat("./.")
        return listing

    def _enter_process(self, process: int) -> None:
        """Take the root and the working directory of a process."""
        with _usage(f"see what the process {process} sees"):
            root, here = f"/proc/{process}/root", f"/proc/{process}/cwd"
            directory = os.open(here, os.O_PATH | os.O_DIRECTORY)
            try:
                os.chroot(root)
                os.fchdir(directory)
            finally:
                os.close(directory)


class Seen(NamedTuple):
    """As whom a daemon runs, and its options, as in `View`."""

    identity: privileges.Identity
    hashed: bool
    check_owner: bool
    hands_over: bool


def view_of_process(process: int) -> Seen:
    """Return how a daemon looks at hosts.

    Raises:
        UsageError: there is no such process, or it is no sniproxy.
    """
    with _usage(f"look at the process {process}"):
        status = Path(f"/proc/{process}/status").read_text()
        arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    if not any(os.path.basename(each) in (b"sniproxy", b"sniproxy.pyz") for each in arguments):
        raise UsageError(f"unable to look as the process {process} does: it is no sniproxy")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    uid, gid = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
    groups = [int(each) for each in fields["Groups"].split()]
    return Seen(
        privileges.Identity(uid, gid, groups),
        hashed=b"--hashed" in arguments,
        check_owner=b"--no-owner-check" not in arguments,
        hands_over=b"--handoff" in arguments,
    )


def may(identity: privileges.Identity, path: str, status: os.stat_result, right: int) -> bool:
    """Tell whether a user may read, search, or write, what we can look at: acl(5), inode(7).

    Args:
        identity: the user.
        path: it.
        status: what lstat(2) says of it.
        right: `READ`, `SEARCH` or `WRITE`.
    """
    mode = status.st_mode
    if identity.uid == 0:
        return True
    if identity.uid == status.st_uid:
        return bool(mode >> 6 & right)
    groups = {identity.gid, *identity.groups}
    # Where the mask, which stands in the place of the group's bits, has nothing, the kernel does
    # not look at the list.
    if mode & stat.S_IRWXG and (entries := _access_control_list(path)):
        return _acl_lets(entries, identity.uid, groups, status.st_gid, right)
    if status.st_gid in groups:
        return bool(mode >> 3 & right)
    return bool(mode & right)


def _acl_lets(
    entries: list[tuple[int, int, int]], uid: int, groups: set[int], group: int, right: int
) -> bool:
    mask = next((rights for tag, rights, _ in entries if tag == _ACL_MASK), 0o7)
    for tag, rights, number in entries:
        if tag == _ACL_USER and number == uid:
            return bool(rights & mask & right)
    of_groups = [
        rights
        for tag, rights, number in entries
        if (tag == _ACL_GROUP_OBJ and group in groups) or (tag == _ACL_GROUP and number in groups)
    ]
    if of_groups:
        return any(rights & mask & right for rights in of_groups)
    return any(tag == _ACL_OTHER and rights & right for tag, rights, _ in entries)


def _access_control_list(path: str) -> list[tuple[int, int, int]]:
    try:
        data = os.getxattr(path, _ACL, follow_symlinks=False)
    except OSError:
        return []  # there is none, or the file system has none
    return list(_ACL_ENTRY.iter_unpack(data[_ACL_VERSION.size :]))


class _usage:  # noqa: N801 - used as a function
    """As `attempt`, but what is not there, or not allowed, is the caller's mistake."""

    _MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ESRCH)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            fatal = UsageError if error.errno in self._MISTAKES else FatalError
            raise fatal.of(self._what, error) from None
