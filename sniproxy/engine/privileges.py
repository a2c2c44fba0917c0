"""Root's part of the start, and the end of it: another root directory, another user, for good."""

import grp
import os
import pwd
import re
from typing import NamedTuple


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
        IdentityError: there is none, or it would be root.
    """
    user, colon, group = name.partition(":")
    uid, gid, groups_of = _user(user)
    if uid == 0:
        raise IdentityError("root would keep its privileges")
    if colon:
        gid = _group(group)
    if gid is None:
        raise IdentityError(f"number {uid} is no known user, and so has no group; name one, too")
    return Identity(uid, gid, os.getgrouplist(groups_of, gid))


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
    os.chroot(".")
    os.chdir("/")


def become(identity: Identity) -> None:
    """Become that user, with no way back.

    Raises:
        OSError: EPERM without CAP_SETUID and CAP_SETGID, setresuid(2).
        RuntimeError: there is a way back: this process keeps its capabilities in some way.
    """
    # The groups first, as long as we may. Nothing that was of the old user stays: the saved ids,
    # too, would be a way back.
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    # With the last id that was 0 all capabilities go, unless somebody has set "securebits"
    # otherwise, capabilities(7).
    try:
        os.setuid(0)
    except PermissionError:
        return
    raise RuntimeError("root can be had back")
