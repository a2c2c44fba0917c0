"""What was found, for people and as JSON."""

import json
import os
import pwd
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from sniproxy_check.finding import CheckReason, Finding, Result, one_line
from sniproxy_check.handshake import Answer

# What does not keep a host from being served.
_WARNINGS: Final = frozenset(
    {
        Answer.CERTIFICATE_EXPIRES_SOON,
        CheckReason.MISSPELT,
        CheckReason.NOT_HANDED_OVER,
        CheckReason.NOT_RELAYED,
        CheckReason.SHARED_PROCESS,
        CheckReason.TWO_PROXY_HEADERS,
        CheckReason.UNCLEAR_HOLD,
        CheckReason.UNKNOWN_FILE,
    }
)

_RED, _GREEN, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"

# Columns of a name before the others are moved to the right.
_WIDEST_NAME: Final = 40

_UID: Final = re.compile(r"\buid ([0-9]{1,10})\b")


def is_served(result: Result) -> bool:
    """Tell whether clients reach the backend, as far as was seen."""
    is_reached = result.listener is not None
    return is_reached and all(finding.word in _WARNINGS for finding in result.findings)


def find_hidden(result: Result, *, chroot: bool) -> Result:
    """Return a result in which what is there out here, but not for the daemon, is called that.

    Args:
        result: what the daemon sees.
        chroot: whether its root directory is the hosts directory.
    """
    return result._replace(
        findings=tuple(_find_hidden(each, chroot=chroot) for each in result.findings)
    )


# What is said of one of two sockets, which does not keep the host from being served.
_OF_ONE_SOCKET: Final = frozenset({CheckReason.NOT_HANDED_OVER, CheckReason.NOT_RELAYED})


def _find_hidden(finding: Finding, *, chroot: bool) -> Finding:
    missing = finding.missing
    if missing is None or not os.path.lexists(missing):
        return finding
    if chroot:
        detail = f"{finding.detail}; it is here, but not in the daemon's root directory"
        mend = "ln -sfnr SOCKET_IN_HOSTS LINK  # a link within the hosts directory, and relative"
        return _as_hidden(finding, CheckReason.ABSOLUTE_IN_CHROOT, detail, mend)
    detail = f"{finding.detail}; it is here, but the daemon's root directory does not have it"
    directory = missing if os.path.isdir(missing) else os.path.dirname(missing)
    place = one_line(directory)
    mend = f"systemctl edit sniproxy.service  # and add: BindReadOnlyPaths={place}"
    return _as_hidden(finding, CheckReason.HIDDEN, detail, mend)


def _as_hidden(finding: Finding, word: CheckReason, detail: str, mend: str) -> Finding:
    return Finding(finding.word if finding.word in _OF_ONE_SOCKET else word, detail, mend)


def show_json(results: Sequence[Result], notes: Sequence[str]) -> str:
    """Return everything as one document."""
    hosts = [_json_of(result) for result in results]
    return json.dumps({"hosts": hosts, "notes": list(notes)}, indent=1) + "\n"


def _json_of(result: Result) -> dict[str, Any]:
    return {
        "host": result.name,
        "directory": result.entry,
        "served": is_served(result),
        "owner": result.owner,
        "listener": result.listener and dict(zip(("pid", "uid"), result.listener, strict=True)),
        "handed_over": result.is_handed_over,
        "handshake": result.is_asked,
        "expires": result.expires,
        "findings": [
            {"reason": each.word, "detail": each.detail, "mend": each.mend}
            for each in result.findings
        ],
    }


def show_table(
    results: Sequence[Result], notes: Sequence[str], *, is_coloured: bool
) -> Iterator[str]:
    """Yield the lines of a table, a summary, and the notes."""
    names = [printable(result.name or result.entry) for result in results]
    width = min(max(map(len, names), default=0), _WIDEST_NAME)
    for name, result in zip(names, results, strict=True):
        for index, (state, colour, text) in enumerate(_rows(result)):
            shown = f"{colour}{state:<26}{_PLAIN}" if is_coloured and colour else f"{state:<26}"
            yield f"{name if index == 0 else '':<{width}}  {shown}  {text}".rstrip()
    served = sum(map(is_served, results))
    wrong = sum(1 for result in results if result.findings)
    yield f"{len(results)} hosts: {served} served, {wrong} with something to mend"
    for note in notes:
        yield f"note: {note}"


def _rows(result: Result) -> Iterator[tuple[str, str, str]]:
    """Yield state, colour and text of the lines of a host."""
    served = is_served(result)
    if served:
        yield "served", _YELLOW if result.findings else _GREEN, _more(result)
    for finding in result.findings:
        colour = _YELLOW if finding.word in _WARNINGS and served else _RED
        yield finding.word, colour, printable(name_users(finding.detail))
        yield "  mend", "", printable(finding.mend)


def _more(result: Result) -> str:
    told = ["handed over"] if result.is_handed_over else []
    if not result.is_asked:
        return " ".join([*told, "(no handshake)"])
    if result.expires is not None:
        day = time.strftime("%Y-%m-%d", time.gmtime(result.expires))
        told.append(f"certificate until {day}")
    return ", ".join(told)


def name_users(text: str) -> str:
    """Return `text` with the name of each user behind their number: the walk knew numbers only."""

    def show(found: re.Match[str]) -> str:
        try:
            return f"{found[0]} ({pwd.getpwuid(int(found[1])).pw_name})"
        except (KeyError, OverflowError):
            return found[0]

    return _UID.sub(show, text)


def printable(text: str) -> str:
    """Return `text` with what a terminal would obey, or can't show, escaped: names are tenants'."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable()
        else char.encode("unicode_escape").decode()
        if not "\udc80" <= char <= "\udcff"
        else f"\\x{ord(char) - 0xDC00:02x}"
        for char in text
    )
