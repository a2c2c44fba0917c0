"""What the commands start: it says which package is missing, if one is."""

from sniproxy.service import missing


def main() -> int:
    """Run tls-bridge; return its exit code."""
    return missing.run("tls-bridge", "bridge", "tls_bridge.__main__")


def main_peer() -> int:
    """Run tls-bridge-peer; return its exit code."""
    return missing.run("tls-bridge-peer", "bridge", "tls_bridge.__main__", "main_peer")
