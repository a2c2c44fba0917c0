"""What tls-tproxy is tested with: a machine, its resolver, and servers on another one.

    with Site() as site, site.start(place, *site.options(place)) as daemon:
        server = site.serve(site.new_name(), ...)

The names v1.example, v2.example and so on have an address of each family. All of these addresses
are the other machine's, so that each test has some that nobody has looked up before.
"""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import pytest
import trustme

from sniproxy.service import libc
from tests.support.bridge import authority, write, write_identity
from tests.support.daemon import PATIENCE, Daemon, unmeasured
from tests.support.dns import AAAA, A, asking
from tests.support.network import Machine, Network

CLIENT: Final = "client.example"
MOST_NAMES: Final = 250

# Where connections are taken, and where they lead.
TAKEN, PORT = 8443, 443

# Seconds. The limit of a handshake is ten: whoever is refused in less has not waited for it.
AT_ONCE: Final = 5.0

# RFC 8446 §4 and §5.1.
_CERTIFICATE: Final = 11
_HANDSHAKE: Final = 22

# Addresses of the two machines, in each family.
HERE: Final = {4: "10.9.8.2", 6: "fd98::2"}
ROUTER: Final = {4: "10.9.8.1", 6: "fd98::1"}

# Within a mount namespace of its own, a program reads these two files in the place of the system's.
_UNDER_FILES: Final = (
    'mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
)


class Name(NamedTuple):
    """A name that the resolver knows, and its addresses."""

    name: str
    addresses: dict[int, str]

    @property
    def address(self) -> str:
        """The IPv4 one."""
        return self.addresses[4]

    @property
    def other(self) -> str:
        """Another name, which has that address only."""
        return f"other-{self.name}"


class End:
    """A server's end of one connection, which sees all of TLS that a TLS library would hide.

    Attributes:
        raw: All bytes that came in.
        sni: The name that was asked for, if it was.
        is_certificate_seen: Whether a certificate has come in, in whatever state the handshake is.
        certificate: That of the client, DER; None if it has shown none.
        received: What it said within.
        failure: What the handshake, or reading, ended with.
        is_reset: Whether the client has reset the connection, or never ended it properly.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = sock
        sock.settimeout(PATIENCE)
        self.raw = bytearray()
        self.received = bytearray()
        self.sni: str | None = None
        self.is_certificate_seen = False
        self.certificate: bytes | None = None
        self.failure: str | None = None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        _ends[id(self._tls)] = self

    @property
    def version(self) -> str | None:
        """That of TLS."""
        return self._tls.version()

    def shake_hands(self) -> None:
        """Do the handshake."""
        self._drive(self._tls.do_handshake)
        self.certificate = self._tls.getpeercert(binary_form=True)

    def receive(self) -> bytes:
        """Return what has come in; nothing at the end, if it was announced.

        Raises:
            OSError: it was not.
        """
        try:
            data: bytes = self._drive(self._tls.read, 1 << 16)
        except ssl.SSLZeroReturnError:
            return b""
        self.received += data
        return data

    def send(self, data: bytes) -> None:
        """Send it."""
        self._tls.write(data)
        self._flush()

    def end_half(self) -> None:
        """Say that nothing will follow; go on listening."""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            self._tls.unwrap()
        self._flush()

    def close(self) -> None:
        """Leave, without another word."""
        _ends.pop(id(self._tls), None)
        self.socket.close()

    def _drive(self, step: Callable[..., Any], *args: int) -> Any:
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.socket.recv(1 << 16)
                if not data:
                    raise ConnectionAbortedError("the end came without close_notify") from None
                self.raw += data
                self._in.write(data)
            except ssl.SSLError as error:
                self.failure = error.reason
                with contextlib.suppress(OSError):
                    self._flush()
                raise
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self._out.read():
            self.socket.sendall(data)


# By the identity of their SSLObject, which is what OpenSSL's callbacks are given.
_ends: dict[int, End] = {}


def _note_name(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
    _ends[id(tls)].sni = name


def _note_message(
    tls: ssl.SSLObject, direction: str, _: object, content: int, message: int, __: bytes
) -> None:
    if (direction, int(content), int(message)) == ("read", _HANDSHAKE, _CERTIFICATE):
        _ends[id(tls)].is_certificate_seen = True


def server_context(
    *names: str,
    ca: trustme.CA | None = None,
    asks: bool = True,
    version: ssl.TLSVersion | None = None,
    certificate: trustme.LeafCert | None = None,
) -> ssl.SSLContext:
    """Return what a server needs that demands a client certificate of our authority.

    Args:
        names: whom its certificate is for.
        ca: who has issued it; by default our authority.
        asks: whether it demands one.
        version: the only one of TLS that it has.
        certificate: instead of one for the names.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (certificate or (ca or authority()).issue_cert(*names)).configure_cert(context)
    if asks:
        authority().configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    if version is not None:
        context.minimum_version = context.maximum_version = version
    context.sni_callback = _note_name
    # It is for debugging; but nothing else tells which messages came in within TLS 1.3.
    context._msg_callback = _note_message  # type: ignore[attr-defined]
    return context


