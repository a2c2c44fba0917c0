"""tls-tproxy: plain connections of this machine's own clients, wrapped in mutual TLS."""
