"""Hostnames: what a client may ask for, and which directory answers.

The daemon and the command `sniproxy-hostname` share this package, so that the tool prints
exactly what the daemon opens. Importing it loads nothing beyond the standard library:

- idna belongs to `_unicode` alone, which only the command imports. The wire carries A-labels,
  and the daemon never decodes a Unicode name;
- blake3 is loaded by the one call that asks for hashed names.
"""

from ._directory import directory_namer
from ._name import Hostname, InvalidHostname

__all__ = ["Hostname", "InvalidHostname", "directory_namer"]
