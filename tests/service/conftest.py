from collections.abc import Iterator

import pytest

from tests.support.machine import Machine, why_no_machine


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine under systemd, one for each file of tests."""
    if missing := why_no_machine():
        pytest.skip(missing)
    with Machine() as machine:
        yield machine
