"""What the programs that speak TLS share: settings, identities, and who the other side may be.

It is a leaf beside `sniproxy.engine` and `sniproxy.service`. The SNI router never imports it, for
that one never decrypts; it needs the package cryptography, which the SNI router does not.
"""
