"""What is wrong: a word, a sentence, and the command that mends it."""

from enum import StrEnum
from typing import Any, NamedTuple


class CheckReason(StrEnum):
    """What is found beside the daemon's reasons, and beside what backends answer."""

    NOT_CANONICAL = "not_canonical"  # no client's name is written that way
    NEVER_MATCHES = "never_matches"  # no client's name can lead there
    MISSPELT = "misspelt"  # an entry that is nearly one that counts
    UNKNOWN_FILE = "unknown_file"  # one that another version may know
    HIDDEN = "hidden"  # it is there, but not for the daemon
    ABSOLUTE_IN_CHROOT = "absolute_in_chroot"  # a link leads to another place in there
    TWO_PROXY_HEADERS = "two_proxy_headers"  # of which one is sent
    UNCLEAR_HOLD = "unclear_hold"  # not as long as is written there
    HANDOFF_IS_OFF = "handoff_is_off"  # the only socket is one that the daemon does not look for
    NOT_HANDED_OVER = "not_handed_over"  # of two sockets, the one that comes first is out of order
    NOT_RELAYED = "not_relayed"  # of two sockets, the one for when the other fails is
    SHARED_PROCESS = "shared_process"  # one process answers for hosts of several owners


class Finding(NamedTuple):
    """Something that is wrong with a host.

    Attributes:
        word: For docs/troubles.md.
        detail: In more words.
        mend: The command that mends it, with what is in capitals filled in; or a comment, where
            there is none.
        missing: The absolute path that is not there, if that is what is wrong.
    """

    word: str
    detail: str
    mend: str
    missing: str | None = None


def typed(mend: str) -> str:
    """Return a command as it may be shown: one with what can't be shown would be another one.

    A tenant could have made the name that the command has when it is typed.
    """
    return mend if mend.isprintable() else f"# {one_line(mend)} (with names that can't be typed)"


def one_line(text: str) -> str:
    """Return `text` as it may stand behind a `#` of the shell: no line of it is another command."""
    return "".join(char if char.isprintable() else "?" for char in text)


class Result(NamedTuple):
    """What is known of a host.

    Attributes:
        entry: The name of its directory.
        name: Its name; None if nobody can say, for a hash.
        owner: The uid of its directory's owner; None if that is not known.
        listener: The process and the user who listen; None if nobody was reached.
        is_asked: Whether there was a handshake.
        expires: When its certificate ends, in Unix time, if that was seen.
        findings: What is wrong: what keeps it from being served is the first.
        is_handed_over: Whether its backend gets the connections of clients themselves.
        has_idle_handoff: Whether it is served, and has a socket for that which does not count.
        unasked: Why there was no handshake, if there was to be one and it is no fault of the host.
    """

    entry: str
    name: str | None
    owner: int | None = None
    listener: tuple[int, int] | None = None
    is_asked: bool = False
    expires: float | None = None
    findings: tuple[Finding, ...] = ()
    is_handed_over: bool = False
    has_idle_handoff: bool = False
    unasked: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` makes the same of."""
        findings = [each._replace(mend=typed(each.mend)) for each in self.findings]
        return self._asdict() | {"findings": [each._asdict() for each in findings]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Result":
        """Return what was told by `to_json`."""
        listener = fields["listener"]
        findings = tuple(Finding(**each) for each in fields["findings"])
        listener = None if listener is None else (listener[0], listener[1])
        return cls(**(fields | {"findings": findings, "listener": listener}))
