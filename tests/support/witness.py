"""A well-behaved client that measures its service: ``python -m tests.support.witness SOCKET OFFSET LENGTH``.

It works in the range of the default export that is its own, one request at a time and never idle for long, and checks
what it reads: it writes in the first half, and never in the second, which is a hole if it was one. It says ``at work``
when it has been served for a while, and at SIGTERM ends with a line of JSON on stdout: how many ``requests`` it made,
the ``slowest`` and the ``median`` of them in seconds.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import time

from tests.support.client import NbdClient

PAUSE_SECONDS = 0.001
WARM_UP = 50
"""Requests."""


def main() -> None:
    """Work until SIGTERM."""
    path, offset, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    choices = random.Random(1)
    seconds: list[float] = []
    # What is under way is finished and measured: it may be the slowest of all.
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    with NbdClient(path) as client:
        content = bytearray(client.read(offset, length))
        while not stopped:
            size = choices.choice([512, 4096, 4096, 65536])
            half = choices.choice([0, 0, length // 2])
            at = half + choices.randrange(0, length // 2 - size + 1)
            began = time.monotonic()
            if not half and choices.random() < 0.5:
                content[at : at + size] = choices.randbytes(size)
                client.write(offset + at, bytes(content[at : at + size]))
            else:
                assert client.read(offset + at, size) == content[at : at + size], f"wrong data at {offset + at}"
            seconds.append(time.monotonic() - began)
            if len(seconds) == WARM_UP:
                print("at work", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)
    result = {"requests": len(seconds), "slowest": max(seconds), "median": statistics.median(seconds)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
