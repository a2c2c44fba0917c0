"""What it costs to read a ClientHello: microseconds of processor time for each, whole in one piece.

usage: python bench/parse.py [FILE...]

Each FILE is the first flight of a client, as recorded by tests/support/recorder.py; without any,
all recordings are read. From a new reader to the name in its canonical form, as the daemon does it
for every connection. Best and median of the rounds: the best is what the code costs, the median
what the machine made of it.
"""

import sys
import time
from pathlib import Path
from statistics import median

from sniproxy.wire import HelloReader, read_at_once
from sniproxy_hostname import Hostname

FLIGHTS = Path(__file__).parent.parent / "tests" / "flights"

# Long enough for the clock, short enough to fall between two interruptions now and then.
REPEATS = 50
ROUNDS = 400


def cost(flight: memoryview) -> list[float]:
    """Return the microseconds that it takes to read `flight`, once for each round."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        for _ in range(REPEATS):
            data = bytes(flight)
            hello = read_at_once(data) or HelloReader().feed(data)
            assert hello is not None
            Hostname(hello.required_server_name())
        rounds.append((time.process_time_ns() - began) / REPEATS / 1000)
    return rounds


def main(arguments: list[str]) -> None:
    """Print a table, a line for each flight."""
    files = [Path(argument) for argument in arguments] or sorted(FLIGHTS.glob("*.bin"))
    print(f"{'flight':40} {'bytes':>6} {'best':>7} {'median':>7}  (µs)")
    for file in files:
        # The daemon cuts it out of a buffer, too.
        rounds = cost(memoryview(bytearray(file.read_bytes())))
        name, size = file.stem, file.stat().st_size
        print(f"{name:40} {size:6} {min(rounds):7.1f} {median(rounds):7.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
