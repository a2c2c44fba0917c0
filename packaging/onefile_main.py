"""What the one file runs: the program by whose name it was called.

Even Python 2 can read this: a Python that is too old has to be able to say so.
"""

import os
import sys

name = os.path.basename(sys.argv[0])

if sys.version_info < (3, 11):  # noqa: UP036 - see above
    found = sys.executable + " is " + sys.version.split()[0]
    choose = "to choose another: python3.11 -I " + sys.argv[0]
    sys.stderr.write(name + ": fatal: unable to run: Python 3.11 or newer is needed, and ")
    sys.stderr.write(found + "; " + choose + "\n")
    sys.exit(100)  # it does not get better by itself

# Else ps(1) and pkill(1) would know it as python3. The kernel keeps 15 bytes.
try:
    with open("/proc/self/comm", "w") as comm:
        comm.write(name)
except EnvironmentError:  # noqa: UP024 - no /proc
    pass

if name == "sniproxy-listen":
    from sniproxy.listen import main
elif name == "sniproxy-hostname":
    from sniproxy_hostname.__main__ import main
elif name == "sniproxy-check":
    from sniproxy_check.__main__ import main
elif name == "sniproxy-status":
    from sniproxy_status.__main__ import main
else:
    from sniproxy.__main__ import main

sys.exit(main())
