"""docs/troubles.md: of one mind with the programs, and every word in it can be found."""

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import mutual_tls.refusal
import mutual_tls.relay
import sniproxy.serve
import sniproxy.session
import tls_bridge.serve
import tls_tproxy.serve
import tproxy_pod.serve
from mutual_tls.dial import DialReason
from mutual_tls.end import TLSReason
from sniproxy.hosts import HostReason, HostsState
from sniproxy.session import _ENDINGS as ENDINGS
from sniproxy.session import _HANDED_OVER as HANDED_OVER
from sniproxy.wire import Reason
from sniproxy_check.finding import CheckReason
from sniproxy_check.handshake import Answer
from tls_bridge.refusal import BridgeReason
from tls_tproxy.refusal import WrapReason
from tproxy_pod.refusal import PodReason
from tproxy_pod.session import PlainEnding

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs/troubles.md"

SYMPTOMS, REASONS = "What you see", "Reasons"
ENDS, STATES = "How connections end", "The hosts directory is no longer the same"
FINDINGS = "What sniproxy-check says"

# --- The words, and who has them

# What sniproxy-check finds, but for reasons of the daemon's.
CHECK_FINDINGS: Final = {*CheckReason, *Answer} - {Answer.SPEAKS_TLS}

_OF_TLS: Final = {*mutual_tls.refusal.SessionReason, *DialReason, *TLSReason}

# Who says no name asks nobody for addresses; and only the peer leaves addresses out.
_NOT_RESOLVING: Final = {DialReason.UNRESOLVED, DialReason.FORBIDDEN}

# tls-bridge judges servers, and no clients.
_NOT_OF_THE_BRIDGE: Final = {BridgeReason.CLIENT_NOT_ALLOWED, DialReason.FORBIDDEN}

# tls-bridge-peer is a server: nobody says a hello inside TLS, and no peer is behind it that could
# answer or have a wrong name.
_NOT_OF_THE_PEER: Final = {
    BridgeReason.BAD_HELLO,
    BridgeReason.PEER_NOT_HTTP,
    BridgeReason.PEER_REFUSED,
    TLSReason.WRONG_NAME,
}

REASONS_OF: Final[dict[str, AbstractSet[str]]] = {
    "sniproxy": {
        *HostReason,
        *Reason,
        *sniproxy.session.SessionReason,
        *sniproxy.session.SessionWarning,
    },
    "tls-bridge": {*BridgeReason, *_OF_TLS} - _NOT_OF_THE_BRIDGE,
    "tls-bridge-peer": {*BridgeReason, *_OF_TLS} - _NOT_OF_THE_PEER,
    "tls-tproxy": {*WrapReason, *_OF_TLS} - _NOT_RESOLVING,
    "tproxy-pod": {*PodReason, *_OF_TLS} - _NOT_RESOLVING,
}

_ENDINGS_OF_TLS: Final = set(mutual_tls.relay.Ending)

ENDINGS_OF: Final[dict[str, AbstractSet[str]]] = {
    "sniproxy": {*ENDINGS.values(), HANDED_OVER},
    "tls-bridge": _ENDINGS_OF_TLS,
    "tls-bridge-peer": _ENDINGS_OF_TLS,
    "tls-tproxy": _ENDINGS_OF_TLS,
    "tproxy-pod": {*_ENDINGS_OF_TLS, *PlainEnding},
}

STATES_OF: Final[dict[str, AbstractSet[str]]] = {"sniproxy": set(HostsState)}


def union(words_of: dict[str, AbstractSet[str]]) -> set[str]:
    """Return the words of all programs."""
    return {str(word) for words in words_of.values() for word in words}


ALL_REASONS: Final = union(REASONS_OF)

# Which words have their headings in which section. What is in several lists has one paragraph, in
# the first section.
HEADINGS: Final[dict[str, AbstractSet[str]]] = {
    REASONS: ALL_REASONS,
    ENDS: union(ENDINGS_OF) - ALL_REASONS,
    STATES: union(STATES_OF),
    FINDINGS: CHECK_FINDINGS - ALL_REASONS,
}

# --- The page


class Section(NamedTuple):
    """A heading of the third level, as it is written, and what stands below it."""

    heading: str
    body: str


