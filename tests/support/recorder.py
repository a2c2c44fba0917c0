"""Records the first flight of a client, for `tests/flights/`.

    python -m tests.support.recorder openssl-alpn --client 'OpenSSL 3.0.17' -- \\
        openssl s_client -connect 127.0.0.1:{port} -servername {name} -alpn h2

It listens on loopback, runs the command, takes down what comes until the client waits for an
answer, and hangs up. In the command

    {name}     stands for the name to ask for, `flight.example` unless --name says otherwise;
    {port}     for the port to come to, on 127.0.0.1;
    {scratch}  for an empty directory, which the command runs in, has for HOME, and leaves behind;
    {clients}  for `tests/flights/clients`, where there are sources for `go run` and the like.

The name need not resolve. A client that cannot be told where to go may come by way of an HTTP
proxy, which 127.0.0.1:{port} is too: a CONNECT is answered, and is no part of the flight.

For a client that resumes a session, --connection 2 records the second connection of the command;
the first one meets an `openssl s_server` that gives out tickets and allows early data. It shows a
certificate that nobody trusts, so the command must say that this is all right.
"""

import argparse
import contextlib
import re
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from os import environ, killpg
from signal import SIGKILL

import trustme

from tests.support.recordings import FOLDER, Recording, load, save, split_flight

NAME = "flight.example"

# Seconds. A browser or a compiler takes its time to start; a client that has sent its hello and is
# silent for so long waits for the answer.
_PATIENCE = 60.0
_SILENCE = 0.3

_CHUNK = 1 << 16

# What a request to a proxy begins with; a handshake record has the type 22.
_METHODS = (b"C", b"G", b"P")


class RecordingError(Exception):
    """There is nothing worth keeping."""


def record_flight(command: Sequence[str], name: str = NAME, connection: int = 1) -> bytes:
    """Run a client and return what it sends first.

    Args:
        command: The client, with placeholders.
        name: What it is to ask for.
        connection: Which of its connections to record, counted from 1.

    Returns:
        All it sends before it waits: a whole ClientHello, and more if it doesn't wait at once.

    Raises:
        RecordingError: It came too late, or left before its hello was complete, or asked for
            something else.
    """
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="flight-", ignore_cleanup_errors=True)
        )
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listening.settimeout(_PATIENCE)
        server = stack.enter_context(_ticket_server(name)) if connection > 1 else None
        values = {
            "name": name,
            "port": str(listening.getsockname()[1]),
            "scratch": scratch,
            "clients": str(FOLDER / "clients"),
        }
        stack.enter_context(_running([_filled_in(part, values) for part in command], scratch))
        try:
            if server is not None:
                for _ in range(connection - 1):
                    with _accept(listening, name) as client:
                        _relay(client, server)
            with _accept(listening, name) as client:
                flight = _receive_flight(client)
        except TimeoutError:
            raise RecordingError("the client does not come, or says too little") from None
    if name.encode() not in flight:
        raise RecordingError(f"the client does not ask for {name}")
    return flight


def _filled_in(part: str, values: dict[str, str]) -> str:
    # No str.format(): programs on a command line have braces of their own.
    return re.sub(r"\{(name|port|scratch|clients)\}", lambda match: values[match[1]], part)


@contextlib.contextmanager
def _running(command: Sequence[str], scratch: str) -> Iterator[None]:
    """Run a command that leaves no children behind."""
    with subprocess.Popen(
        command,
        # A pipe that stays open: some clients leave at the end of their input.
        stdin=subprocess.PIPE,
        stdout=2,  # what it says is of use if something goes wrong, and no result
        cwd=scratch,
        env={**environ, "HOME": scratch, "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                killpg(process.pid, SIGKILL)


def _accept(listening: socket.socket, name: str) -> socket.socket:
    """Return the next connection that is about TLS with `name`, as far as one can see."""
    while True:
        client, _ = listening.accept()
        client.settimeout(_PATIENCE)
        first = client.recv(1, socket.MSG_PEEK)
        if first and first not in _METHODS:
            return client
        request = b""
        while not request.endswith(b"\r\n\r\n") and (byte := client.recv(1)):
            request += byte
        if request.startswith(b"CONNECT %s:" % name.encode()):
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            return client
        # A browser has errands of its own, and connections that it only might need.
        client.close()


def _receive_flight(client: socket.socket) -> bytes:
    flight = b""
    with contextlib.suppress(ConnectionError):
        while split_flight(flight) is None and (data := client.recv(_CHUNK)):
            flight += data
    if split_flight(flight) is None:
        raise RecordingError(f"the client leaves after {len(flight)} bytes")
    client.settimeout(_SILENCE)
    with contextlib.suppress(ConnectionError, TimeoutError):
        while data := client.recv(_CHUNK):
            flight += data
    return flight


@contextlib.contextmanager
def _ticket_server(name: str) -> Iterator[tuple[str, int]]:
    """Run a server that lets clients resume, with early data if they like; yield its address."""
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        trustme.CA().issue_cert(name).private_key_and_cert_chain_pem.write_to_path(pem.name)
        with subprocess.Popen(
            ["openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", pem.name, "-early_data"],
            stdin=subprocess.PIPE,  # stays open: at its end the server would leave
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if accepts := re.match(r"ACCEPT 127\.0\.0\.1:(\d+)", line):
                        yield "127.0.0.1", int(accepts[1])
                        break
                else:
                    raise RecordingError("openssl s_server does not start")
            finally:
                process.kill()


def _relay(client: socket.socket, server_address: tuple[str, int]) -> None:
    """Let them talk until one of them leaves, or both are silent: s_server has no answers."""
    with socket.create_connection(server_address) as server:
        others = {client: server, server: client}
        while readable := select.select(list(others), [], [], _SILENCE)[0]:
            for sender in readable:
                with contextlib.suppress(ConnectionError):
                    if data := sender.recv(_CHUNK):
                        others[sender].sendall(data)
                        continue
                return


def main() -> None:
    """Record one flight."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.recorder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("label", help="the file's name, without .bin: CLIENT-WHAT")
    parser.add_argument("--client", required=True, help="program, version and TLS library")
    parser.add_argument("--name", default=NAME, help="what the client is to ask for")
    parser.add_argument("--connection", type=int, default=1, help="which one to record, from 1")
    parser.add_argument("command", nargs="+", help="after --, with placeholders")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9_-]+", options.label):
        parser.error("a label is of a-z, 0-9, _ and -")
    try:
        flight = record_flight(options.command, options.name, options.connection)
    except RecordingError as error:
        sys.exit(f"{options.label}: {error}")
    save(
        Recording(
            label=options.label,
            client=options.client,
            command=tuple(options.command),
            server_name=options.name,
            recorded=date.today(),
            connection=options.connection,
            flight=flight,
        )
    )
    sys.stdout.write(f"{options.label}: {len(flight)} bytes; {len(load())} flights\n")


if __name__ == "__main__":
    main()
