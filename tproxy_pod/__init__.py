"""tproxy-pod: connections between pods, wrapped in mutual TLS, with the addresses of both."""
