"""Pages that say what is so in bold type, and the tests behind each of these sentences."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def check(page: Path, tests: Mapping[str, Sequence[str]], here: str) -> None:
    """Make sure that each sentence of a page has its tests, and that these are there.

    Args:
        page: Where the sentences are.
        tests: For each of them, in their order, FILE::TEST, the file below tests/; or TEST alone.
        here: The file in which those are.
    """
    sentences = re.findall(r"\*\*(.+?)\*\*", page.read_text(), re.DOTALL)
    assert [" ".join(each.split()) for each in sentences] == list(tests)
    for where in chain(*tests.values()):
        path, _, test = where.rpartition("::")
        source = (_TESTS / path if path else Path(here)).read_text()
        assert f"\ndef {test}(" in source, where
