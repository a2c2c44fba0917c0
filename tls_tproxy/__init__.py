"""tls-tproxy: plaintext connections of programs on this machine, wrapped in mutual TLS."""
