"""The clients of a benchmark and what they want to reach: a program in C."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).parent


class Place(NamedTuple):
    """Where a load runs.

    Attributes:
        host: The address that it connects to, or listens at.
        under: What runs it in another network namespace.
    """

    host: str = "127.0.0.1"
    under: tuple[str, ...] = ()


HERE = Place()


class Load:
    """One of the programs here, compiled; load.h has what they share.

    Args:
        directory: where the compiled program goes.
        source: its name.
        libraries: what it is linked with, as the compiler wants it said.
    """

    def __init__(self, directory: Path, source: str, *libraries: str) -> None:
        self._program = directory / source.removesuffix(".c")
        compiler: list[str | Path] = ["cc", "-O2", "-Wall", "-o", self._program, BENCH / source]
        subprocess.run([*compiler, *libraries], check=True)

    @contextmanager
    def serving(self, *arguments: object, place: Place = HERE) -> Iterator[None]:
        """Run what is behind the proxies, meanwhile."""
        with self.ready(*arguments, place=place) as process:
            assert process.stdout is not None
            try:
                process.stdout.readline()  # "ready"
                yield
            finally:
                process.kill()

    def run(self, *arguments: object, place: Place = HERE) -> dict[str, float]:
        """Run clients to their end; return what they print."""
        with self.ready(*arguments, place=place) as clients:
            return self.go_on(clients)

    def ready(self, *arguments: object, place: Place = HERE) -> subprocess.Popen[str]:
        """Start clients; some print "ready" first, and wait for standard input."""
        return subprocess.Popen(
            [*place.under, str(self._program), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "BENCH_HOST": place.host},
        )

    def go_on(self, clients: subprocess.Popen[str]) -> dict[str, float]:
        """Let clients that are ready go on to their end; return what they print."""
        out, _ = clients.communicate("\n")
        if clients.returncode:
            raise RuntimeError(f"the clients failed: {clients.args!r}")
        return {name: float(value) for name, value in (line.split() for line in out.splitlines())}
