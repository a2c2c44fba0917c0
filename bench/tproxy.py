"""tls-tproxy beside programs that wrap connections in TLS, and clients that speak TLS themselves.

usage: scripts/bench tproxy [--rounds N] [--quick] [--only WORD] [--save]

As tls.py, which has all of it.
"""

import sys

import tls

if __name__ == "__main__":
    sys.exit(tls.main(tls.WRAPPER))
