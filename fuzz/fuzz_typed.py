#!/usr/bin/env python3
"""What a person typed at sniproxy-hostname: see `invariants.check_typed`."""

import sys

import atheris

with atheris.instrument_imports(include=["sniproxy_hostname", "idna.core", "fuzz"]):
    from fuzz.invariants import check_typed


def check(data: bytes) -> None:
    """Decode as Python decodes an argument: any bytes are text, if odd text."""
    check_typed(data.decode("utf-8", "surrogateescape"))


atheris.Setup(sys.argv, check)
atheris.Fuzz()
