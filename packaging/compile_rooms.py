"""The build hook that compiles the rooms that every connection passes, where that is asked for.

    SNIPROXY_COMPILE=1 pip install .

The rooms are those of `pyproject.toml`, and mypyc compiles their very sources. These are in the
wheel as well: a Python that the modules are not made for takes them instead. Without the variable
nothing is compiled, and nothing is needed for it. Nothing is ever left in the tree that is built.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The first that this was tried with. What comes with it makes extension modules.
_COMPILER = "mypy[mypyc] >= 2.4"

# Run where the sources are. Of packages that are not there, such as trio, nothing need be known:
# whether all is right, scripts/lint has said. And a warning is no error: compilers learn new ones.
_COMPILE = """
import sys
from mypyc.build import mypycify
from setuptools import setup
modules = mypycify(
    ["--ignore-missing-imports", *sys.argv[1:]],
    opt_level="3",
    debug_level="0",
    group_name="sniproxy",
)
for module in modules:
    module.extra_compile_args = [word for word in module.extra_compile_args if word != "-Werror"]
setup(name="rooms", packages=[], ext_modules=modules, script_args=["build_ext", "--inplace"])
"""


class CompileRooms(BuildHookInterface[Any]):
    """Compiles into a directory of its own, and has the results put into the wheel."""

    _work: tempfile.TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        """Return what pip is to get first."""
        return [_COMPILER] if _is_wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile.

        Raises:
            RuntimeError: that does not work; the compiler has said why.
        """
        if not _is_wanted():
            return
        if version == "editable":
            self.app.display_warning("SNIPROXY_COMPILE: what is editable is not compiled")
            return
        self._work = tempfile.TemporaryDirectory(prefix="sniproxy-compile-")
        work = Path(self._work.name)
        rooms: list[str] = self.config["rooms"]
        for package in {room.partition("/")[0] for room in rooms} | {"sniproxy_hostname"}:
            shutil.copytree(Path(self.root, package), work / package)
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, *rooms],
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"unable to compile:\n{done.stdout}")
        for module in work.rglob("*.so"):
            place = module.relative_to(work)
            if place.parts[0] != "build":
                build_data["force_include"][str(module)] = str(place)
        # The runtime library of mypyc is in the modules.
        licence = next(file for file in metadata.files("mypy") or () if file.name == "LICENSE")
        build_data["force_include"][str(licence.locate())] = "sniproxy/LICENSE.mypyc"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has by now."""
        if self._work is not None:
            self._work.cleanup()


def _is_wanted() -> bool:
    return os.environ.get("SNIPROXY_COMPILE", "0") not in {"", "0"}
