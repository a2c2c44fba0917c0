"""Small files as configuration: what is a value, and what is refused rather than guessed."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mutual_tls import settings
from mutual_tls.settings import (
    SettingsError,
    exists,
    read_entries,
    read_names,
    read_value,
    read_values,
)

# Any user who is not root, who may read everything.
NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Act as a user who owns nothing, where this is run by root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "setting"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "clients").mkdir()
    return tmp_path / "clients"


# --- values


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("", []),
        ("443", ["443"]),
        ("443\n", ["443"]),
        ("b\na\n", ["b", "a"]),
        ("\n  \n a b \t\n", ["a b"]),
        ("# all of it\n#443\n", []),
        ("  # all of it\n", []),
        ("443 # why\n", ["443"]),
        ("443\t#why\n", ["443"]),
        ("a#b\n", ["a#b"]),
        ("a#b # c # d", ["a#b"]),
        ("a # b\r\n", ["a"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\u2028b\x85c\x1cd", ["a\u2028b\x85c\x1cd"]),
        ("\u00a0a\n", ["\u00a0a"]),
        ("bücher.example", ["bücher.example"]),
    ],
)
def test_values(file: Path, content: str, values: list[str]) -> None:
    assert read_values(write(file, content)) == values
    assert read_names(file) == values


@pytest.mark.parametrize(("content", "count"), [("", 0), ("# 1\n", 0), ("1\n2\n", 2)])
def test_one_value_is_not_none_and_not_several(file: Path, content: str, count: int) -> None:
    with pytest.raises(SettingsError, match=f"^unable to read {file}: it has {count} values"):
        read_value(write(file, content))


def test_one_value(file: Path) -> None:
    assert read_value(write(file, "# port\n443\n")) == "443"


@pytest.mark.parametrize("read", [read_value, read_values, read_names])
def test_what_is_absent_is_told_apart(file: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(FileNotFoundError):
        read(file)
    write(file, "")
    with pytest.raises(FileNotFoundError):
        read(file / "below")
    file.unlink()
    # Else a list of whom or what to allow would allow all when what it leads to is gone.
    file.symlink_to("nothing")
    with pytest.raises(SettingsError, match="a link that leads nowhere"):
        read(file)


def test_not_utf8(file: Path) -> None:
    with pytest.raises(SettingsError, match=f"^unable to read {file}: line 2 is not UTF-8$"):
        read_values(write(file, b"a\nb\xff\n"))


def test_nul(file: Path) -> None:
    with pytest.raises(SettingsError, match="NUL"):
        read_values(write(file, "a\0b"))


def test_too_large(file: Path) -> None:
    assert read_values(write(file, "a" * 65536)) == ["a" * 65536]
    with pytest.raises(SettingsError, match="more than 65536 bytes"):
        read_values(write(file, "a" * 65537))


def test_endless(file: Path) -> None:
    file.symlink_to("/dev/zero")
    with pytest.raises(SettingsError, match="not a regular file"):
        read_values(file)


def test_a_file_that_says_it_is_empty() -> None:
    assert read_value(Path("/proc/sys/kernel/ostype")) == "Linux"


def test_a_fifo_does_not_block(file: Path, directory: Path) -> None:
    os.mkfifo(file)
    os.mkfifo(directory / "fifo")
    for call in (read_values, read_names):
        with pytest.raises(SettingsError, match="setting: it is not a regular file"):
            call(file)
    with pytest.raises(SettingsError, match="clients/fifo: it is not a regular file"):
        read_names(directory)


def test_a_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file))
        with pytest.raises(SettingsError, match="it is not a regular file"):
            read_values(file)


def test_a_directory_is_not_a_file_of_values(directory: Path) -> None:
    with pytest.raises(SettingsError, match="not a regular file"):
        read_values(directory)


def test_a_loop_of_links(file: Path) -> None:
    file.symlink_to(file.name)
    with pytest.raises(SettingsError, match="symbolic links"):
        read_values(file)
    assert exists(file)
    with pytest.raises(SettingsError, match="symbolic links"):
        exists(file / "below")


def test_out_of_reach(file: Path) -> None:
    write(file, "a").chmod(0)
    with as_nobody(), pytest.raises(SettingsError, match="Permission denied"):
        read_values(file)


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(SettingsError):
            read_values(path)
        with pytest.raises(SettingsError):
            exists(path)
    with pytest.raises(SettingsError, match="name too long"):
        read_values(tmp_path / ("a" * 256))


@pytest.mark.parametrize("call", [read_values, read_names])
def test_no_descriptor_is_no_fault_of_a_setting(
    call: Callable[[Path], object], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, "a")

    def fail(*args: object, **options: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError, match="Too many open files"):
            call(file)
    assert call(file) == ["a"]


def test_no_descriptor_stays_open(file: Path, directory: Path) -> None:
    write(file, "a")
    write(directory / "a", "")
    os.mkfifo(directory / "fifo")
    before = os.listdir("/proc/self/fd")
    read_values(file)
    for call in (read_values, read_names):
        with pytest.raises(SettingsError):
            call(directory)
    assert os.listdir("/proc/self/fd") == before


# --- names


def test_names_of_entries(directory: Path) -> None:
    write(directory / "b.example", "")
    write(directory / "a.example", "")
    write(directory / ".hidden", "x.example")
    (directory / "443").mkdir()
    assert read_names(directory) == ["443", "a.example", "b.example"]


def test_the_name_of_a_list_means_nothing(directory: Path) -> None:
    write(directory / "a.example", "spiffe://a/b\ncn:A # why\n")
    write(directory / "comment", "# nobody\n")
    write(directory / "z.example", "")
    assert read_names(directory) == ["spiffe://a/b", "cn:A", "z.example"]


def test_an_empty_directory_has_no_names(directory: Path) -> None:
    assert read_names(directory) == []


def test_a_directory_as_kubernetes_mounts_it(directory: Path) -> None:
    (directory / "..2026_01_01").mkdir()
    write(directory / "..2026_01_01/list", "a.example\n")
    (directory / "..data").symlink_to("..2026_01_01")
    (directory / "list").symlink_to("..data/list")
    assert read_names(directory) == ["a.example"]


def test_a_link_to_nothing_is_no_name(directory: Path) -> None:
    (directory / "a.example").symlink_to("nothing")
    write(directory / "b.example", "")
    assert read_names(directory) == ["b.example"]


def test_one_broken_entry_breaks_all(directory: Path) -> None:
    write(directory / "a.example", "")
    write(directory / "list", b"\xff")
    with pytest.raises(SettingsError, match="clients/list: line 1 is not UTF-8"):
        read_names(directory)


def test_an_entry_that_is_not_utf8(directory: Path) -> None:
    write(Path(os.fsdecode(os.fsencode(directory) + b"/\xff")), "")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_names(directory)


def test_too_many_entries(directory: Path) -> None:
    for number in range(1000):
        write(directory / str(number), "")
    assert len(read_names(directory)) == 1000
    write(directory / "1000", "")
    with pytest.raises(SettingsError, match="more than 1000 entries"):
        read_names(directory)


def test_files_too_large_together(directory: Path) -> None:
    write(directory / "1", "a" * 40_000)
    write(directory / "2", "a" * 40_000)
    with pytest.raises(SettingsError, match="clients/2: there are more than 65536 bytes"):
        read_names(directory)


# --- markers


def test_a_marker(file: Path) -> None:
    assert not exists(file)
    assert not exists(file / "below")
    file.symlink_to("nothing")
    assert exists(file)
    file.unlink()
    write(file, "")
    assert exists(file)
    assert not exists(file / "below")


def test_a_marker_out_of_reach(directory: Path) -> None:
    directory.chmod(0)
    with as_nobody(), pytest.raises(SettingsError, match="Permission denied"):
        exists(directory / "send-proxy-v1")


# --- what is remembered


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what was just written for what was written long ago."""
    monkeypatch.setattr(settings, "_SETTLED", 0)


