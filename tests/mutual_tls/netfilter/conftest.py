from collections.abc import Iterator

import pytest

from mutual_tls.netfilter.table import Nft
from tests.support.network import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A network namespace, of the test alone."""
    machine = Machine()
    yield machine
    machine.end()


@pytest.fixture
def nft(machine: Machine) -> Iterator[Nft]:
    """A session with nft there."""
    nft = machine.do(Nft)
    yield nft
    nft.close()
