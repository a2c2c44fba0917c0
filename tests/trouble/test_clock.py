"""A clock that is set while clients wait: every time here is one of CLOCK_MONOTONIC."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import hellos
from tests.support.backends import RawBackend, host_directory
from tests.support.daemon import start_daemon
from tests.support.sockets import receive_all, receive_exactly

NAME = "a.example"
HELLO = hellos.hello_bytes(NAME)

# Stands in front of the C library: the time of day is off by what the first eight bytes of a file
# say. Nothing else is changed.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t offset(void)
{
    int64_t seconds = 0;
    int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, &seconds, sizeof seconds) < 0)
        abort();
    close(fd);
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME)
        now->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec time;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}
"""
DAY = 86_400


def test_a_clock_that_jumps_a_day_on_and_two_days_back(hosts: Path, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (Debian: apt install gcc libc6-dev)")
    source, shim, offset = (tmp_path / name for name in ("shim.c", "shim.so", "offset"))
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)

    def jump(seconds: int) -> None:
        offset.write_bytes(seconds.to_bytes(8, "little", signed=True))

    jump(0)
    env = {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(offset)}
    with (
        start_daemon(hosts, env=env) as daemon,
        RawBackend(host_directory(hosts, NAME) / "tls-socket") as backend,
        daemon.connect() as silent,
        daemon.connect() as client,
    ):
        began = time.monotonic()
        silent.sendall(HELLO[:10])
        client.sendall(HELLO[:10])
        for seconds in DAY, -DAY:
            time.sleep(0.3)
            jump(seconds)
        time.sleep(0.3)
        # Nobody's time is over.
        client.sendall(HELLO[10:])
        with backend.accept() as connection:
            assert receive_exactly(connection, len(HELLO)) == HELLO
            # And it is over when it should be.
            silent.settimeout(15)
            assert receive_all(silent) == b""
            assert 9 < time.monotonic() - began < 13
            connection.sendall(b"still here")
            assert receive_exactly(client, 10) == b"still here"
