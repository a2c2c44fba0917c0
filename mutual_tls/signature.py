"""What tells a file from the one that was in its place before, and from itself before it changed.

What was read of a file counts for as long as stat(2) gives the same signature.
"""

import os

Signature = tuple[int, int, int, int, int]


def signature(status: os.stat_result) -> Signature:
    """Return the signature of a file, as stat(2) has seen it."""
    # A file that was renamed into place may have the size and the time of the one before, and one
    # that was written in place has its inode. ctime can't be set, inode(7).
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
