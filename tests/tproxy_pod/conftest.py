from collections.abc import Iterator

import pytest

from tests.support.pods import Pods


@pytest.fixture(scope="package")
def pods() -> Iterator[Pods]:
    """A router for the pods of all tests."""
    with Pods() as pods:
        yield pods
