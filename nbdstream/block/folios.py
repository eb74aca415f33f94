"""Large folios of the page cache, parted into single pages before something small is written into them.

What was read or written in sequence (a copied image, a streamed one) lies in folios of up to 2 MiB. For each write into
one, however small, ext4 goes over all of its blocks: 4 KiB take 27 µs there, and 2 in a single page (Linux 6.18; there
are such folios since 6.16). To part one takes 65 µs, once.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_SHIFT: Final = 18
"""A folio is parted where something is written in a piece of 256 KiB for the first time: smaller ones cost little."""

_MOST_IN_VAIN = 64
"""Pieces in a row that lay in single pages: then others do, too, and to try takes as long as some writes."""

_KNOWN_SECONDS = 30.0
"""After that it is tried afresh: a folio that was dirty, and so could not be parted, is clean by then."""

_MOST_KNOWN = 1 << 16
"""Pieces that are known at most: the memory for them does not follow the disk's size."""

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_STATFS_BYTES = 256
"""More than a ``struct statfs`` has anywhere; it begins with the file system's magic, a long."""
_EXT4_MAGIC = 0xEF53


class Folios:
    """Those of one file. Who writes asks whether a piece is to be parted: :attr:`trying`, :attr:`known`, :attr:`until`.

    (They are read for every write, and a call would be felt.)
    """

    def __init__(self, fd: int, part: Callable[[int], bool]) -> None:
        """``part`` parts the folio at an offset of the file, and tells if there was one."""
        self._part = part
        self._in_vain = 0
        self.trying = False
        """Whether it seems worthwhile now."""
        self.known: set[int] = set()
        """The pieces that need not be parted."""
        self.until = -math.inf if walks_folios(fd) else math.inf
        """When all that is over, and :meth:`part` is to be called in any case (``time.monotonic``)."""

    def part(self, offset: int, now: float) -> None:
        """Have the folio at ``offset`` parted while it is clean: a write makes it dirty, and a dirty one stays."""
        if now >= self.until or len(self.known) >= _MOST_KNOWN:
            self.known.clear()
            self._in_vain = 0
            self.until = now + _KNOWN_SECONDS
        self.known.add(offset >> PIECE_SHIFT)
        self._in_vain = 0 if self._part(offset) else self._in_vain + 1
        self.trying = self._in_vain < _MOST_IN_VAIN


def walks_folios(fd: int) -> bool:
    """Whether a file is on a file system that takes time for each block of a folio that is written to: ext4."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    return not _fstatfs(fd, buffer) and ctypes.c_long.from_buffer(buffer).value == _EXT4_MAGIC