@contextmanager
def nothing_opens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", None)
        yield


@pytest.mark.usefixtures("settled")
def test_what_has_not_changed_is_not_opened_again(file: Path, directory: Path) -> None:
    write(file, "443\n")
    write(directory / "one", "")
    write(directory / "more", "two\nthree\n")
    assert read_value(file) == "443"
    assert read_names(directory) == ["two", "three", "one"]
    with nothing_opens():
        assert read_value(file) == "443"
        assert read_names(directory) == ["two", "three", "one"]


@pytest.mark.usefixtures("settled")
def test_every_change_is_noticed(file: Path, directory: Path) -> None:
    def change(path: Path, content: str) -> None:
        # Renamed into place: another inode, whatever the clock of the kernel says.
        os.rename(write(path.with_name(".new"), content), path)

    change(file, "443")
    assert read_value(file) == "443"
    change(file, "444")
    assert read_value(file) == "444"
    change(directory / "more", "two")
    assert read_names(directory) == ["two"]
    change(directory / "more", "too")
    assert read_names(directory) == ["too"]
    write(directory / "one", "")
    assert read_names(directory) == ["too", "one"]
    (directory / "more").unlink()
    assert read_names(directory) == ["one"]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        read_value(file)


def test_what_was_changed_just_now_is_opened_again(file: Path) -> None:
    write(file, "443")
    assert read_value(file) == "443"
    with nothing_opens(), pytest.raises(TypeError):
        read_value(file)


