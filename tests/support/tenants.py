"""A machine with tenants, and a page of documentation that is run on it.

    page = Page(Path("docs/hosting.md"))
    with SharedMachine() as machine:
        machine.follow(page["reviewed"])
        machine.listen("two", "/srv/hosts/two.example/tls-socket", "two")
        with machine.daemon() as daemon:
            assert machine.ask(daemon, "two.example") == b"two"

It takes root.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support import hellos
from tests.support.daemon import Daemon, eventually
from tests.support.enclosure import Enclosure
from tests.support.greeting import ask

TENANTS: Final = ("two", "three")

# Of the first tenant. They are nobody's out here, and no other run of these tests has the same.
_UIDS: Final = 1_000_000 + os.getpid() * 10

# Answers each hello with a word, so many times. The socket gets its name when it listens, so that
# whoever sees it can connect.
_GREETER: Final = """
import contextlib, os, socket, sys, threading
path, word, times = sys.argv[1:]
def greet(connection):
    with contextlib.suppress(OSError), connection:
        connection.recv(65536)
        connection.sendall(word.encode() * int(times))
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(path + ".new")
    listening.listen()
    os.rename(path + ".new", path)
    while True:
        threading.Thread(target=greet, args=listening.accept()[:1], daemon=True).start()
"""

# The homes can be searched, so that a link into one is refused for no other reason than the one
# that is meant.
_CLEAN: Final = f"""
awk '$2 ~ "^/(srv|home)/" {{ print $2 }}' /proc/mounts | tac | xargs --no-run-if-empty umount --lazy
rm -rf /srv/* /home/gone
install -d /srv/hosts
[ ! -e /etc/fuse.conf ] || sed -i /^user_allow_other/d /etc/fuse.conf
! getent group tenants >/dev/null || groupdel tenants
for name in {" ".join(TENANTS)}; do
    rm -rf /home/$name
    install -d -o $name -g $name -m 0711 /home/$name
done
"""


@dataclass(frozen=True)
class Block:
    """A block of code on the page.

    Attributes:
        user: Whose it is: who runs it, if it is a script, or has it for a file.
        text: What is in it.
        command: What runs it, if it is a file: the words before the colon that leads to it.
    """

    user: str
    text: str
    command: str

    @property
    def path(self) -> str:
        """Where it is to be, as its first line says."""
        return self.text.splitlines()[0].removeprefix("# ")


class Page(Mapping[str, Block]):
    """The blocks of a page in Markdown that have a name. Readers don't see it.

    <!-- test: NAME -->, or <!-- test: NAME as USER -->, is the line above the fence.
    """

    _BLOCK: Final = re.compile(
        r"(?:`([^`\n]+)`:\n\n)?^<!-- test: (.+?)(?: as (\w+))? -->\n```\w+\n(.*?)^```$",
        re.MULTILINE | re.DOTALL,
    )

    def __init__(self, path: Path) -> None:
        self.text = path.read_text("utf-8")
        self._blocks = {
            name: Block(user or "root", text, command)
            for command, name, user, text in self._BLOCK.findall(self.text)
        }
        assert len(self._blocks) == self.text.count("<!-- test: "), "a name twice, or no block"

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class SharedMachine:
    """An enclosure with the tenants `two` and `three`, and names that lead to it.

    Attributes:
        inside: The enclosure.
    """

    def __init__(self) -> None:
        self.inside = Enclosure()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        # Over /home, and not in its place: this checkout may be there.
        self.root(
            "mkdir -p /run/upper /run/work; mount -t overlay "
            "-o lowerdir=/home,upperdir=/run/upper,workdir=/run/work overlay /home; "
            "ln -s /opt/sniproxy/bin/sniproxy-hostname /run; "
            "echo 127.0.0.1 two.example www.two.example three.example >>/etc/hosts"
        )
        for number, name in enumerate(TENANTS):
            self.root(f"useradd --uid {_UIDS + number} --user-group {name}")
        self.clean()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.inside.__exit__(kind, error, trace)
        self._wait()

    def clean(self) -> None:
        """End what was started, and make it as it was in the beginning."""
        self.inside.end(signal.SIGKILL)
        self._wait()
        self.root(_CLEAN)

    def _wait(self) -> None:
        while self._started:
            self._started.pop().wait()

    def root(self, script: str) -> str:
        """Run a script of root's; return what it says."""
        return self.inside.run(*_SHELL, script)

    def tenant(self, user: str, script: str) -> str:
        """Run a script as that user, in the home directory; return what it says."""
        return self.inside.run(*_as_user(user), *_SHELL, f"cd; {script}")

    def follow(self, block: Block) -> str:
        """Do what the block says, as the one who is to do it."""
        return (
            self.root(block.text) if block.user == "root" else self.tenant(block.user, block.text)
        )

    def start(self, user: str, script: str) -> None:
        """Start a script as that user. It ends when the machine is cleaned, if not before."""
        self._started.append(self.inside.start(*_as_user(user), *_SHELL, f"cd; {script}"))

    def outside(self, path: str) -> Path:
        """Return what is at `path` in there as a path out here."""
        return self.inside / path.lstrip("/")

    def write(self, path: str, text: str, user: str) -> None:
        """Write a file of that user's."""
        self.outside(path).write_text(text)
        self.root(f"chown {user}: {path}")

    def listen(
        self, user: str, path: str, word: str, *, umask: str = "0", times: int = 1, under: str = ""
    ) -> None:
        """Have a listener of that user's, which answers with that word, so many times.

        Args:
            user: Who listens.
            path: Where.
            word: What it answers.
            umask: Which permissions the socket is not to have.
            times: How often it says the word.
            under: A command that becomes the listener.
        """
        self.write("/run/greeter.py", _GREETER, "root")
        command = f"{under} python3 /run/greeter.py {path} {word} {times}"
        self.start(user, f"umask {umask}; exec {command}")
        eventually(lambda: os.path.lexists(self.outside(path)))

    @contextmanager
    def daemon(self, *options: str) -> Iterator[Daemon]:
        """Run the daemon on port 443, as the user `sniproxy`."""

        def start() -> Daemon:
            # The port may have been used a moment ago: create_server() does not mind.
            with socket.create_server(("127.0.0.1", 443), backlog=socket.SOMAXCONN) as listening:
                arguments = ("--user", "sniproxy", *options)
                return Daemon(listening, Path("/srv/hosts"), arguments, measured=False)

        with self.inside.do(start) as daemon:
            daemon.wait_for_log("listening")
            yield daemon

    def ask(self, daemon: Daemon, name: str) -> bytes:
        """Return what a client of that name gets."""
        return self.inside.do(ask, daemon, name)

    def connect(self, name: str) -> socket.socket:
        """Return a client that has asked for that name."""
        client = self.inside.connect(("127.0.0.1", 443))
        client.sendall(hellos.hello_bytes(name))
        return client


_SHELL: Final = ("env", "PATH=/run:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-euc")


def _as_user(user: str) -> tuple[str, ...]:
    home = f"/home/{user}" if user in TENANTS else "/"
    ids = (f"--reuid={user}", f"--regid={user}", "--init-groups")
    return ("setpriv", *ids, "env", f"HOME={home}")
