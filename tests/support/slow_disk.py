"""``python -m tests.support.slow_disk SECONDS COMMAND...``: COMMAND, on a disk whose barriers take so much longer.

Each ``fdatasync`` and ``fsync`` begins so many seconds late. Nothing else is slower.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from functools import partial

from tests.support.held_calls import HeldCalls, become


def main() -> None:
    """Become the command."""
    seconds, *command = sys.argv[1:]
    become(command, ["fdatasync", "fsync"], partial(_delay, float(seconds)))


def _delay(seconds: float, calls: HeldCalls) -> None:
    """Let each call go on when its time has come; several threads may be in one at the same time."""
    held: deque[tuple[float, int]] = deque()
    while True:
        call = calls.wait(max(0.0, held[0][0] - time.monotonic()) if held else None)
        if call is not None:
            held.append((time.monotonic() + seconds, call))
        while held and held[0][0] <= time.monotonic():
            calls.let_go(held.popleft()[1])


if __name__ == "__main__":
    main()
