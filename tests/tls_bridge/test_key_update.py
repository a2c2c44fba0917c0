"""OpenSSL's own programs change their keys in an established tunnel, RFC 8446 §4.6.3."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.support.bridge import (
    INGRESS,
    PATIENCE,
    PEER,
    Bridge,
    bridge,
    connect,
    read_header,
    write,
    write_identity,
)
from tests.support.daemon import eventually
from tests.support.sockets import receive_exactly

OK = b"HTTP/1.1 200 "

# More than a record. Digits, as a letter at the beginning of what it reads may be a command.
MUCH = b"".join(b"%08d" % number for number in range(5_000)) + b"\n"

# To change the own keys, and to ask for the same of the other side or not.
COMMANDS = (b"K", b"k", b"K", b"K", b"k")

# What s_server has to say itself, when its buffer is full: in the middle of what it shows.
REMARKS = re.compile(rb"SSL_do_handshake -> 1\n|Read BLOCK\n")

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Bridge]:
    with bridge(tmp_path) as made:
        yield made


class OpenSSL:
    """s_client or s_server, at its keyboard."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: Path, messages: Path) -> None:
        assert process.stdin is not None
        self._keyboard: IO[bytes] = process.stdin
        self._screen = screen
        self._messages = messages

    def type(self, data: bytes) -> None:
        """Type something that it sends, or a command. What is typed at once is read at once."""
        self._keyboard.write(data)
        self._keyboard.flush()

    def wait_for(self, data: bytes) -> None:
        """Wait until something stands on the screen."""
        eventually(lambda: data in REMARKS.sub(b"", self._screen.read_bytes()))

    def wait_for_commands(self, number: int) -> None:
        """Wait until s_client has understood so many commands."""
        eventually(lambda: self._screen.read_bytes().count(b"KEYUPDATE\n") == number)

    def wait_for_changes(self, number: int) -> None:
        """Wait until it has sent so many changes of keys."""
        eventually(lambda: self.count(">") == number)

    def count(self, direction: str) -> int:
        """Return how often it has sent (>) or received (<) a change of keys."""
        pattern = f"^{direction * 3} .*KeyUpdate"
        return len(re.findall(pattern, self._messages.read_text(), re.MULTILINE))

    def port(self) -> int:
        """Return where s_server listens."""
        self.wait_for(b"ACCEPT")
        eventually(lambda: re.search(rb"ACCEPT \S+:\d+\n", self._screen.read_bytes()))
        [port] = re.findall(rb"ACCEPT \S+:(\d+)\n", self._screen.read_bytes())
        return int(port)


@contextmanager
def openssl(directory: Path, name: str, *arguments: str) -> Iterator[OpenSSL]:
    """Run s_client or s_server with an identity of its own."""
    program, *options = arguments
    write_identity(directory, name)
    screen, messages = directory / "screen", directory / "messages"
    messages.touch()
    keys = ["-cert", "cert.pem", "-key", "key.pem", "-CAfile", "ca.pem", "-tls1_3"]
    command = ["openssl", program, *keys, "-msg", "-msgfile", "messages", *options]
    with (
        screen.open("wb") as output,
        subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=output, stderr=output
        ) as process,
    ):
        try:
            yield OpenSSL(process, screen, messages)
        finally:
            process.kill()


def test_a_client_of_the_peer_changes_its_keys(it: Bridge, tmp_path: Path) -> None:
    host, port = it.start_peer().address
    options = ("-connect", f"{host}:{port}", "-servername", PEER, "-verify_return_error")
    with openssl(tmp_path / "client", INGRESS, "s_client", *options) as client:
        client.type(connect())
        client.wait_for(OK)
        expected = 0
        for sent, command in enumerate(COMMANDS, 1):
            client.type(command + b"\n")
            client.wait_for_commands(sent)
            # It goes out with the next data, and then the keys of both are new, or ours alone.
            expected += command == b"K"
            line = b"%d\n" % sent + MUCH
            client.type(line)
            client.wait_for(line)
            assert client.count(">") == sent
            # Our answer came before the data that it was asked with.
            assert client.count("<") == expected


def test_the_peer_of_an_ingress_changes_its_keys(it: Bridge, tmp_path: Path) -> None:
    """s_server shows the CONNECT on its screen, and the answer is typed."""
    options = ("-accept", "127.0.0.1:0", "-Verify", "1", "-verify_return_error")
    with openssl(tmp_path / "server", PEER, "s_server", *options) as server:
        write(it.ingress_place / "peers/p/address", f"127.0.0.1:{server.port()}")
        with it.start_ingress().connect(PATIENCE) as client:
            client.sendall(connect())
            server.wait_for(b"\r\n\r\n")
            server.type(OK + b"OK\r\n\r\n")
            assert read_header(client).startswith(OK)
            expected = 0
            for sent, command in enumerate(COMMANDS, 1):
                server.type(command + b"\n")
                server.wait_for_changes(sent)
                expected += command == b"K"
                line = b"%d\n" % sent + MUCH
                server.type(line)
                assert receive_exactly(client, len(line)) == line
                upward = b"up %d\n" % sent + MUCH
                client.sendall(upward)
                server.wait_for(upward)
                assert server.count("<") == expected