def without_blocks(text: str) -> str:
    """Return a text without its blocks of code: a # in there begins no heading."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[Section]]:
    """Return what is under each heading of the second level."""
    found: dict[str, list[Section]] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, rest = part.partition("\n")
        found[heading] = [
            Section(first, body)
            for first, _, body in (
                each.partition("\n") for each in re.split(r"^### ", rest, flags=re.MULTILINE)[1:]
            )
        ]
    return found


SECTIONS: Final = sections()


def anchors(text: str) -> list[str]:
    """Return the anchors of a page's headings as GitHub makes them.

    In lower case, without what is neither letter, digit, hyphen, underscore nor space, and with
    hyphens for spaces. A second one of the same name gets a number, which nobody wants to write.
    """
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    shown = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", each) for each in headings]
    return [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in shown]


def links(text: str) -> list[str]:
    """Return where the links of a text lead."""
    without_code = re.sub(r"`[^`]*`", "", without_blocks(text))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def spans(text: str) -> Iterator[str]:
    """Yield what stands in a text as code: lines of blocks without comments, and spans."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from (line.partition("  #")[0].strip() for line in block.splitlines())
    for span in re.findall(r"`([^`]+)`", without_blocks(text)):
        yield " ".join(span.split())


# --- Its words


def test_the_lists_are_all_that_the_programs_know() -> None:
    # Whatever serves is imported with these, and so are its lists.
    programs = (sniproxy.serve, tls_bridge.serve, tls_tproxy.serve, tproxy_pod.serve)
    ours = ("mutual_tls.", *(each.__name__.removesuffix("serve") for each in programs))
    named = ("Reason", "Ending", "State")
    lists = {
        f"{each.__module__}.{each.__name__}"
        for each in StrEnum.__subclasses__()
        if each.__module__.startswith(ours) and each.__name__.endswith(named)
    }
    assert lists == {
        "sniproxy.engine.ending.Ending",  # the words for the log are those of _ENDINGS
        "sniproxy.hosts.HostReason",
        "sniproxy.hosts.HostsState",
        "sniproxy.session.SessionReason",
        "sniproxy.wire.errors.Reason",
        "mutual_tls.dial.DialReason",
        "mutual_tls.end.TLSReason",
        "mutual_tls.refusal.SessionReason",
        "mutual_tls.relay.Ending",
        "tls_bridge.refusal.BridgeReason",
        "tls_tproxy.refusal.WrapReason",
        "tproxy_pod.refusal.PodReason",
        "tproxy_pod.session.PlainEnding",
    }


@pytest.mark.parametrize("name", HEADINGS)
def test_each_word_has_one_heading_and_they_are_sorted(name: str) -> None:
    written = [each.heading for each in SECTIONS[name]]
    assert written == [f"`{word}`" for word in sorted(HEADINGS[name])]


def test_the_parts_are_there_in_this_order() -> None:
    assert list(SECTIONS) == [SYMPTOMS, *HEADINGS]


def programs_at(section: Section) -> list[str]:
    """Return the programs that stand in front of a paragraph."""
    found = re.match(r"\n\*([a-z, \-]+)\.\*\s", section.body)
    return [] if found is None else found[1].split(", ")


@pytest.mark.parametrize(
    ("name", "words_of"), [(REASONS, REASONS_OF), (ENDS, ENDINGS_OF), (STATES, STATES_OF)]
)
def test_the_programs_at_a_word_are_those_that_have_it(
    name: str, words_of: dict[str, AbstractSet[str]]
) -> None:
    for section in SECTIONS[name]:
        word = section.heading.strip("`")
        having = [program for program, words in words_of.items() if word in words]
        assert programs_at(section) == having, word


def test_what_has_two_meanings_says_both() -> None:
    """Each of these has one paragraph only."""
    paragraphs = {each.heading.strip("`"): each.body for each in SECTIONS[REASONS]}
    for word in union(ENDINGS_OF) & ALL_REASONS:
        assert "`ending=`" in paragraphs[word], word
    for word in CHECK_FINDINGS & ALL_REASONS:
        assert "sniproxy-check says" in " ".join(paragraphs[word].split()), word


# --- Its links


def test_no_two_headings_have_one_anchor() -> None:
    found = anchors(PAGE.read_text())
    assert sorted(found) == sorted(set(found))


