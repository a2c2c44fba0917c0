"""A session with nft(8), and tables that last as long as it does.

A table with `flags owner` belongs to the netlink socket that made it. Nobody else can change it,
`flush ruleset` of others passes it by, and when the socket is closed, and be it by SIGKILL, the
kernel removes the table. That takes Linux 5.12. A child that does nothing else holds the socket:
`nft -i`, which reads commands from a socket whose other end we hold. When we are gone it reads the
end, and ends.

Why a child, and not libnftables in this process: to change a table takes CAP_NET_ADMIN at that
moment, netlink(7), and we, who read what the network sends, are to have given it up. The child has
that right alone. A second copy of this program would do as well, but it would need words of its own
for what nft reads anyway. And a process `nft` for each command could hold no table.

PR_SET_PDEATHSIG would add nothing: the kernel asks whether the parent might have sent the signal,
and a parent who has become another user might not send one to root.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Collection
from typing import Final, NoReturn

from mutual_tls.netfilter import child
from mutual_tls.netfilter.command import Command, Name, Value

# Seconds for a command. It takes a millisecond; but the kernel changes the tables of one at a time,
# and those of another one may be large.
_DEADLINE: Final = 10.0

# Seconds for the child's end, before it is killed.
_PATIENCE: Final = 2.0

# nft -i answers nothing when all is well. So after each command it is asked for something that it
# knows without the kernel, and that it answers always in these words.
_QUESTION: Final = "describe meta mark"
_ANSWER: Final = b"meta expression, datatype mark"

# What nft has before what went wrong.
_ERROR: Final = "Error: "

# Bytes of its words that go into an exception: it repeats the command.
_MOST_WORDS: Final = 300


class NftError(Exception):
    """nft has refused a transaction, and none of it was done; the message is in nft's words."""


class NftEndedError(NftError):
    """There is no nft, or none any more, and so no table of ours; the message says why."""


class Nft:
    """A session, for one thread. To be opened with CAP_NET_ADMIN.

    In copies of this process that fork(2) makes, it is closed at once: a worker that outlives the
    first process does not keep its tables.

    Args:
        user: the user id and group id to run nft as, with CAP_NET_ADMIN as its only right; those
            that this process will have. None: nft is run as we are.

    Raises:
        NftEndedError: nft can't be run.
    """

    def __init__(self, user: tuple[int, int] | None = None) -> None:
        try:
            command = [child.find("nft", "nftables"), "-i"]
            self._process, self._socket = child.start(command, user=user)
        except child.MissingProgramError as error:
            raise NftEndedError(f"unable to run nft: {error}") from None
        except OSError as error:
            raise NftEndedError(f"unable to run nft: {error.strerror}") from error
        try:
            self.run()  # whether it answers
        except BaseException:
            self.close()
            raise

    def run(self, *commands: Command) -> None:
        """Do all that, or nothing of it: one transaction.

        It takes a millisecond or so, and ten seconds at the most.

        Raises:
            NftError: nft refuses it.
            NftEndedError: nft has ended, or did not answer in time and was ended.
        """
        line = "; ".join(map(str, commands))
        words = self._ask(line).decode(errors="replace")
        errors = [each for each in words.splitlines() if _ERROR in each]
        if errors:
            detail = "; ".join(each.partition(_ERROR)[2] for each in errors)
            raise NftError(f"nft: {detail[:_MOST_WORDS]}")

    def _ask(self, line: str) -> bytes:
        """Send a line and the question; return what nft says before it answers that."""
        deadline = time.monotonic() + _DEADLINE
        heard = b""
        try:
            self._socket.settimeout(_DEADLINE)
            # It reads a line as a whole before it says anything, and the question is short: neither
            # side can wait for the other one to read. If it has ended, it may have said why.
            with contextlib.suppress(ConnectionError):
                self._socket.sendall(f"{line}\n{_QUESTION}\n".encode("ascii"))
            while True:
                # Only what stands after the answer's first words ends it: all of its line.
                before, found, rest = heard.partition(_ANSWER)
                if found and b"\n" in rest:
                    return before
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                data = self._socket.recv(1 << 16)
                if not data:
                    break
                heard += data
        except TimeoutError:
            self._end_at_once(f"it did not answer within {_DEADLINE:.0f} seconds")
        except OSError as error:
            self._end_at_once(heard.decode(errors="replace").strip() or str(error.strerror))
        self._end_at_once(heard.decode(errors="replace").strip() or "it has ended")

    def _end_at_once(self, why: str) -> NoReturn:
        """End it, for what it has done is not known; its tables go with it."""
        with contextlib.suppress(PermissionError):  # ours is another user now
            self._process.kill()
        with contextlib.suppress(OSError):
            # Not closed: somebody may wait for its end.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reap()
        raise NftEndedError(f"unable to run nft: {' '.join(why.split())[:_MOST_WORDS]}")

    def fileno(self) -> int:
        """Return the descriptor of our end of the session, which lasts while anybody holds it."""
        return self._socket.fileno()

    def has_ended(self) -> bool:
        """Tell whether nft has ended, and our tables with it, which nobody has asked for."""
        try:
            self._socket.setblocking(False)
            # It says nothing but answers, and those have been read.
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Let nft end, and its tables with it; when this returns they are gone."""
        self._socket.close()
        self._reap()

    def _reap(self) -> None:
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):
                self._process.kill()
                self._process.wait(_PATIENCE)


def create_table(name: Name) -> Command:
    """Return the command for a new table of family inet that vanishes with the session.

    nft refuses it if there is one of that name.
    """
    return Command("create table inet $table { flags owner; }", table=name)


def remove_table(name: Name) -> list[Command]:
    """Return the commands that remove a table of family inet, if there is one."""
    return [
        # To delete a table is an error where there is none.
        Command("add table inet $table", table=name),
        Command("delete table inet $table", table=name),
    ]


def replace_elements(table: Name, name: Name, values: Collection[Value]) -> list[Command]:
    """Return the commands after which these are the elements of the set."""
    commands = [Command("flush set inet $table $set", table=table, set=name)]
    if values:
        commands.append(
            Command(
                "add element inet $table $set { $values }",
                table=table,
                set=name,
                values=list(values),
            )
        )
    return commands
