"""A program whose packages are not all there: which one is missing, and how to get it."""

import shlex
import sys
from collections.abc import Callable
from importlib import import_module

# It does not get better by itself: the exit code of UsageError.
_CODE = 100


def run(program: str, extra: str, module: str, function: str = "main") -> int:
    """Run a program's function; return its exit code.

    Args:
        program: its name.
        extra: what installs all that it needs.
        module: where the function is; it is not loaded before.
        function: its name.
    """
    try:
        main: Callable[[], int] = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        missing = f"unable to start: the Python package {error.name} is missing"
        # The pip of this very environment, which has sniproxy: it fetches what that lacks. Another
        # one would look elsewhere for something called sniproxy.
        pip = f"{shlex.quote(sys.executable)} -m pip install 'sniproxy[{extra}]'"
        print(f"{program}: fatal: {missing}; {pip}", file=sys.stderr)  # noqa: T201
        return _CODE
    return main()