def test_each_link_leads_somewhere() -> None:
    for link in links(PAGE.read_text()):
        path, _, anchor = link.partition("#")
        target = PAGE.parent / path if path else PAGE
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_each_word_is_found_by_what_people_see() -> None:
    linked = {link for section in SECTIONS[SYMPTOMS] for link in links(section.body)}
    wanted = {f"#{word}" for words in HEADINGS.values() for word in words}
    assert wanted - linked == set()


def test_a_link_to_a_word_is_called_like_it() -> None:
    words = {word for words in HEADINGS.values() for word in words}
    text = without_blocks(PAGE.read_text())
    for name, target in re.findall(r"\[([a-z0-9_]+)\]\(#([^)\s]+)\)", text):
        if target in words:
            assert name == target


def test_each_symptom_says_what_to_do_first() -> None:
    for section in SECTIONS[SYMPTOMS]:
        first = re.findall(r"^First: (.+)", section.body, re.MULTILINE)
        assert len(first) == 1, section.heading
        typed = {span.split()[0] for span in spans(first[0])}
        assert typed & (COMMANDS | OURS.keys()), section.heading


# --- What it has people type

# Programs that the page has people run, which are no programs of ours.
COMMANDS: Final = frozenset(
    {
        *("certbot", "chgrp", "chmod", "chown", "curl", "date", "getent", "getfacl", "install"),
        *("ip", "journalctl", "kubectl", "ln", "ls", "mkdir", "mount", "mv", "namei", "openssl"),
        *("ping", "rm", "runuser", "setfacl", "ss", "sysctl", "systemctl", "timedatectl"),
        *("touch", "useradd"),
    }
)

# Ours, and the pages that have their options.
OURS: Final = {
    "sniproxy": "sniproxy.8",
    "sniproxy-check": "sniproxy-check.1",
    "sniproxy-hostname": "sniproxy-hostname.1",
    "sniproxy-status": "sniproxy-status.1",
    "tls-bridge": "tls-bridge.8",
    "tls-bridge-peer": "tls-bridge-peer.8",
    "tls-tproxy": "tls-tproxy.8",
    "tproxy-pod": "tproxy-pod.8",
}

# Files of the directories that the programs look into, from their pages of chapter 5.
FILES: Final = re.compile(
    r"(?:^|/)(?:(?:tls|handoff)-socket|send-proxy-v[12]|pod/|wrap/|hosts/|peers/|allow/|rules\.d|clients|"
    r"identity|servers|(?:cert|key|ca)\.pem)"
)


def options_of(page: str) -> set[str]:
    """Return the options that a manual describes, as they are typed."""
    source = (ROOT / "man" / page).read_text()
    return {f"--{each}" for each in re.findall(r"\bFl Fl ([a-zA-Z-]+)", source)}


ALL_OPTIONS: Final = set[str]().union(*map(options_of, OURS.values()))


def helps(span: str) -> bool:
    """Tell whether this is a command, an option, a file of ours, or a setting of a unit."""
    first = span.split()[0]
    return (
        first in COMMANDS
        or first in OURS
        or first in ALL_OPTIONS
        or FILES.search(span) is not None
        or re.fullmatch(r"[A-Z][A-Za-z]+=\S*", first) is not None
    )


def test_each_paragraph_has_something_to_do_or_to_look_at() -> None:
    helpless = [
        section.heading
        for name in HEADINGS
        for section in SECTIONS[name]
        if not any(helps(span) for span in spans(section.body))
    ]
    assert helpless == []


def test_options_of_ours_exist() -> None:
    for span in spans(PAGE.read_text()):
        first, *rest = span.split()
        if first in OURS:
            assert {word for word in rest if word.startswith("--")} <= options_of(OURS[first]), span
        elif first.startswith("--"):
            assert first in ALL_OPTIONS, span


def test_commands_are_of_the_list() -> None:
    """What is in the list and not in the page could go; what is in a block is in the list."""
    typed = {span.split()[0] for span in spans(PAGE.read_text())}
    assert typed >= COMMANDS
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.split()[0] for block in blocks for line in block.splitlines()]
    assert set(lines) <= COMMANDS | OURS.keys()
