#!/usr/bin/env python3
"""A rule, and names in a certificate: see `rule_invariants.check_rule`."""

import sys

import atheris

with atheris.instrument_imports(include=["mutual_tls", "sniproxy_hostname", "fuzz"]):
    from fuzz.rule_invariants import check_rule

atheris.Setup(sys.argv, check_rule)
atheris.Fuzz()
