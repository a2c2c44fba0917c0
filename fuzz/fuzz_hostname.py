#!/usr/bin/env python3
"""A name from the wire: see `invariants.check_hostname`."""

import sys

import atheris

with atheris.instrument_imports(include=["sniproxy_hostname", "fuzz"]):
    from fuzz.invariants import check_hostname

atheris.Setup(sys.argv, check_hostname)
atheris.Fuzz()
