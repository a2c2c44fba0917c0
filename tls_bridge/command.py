"""What the commands start: it says which package is missing, if one is."""

import shlex
import sys


def main() -> int:
    """Run tls-bridge; return its exit code."""
    try:
        from tls_bridge.__main__ import main as run
    except ModuleNotFoundError as error:
        return _complain("tls-bridge", error)
    return run()


def main_peer() -> int:
    """Run tls-bridge-peer; return its exit code."""
    try:
        from tls_bridge.__main__ import main_peer as run
    except ModuleNotFoundError as error:
        return _complain("tls-bridge-peer", error)
    return run()


def _complain(program: str, error: ModuleNotFoundError) -> int:
    missing = f"unable to start: the Python package {error.name} is missing"
    # The pip of this very environment, which has sniproxy: it fetches what that lacks. Another one
    # would look elsewhere for something called sniproxy.
    pip = f"{shlex.quote(sys.executable)} -m pip install 'sniproxy[bridge]'"
    print(f"{program}: fatal: {missing}; {pip}", file=sys.stderr)  # noqa: T201
    return 100  # it does not get better by itself
