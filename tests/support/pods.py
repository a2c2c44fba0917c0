"""What tproxy-pod is tested with: pods, which are network namespaces with a router in the middle.

with Pods() as pods:
    one, other = pods.pod(), pods.pod()
    with one.start(place), other.start(place):
        with other.listen(8080) as listening, one.connect(other, 8080) as client:
            ...
"""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sniproxy.engine.tcp import LINGER_0
from tests.support.bridge import authority, write
from tests.support.daemon import PATIENCE, Daemon, eventually
from tests.support.network import Machine, Network

# An address that is not private, of the router: somebody on the Internet.
PUBLIC: Final = {4: "198.51.100.7", 6: "2001:db8::7"}

# Seconds. The contract says one, and the limit of a handshake is ten: whoever is refused in less
# has not waited for it. A machine that does much else at the same time is granted some more.
AT_ONCE: Final = 4.0

# What is run.
MODULE: Final = "tproxy_pod"


class Pod:
    """A pod, and the directory that tproxy-pod runs in there, if it does.

    Attributes:
        machine: The namespace.
        addresses: Its addresses, by version.
    """

    def __init__(self, machine: Machine, addresses: dict[int, str]) -> None:
        self.machine = machine
        self.addresses = addresses

    @property
    def address(self) -> str:
        """The IPv4 one."""
        return self.addresses[4]

    def connect(
        self, host: "str | Pod", port: int, *, version: int = 4, timeout: float = PATIENCE
    ) -> socket.socket:
        """Connect from here, as any program would."""
        if isinstance(host, Pod):
            host = host.addresses[version]
        return self.machine.do(socket.create_connection, (host, port), timeout)

    @contextmanager
    def listen(
        self, port: int, *, version: int = 4, host: str | None = None
    ) -> Iterator[socket.socket]:
        """Listen on all addresses of one version, as a program of the pod does."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        host = host if host is not None else "0.0.0.0" if version == 4 else "::"
        listening = self.machine.do(socket.create_server, (host, port), family=family, backlog=512)
        listening.settimeout(PATIENCE)
        with listening:
            yield listening

    def issue(
        self,
        directory: Path,
        *names: str,
        ca: trustme.CA | None = None,
        trusts: trustme.CA | None = None,
        **times: object,
    ) -> Path:
        """Make an identity with Kubernetes' names of the files; by default for our addresses."""
        directory.mkdir(parents=True, exist_ok=True)
        ca = ca or authority()
        names = names or tuple(self.addresses.values())
        spiffe_ids = [name for name in names if name.startswith("spiffe://")]
        issued = ca.issue_cert(*(set(names) - set(spiffe_ids)), **times)  # type: ignore[arg-type]
        certificate = issued.cert_chain_pems[0].bytes()
        if spiffe_ids:
            certificate = _add_spiffe_ids(ca, certificate, spiffe_ids)
        (directory / "tls.crt").write_bytes(certificate)
        issued.private_key_pem.write_to_path(str(directory / "tls.key"))
        (trusts or authority()).cert_pem.write_to_path(str(directory / "ca.crt"))
        return directory

    @contextmanager
    def start(
        self, place: Path, *options: str, under: tuple[str, ...] = (), measured: bool = True
    ) -> Iterator[Daemon]:
        """Run tproxy-pod here in that directory; it has an identity if it has none yet."""
        if not (place / "pod/identity").exists():
            self.issue(place / "pod/identity")
        with Daemon(
            None,
            place,
            ("--log=connections", *options),
            under=(*self.machine.under, *under),
            module=MODULE,
            measured=measured,
        ) as daemon:
            daemon.wait_for_log("listening")
            yield daemon

    def rules(self) -> dict[str, list[str]]:
        """Return what a tproxy-pod may leave behind: its tables, and rules and routes."""
        run = self.machine.run
        return {
            "tables": sorted(
                line.split()[-1] for line in run("nft", "list", "tables").splitlines()
            ),
            "rules": [
                line
                for version in ("-4", "-6")
                for line in run("ip", version, "rule", "show").splitlines()
                if "fwmark" in line
            ],
            "routes": [
                line
                for version in ("-4", "-6")
                for line in run("ip", version, "route", "show", "table", "all").splitlines()
                if "table 1443" in line
            ],
        }


def _add_spiffe_ids(ca: trustme.CA, certificate: bytes, spiffe_ids: Sequence[str]) -> bytes:
    """Issue a certificate anew, with URIs among its names; trustme knows none."""
    old = x509.load_pem_x509_certificate(certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(old.serial_number)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
    )
    for extension in old.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            uris = map(x509.UniformResourceIdentifier, spiffe_ids)
            value = x509.SubjectAlternativeName([*value, *uris])
        builder = builder.add_extension(value, extension.critical)
    key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    new = builder.sign(key, hashes.SHA256())
    return new.public_bytes(serialization.Encoding.PEM)


