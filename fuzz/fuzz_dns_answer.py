#!/usr/bin/env python3
"""A DNS message: see `dns_invariants.check_dns_answer`."""

import sys

import atheris

with atheris.instrument_imports(include=["tls_tproxy", "dnslib", "sniproxy_hostname", "fuzz"]):
    from fuzz.dns_invariants import check_dns_answer

atheris.Setup(sys.argv, check_dns_answer)
atheris.Fuzz()