def echo(end: End) -> None:
    """Say back all that comes, and end after the end."""
    while data := end.receive():
        end.send(data)
    end.end_half()


class Server:
    """A server, until it is closed.

    Attributes:
        ends: Its connections, the oldest first; each is there when it has been accepted.
    """

    def __init__(
        self,
        listening: socket.socket,
        context: ssl.SSLContext,
        behave: Callable[[End], None] = echo,
    ) -> None:
        self._listening = listening
        self._context = context
        self._behave = behave
        self._arrived = threading.Condition()
        self.ends: list[End] = []
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        end = End(sock, self._context)
        with self._arrived:
            self.ends.append(end)
            self._arrived.notify_all()
        try:
            end.shake_hands()
            self._behave(end)
        except OSError as error:
            end.failure = end.failure or str(error)
        finally:
            end.close()

    def end(self, number: int = 0) -> End:
        """Return that connection, once it is there."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.ends) > number, PATIENCE)
            return self.ends[number]

    def close(self) -> None:
        """Listen no more, and wait for the connections to end."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a connection to a server has not ended"


class Site:
    """The machine `here`, where tls-tproxy and its clients run, and the `router`, who serves."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._numbers = count(1)
        self.network = Network()
        self.here: Machine
        self.router: Machine

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.network)
            self.router = self.network.router
            self.here = self.network.machine(HERE[4])
            for machine, cable, address in (
                (self.here, "cable", HERE[6]),
                (self.router, "to1", ROUTER[6]),
            ):
                machine.run("ip", "address", "add", f"{address}/64", "dev", cable, "nodad")
            self.here.run("ip", "-6", "route", "add", "default", "via", ROUTER[6])
            for prefix in "10.77.0.0/16", "fd77::/64":
                self.router.run("ip", "route", "add", "local", prefix, "dev", "lo")
            # In IPv4, such a route makes them addresses of ours; in IPv6, it takes this as well.
            self.router.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind")
            self._start_resolvers(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start_resolvers(self, stack: ExitStack) -> None:
        names = [_name(n) for n in range(1, MOST_NAMES)]
        records = [
            *(f"--host-record={each.name},{','.join(each.addresses.values())}" for each in names),
            # Two names of one address; a chain; one that nobody may remember.
            *(f"--host-record={each.other},{each.address}" for each in names),
            *(f"--cname=middle-{each.name},{each.name}" for each in names),
            *(f"--cname=alias-{each.name},middle-{each.name}" for each in names),
            *(f"--host-record=brief-{each.name},{each.address},0" for each in names),
        ]
        start_dnsmasq(stack, self.router, f"--listen-address={ROUTER[4]}", *records)
        upstream = f"--server={ROUTER[4]}"
        start_dnsmasq(stack, self.here, "--listen-address=127.0.0.1", "--interface=lo", upstream)
        for server in ROUTER[4], "127.0.0.1":
            self.here.do(ask, server, "v1.example")

    def new_name(self) -> Name:
        """Return a name that no test has had."""
        return _name(next(self._numbers))

    def look_up(self, name: str, kind: int = A, server: str = ROUTER[4]) -> None:
        """Ask the resolver, as any program here would."""
        self.here.do(ask, server, name, kind)

    def connect(self, address: str, port: int = TAKEN, *, user: int = 0) -> socket.socket:
        """Connect from here, as a program of that user would."""
        return self.here.do(_connect, address, port, user)

    def visit(
        self, name: Name, port: int = TAKEN, *, version: int = 4, user: int = 0
    ) -> socket.socket:
        """Look a name up, and connect to it."""
        self.look_up(name.name, A if version == 4 else AAAA)
        return self.connect(name.addresses[version], port, user=user)

    @contextmanager
    def serve(
        self,
        address: str,
        context: ssl.SSLContext,
        behave: Callable[[End], None] = echo,
        *,
        port: int = PORT,
    ) -> Iterator[Server]:
        """Run a server on the other machine."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = self.router.do(socket.create_server, (address, port), family=family)
        server = Server(listening, context, behave)
        try:
            yield server
        finally:
            server.close()

    def under(self, place: Path, hosts: str = "") -> tuple[str, ...]:
        """Return the command that becomes another one here, with this resolver and /etc/hosts."""
        files = write(place / "resolv.conf", f"nameserver {ROUTER[4]}\n"), place / "hosts"
        if not files[1].exists() or hosts:
            write(files[1], hosts)
        enter = (*self.here.under, "unshare", "--mount", "sh", "-euc", _UNDER_FILES, "sh")
        return (*enter, *map(str, files))

    @contextmanager
    def start(
        self, place: Path, *options: str, before: Sequence[str] = (), hosts: str = ""
    ) -> Iterator[Daemon]:
        """Run tls-tproxy here, in the directory `place`/run.

        Args:
            place: where it and what belongs to it is.
            options: the command line.
            before: a command that becomes it.
            hosts: what it reads as /etc/hosts.
        """
        run = place / "run"
        run.mkdir(exist_ok=True)
        under = (*self.under(place, hosts), *before)
        # As another user, in another root, or with fewer rights, it could not save what was found.
        measured = not before and not any(
            each.startswith(("--user", "--chroot")) for each in options
        )
        with Daemon(
            None, run, options, under=under, module="tls_tproxy", measured=measured
        ) as daemon:
            daemon.wait_for_log("listening")
            yield daemon

    def run(
        self, place: Path, *options: str, before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run tls-tproxy as `start` does, where it ends by itself at once."""
        (place / "run").mkdir(exist_ok=True)
        return subprocess.run(
            [*self.under(place), *before, *COMMAND, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            cwd=place / "run",
            env=unmeasured(),
        )

    def tables(self) -> list[str]:
        """Return the names of all nftables tables here."""
        lines = self.here.run("nft", "list", "tables").splitlines()
        return sorted(line.split()[-1] for line in lines)

    def command(
        self, place: Path, *command: str, user: int = 0, timeout: float = 3 * PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run a client of others here, with this resolver, and return what it said."""
        become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups") if user else ()
        return subprocess.run(
            [*self.under(place), *become, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def _connect(host: str, port: int, user: int) -> socket.socket:
    # The file system's user id is that of a thread, setfsuid(2), and whose the socket is.
    libc.call("setfsuid", user)
    try:
        return socket.create_connection((host, port), PATIENCE)
    finally:
        libc.call("setfsuid", 0)


def _name(n: int) -> Name:
    assert n < MOST_NAMES
    return Name(f"v{n}.example", {4: f"10.77.0.{n}", 6: f"fd77::{n:x}"})


def start_dnsmasq(stack: ExitStack, machine: Machine, *arguments: str) -> None:
    """Run a resolver on a machine, until the stack ends."""
    command = [
        *(*machine.under, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
        *("--no-resolv", "--no-hosts", "--pid-file", "--user=root", "--bind-interfaces"),
        # An answer from its cache takes no question that can be seen.
        "--cache-size=0",
    ]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)


def ask(server: str, name: str, kind: int = A) -> bytes:
    """Ask as a stub resolver does, until it is answered; return the answer."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(1)
            client.connect((server, 53))
            try:
                client.send(asking(name, kind))
                return client.recv(4096)
            except OSError:
                time.sleep(0.01)  # it has not started yet
    raise AssertionError("nobody answers")


def options(place: Path) -> tuple[str, ...]:
    """Return the shortest command line that serves; its files are made in `place`."""
    if not (place / "id").exists():
        write_identity(place / "id", CLIENT)
    files = (f"--{option}={place}/id/{name}.pem" for option, name in _FILES)
    return (*files, f"--portMap={TAKEN}:{PORT}", "--log=connections")


_FILES: Final = (("cert", "cert"), ("key", "key"), ("cacert", "ca"))

# For commands that end at once.
COMMAND: Final = (sys.executable, "-bb", "-P", "-X", "dev", "-W", "error", "-m", "tls_tproxy")


def receive_all(client: socket.socket) -> bytes:
    """Return all that is said until the end; a reset is an exception."""
    received = bytearray()
    while data := client.recv(1 << 16):
        received += data
    return bytes(received)


def works(client: socket.socket) -> bool:
    """Tell whether an echo comes back."""
    with client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        return receive_all(client) == b"hello"


def is_reset(connect: Callable[[], socket.socket]) -> bool:
    """Tell whether the connection is reset, soon, and before anything was said."""
    # It may be even before the client has learned that it is connected.
    with pytest.raises(ConnectionResetError), connect() as client:
        client.settimeout(AT_ONCE)
        client.recv(1)
    return True
