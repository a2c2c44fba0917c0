"""A process that locks itself in: whoever takes it over can do little more than it does.

Three means of the kernel that need no privilege and can't be undone. With PR_SET_NO_NEW_PRIVS no
program that is executed gains anything by its set-user-id bit, prctl(2). Landlock takes away rights
of this process and its children, landlock(7): here all that it knows of, since whoever serves has
opened all files before. And a filter of system calls, seccomp(2), bars what goes past Landlock:
sockets that are not its kind of TCP, and programs that are in no file.

What none of them forbids stays allowed: to change into a directory, to look at what is there, to
connect to a Unix socket by its path. That is just what looking up a host takes.

A program that connects to other machines, and whose configuration is files, is left that much more:
to read where it says, to make TCP connections, and to ask for addresses.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_NETLINK, AF_UNIX
from typing import Final, NamedTuple

from sniproxy.service import libc
from sniproxy.service.bpf import Instruction, Program

_PR_SET_NO_NEW_PRIVS: Final = 38

# --- Landlock, linux/landlock.h

# The same numbers wherever Python runs, but for two architectures; there it is not tried.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_OTHER_NUMBERS: Final = ("alpha", "mips")

_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1

# What can be taken away, by the version of Landlock that brought it.
_FILES: Final = {
    1: (1 << 13) - 1,  # to execute, read, write, list, remove, and make files of any kind
    2: 1 << 13,  # to link or rename between directories
    3: 1 << 14,  # to truncate
    5: 1 << 15,  # ioctl(2) on devices
}
_READ_FILES_AND_DIRECTORIES: Final = 0b1100
_BIND_TCP, _CONNECT_TCP = 0b01, 0b10  # since version 4
_ABSTRACT_UNIX_SOCKETS_AND_SIGNALS: Final = 0b11  # since version 6

# The kernel has no Landlock, or it was not enabled when it booted, or a filter of system calls
# hides it: by either error, as the filter's author liked.
_NO_LANDLOCK: Final = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


class _RulesetAttributes(ctypes.Structure):
    # struct landlock_ruleset_attr. A kernel that knows fewer fields accepts the others as zero.
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneathAttributes(ctypes.Structure):
    # struct landlock_path_beneath_attr
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


# --- The filter, linux/seccomp.h and linux/filter.h

_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000
_SECCOMP_RET_ERRNO: Final = 0x00050000

# Instructions: load a word of struct seccomp_data, compare it with a constant, return.
_LOAD: Final = 0x20
_IF_EQUAL: Final = 0x15
_IF_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06

# Where in struct seccomp_data: the call, the architecture, and the lower halves of its arguments.
_CALL, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24

# x86-64 has its calls a second time, for programs with short pointers, from here on.
_X32: Final = 1 << 30

# ioctls that type on a terminal what its shell then reads: TIOCSTI, TIOCLINUX.
_TYPING: Final = (0x5412, 0x541C)

# It makes system calls that no filter sees.
_IO_URING_SETUP: Final = 425

# There is no filter in the kernel, or another one bars it.
_NO_FILTER: Final = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES}


class _Calls(NamedTuple):
    """What an architecture calls itself, and its numbers of system calls."""

    architecture: int  # AUDIT_ARCH_..., linux/audit.h
    execve: int
    execveat: int
    ioctl: int
    socket: int


_CALLS: Final = {
    "x86_64": _Calls(0xC000003E, execve=59, execveat=322, ioctl=16, socket=41),
    "aarch64": _Calls(0xC00000B7, execve=221, execveat=281, ioctl=29, socket=198),
}


def enter(
    readable: Sequence[Path] = (), *, may_connect: bool = False, may_bind: bool = False
) -> list[str]:
    """Lock this process in, and the children that it will have. It must have one thread only.

    Args:
        readable: directories in which files may be read; those that are absent, or out of reach, do
            not matter.
        may_connect: whether TCP connections may be made, and addresses of names asked for.
        may_bind: whether they may be given any address and port of their own.

    Returns:
        What is forbidden from now on, in words for a log: `new_privileges`; and where the kernel
        offers it, `files` (to open, make or run any; with `readable`: to open any others), `tcp`
        (to bind or to connect; without what may be done), `abstract_sockets` (to connect to
        those of others), `signals` (to send any to others), `network` (to make a socket that is no
        Unix socket; with `may_connect`: none that is of neither IP nor netlink) and `programs` (to
        run any).

    Raises:
        OSError: the kernel offers it and refuses it. E2BIG: we are in sixteen sandboxes already.
    """
    libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    families = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK) if may_connect else (AF_UNIX,)
    tcp = (0 if may_connect else _CONNECT_TCP) | (0 if may_bind else _BIND_TCP)
    return [
        "new_privileges",
        *_enter_landlock(readable, tcp),
        *_enter_filter(families),
    ]


def _enter_landlock(readable: Sequence[Path], tcp: int) -> list[str]:
    version = _landlock_version()
    if version == 0:
        return []
    attributes = _RulesetAttributes()
    attributes.handled_access_fs = sum(bits for since, bits in _FILES.items() if since <= version)
    forbidden = ["files"]
    if version >= 4 and tcp:
        attributes.handled_access_net = tcp
        forbidden.append("tcp")
    if version >= 6:
        attributes.scoped = _ABSTRACT_UNIX_SOCKETS_AND_SIGNALS
        forbidden += ["abstract_sockets", "signals"]
    # Without a rule nothing of all that is allowed anywhere.
    reference, size = ctypes.byref(attributes), ctypes.sizeof(attributes)
    rules = libc.call("syscall", _LANDLOCK_CREATE_RULESET, reference, size, 0)
    try:
        for path in readable:
            _allow_to_read(rules, path)
        libc.call("syscall", _LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return forbidden


def _allow_to_read(rules: int, path: Path) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # where the user that we are now may not go, nothing can be allowed
    try:
        attributes = _PathBeneathAttributes(_READ_FILES_AND_DIRECTORIES, parent)
        reference = ctypes.byref(attributes)
        libc.call("syscall", _LANDLOCK_ADD_RULE, rules, _LANDLOCK_RULE_PATH_BENEATH, reference, 0)
    except OSError as error:
        # A filter of system calls that was made for less hides it: then nothing can be allowed.
        if error.errno not in _NO_LANDLOCK:
            raise
    finally:
        os.close(parent)


def _landlock_version() -> int:
    """Return what the kernel calls its ABI version; 0 for no Landlock."""
    if os.uname().machine.startswith(_OTHER_NUMBERS):
        return 0
    flags = _LANDLOCK_CREATE_RULESET_VERSION
    try:
        return libc.call("syscall", _LANDLOCK_CREATE_RULESET, None, 0, flags)
    except OSError as error:
        if error.errno in _NO_LANDLOCK:
            return 0
        raise


def _enter_filter(families: Sequence[int]) -> list[str]:
    calls = _CALLS.get(os.uname().machine)
    if calls is None or sys.maxsize < 1 << 32:  # a Python of 32 bits makes other calls
        return []
    program = ctypes.byref(Program.of(_filter(calls, families)))
    try:
        libc.call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)
    except OSError as error:
        if error.errno in _NO_FILTER:
            return []
        raise
    return ["network", "programs"]


def _filter(calls: _Calls, families: Sequence[int]) -> list[Instruction]:
    """Return the instructions that let all calls pass but a few, which get EACCES."""
    allow = (_RETURN, 0, 0, _SECCOMP_RET_ALLOW)
    deny = (_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EACCES)
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, calls.architecture),
        deny,
        (_LOAD, 0, 0, _CALL),
        (_IF_AT_LEAST, 0, 1, _X32),
        deny,
    ]
    for call in calls.execve, calls.execveat, _IO_URING_SETUP:
        instructions += [(_IF_EQUAL, 0, 1, call), deny]
    of_families = [each for family in families for each in ((_IF_EQUAL, 0, 1, family), allow)]
    instructions += [
        (_IF_EQUAL, 0, 2 + len(of_families), calls.socket),
        (_LOAD, 0, 0, _FIRST),
        *of_families,
        deny,
        (_IF_EQUAL, 1, 0, calls.ioctl),
        allow,
        (_LOAD, 0, 0, _SECOND),
    ]
    for request in _TYPING:
        instructions += [(_IF_EQUAL, 0, 1, request), deny]
    return [*instructions, allow]
