"""What the command starts: it says which package is missing, if one is."""

from sniproxy.service import missing


def main() -> int:
    """Run tproxy-pod; return its exit code."""
    return missing.run("tproxy-pod", "pod", "tproxy_pod.__main__")
