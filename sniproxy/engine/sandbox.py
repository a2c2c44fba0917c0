"""A process that locks itself in: whoever takes it over can do little more than it does.

Two means of the kernel that need no privilege and can't be undone. With PR_SET_NO_NEW_PRIVS no
program that is executed gains anything by its set-user-id bit, prctl(2). And Landlock takes away
rights of this process and its children, landlock(7): here all that it knows of, since whoever
serves has opened all files before. What Landlock does not know of stays allowed: to change into a
directory, to look at what is there, to connect to a Unix socket by its path. That is just what
looking up a host takes.
"""

import ctypes
import errno
import os

_PR_SET_NO_NEW_PRIVS = 38

# The same numbers for all architectures but alpha, since Linux 5.13.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446

_LANDLOCK_CREATE_RULESET_VERSION = 1

# What can be taken away, by the version of Landlock that brought it. linux/landlock.h has the bits.
_FILES = {
    1: (1 << 13) - 1,  # to execute, read, write, list, remove, and make files of any kind
    2: 1 << 13,  # to link or rename between directories
    3: 1 << 14,  # to truncate
    5: 1 << 15,  # ioctl(2) on devices
}
_BIND_AND_CONNECT_TCP = 0b11  # since version 4
_ABSTRACT_UNIX_SOCKETS_AND_SIGNALS = 0b11  # since version 6

# The kernel has no Landlock, or it was not enabled when it booted, or a filter of system calls
# hides it: by either error, as the filter's author liked.
_NO_LANDLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

_libc = ctypes.CDLL(None, use_errno=True)


class _RulesetAttributes(ctypes.Structure):
    # struct landlock_ruleset_attr. A kernel that knows fewer fields accepts the others as zero.
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


def enter() -> list[str]:
    """Lock this process in, and the children that it will have. It must have one thread only.

    Returns:
        What is forbidden from now on, in words for a log: `new_privileges`; and where the kernel
        offers it, `files` (to open, make or run any), `tcp` (to bind or to connect),
        `abstract_sockets` (to connect to those of others) and `signals` (to send any to others).

    Raises:
        OSError: the kernel offers it and refuses it. E2BIG: we are in sixteen sandboxes already.
    """
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    forbidden = ["new_privileges"]
    version = _landlock_version()
    if version == 0:
        return forbidden
    attributes = _RulesetAttributes()
    attributes.handled_access_fs = sum(bits for since, bits in _FILES.items() if since <= version)
    forbidden.append("files")
    if version >= 4:
        attributes.handled_access_net = _BIND_AND_CONNECT_TCP
        forbidden.append("tcp")
    if version >= 6:
        attributes.scoped = _ABSTRACT_UNIX_SOCKETS_AND_SIGNALS
        forbidden += ["abstract_sockets", "signals"]
    # A set of rules without a rule: nothing of all that is allowed anywhere.
    rules = _system_call(
        _LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0
    )
    try:
        _system_call(_LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return forbidden


def _landlock_version() -> int:
    """Return what the kernel calls its ABI version; 0 for no Landlock."""
    try:
        return _system_call(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in _NO_LANDLOCK:
            return 0
        raise


def _system_call(number: int, *arguments: object) -> int:
    # Each argument fills a register: syscall(2) is variadic, and ctypes would pass an int of 32
    # bits.
    registers = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    return _check(_libc.syscall(ctypes.c_long(number), *registers))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
