"""Small writes into the page cache, on the event loop itself.

To hand a write of 4 KiB to a thread, and to hear of its end, costs several times as much as the write: the page cache
takes it in 3 µs. But now and then it has to wait, for a journal that commits or for pages that have to be written
first, and the kernel cannot be asked not to (ext4 knows no RWF_NOWAIT for writes). So this is done only where nothing
is known to be under way, and when it did wait, it is not done for a while.
"""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING

from nbdstream.block.folios import PIECE_SHIFT

if TYPE_CHECKING:
    from nbdstream.block.device import Buffer
    from nbdstream.block.folios import Folios

_LONG_SECONDS = 0.001
"""A write that took longer has waited, or somebody else had the processor."""

_WATCHED = 128
"""So many writes after a long one are watched: to know which of the two it is costs a system call before each."""

_CAUTION = 4
"""For so many times what a write waited no other is tried: at most a fifth of the time is lost on the loop."""

_ROOM_BYTES = 4 << 20
"""How much longer than needed a file is made: that is done seldom then."""

_PAGE_MASK = os.sysconf("SC_PAGE_SIZE") - 1


class PromptWriter:
    """Writes into one file, as long as that takes no time. Its methods belong to the loop's thread."""

    def __init__(self, fd: int, length: int, folios: Folios) -> None:
        """``length``: the file is at least so long, bytes."""
        self._fd = fd
        self._length = length
        self._folios = folios
        self._not_before = 0.0
        self._watched = 0
        self.held = 0
        """How many others write to the file, or sync it, in such a way that a write may have to wait for them."""

    def ready(self) -> bool:
        """Whether a write is likely not to wait."""
        return not self.held and time.monotonic() >= self._not_before

    def write(self, data: Buffer, offset: int) -> bool:
        """Write whole pages if that can be done now; return False if not all of it was written, for whatever reason.

        A part of a page would have to be read first, if it is not in memory: that is not tried.
        """
        if self.held or (offset | len(data)) & _PAGE_MASK:
            return False
        begun = time.monotonic()
        if begun < self._not_before:
            return False
        folios = self._folios
        if begun >= folios.until or (folios.trying and offset >> PIECE_SHIFT not in folios.known):
            folios.part(offset, begun)
        sleeps = -1
        if self._watched:
            self._watched -= 1
            sleeps = _sleeps()
        try:
            written = os.pwrite(self._fd, data, offset)
        except OSError:
            return False  # a thread will see the same, and tell
        ended = time.monotonic()
        if ended - begun > _LONG_SECONDS:
            self._watched = _WATCHED
            if 0 <= sleeps < _sleeps():
                self._not_before = ended + _CAUTION * (ended - begun)
        return written == len(data)

    def lengthen(self, end: int) -> bool:
        """Make the file at least so long; return False if that fails. Nobody may be writing behind ``end``."""
        if end > self._length:
            try:
                os.ftruncate(self._fd, end + _ROOM_BYTES)
            except OSError:
                return False
            self._length = end + _ROOM_BYTES
        return True

    def cut(self, end: int) -> None:
        """Cut the file off, or make it longer. Nobody may be writing behind ``end``. Raises OSError."""
        os.ftruncate(self._fd, end)
        self._length = end


def _sleeps() -> int:
    """Return how often this thread has waited for something; losing the processor to somebody else does not count."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
