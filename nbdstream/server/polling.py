"""Staying awake for a client's next request.

A client with one request in flight at a time sends the next one some microseconds after a reply. To sleep until then
costs more than the request itself: the client's system call has to wake a processor up, and through the hypervisor if
we run in a guest. So the loop goes on looking for a moment, as QEMU's iothreads do, as long as that pays: for a client
that thinks for longer, and beside threads that have better use for the processor, it sleeps.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_PAYS: Final = 2
"""While we sleep, a client that would be back within the time looks slower than that, by what it costs to wake us."""

_MOST_CAUTION: Final = 1024
"""Quick requests in a row that are waited for at most: then a look in vain costs some 50 ns a request."""


class Polling:
    """Keeps one event loop awake on behalf of all connections that it has."""

    def __init__(self, longest: int, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """``longest`` is for how many nanoseconds at a time; 0: never, and never where there is but one processor."""
        self.longest = longest if len(os.sched_getaffinity(0)) > 1 else 0
        """For how many nanoseconds at a time the loop is kept awake; 0: never."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._replied = 0
        self._until = 0
        self._pays = False
        self._quick = 0
        self._caution = 1
        """How many requests in a row must have been quick before we look: twice as many after each look in vain."""
        self.awake = False
        """Whether the loop does not sleep now."""

    def requested(self) -> None:
        """Learn from requests that arrive whether it pays."""
        if self.awake:
            self._caution = 1
        elif self._clock() - self._replied < _PAYS * self.longest:
            self._quick += 1
            self._pays = self._quick >= self._caution
        else:
            self._quick = 0

    def replied(self) -> None:
        """Stay awake for a while, if that pays: the replies have been sent, and nothing is in flight."""
        self._replied = self._clock()
        if self._pays:
            self._until = self._replied + self.longest
            if not self.awake:
                self.awake = True
                self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Have the loop look once more without going to sleep, which a callback that is ready makes it do."""
        if self._clock() < self._until:
            self._loop.call_soon(self._look)
        else:
            self.awake = self._pays = False
            self._quick = 0
            self._caution = min(2 * self._caution, _MOST_CAUTION)
