"""The pool of pipes."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from sniproxy.engine.pipes import PipePool


def test_a_pipe_is_lent_again() -> None:
    pool = PipePool()
    pipe = pool.take()
    assert pipe is not None
    pool.give(pipe)
    assert pool.take() is pipe
    pool.scrap(pipe)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_both_ends_of_a_scrapped_pipe_are_closed() -> None:
    pool = PipePool()
    pipe = pool.take()
    assert pipe is not None
    os.write(pipe.write_end, b"nobody reads this")
    assert is_open(pipe.read_end)
    assert is_open(pipe.write_end)
    pool.scrap(pipe)
    assert not is_open(pipe.read_end)
    assert not is_open(pipe.write_end)


def test_a_scrapped_pipe_makes_room_for_one_and_no_more() -> None:
    pool = PipePool(limit=3)
    for _ in range(10):
        pipe = pool.take()
        assert pipe is not None
        pool.scrap(pipe)
    pipes = [pool.take() for _ in range(4)]
    assert [pipe is None for pipe in pipes] == [False, False, False, True]
    for pipe in pipes:
        if pipe is not None:
            pool.give(pipe)
    pool.close()


def test_a_pipe_holds_as_much_as_an_unprivileged_process_may_have() -> None:
    pool = PipePool()
    pipe = pool.take()
    assert pipe is not None
    # pipe(7): /proc/sys/fs/pipe-max-size, one MiB by default.
    most = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    assert fcntl.fcntl(pipe.write_end, fcntl.F_GETPIPE_SZ) == min(most, 1 << 20)
    pool.scrap(pipe)


def test_no_more_than_the_limit() -> None:
    pool = PipePool(limit=2)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.take() is None
    pool.scrap(first)
    third = pool.take()
    assert third is not None
    pool.give(second)
    pool.give(third)
    pool.close()


def test_what_is_adopted_beyond_the_limit_is_not_kept() -> None:
    pool = PipePool(limit=1)
    pipes = [pool.take(), pool.adopt(*os.pipe()), pool.adopt(*os.pipe())]
    assert pool.take() is None
    ends = [f"/proc/self/fd/{pipe.read_end}" for pipe in pipes if pipe is not None]
    for pipe in pipes:
        assert pipe is not None
        pool.give(pipe)
    # One is, as before.
    assert [os.path.exists(end) for end in ends] == [False, False, True]
    pool.close()
    assert [os.path.exists(end) for end in ends] == [False, False, False]


def test_without_descriptors_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    pool = PipePool()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", fail)
        assert pool.take() is None
    pipe = pool.take()
    assert pipe is not None
    pool.scrap(pipe)


def test_a_small_pipe_is_better_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, command: int, size: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    pool = PipePool()
    pipe = pool.take()
    assert pipe is not None
    assert os.write(pipe.write_end, b"x") == 1
    pool.scrap(pipe)
