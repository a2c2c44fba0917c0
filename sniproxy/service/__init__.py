"""What makes a process a service: the same for every program. Nothing here moves a byte of theirs.

In the order in which a program meets them:

- `fatal`: how a program ends that can't do what it is for; exit codes.
- `options`: the options that every program has.
- `standard`: descriptors 0, 1 and 2, as they are found and as they are left.
- `descriptors`: how many descriptors there may be, and what they suffice for.
- `eventlog` and `syslogd`: lines of the log, and where they go.
- `privileges`, `sandbox` and `libc`: another root directory, another user, and what is given up.
- `workers`: several processes that share a listening socket.
- `signals`, `notify` and `drain`: how a service learns that it shall end, how it tells its
  supervisor, and how it ends.
"""
