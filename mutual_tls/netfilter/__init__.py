"""What programs share to whom the kernel redirects connections: marks, destinations, tables.

It knows the kernel's packet filter, and nothing of TLS or of what is done with a connection.
"""
