"""The examples in the README, as they stand, and the programs that they need."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.daemon import PATIENCE

README: Final = Path(__file__).parents[2] / "README.md"

# Namespaces for the network, and for the processes: they end with the shell. /proc has to be of
# theirs: by the number of a process there, one of the machine would be found.
_ALONE: Final = (
    *("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("bash", "-eumc"),
)


def run_example(
    program: str, begin: str, place: Path, *, before: str = "", wait: str, after: str
) -> subprocess.CompletedProcess[str]:
    """Run the example of a program's section, and return what it said.

    Args:
        program: it, and what its section is called.
        begin: how the example begins.
        place: an empty directory.
        before: what is done first.
        wait: what stands in the place of the pause: it waits until the programs are there.
        after: what is done last.
    """
    section = README.read_text().split(f"\n## {program}: ")[1]
    [example] = re.findall(rf"```sh\n({re.escape(begin)}.*?)```", section, re.DOTALL)
    assert example.count("sleep 2;") == 1
    programs = Path(sys.executable).parent
    assert shutil.which(program, path=programs), "the project is not installed"
    return subprocess.run(
        [*_ALONE, before + example.replace("sleep 2;", wait) + after],
        cwd=place,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # three keys of RSA are made
    )
