"""Letting requests gather while a client still has replies to read, as a network card holds its interrupts back.

Where a client needs longer for a reply than we do, there would be two or three requests each time that we look, and a
system call on either side for so few. It is the client that pays for that: replies that come in larger pieces cost it
less. So as long as it has plenty to read we wait, some microseconds, in which it does without us.
"""

from __future__ import annotations

import array
import fcntl
import termios
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_LONGEST_NS: Final = 20_000
"""For all others that the loop serves, this is what they wait for nothing."""

_PLENTY_BYTES: Final = 48 << 10
"""In the socket, with what the kernel needs itself: ten reads of 4 KiB, so that the client has work when we go on."""

_DEEP_REQUESTS: Final = 8
_SMALL_READ: Final = 16 << 10
_TRUST: Final = 64
"""A client that sent more than 8 requests at once has many in flight: for the next 64 batches it is worth a look, if
they were reads of 16 KiB at most. (Of these the number counts, more than the length. It pays to be in time for others.)
"""


class Gathering:
    """One client's replies that it has not read."""

    def __init__(
        self, transport: asyncio.Transport, longest: int, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """``longest``: for how many nanoseconds the loop may be kept awake, as for :class:`Polling`; 0: never."""
        self._socket = transport.get_extra_info("socket")
        self._longest = min(longest, _LONGEST_NS) if self._socket else 0
        self._clock = clock
        self._unread = array.array("i", [0])
        self._trust = 0

    def wait(self, requests: int, read: int) -> None:
        """Wait, 20 µs at most, until the client has little left to read of a batch in which ``read`` bytes were."""
        if requests > _DEEP_REQUESTS and 0 < read <= requests * _SMALL_READ and self._longest:
            self._trust = _TRUST
        elif not self._trust:
            return
        self._trust -= 1
        end = self._clock() + self._longest
        while self._has_plenty() and self._clock() < end:
            pass

    def _has_plenty(self) -> bool:
        try:
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, self._unread)
        except OSError:  # not every kind of socket tells
            self._longest = self._trust = 0
            return False
        return self._unread[0] > _PLENTY_BYTES
