"""What the commands start: it says which package is missing, if one is."""

from sniproxy.service import missing


def main() -> int:
    """Run tproxy-pod; return its exit code."""
    return missing.run("tproxy-pod", "pod", "tproxy_pod.__main__")


def main_inject() -> int:
    """Run tproxy-pod-inject; return its exit code."""
    return missing.run("tproxy-pod-inject", "pod", "tproxy_pod.inject.__main__")
