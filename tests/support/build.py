"""Which build is tested: the sources, or what was compiled of them."""

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Final

ROOT: Final = Path(__file__).parents[2]

# What scripts/test says that it runs. Who says nothing means the sources.
MEANT: Final = os.environ.get("SNIPROXY_TESTED", "pure Python")

_HOOK = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
ROOMS: Final[list[str]] = _HOOK["wheel"]["hooks"]["custom"]["rooms"]


def module_name(room: str) -> str:
    """Return what is imported of a room, which is the path of a file."""
    return room.removesuffix(".py").replace("/", ".")


def build_of(name: str) -> str:
    """Tell what a module is that is imported here."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    is_compiled = isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
    return "compiled" if is_compiled else "pure Python"


class _Sources:
    """Finds the modules of one package in their sources, whatever lies beside them."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._directory = directory
        self._finder = FileFinder(str(directory), (SourceFileLoader, [".py"]))

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self._name:
            start = self._directory / "__init__.py"
            places = [str(self._directory)]
            return importlib.util.spec_from_file_location(
                name, start, submodule_search_locations=places
            )
        if name.startswith(f"{self._name}."):
            return self._finder.find_spec(name)
        return None


def import_sources(package: str) -> ModuleType:
    """Import the sources of a package that imports nothing but its own modules.

    Its name is another one then, so that both builds are there.
    """
    name = f"sources_of_{package.replace('.', '_')}"
    if name not in sys.modules:
        sys.meta_path.insert(0, _Sources(name, ROOT / package.replace(".", "/")))
    return importlib.import_module(name)


def traps(source: str) -> list[str]:
    """Return what of a source mypyc would compile into something else.

    Attribute types that it narrows for too long can't be seen here: the tests of the relay find
    them.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            classes: dict[str, set[str]] = {}
            for handler in ast.walk(node):
                if isinstance(handler, ast.ExceptHandler) and handler.name and handler.type:
                    classes.setdefault(handler.name, set()).add(ast.unparse(handler.type))
            found += [
                f"{node.name}: `{name}` is {' and '.join(sorted(kinds))}"
                for name, kinds in classes.items()
                if len(kinds) > 1
            ]
        elif isinstance(node, ast.Attribute) and node.attr == "__new__":
            found.append(f"`{ast.unparse(node)}` runs __init__, too")
        elif isinstance(node, ast.ClassDef):
            is_enumeration = any("Enum" in ast.unparse(base) for base in node.bases)
            for statement in node.body:
                if isinstance(statement, ast.Assign) and not is_enumeration:
                    names = [ast.unparse(target) for target in statement.targets]
                    if names != ["__slots__"]:
                        found.append(f"{node.name}: {' '.join(names)} is set in the class")
    return found
