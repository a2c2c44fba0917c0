"""/etc/hosts: what names an address, and what names none."""

import os
import socket
from pathlib import Path

import pytest

from tls_tproxy.names import hosts_file
from tls_tproxy.names.cache import MOST_NAMES
from tls_tproxy.names.hosts_file import LARGEST, HostsFile


def pack(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address)


HERE = pack("192.0.2.1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hosts"


@pytest.fixture
def hosts(path: Path) -> HostsFile:
    return HostsFile(path)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("192.0.2.1 a.example", ["a.example"]),
        ("192.0.2.1\ta.example  b \t c\n", ["a.example", "b", "c"]),
        ("  192.0.2.1 A.Example.\r\n", ["a.example"]),
        ("192.0.2.1 a # b\n192.0.2.1 b#c\n#192.0.2.1 d", ["a", "b"]),
        ("192.0.2.1 a\n192.0.2.2 b\n192.0.2.1 c a\n", ["a", "c"]),
        ("192.0.2.1", []),
        ("192.0.2.1 # a", []),
        ("a 192.0.2.1", []),
        ("192.0.2.01 a\n192.0.513 a\n0xc0000201 a\n192.0.2.1/24 a", []),
        ("192.0.2.1 *.a _b c/d ../e 192.0.2.9 ok", ["ok"]),
        ("::ffff:192.0.2.1 mapped", ["mapped"]),
        ("", []),
    ],
)
def test_names(path: Path, hosts: HostsFile, content: str, names: list[str]) -> None:
    path.write_text(content)
    assert hosts.names(HERE) == names
    assert hosts.trouble is None


def test_ipv6(path: Path, hosts: HostsFile) -> None:
    path.write_text("2001:DB8:0::1 a\nfe80::1%eth0 b\nfe80::1 c\n:: d\n:x e\n")
    assert hosts.names(pack("2001:db8::1")) == ["a"]
    assert hosts.names(pack("fe80::1")) == ["c"]


def test_what_is_not_text_is_skipped(path: Path, hosts: HostsFile) -> None:
    path.write_bytes(b"# \xfcber\n192.0.2.1 \xfcber a\n\xff 192.0.2.1 b\n192.0.2.1\0 c\n:\xff d\n")
    assert hosts.names(HERE) == ["a"]


def test_too_many_names(path: Path, hosts: HostsFile) -> None:
    path.write_text("192.0.2.1 " + " ".join(f"n{number}" for number in range(MOST_NAMES + 1)))
    assert hosts.names(HERE) == [f"n{number}" for number in range(MOST_NAMES)]


def test_what_is_returned_is_the_callers_own(path: Path, hosts: HostsFile) -> None:
    path.write_text("192.0.2.1 a")
    hosts.names(HERE).append("b")
    assert hosts.names(HERE) == ["a"]


def test_a_change_is_seen_at_once(path: Path, hosts: HostsFile) -> None:
    for content in "192.0.2.1 a", "192.0.2.1 b", "192.0.2.1 cc", "":
        path.write_text(content)
        assert hosts.names(HERE) == content.split()[1:]
    path.with_name("new").write_text("192.0.2.1 d")
    path.with_name("new").rename(path)
    assert hosts.names(HERE) == ["d"]
    path.unlink()
    assert (hosts.names(HERE), hosts.trouble) == ([], None)


def test_what_has_not_changed_is_not_read(
    path: Path, hosts: HostsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("192.0.2.1 a")
    monkeypatch.setattr(hosts_file, "_SETTLED", 0)
    assert hosts.names(HERE) == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", None)
        assert hosts.names(HERE) == ["a"]
    path.write_text("192.0.2.1 b c")
    assert hosts.names(HERE) == ["b", "c"]


def test_thousands_of_lines(path: Path, hosts: HostsFile) -> None:
    lines = [f"10.0.{number >> 8}.{number & 255} host-{number}.example" for number in range(5000)]
    path.write_text("\n".join(lines))
    assert hosts.names(pack("10.0.19.135")) == ["host-4999.example"]


def test_the_largest(path: Path, hosts: HostsFile) -> None:
    line = b"192.0.2.1 a\n"
    path.write_bytes(line + b"#" * (LARGEST - len(line)))
    assert hosts.names(HERE) == ["a"]
    path.write_bytes(line + b"#" * (LARGEST + 1 - len(line)))
    # Not the lines up to there: whose would be missing?
    assert hosts.names(HERE) == []
    trouble = hosts.trouble
    assert trouble == f"unable to read {path}: there are more than {LARGEST} bytes"
    path.write_bytes(line)
    assert hosts.names(HERE) == ["a"]
    assert hosts.trouble is None


def test_a_directory(path: Path, hosts: HostsFile) -> None:
    path.mkdir()
    assert hosts.names(HERE) == []
    assert hosts.trouble == f"unable to read {path}: it is not a regular file"


def test_a_fifo_that_nobody_writes_to(path: Path, hosts: HostsFile) -> None:
    os.mkfifo(path)
    assert hosts.names(HERE) == []
    assert hosts.trouble == f"unable to read {path}: it is not a regular file"


def test_out_of_reach(path: Path, hosts: HostsFile) -> None:
    path.symlink_to(path)
    assert hosts.names(HERE) == []
    assert hosts.trouble == f"unable to read {path}: Too many levels of symbolic links"


def test_a_path_through_a_file(path: Path) -> None:
    path.write_text("")
    hosts = HostsFile(path / "hosts")
    assert hosts.names(HERE) == []
    assert hosts.trouble == f"unable to read {path}/hosts: Not a directory"
