"""A reverse proxy that routes TLS connections by server name and never decrypts them."""

__version__ = "0.1.0"
