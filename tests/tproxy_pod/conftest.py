from collections.abc import Iterator

import pytest

from tests.support.pods import Pod, Pods, Running, running


@pytest.fixture(scope="package")
def pods() -> Iterator[Pods]:
    """A router for the pods of all tests."""
    with Pods() as pods:
        yield pods


@pytest.fixture(scope="module")
def here(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pod whose programs connect."""
    with running(pods.pod(), tmp_path_factory.mktemp("here")) as pod:
        yield pod


@pytest.fixture(scope="module")
def there(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pod whose programs are connected to."""
    with running(pods.pod(), tmp_path_factory.mktemp("there")) as pod:
        yield pod


@pytest.fixture(scope="module")
def outsider(pods: Pods) -> Pod:
    """A machine without tproxy-pod."""
    return pods.pod()
