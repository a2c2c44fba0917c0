"""tls-bridge and tls-bridge-peer: connections to services on other machines, over mutual TLS."""
