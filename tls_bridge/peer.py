"""python -m tls_bridge.peer is tls-bridge-peer."""

import sys

from tls_bridge.command import main_peer

if __name__ == "__main__":
    sys.exit(main_peer())
