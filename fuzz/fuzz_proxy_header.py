#!/usr/bin/env python3
"""The addresses of a connection: see `invariants.check_proxy_header`."""

import sys

import atheris

with atheris.instrument_imports(include=["sniproxy", "ipaddress", "fuzz"]):
    from fuzz.invariants import check_proxy_header

atheris.Setup(sys.argv, check_proxy_header)
atheris.Fuzz()
