"""Root's part of the start, and the end of it: another root directory, another user, for good."""

import contextlib
import ctypes
import grp
import os
import pwd
import re
import stat
from collections.abc import Collection
from typing import Final, NamedTuple

from sniproxy.service import libc

# linux/capability.h: sets of 64 capabilities, and two of these.
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13

# linux/prctl.h: whether capabilities outlive the change of the user.
_PR_SET_KEEPCAPS: Final = 8


class IdentityError(Exception):
    """There is no such user or group; the message says which."""


class Identity(NamedTuple):
    """Whom to become."""

    uid: int
    gid: int
    groups: list[int]  # all of them, as for setgroups(2)


def look_up(name: str) -> Identity:
    """Return whom `USER` or `USER:GROUP` means, by name or by number.

    Without GROUP it is the user's own. The user's supplementary groups come along in both cases.
    To be called before the root directory changes: the names are in /etc, and perhaps behind
    libraries of nsswitch.conf(5).

    Raises:
        IdentityError: there is none, or it would be root, or in root's group.
    """
    user, colon, group = name.partition(":")
    uid, gid, groups_of = _user(user)
    if uid == 0:
        raise IdentityError("root would keep its privileges")
    if colon:
        gid = _group(group)
    if gid is None:
        raise IdentityError(f"number {uid} is no known user, and so has no group; name one, too")
    groups = os.getgrouplist(groups_of, gid)
    if 0 in groups:
        raise IdentityError("root's group would keep its permissions")
    return Identity(uid, gid, groups)


def _user(name: str) -> tuple[int, int | None, str]:
    """Return the user's id, group and name; for a number without an entry there is no group."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        uid = _number(name)
        if uid is None:
            raise IdentityError(f"there is no user {name!a}") from None
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return uid, None, name
    return entry.pw_uid, entry.pw_gid, entry.pw_name


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        gid = _number(name)
        if gid is None:
            raise IdentityError(f"there is no group {name!a}") from None
        return gid


def _number(name: str) -> int | None:
    # Ids have 32 bits, and the highest of them stands for "as it is" in setresuid(2).
    if re.fullmatch("[0-9]{1,10}", name) and int(name) < (1 << 32) - 1:
        return int(name)
    return None


def enter_root() -> None:
    """Make the working directory the root directory.

    Raises:
        OSError: EPERM without CAP_SYS_CHROOT, chroot(2).
    """
    # A directory that somebody has left open would be a way out: fchdir(2) asks nobody.
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the list itself is closed by now
            if stat.S_ISDIR(os.fstat(int(name)).st_mode):
                os.close(int(name))
    os.chroot(".")
    os.chdir("/")


def become(identity: Identity, keep: Collection[int] = ()) -> None:
    """Become that user, with no way back.

    Args:
        identity: whom to become.
        keep: capabilities that are not lost by it, but put aside; see `keep_capabilities`.

    Raises:
        OSError: EPERM without CAP_SETUID and CAP_SETGID, setresuid(2).
    """
    if keep:
        libc.call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    # The groups first, as long as we may. Nothing that was of the old user stays: the saved ids,
    # too, would be a way back.
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def drop_capabilities() -> None:
    """Give up what is left of root's rights, unless we are root: capabilities(7).

    With the last id that was 0 they are gone already, but not those that somebody has given to an
    ordinary user, or made to outlive the change of the user.
    """
    if os.geteuid() != 0:
        keep_capabilities(())


def keep_capabilities(keep: Collection[int]) -> None:
    """Give up all of root's rights but these, whoever we are, and none is inherited by programs.

    What is left of root without them is the owner of root's files.

    Args:
        keep: numbers of capabilities, linux/capability.h.

    Raises:
        OSError: EPERM, we do not have one of them; capset(2).
    """
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    bits = sum(1 << number for number in keep)
    # struct __user_cap_data_struct, for the lower halves and for the upper ones: effective,
    # permitted, inheritable.
    low, high = bits & 0xFFFFFFFF, bits >> 32
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    libc.call("capset", ctypes.byref(header), ctypes.byref(sets))
