"""Which clusters of an image file are in use: where the next ones go, and which may be used again."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitarray import bitarray


class Space:
    """The clusters of one file. Offsets and lengths are bytes, multiples of the cluster size.

    ``end`` is where the file's used part ends: new clusters are appended there when no free run is left.
    """

    def __init__(self, cluster_size: int, end: int) -> None:
        self._cluster_size = cluster_size
        self.end = end
        self.untouched = end
        """From here on nothing was ever given out: where the file is longer, or made longer, it reads as zeroes."""
        self._free: list[tuple[int, int]] = []  # (offset, end) of free runs below `end`; sorted, never touching

    @classmethod
    def of_used(cls, cluster_size: int, used: bitarray) -> Space:
        """Return the space of a file of which ``used`` has a bit for each cluster."""
        space = cls(cluster_size, 0)
        last = 0
        for first, behind in _runs(used):
            if first > last:
                space._free.append((last * cluster_size, first * cluster_size))
            last = behind
        space.end = space.untouched = last * cluster_size
        return space

    @property
    def free(self) -> list[tuple[int, int]]:
        """The free runs below ``end``, as (offset, length)."""
        return [(start, end - start) for start, end in self._free]

    def allocate(self, count: int) -> tuple[int, int]:
        """Return (offset, clusters) of a run of at least one and at most ``count`` clusters; free runs come first."""
        if not self._free:
            return self.append(count), count
        start, end = self._free[0]
        taken = min(count * self._cluster_size, end - start)
        if start + taken == end:
            del self._free[0]
        else:
            self._free[0] = (start + taken, end)
        return start, taken // self._cluster_size

    def allocate_below(self, limit: int) -> int | None:
        """Return the offset of the first free cluster, if there is one below ``limit``."""
        return self.allocate(1)[0] if self._free and self._free[0][0] < limit else None

    def append(self, count: int) -> int:
        """Return the offset of ``count`` new clusters at the end."""
        offset = self.end
        self.end += count * self._cluster_size
        self.untouched = max(self.untouched, self.end)
        return offset

    def append_untouched(self) -> int | None:
        """Return the offset of a new cluster that reads as zeroes; None if others are to be used first."""
        if self._free or self.end < self.untouched:
            return None
        return self.append(1)

    def cut(self) -> None:
        """Note that the file was cut off at the end."""
        self.untouched = self.end

    def release(self, offset: int, count: int = 1) -> None:
        """Take clusters back. Nothing refers to them any more, neither durably nor in memory."""
        start, end = offset, offset + count * self._cluster_size
        index = bisect_left(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        if end == self.end:
            self.end = start
        else:
            self._free.insert(index, (start, end))


def _runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    """Return (first, behind) of each run of set bits."""
    position = bits.find(1)
    while position >= 0:
        behind = bits.find(0, position)
        if behind < 0:
            behind = len(bits)
        yield position, behind
        position = bits.find(1, behind)
