"""`Hostname` → the name of its directory, plain or hashed. One rule, one function.

The choice is made once, when the program starts. Nobody asks for both forms of a name: whoever
may create directories could then take a name that another one holds in the other form.
"""

from collections.abc import Callable

from ._name import Hostname


def directory_namer(hashed: bool) -> Callable[[Hostname], str]:
    """Return the function that names a host's directory.

    Everything it needs is loaded when it is made, nothing when it is called: by then the daemon
    may be in a chroot, where there is no library to import.

    Raises:
        ImportError: Python's package blake3, which hashes, is not there or does not work here.
    """
    if not hashed:
        return str  # a Hostname is one safe path component; that was the point of it

    from blake3 import blake3

    def hashed_name(name: Hostname) -> str:
        """Return what `printf %s NAME | b3sum` prints: 64 lower-case hex digits."""
        return blake3(name.encode("ascii")).hexdigest()

    return hashed_name