class Pods:
    """The router, and pods around it. Private addresses, but for `PUBLIC`, which the router has."""

    def __init__(self) -> None:
        self.network = Network()
        self.router = Pod(self.network.router, PUBLIC)
        self._count = 0

    def __enter__(self) -> Self:
        router = self.network.router
        router.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
        router.run("ip", "address", "add", f"{PUBLIC[4]}/32", "dev", "lo")
        router.run("ip", "address", "add", f"{PUBLIC[6]}/128", "dev", "lo", "nodad")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.network.__exit__(kind, error, trace)

    def pod(self, *, rp_filter: int | None = None) -> Pod:
        """Add a pod."""
        self._count += 1
        number = self._count
        addresses = {4: f"10.44.{number}.2", 6: f"fd44:{number:x}::2"}
        machine = self.network.machine(addresses[4])
        gateway = f"fd44:{number:x}::1"
        for side, cable, address in (
            (machine, "cable", addresses[6]),
            (self.network.router, f"to{number}", gateway),
        ):
            side.run("ip", "address", "add", f"{address}/64", "dev", cable, "nodad")
        machine.run("ip", "-6", "route", "add", "default", "via", gateway)
        if rp_filter is not None:
            for name in "all", "default", "lo", "cable":
                path = f"/proc/sys/net/ipv4/conf/{name}/rp_filter"
                machine.run("sh", "-c", f"echo {rp_filter} >{path}")
        return Pod(machine, addresses)


class Running(NamedTuple):
    """A pod, its tproxy-pod, and the directory of that."""

    pod: Pod
    daemon: Daemon
    place: Path

    def line(self, *words: str) -> str:
        """Return the line of the log that has all these words, once it is there."""

        def find() -> list[str]:
            return [each for each in self.daemon.log() if set(words) <= set(each.split())]

        try:
            eventually(find)
        except AssertionError:
            log = "\n".join(self.daemon.log())
            raise AssertionError(f"no line has {words}:\n{log}") from None
        return find()[-1]

    def change(self, path: str, text: str | None) -> None:
        """Write a file of the directory, or remove it, and wait until the kernel knows."""
        before = sum("intercepting" in line for line in self.daemon.log())
        target = self.place / path
        if text is None:
            target.unlink()
        else:
            write(target, text)
        eventually(
            lambda: sum("intercepting" in line for line in self.daemon.log()) > before, PATIENCE
        )


@contextmanager
def running(pod: Pod, place: Path, *options: str) -> Iterator[Running]:
    place.mkdir(parents=True, exist_ok=True)
    with pod.start(place, *options) as daemon:
        yield Running(pod, daemon, place)


def receive_all(client: socket.socket) -> bytes:
    received = bytearray()
    while data := client.recv(1 << 16):
        received += data
    return bytes(received)


def echo_once(listening: socket.socket) -> tuple[str, int]:
    """Serve one connection; return who it comes from, as the program sees it."""
    connection, peer = listening.accept()
    with connection:
        connection.settimeout(PATIENCE)
        while data := connection.recv(1 << 16):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    return str(peer[0]), int(peer[1])


def ask(client: socket.socket, listening: socket.socket) -> tuple[str, int]:
    """Send something, and have it come back; return what the program sees as the client."""
    seen: list[tuple[str, int]] = []
    thread = threading.Thread(target=lambda: seen.append(echo_once(listening)))
    thread.start()
    with client:
        client.settimeout(PATIENCE)
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"hello"
    thread.join(PATIENCE)
    return seen[0]


def fails_soon(connect: Callable[[], socket.socket]) -> bool:
    """Tell whether a connection ends with an error within a second, without a byte."""
    began = time.monotonic()
    with pytest.raises(ConnectionError), connect() as client:
        client.settimeout(PATIENCE)
        client.sendall(b"hello\n")
        said = client.recv(100)
        raise AssertionError(f"it was served: {said!r}")
    assert time.monotonic() - began < AT_ONCE
    return True


def show(pod: Pod, port: int, version: int = 4) -> str:
    return f"[{pod.addresses[6]}]:{port}" if version == 6 else f"{pod.address}:{port}"


def show_client(seen: tuple[str, int]) -> str:
    return f"[{seen[0]}]:{seen[1]}" if ":" in seen[0] else f"{seen[0]}:{seen[1]}"


def client_context(pod: Pod, place: Path, *names: str, **how: Any) -> ssl.SSLContext:
    """Return what a client of TLS needs that has no tproxy-pod."""
    identity = pod.issue(place, *names, **how)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    authority().configure_trust(context)
    return context


# How servers behave that know nothing of TLS.


def talk_plain(connection: socket.socket) -> None:
    connection.sendall(b"220 ready\r\n")


def answer_400(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def say_it_back(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def leave(connection: socket.socket) -> None:
    connection.recv(1 << 16)


def break_off(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


@contextmanager
def serving(
    pod: Pod, port: int, behave: Callable[[socket.socket], None], *, version: int = 4
) -> Iterator[None]:
    """Serve connections in that way, each in a thread."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            behave(connection)

    def run() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with pod.listen(port, version=version) as listening:
        listening.settimeout(None)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
