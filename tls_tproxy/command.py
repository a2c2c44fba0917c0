"""What the command starts: it says which package is missing, if one is."""

import sys


def main() -> int:
    """Run tls-tproxy; return its exit code."""
    try:
        from tls_tproxy.__main__ import main as run
    except ModuleNotFoundError as error:
        missing = f"unable to start: the Python package {error.name} is missing"
        print(f"tls-tproxy: fatal: {missing}; pip install 'sniproxy[tproxy]'", file=sys.stderr)  # noqa: T201
        return 100  # it does not get better by itself
    return run()
