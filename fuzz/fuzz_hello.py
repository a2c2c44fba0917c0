#!/usr/bin/env python3
"""A TLS stream: see `invariants.check_hello`."""

import sys

import atheris

with atheris.instrument_imports(include=["sniproxy", "sniproxy_hostname", "fuzz"]):
    from fuzz.invariants import check_hello

atheris.Setup(sys.argv, check_hello)
atheris.Fuzz()
