"""Giving leaks back: moving what lies at the end of a QED image file into clusters that nothing leads to.

For a sound image that nobody else has open. When it is done the file is as long as what is in use, and has no cluster
that is not. Data fits everywhere; a table needs clusters that lie together. So the tables that reach behind the new
end come first: data is moved out of their way, if need be, and all tables if they stand in each other's.

Order: whatever is moved is copied, then a barrier, then the entries lead to the copy, then a barrier before the old
place is used again. A power cut leaves leaks at worst, as they were before. Everything here blocks.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from bitarray.util import zeros

from nbdstream.block.qed.mend import copy_cluster
from nbdstream.block.qed.tables import write_entries
from nbdstream.block.qed.walk import Walk
from nbdstream.block.worker import pread_exact, pwrite_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bitarray import bitarray

    from nbdstream.block.qed.layout import Header

_MOVED_AT_ONCE = 4096
"""Clusters between two barriers."""


def compact(fd: int, header: Header) -> Header:
    """Leave no cluster of the file unused; return the header, which changes if the L1 table is moved.

    Raises OSError: nothing is lost then. The tables must be sound (see :mod:`nbdstream.block.qed.check`).
    """
    return _Compaction(fd, header).run()


class _Compaction:
    def __init__(self, fd: int, header: Header) -> None:
        walk = _Tables(fd, header)
        walk.run()
        self._fd = fd
        self._header = header
        self._shift = walk.cluster_shift
        self._size = walk.used.count()  # of the file when all is done, in clusters
        self._free_from = 0
        self._used: bitarray = walk.used
        self._tables: bitarray = zeros(len(walk.used))
        self._tables[: header.header_size] = 1
        self._l1 = header.geometry.entries
        self._place_of = walk.places
        self._place_of.append(header.l1_table_offset >> self._shift)  # its index is behind those of the L2 tables
        for place in filter(None, self._place_of):
            self._mark(self._tables, place, used=True)

    def run(self) -> Header:
        if self._size < len(self._used):
            self._move_tables_below()
            self._move_data(self._behind_the_new_end(), self._free_place)
        os.ftruncate(self._fd, self._size << self._shift)
        os.fsync(self._fd)
        return self._header

    # -- tables -----------------------------------------------------------------------------------------------

    def _move_tables_below(self) -> None:
        """Have all tables lie in front of the new end."""
        table_size = self._header.table_size
        moving = [index for index, place in enumerate(self._place_of) if place + table_size > self._size]
        places = self._room_for_tables(len(moving))
        if len(places) < len(moving):  # they stand in each other's way
            moving = [index for index, place in enumerate(self._place_of) if place]
            self._move_tables({index: self._append(table_size) for index in moving})
            places = self._room_for_tables(len(moving))
        wanted = zeros(len(self._used))
        for place in places:
            self._mark(wanted, place, used=True)
        self._move_data(wanted, lambda: self._append(1))
        self._move_tables(dict(zip(moving, places, strict=True)))

    def _room_for_tables(self, count: int) -> list[int]:
        """Return up to ``count`` places in front of the new end where only data lies, or nothing."""
        table_size = self._header.table_size
        places: list[int] = []
        start = self._tables.find(0)
        while len(places) < count and start >= 0 and start + table_size <= self._size:
            in_the_way = self._tables.find(1, start, start + table_size)
            if in_the_way < 0:
                places.append(start)
                start += table_size
            else:
                start = self._tables.find(0, in_the_way)
        return places

    def _move_tables(self, targets: dict[int, int]) -> None:
        """Move tables to clusters that are free; durable when this returns."""
        for index, target in targets.items():
            if index != self._l1:
                self._copy_table(self._place_of[index], target)
        os.fdatasync(self._fd)
        l1_place = self._place_of[self._l1] << self._shift
        write_entries(
            self._fd,
            ((l1_place + index * 8, target << self._shift) for index, target in targets.items() if index != self._l1),
        )
        os.fdatasync(self._fd)
        if self._l1 in targets:
            self._copy_table(self._place_of[self._l1], targets[self._l1])
            os.fdatasync(self._fd)
            self._header = replace(self._header, l1_table_offset=targets[self._l1] << self._shift)
            pwrite_all(self._fd, self._header.pack(), 0)
            os.fdatasync(self._fd)
        for index, target in targets.items():
            for bits in (self._used, self._tables):
                self._mark(bits, self._place_of[index], used=False)
                self._mark(bits, target, used=True)
            self._place_of[index] = target

    def _copy_table(self, place: int, target: int) -> None:
        table = pread_exact(self._fd, self._header.geometry.table_bytes, place << self._shift)
        pwrite_all(self._fd, table, target << self._shift)

    # -- data -------------------------------------------------------------------------------------------------

    def _behind_the_new_end(self) -> bitarray:
        behind = zeros(len(self._used))
        behind[self._size :] = 1
        return behind

    def _move_data(self, wanted: bitarray, target: Callable[[], int]) -> None:
        """Move the data that lies in ``wanted`` clusters; durable when this returns."""
        if not (wanted & self._used & ~self._tables).any():
            return
        walk = _Data(self._fd, self._header, wanted, lambda entries: self._move_some(entries, target))
        walk.run()
        walk.deliver()
        os.fdatasync(self._fd)
        self._used[: len(wanted)] &= ~wanted | self._tables[: len(wanted)]

    def _move_some(self, entries: Iterable[tuple[int, int]], target: Callable[[], int]) -> None:
        links = []
        for entry_offset, place in entries:
            new = target() << self._shift
            copy_cluster(self._fd, place, new, self._header.cluster_size)
            links.append((entry_offset, new))
        os.fdatasync(self._fd)
        write_entries(self._fd, links)

    # -- clusters of the file ---------------------------------------------------------------------------------

    def _free_place(self) -> int:
        """Return a free cluster in front of the new end: there is one for each that lies behind it."""
        place = self._used.find(0, self._free_from)
        self._used[place] = 1
        self._free_from = place + 1
        return place

    def _append(self, count: int) -> int:
        """Return the first of ``count`` new clusters at the end of the file."""
        place = len(self._used)
        self._used.extend([1] * count)
        self._tables.extend([0] * count)
        return place

    def _mark(self, bits: bitarray, place: int, *, used: bool) -> None:
        bits[place : place + self._header.table_size] = used


class _Tables(Walk):
    """Finds where the L2 tables are."""

    def __init__(self, fd: int, header: Header) -> None:
        super().__init__(fd, header)
        self.places = array("Q", bytes(8 * self.geometry.entries))
        """By L1 index, in clusters of the file; 0 where there is none."""

    def table_found(self, index: int, offset: int) -> None:
        self.places[index] = offset >> self.cluster_shift


class _Data(Walk):
    """Delivers (entry offset, place) of the data that lies in wanted clusters, some at a time."""

    def __init__(
        self, fd: int, header: Header, wanted: bitarray, deliver: Callable[[list[tuple[int, int]]], None]
    ) -> None:
        super().__init__(fd, header)
        self._wanted = wanted
        self._deliver = deliver
        self._found: list[tuple[int, int]] = []
        self._table = 0

    def table_found(self, index: int, offset: int) -> None:
        self._table = offset

    def entries_found(self, cluster: int, entries: array[int], places: list[int]) -> None:
        shift, wanted = self.cluster_shift, self._wanted
        if not wanted[[place >> shift for place in places]].any():
            return
        first = self._table + cluster % self.geometry.entries * 8
        self._found += [
            (first + within * 8, entry) for within, entry in enumerate(entries) if entry > 1 and wanted[entry >> shift]
        ]
        if len(self._found) >= _MOVED_AT_ONCE:
            self.deliver()

    def deliver(self) -> None:
        """Deliver what was found since the last time."""
        self._deliver(self._found)
        self._found = []
