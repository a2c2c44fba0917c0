"""Values on their way to nft: none of them can be anything else than what it is."""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutual_tls.netfilter.command import Cgroup, Command, Name
from tests.support.strategies import steady

HOSTILE = (
    "8443; flush ruleset",
    "8443 }\nflush ruleset",
    '"; flush ruleset; "',
    "$other",
    "",
    "443",
)

scopes = st.text(st.characters(exclude_characters="%/"), min_size=1)
addresses_with_scope = scopes.map(lambda scope: IPv6Address(f"fe80::1%{scope}"))

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(HOSTILE)
    | st.binary()
    | st.ip_addresses()
    | addresses_with_scope
    | addresses_with_scope.map(lambda address: IPv6Network((address, 128))),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(), st.integers())
    ),
)


@steady
@given(anything)
def test_what_is_sent_is_numbers_and_addresses(value: object) -> None:
    try:
        text = Command("$value", value=value).text  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    one = r"(\d+|[0-9a-f:.]+(/\d+)?)"
    assert re.fullmatch(f"{one}(, {one})*", text, re.ASCII)


@pytest.mark.parametrize("value", [*HOSTILE, None, b"443", True, 1.0, ["443"], {443: "x"}])
def test_text_and_the_like_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        Command("add element inet t s { $value }", value=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 1 << 32, [], [80, -1]])
def test_numbers_have_32_bits_and_lists_something_in_them(value: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"32 bits|no elements"):
        Command("$value", value=value)


@pytest.mark.parametrize(
    "value", [IPv6Address("fe80::1%a; b"), IPv6Network((IPv6Address("fe80::%a; b"), 64))]
)
def test_a_scope_is_refused(value: IPv6Address | IPv6Network) -> None:
    with pytest.raises(ValueError, match="has a scope"):
        Command("$value", value=value)


def test_values_stand_where_their_names_are() -> None:
    command = Command(
        "add element inet $table prefixes { $prefixes } $port $one",
        table=Name("a_b"),
        prefixes=[IPv4Network("10.0.0.0/8"), IPv6Network("2001:db8::/32")],
        port=443,
        one=IPv4Address("192.0.2.1"),
    )
    assert str(command) == (
        "add element inet a_b prefixes { 10.0.0.0/8, 2001:db8::/32 } 443 192.0.2.1"
    )
    assert str(command + Command("end")) == f"{command} end"


@steady
@given(st.text() | st.sampled_from(HOSTILE))
def test_a_name_is_a_word(text: str) -> None:
    if re.fullmatch("[a-z][a-z0-9_]{0,62}", text):
        assert str(Name(text)) == text
    else:
        with pytest.raises(ValueError, match="is no name for nftables"):
            Name(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What looks like control groups, and a file outside that is not to be had."""
    inner = tmp_path / "cgroup/a.slice/b@1.service"
    inner.mkdir(parents=True)
    for place in tmp_path, inner.parents[1], inner.parent, inner:
        (place / "cgroup.controllers").touch()
    (tmp_path / "cgroup/plain").mkdir()
    return tmp_path / "cgroup"


def test_a_control_group_has_its_depth(root: Path) -> None:
    assert Cgroup.find("/a.slice", root) == (1, "a.slice")
    found = Cgroup.find("a.slice/b@1.service", root)
    assert str(Command("socket cgroupv2 $cgroup", cgroup=found)) == (
        'socket cgroupv2 level 2 "a.slice/b@1.service"'
    )


@pytest.mark.parametrize("path", ["/none", "/plain"])
def test_a_control_group_that_is_none(root: Path, path: str) -> None:
    with pytest.raises(ValueError, match="there is no control group"):
        Cgroup.find(path, root)


@pytest.mark.parametrize(
    "path", ["", "/", "..", "a.slice/../..", "/a.slice/", "a.slice//b@1.service", 'a"', "a\nb"]
)
def test_a_path_that_is_not_passed_on(root: Path, path: str) -> None:
    with pytest.raises(ValueError, match="is no path of a control group"):
        Cgroup.find(path, root)


@steady
@given(st.text() | st.sampled_from(HOSTILE))
def test_no_path_gets_out_of_its_quotes(text: str) -> None:
    try:
        rendered = str(Command("$cgroup", cgroup=Cgroup(1, text)))
    except ValueError:
        return
    assert re.fullmatch('level 1 "[A-Za-z0-9_.:@/-]+"', rendered)
