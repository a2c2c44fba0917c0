"""Bytes and time: accepting and relaying. Nothing here knows of TLS, of names, or of processes.

In the order in which a connection meets them:

- `listener` and `limit`: the listening socket, checked; accepting, and how many there may be.
- `loop`: one trio task over an epoll set of its own, in which every connection is served.
- `relay` and `pipes`: pairs of sockets, and the bytes that move between them.
- `stream`: the same relay over trio streams, for ends that are no plain sockets.
"""
