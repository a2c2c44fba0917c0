"""Sockets and time: accepting, relaying, draining. Nothing here knows of TLS or of host names.

The rooms, in the order in which a connection meets them:

- `listener`: the listening socket on standard input, checked; accepting.
- `loop`: one trio task over an epoll set of its own, in which every connection is served.
- `relay` and `pipes`: pairs of sockets, and the bytes that move between them.
- `stream`: the same relay over trio streams, for ends that are no plain sockets.
- `signals`, `drain` and `notify`: how a service learns that it shall end, how it ends, and how
  it tells its supervisor.
"""