@pytest.mark.usefixtures("settled")
def test_a_link_to_nothing_is_looked_at_again(directory: Path, tmp_path: Path) -> None:
    (directory / "link").symlink_to(tmp_path / "target")
    assert read_names(directory) == []
    write(tmp_path / "target", "two")
    assert read_names(directory) == ["two"]


@pytest.mark.usefixtures("settled")
def test_a_directory_that_was_read_is_no_file(directory: Path) -> None:
    assert read_names(directory) == []
    with pytest.raises(SettingsError, match="not a regular file"):
        read_values(directory)


@pytest.mark.usefixtures("settled")
def test_what_changes_without_a_trace_is_read_each_time() -> None:
    path = Path("/proc/self/comm")
    before = read_value(path)
    try:
        path.write_text("another")
        assert read_value(path) == "another"
    finally:
        path.write_text(before)


@pytest.mark.usefixtures("settled")
def test_only_so_much_is_remembered(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_MOST_REMEMBERED", 3)
    for number in range(10):
        assert read_value(write(directory / str(number), "443")) == "443"
        assert len(settings._known) <= 3


# --- entries


def test_entries(directory: Path) -> None:
    write(directory / "b.example", "not empty")
    (directory / "443").mkdir()
    (directory / "link").symlink_to("nothing")
    write(directory / ".hidden", "")
    with open(os.fsencode(directory) + b"/\xff", "w"):
        pass
    assert read_entries(directory) == {"b.example", "443", "link", "\udcff"}


def test_entries_of_what_is_no_directory(file: Path, directory: Path) -> None:
    for path in file, directory / "a" / "b":
        with pytest.raises(FileNotFoundError):
            read_entries(path)
    with pytest.raises(NotADirectoryError, match="setting"):
        read_entries(write(file, ""))
    with pytest.raises(FileNotFoundError):
        read_entries(file / "below")
    directory.chmod(0)
    with as_nobody(), pytest.raises(SettingsError, match="Permission denied"):
        read_entries(directory)


def test_too_many_entries_to_list(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_MOST_ENTRIES", 2)
    write(directory / "a", "")
    write(directory / "b", "")
    assert len(read_entries(directory)) == 2
    write(directory / "c", "")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SettingsError, match="more than 2 entries"):
        read_entries(directory)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("settled")
def test_entries_are_listed_again_when_they_change(directory: Path, tmp_path: Path) -> None:
    write(directory / "a", "")
    assert read_entries(directory) == {"a"}
    with nothing_opens():
        assert read_entries(directory) == {"a"}
    (tmp_path / "other").mkdir()
    directory.rename(tmp_path / "old")
    (tmp_path / "other").rename(directory)
    assert read_entries(directory) == set()
    directory.rmdir()
    with pytest.raises(FileNotFoundError):
        read_entries(directory)


@pytest.mark.usefixtures("settled")
def test_only_so_many_lists_are_remembered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_MOST_REMEMBERED", 3)
    for number in range(10):
        (directory / str(number)).mkdir()
        assert read_entries(directory / str(number)) == set()
        assert len(settings._listed) <= 3
