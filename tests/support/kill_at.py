"""``python -m tests.support.kill_at CALL NUMBER COMMAND...``: COMMAND, killed when it is about to make a system call.

``kill -9`` comes at the NUMBER-th CALL (its name, as in ``pwrite64``) of all threads together, which does not happen
any more. (strace counts the calls of each thread alone.)
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

from tests.support.held_calls import HeldCalls, become


def main() -> None:
    """Become the command."""
    call, number, *command = sys.argv[1:]
    become(command, [call], partial(_count, int(number)))


def _count(number: int, calls: HeldCalls) -> None:
    """Let the calls go on, one by one, up to the last one."""
    while True:
        if (call := calls.wait()) is None:
            continue
        number -= 1
        if number == 0:
            os.kill(calls.victim, signal.SIGKILL)
            return
        calls.let_go(call)


if __name__ == "__main__":
    main()
