"""What a program calls itself in Via: by that it knows that a request comes round again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from tls_bridge.session import pseudonym
os.chdir(sys.argv[1])
if "chroot" in sys.argv:
    os.chroot(".")
print(pseudonym("tls-bridge"))
"""


def pseudonym(*words: str | Path) -> str:
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout


@pytest.mark.parametrize("options", [[], ["chroot"]], ids=["anywhere", "chroot"])
def test_it_is_the_same_again_and_another_one_elsewhere(tmp_path: Path, options: list[str]) -> None:
    if options and os.geteuid() != 0:
        pytest.skip("only root can change its root directory")
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    one, again, two = (pseudonym(place, *options) for place in (places[0], *places))
    assert one == again
    assert one != two
