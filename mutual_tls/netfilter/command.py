"""Commands for nft(8): text of ours, and values that can mean nothing else.

nft reads a language, so whatever gets into its input as text could be a command. Nothing does: a
value is a number, an address, or of a type that has read its text strictly.
"""

import os
import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from string import Template
from typing import Final, LiteralString, NamedTuple, Self

# 32 bits: the widest numbers that are used here, user ids and marks.
_HIGHEST: Final = (1 << 32) - 1

# The limit of linux/netfilter/nf_tables.h is 255; names that people are to read are shorter.
_NAME: Final = re.compile("[a-z][a-z0-9_]{0,62}")

# What systemd.unit(5) has in names, but for the backslash, whose meaning is nft's.
_CGROUP_PART: Final = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.:@-]{1,255}")

# Where nft looks for control groups.
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


class Name:
    """The name of a table or set: small letters, digits and underscores.

    Without an underscore it could be a word of nft's language, such as `rt`, which is an error of
    syntax then.

    Raises:
        ValueError: it has something else in it.
    """

    def __init__(self, text: str) -> None:
        if not _NAME.fullmatch(text):
            raise ValueError(f"{text!a} is no name for nftables")
        self.text: Final = text

    def __str__(self) -> str:
        return self.text


class Cgroup(NamedTuple):
    """A control group of version 2, cgroups(7), and how deep it is in its hierarchy.

    nft looks it up once, and the rule means that very directory from then on. One that is removed
    and made anew, as systemd does with a service that is started again, is another. Take one that
    stays: a slice.
    """

    level: int
    path: str  # below /sys/fs/cgroup

    @classmethod
    def find(cls, text: str, root: Path = _CGROUP_ROOT) -> Self:
        """Return the control group with that path, as /proc/PID/cgroup has it: /a.slice/b.slice.

        Raises:
            ValueError: the path is not one that can be passed on, or there is no such group.
        """
        parts = text.removeprefix("/").split("/")
        if not all(_CGROUP_PART.fullmatch(part) for part in parts):
            raise ValueError(f"{text!a} is no path of a control group")
        # With both versions in use the second is mounted further down.
        if (root / "unified/cgroup.controllers").exists():
            parts = ["unified", *parts]
        path = root.joinpath(*parts)
        # Only version 2 has that file.
        if not (path / "cgroup.controllers").exists():
            raise ValueError(f"there is no control group {text!a} of version 2")
        places = [root, *(root.joinpath(*parts[: n + 1]) for n in range(len(parts)))]
        devices = [os.stat(place).st_dev for place in places]
        return cls(devices.count(devices[-1]) - 1, "/".join(parts))


Value = int | IPv4Address | IPv6Address | IPv4Network | IPv6Network | Name | Cgroup


class Command:
    """A command, or a part of one.

    Args:
        template: written in the program, with `$name` where a value stands.
        values: by name. Several stand with commas between them; none at all is nothing that nft
            understands.

    Raises:
        TypeError: a value is of another type; text, above all.
        ValueError: a number is negative or has more than 32 bits, an address has a scope, or there
            is no value where there should be several.
    """

    def __init__(self, template: LiteralString, **values: Value | Collection[Value]) -> None:
        rendered = {name: _render(value) for name, value in values.items()}
        # nft -i takes a line for a transaction.
        assert "\n" not in template
        self.text = Template(template).substitute(rendered)

    def __add__(self, other: "Command") -> "Command":
        """Return the command that begins with this one and goes on with the other."""
        whole = Command("")
        whole.text = f"{self.text} {other.text}"
        return whole

    def __str__(self) -> str:
        return self.text


def _render(value: Value | Collection[Value]) -> str:
    match value:
        case Cgroup(level, path):
            if not all(_CGROUP_PART.fullmatch(part) for part in path.split("/")):
                raise ValueError(f"{path!a} is no path of a control group")
            return f'level {_render(level)} "{path}"'
        case bool():
            raise TypeError("a truth value is no number")
        case int():
            if not 0 <= value <= _HIGHEST:
                raise ValueError(f"{value} has not 32 bits")
            return f"{value:d}"
        case IPv4Address() | IPv4Network() | Name():
            return str(value)
        case IPv6Address() | IPv6Network():
            # Python lets a scope be any text, and it passes from an address to a network.
            if "%" in (text := str(value)):
                raise ValueError(f"{text!a} has a scope")
            return text
        case list() | tuple() | set() | frozenset():
            if not value:
                raise ValueError("there are no elements")
            return ", ".join(_render(each) for each in value)
    raise TypeError(f"{type(value).__name__} can't be part of a command for nft")
