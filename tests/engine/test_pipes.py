"""The pool of pipes."""

import errno
import fcntl
import os

import pytest

from sniproxy.engine.pipes import PipePool


def test_a_pipe_is_lent_again() -> None:
    pool = PipePool()
    pipe = pool.take()
    assert pipe is not None
    pool.give(pipe)
    assert pool.take() is pipe
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
