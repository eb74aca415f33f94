"""The thread that writes what was received into its file, while the export's own thread goes on receiving.

Storing a megabyte takes as long as receiving it. In a thread of its own it takes a processor of its own, and a
read that a guest waits for is never behind it.
"""

from __future__ import annotations

import itertools
import threading
from queue import PriorityQueue
from typing import TYPE_CHECKING

from nbdstream.block.worker import give_way

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.remote.commands import Copy


class Store:
    """Has copies finished one by one, the urgent ones first. How many wait is bounded by who asks for them."""

    def __init__(self, finish: Callable[[Copy], None]) -> None:
        """Start the thread; ``finish`` is called there, and must not raise."""
        self._finish = finish
        self._numbers = itertools.count()
        self._queue: PriorityQueue[tuple[int, int, Copy | None]] = PriorityQueue()
        self._thread = threading.Thread(target=self._serve, name="nbd-store", daemon=True)
        self._thread.start()

    def put(self, copy: Copy) -> None:
        """Have a copy finished whose data is there."""
        self._queue.put((not copy.urgent, next(self._numbers), copy))

    def close(self) -> None:
        """Wait until all of them are finished, and end the thread."""
        self._queue.put((2, 0, None))  # behind every copy
        self._thread.join()

    def _serve(self) -> None:
        give_way()
        while (copy := self._queue.get()[2]) is not None:
            self._finish(copy)
            del copy  # and its buffer: the next one may be long in coming
