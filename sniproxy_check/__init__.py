"""Tells for each host whether it is served, or the first thing that is wrong and what mends it.

- `view`: with whose eyes it is looked at: user, root directory, options of the daemon.
- `entries`: what the names in the hosts directory, and in a host's, say by themselves.
- `walk`: the lookup, which is the daemon's own; and what is to be done about its failures.
- `client`: whose connection is handed over, for backends that want it so.
- `handshake`: what the backend says, through its socket.
- `report`: all that for people, and as JSON.
"""
