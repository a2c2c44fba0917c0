"""The marks by which packets are known: our own connections, so that no rule redirects them to us.

They are the same for every program and every instance: none wraps what another one has wrapped.

socket(7): SO_MARK takes CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17. So nobody but root gets
past the rules with it. CAP_NET_RAW is the smaller right of the two, and packet(7) wants it, too.
"""

import socket
from typing import Final

# The bits of a packet's mark that are ours to read. Kubernetes and Calico set single bits from 14
# up in the marks of packets of others, the port mapper of CNI bit 13; what they add does not hide
# ours. Small programs that mark what they like take 1, 2, 3.
MASK: Final = 0x1FFF

# A pattern, and not one bit: many a mark of others has some one bit, and would get past the rules.
MARK: Final = 0x1443

# A connection of ours to a program of this machine, in the name of a client: it has the client's
# address. And packets that stay on this machine, whatever their addresses are.
FOR_CLIENT: Final = 0x1444
STAYS_HERE: Final = 0x1445

# What a connection of ours has set before it connects, as by setsockopt(2).
OPTION: Final = (socket.SOL_SOCKET, socket.SO_MARK, MARK)
OPTION_FOR_CLIENT: Final = (socket.SOL_SOCKET, socket.SO_MARK, FOR_CLIENT)
