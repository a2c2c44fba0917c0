"""What the command starts: it says which package is missing, if one is."""

from sniproxy.service import missing


def main() -> int:
    """Run tls-tproxy; return its exit code."""
    return missing.run("tls-tproxy", "tproxy", "tls_tproxy.__main__")
