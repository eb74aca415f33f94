"""The thread that writes what was received into its file, while the export's own thread goes on receiving.

Storing a megabyte takes as long as receiving it. In a thread of its own it takes a processor of its own, and a
read that a guest waits for is never behind it.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdstream.block.remote.commands import Copy


class Store:
    """Has copies finished one by one. How many wait is bounded by who asks for them.

    None overtakes another, however urgent it is: who waited for its bytes has them by now, and while a guest goes on
    reading, what is overtaken would wait for ever. Nor does the thread give way: as fast as it is, the stream is.
    """

    def __init__(self, finish: Callable[[Copy], None]) -> None:
        """Start the thread; ``finish`` is called there, and must not raise."""
        self._finish = finish
        self._queue: SimpleQueue[Copy | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="nbd-store", daemon=True)
        self._thread.start()

    def put(self, copy: Copy) -> None:
        """Have a copy finished whose data is there."""
        self._queue.put(copy)

    def close(self) -> None:
        """Wait until all of them are finished, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (copy := self._queue.get()) is not None:
            self._finish(copy)
            del copy  # and its buffer: the next one may be long in coming
