"""Whether the kernel can be told to remember half-closed connections."""

from typing import Final

import pytest

from mutual_tls.netfilter.command import Command, Name
from mutual_tls.netfilter.memory import Memory
from mutual_tls.netfilter.table import Nft, NftEndedError, NftError, create_table
from tests.support.network import Machine, why_no_network

_why_not: Final = why_no_network(("nft", "nftables"))
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))

TABLE: Final = Name("of_a_test")


def test_it_can_be_told(machine: Machine, nft: Nft) -> None:
    memory = Memory(nft)
    assert machine.run("nft", "list", "tables") == ""
    chain = Command("add chain inet $table c { type filter hook output priority 0; }", table=TABLE)
    rules = [Command("add rule inet $table c", table=TABLE) + rule for rule in memory.rules]
    nft.run(create_table(TABLE), *memory.policies(TABLE), chain, *rules)
    said = machine.run("nft", "list", "table", "inet", str(TABLE))
    assert "close_wait" in said
    assert said.count("ct timeout set") == 2


def test_where_it_can_not_be_told_there_is_nothing(
    nft: Nft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*commands: Command) -> None:
        raise NftError("Could not process rule: Not supported")

    monkeypatch.setattr(nft, "run", refuse)
    memory = Memory(nft)
    assert memory.rules == ()
    assert memory.policies(TABLE) == []


def test_an_nft_that_has_ended_is_told(nft: Nft) -> None:
    nft.close()
    with pytest.raises(NftEndedError):
        Memory(nft)
