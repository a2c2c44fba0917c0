"""What a system call fails with when the machine has nothing left: nobody asked is at fault."""

import errno

# No descriptor (for the process, for the machine), no buffer, no memory.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
