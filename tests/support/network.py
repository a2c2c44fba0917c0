"""Machines that are network namespaces, each with a cable to a router in the middle.

    with Network() as network:
        front = network.machine("10.2.1.2")
        listening = front.do(socket.create_server, ("10.2.1.2", 443))

It takes root. Nothing of this machine's own network is touched.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, ParamSpec, Self, TypeVar

from sniproxy.service import libc
from tests.support.daemon import PATIENCE

P = ParamSpec("P")
T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000  # sched.h


# What curl says of a connection that is reset: while it waits for that, or once it stands.
RESET: Final = re.compile(r"reset by peer|Couldn't connect")


def why_no_network(*programs: tuple[str, str]) -> str | None:
    """Return what is missing here, in words for people; None if nothing is.

    Args:
        programs: What else is needed, each with its Debian package.
    """
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for program, package in ("ip", "iproute2"), ("nsenter", "util-linux"), *programs:
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian package {package})"
    cable = "ip link add cable type veth peer name other"
    if subprocess.run(["unshare", "--net", "sh", "-c", cable], capture_output=True).returncode:
        return "no network namespaces with cables are to be had here"
    return None


class Machine:
    """A network namespace, which one thread of ours is in. It ends with its last user.

    Attributes:
        under: The command that becomes another one, in there.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.place = self.do(_enter)
        self.under = ("nsenter", f"--net={self.place}")
        # No second's wait, before an address may be used, for somebody else to claim it.
        self.run("sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad")
        self.run("ip", "link", "set", "lo", "up")

    def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in there: sockets that it makes are of there."""
        return self._thread.submit(function, *args, **kwargs).result()

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command in there; return what it says."""
        done = subprocess.run(
            [*self.under, *command], input=stdin, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def end(self) -> None:
        """Let our thread leave."""
        self._thread.shutdown()


def _enter() -> Path:
    libc.call("unshare", _CLONE_NEWNET)
    return Path("/proc/thread-self").resolve() / "ns/net"


class Network:
    """A router, and the machines around it.

    Attributes:
        router: The one in the middle.
    """

    def __init__(self) -> None:
        self.router = Machine()
        self._machines: list[Machine] = []
        self.router.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for machine in self.router, *self._machines:
            machine.end()

    def machine(self, address: str) -> Machine:
        """Add a machine; its network has 24 bits, and the router the first address in it."""
        machine = Machine()
        self._machines.append(machine)
        gateway = f"{address.rpartition('.')[0]}.1"
        cable = f"to{len(self._machines)}"
        # A namespace goes by the thread that is in it: ip(8) takes that number for a process's.
        leader = machine.place.parts[4]
        self.router.run(
            *("ip", "link", "add", cable, "type", "veth", "peer", "name", "cable", "netns", leader)
        )
        self.router.run("ip", "address", "add", f"{gateway}/24", "dev", cable)
        self.router.run("ip", "link", "set", cable, "up")
        machine.run("ip", "address", "add", f"{address}/24", "dev", "cable")
        machine.run("ip", "link", "set", "cable", "up")
        machine.run("ip", "route", "add", "default", "via", gateway)
        return machine
