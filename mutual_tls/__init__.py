"""What programs share that speak TLS themselves: identities, rules, TLS ends, connecting."""
