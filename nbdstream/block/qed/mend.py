"""Mending the tables of a damaged QED image so that what can be read stays as it is read.

Two things are wrong with entries. Those that lead nowhere can be read by nobody: they become UNALLOCATED, and which
parts of the disk were given up is told. Those that lead to what is in use already get a copy of it of their own: both
read as they did, and a write to one no longer changes the other. Where data lies in a table's place, the table gets the
copy: what is no entry in it may be data.

Order: an entry is changed only when what it will lead to is durable, so a power cut leaves each as it was or as it is
to be. Everything here blocks.
"""

from __future__ import annotations

import os
import sys
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bitarray.util import zeros

from nbdstream.block.qed.tables import write_entries
from nbdstream.block.qed.walk import Walk
from nbdstream.block.worker import pread_exact, pwrite_all
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bitarray import bitarray

    from nbdstream.block.qed.layout import Header

MOST_COPIES = 1 << 20
"""Clusters that are copied at most. A wrong entry for a whole table needs 32768 at the default geometry; what needs a
million is no damage but a construction, which would fill the disk."""

_SMALL_BYTES = 64 << 20
"""An accident may double a file; one that is smaller than this may become larger by so much, since what one wrong entry
leads to can be most of it."""

MOST_TABLES = 1024
"""L2 tables that are copied at most: as many as a damaged sector of the L1 table has entries, sixteen times."""

_KEPT_RANGES = 1000
_COPY_BYTES = 1 << 20
_ENTRIES_AT_ONCE = 1 << 16


class Range(NamedTuple):
    """A part of the disk, in bytes."""

    offset: int
    length: int


@dataclass(slots=True)
class Ranges:
    """Parts of the disk, all counted, the first of them kept."""

    bytes: int = 0
    kept: list[Range] = field(default_factory=list)
    """At most 1000; neighbours are joined."""

    def add(self, offset: int, length: int) -> None:
        """Add a part; they come in the order of the disk."""
        self.bytes += length
        last = self.kept[-1] if self.kept else None
        if last and last.offset + last.length == offset:
            self.kept[-1] = Range(last.offset, last.length + length)
        elif len(self.kept) < _KEPT_RANGES:
            self.kept.append(Range(offset, length))


def find_shared(fd: int, header: Header) -> bitarray:
    """Return a bit for each cluster of the file: whether an L2 table lies there, or should, and data as well.

    Raises ImageError if it is too much.
    """
    walk = _FindShared(fd, header)
    walk.run()
    return walk.shared


def drop_bad_entries(fd: int, header: Header, shared: bitarray) -> Ranges:
    """Make UNALLOCATED what leads nowhere, durably; return what of the disk could not be read because of it.

    :func:`measure_doubles` must have found that it is not too much: all tables are read, ``shared`` is from
    :func:`find_shared`. Raises OSError.
    """
    walk = _DropBad(fd, header, shared)
    walk.run()
    walk.write()
    if walk.dropped:
        os.fdatasync(fd)
    return walk.lost


def measure_doubles(fd: int, header: Header, shared: bitarray) -> int:
    """Return by how many bytes :func:`part_doubles` lets the file grow. Raises ImageError if it is too much."""
    walk = _PartDoubles(fd, header, shared, dry=True)
    walk.run()
    return walk.growth


def part_doubles(fd: int, header: Header, shared: bitarray) -> Ranges:
    """Give all that is used twice a copy of its own, durably; return what of the disk was copied.

    No entry may lead nowhere (see :func:`drop_bad_entries`), but for those in tables that are used twice: they are
    dropped in the copies. Raises ImageError where there is too much to copy, OSError where there is no room; nothing
    has changed then.
    """
    walk = _PartDoubles(fd, header, shared)
    size = walk.file_size
    try:
        walk.run()
        walk.finish()
    except BaseException:
        os.ftruncate(fd, size)  # nothing leads there yet
        raise
    walk.link()
    return walk.copied


class _FindShared(Walk):
    """Compares where the L1 table says that tables are with where these say that data is."""

    def __init__(self, fd: int, header: Header) -> None:
        super().__init__(fd, header)
        self.shared = zeros(len(self.used))
        self._taken = 0
        self._tables = zeros(len(self.used))

    def run(self) -> None:
        l1 = self.header.l1_table_offset
        for _, entries in self._read_table(l1, {}):
            for entry in filter(None, entries):
                if self.geometry.valid_table_offset(entry, self.file_size):
                    self._tables[self.clusters_of_table(entry)] = 1
        self._tables[self.clusters_of_table(l1)] = 0  # it stays where it is, whatever else is there
        super().run()

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        self._taken += 1
        _check_amount(self, self._taken, self._taken * self.header.table_size)
        self._look_at(read_table(self._fd, self.header, entry))

    def entries_found(self, cluster: int, entries: array[int], places: list[int]) -> None:
        self._look_at(places)

    def _look_at(self, places: Iterable[int]) -> None:
        for place in places:
            if self.geometry.valid_cluster_offset(place, self.file_size):
                number = place >> self.cluster_shift
                self.shared[number] |= self._tables[number]


class _Mending(Walk):
    def __init__(self, fd: int, header: Header, shared: bitarray) -> None:
        """``shared`` is what :func:`find_shared` finds."""
        super().__init__(fd, header)
        self._shared = shared

    def take_table(self, offset: int) -> int:
        """Leave the place to the data that lies there, if any does."""
        return self._shared[self.clusters_of_table(offset)].count() or super().take_table(offset)

    def part_of_disk(self, cluster: int, count: int) -> Range:
        """Return which part of the disk clusters are: of length 0 if they lie behind its end."""
        size = self.header.cluster_size
        start = min(cluster * size, self.header.image_size)
        return Range(start, min((cluster + count) * size, self.header.image_size) - start)


class _DropBad(_Mending):
    """Collects bad entries, and writes zeroes over them."""

    def __init__(self, fd: int, header: Header, shared: bitarray) -> None:
        super().__init__(fd, header, shared)
        self.lost = Ranges()
        self.dropped = 0
        self._offsets: list[int] = []

    def bad_table(self, index: int, entry_offset: int, entry: int) -> None:
        self._drop(entry_offset, index * self.geometry.entries, self.geometry.entries)

    def bad_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        self._drop(entry_offset, cluster, 1)

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        """Count what is lost; it is dropped in the copy (see :func:`part_doubles`), since this may be data as well."""
        first = index * self.geometry.entries
        for within, found in enumerate(read_table(self._fd, self.header, entry)):
            if found > 1 and not self.geometry.valid_cluster_offset(found, self.file_size):
                self._lose(first + within, 1)

    def _drop(self, entry_offset: int, cluster: int, count: int) -> None:
        self.dropped += 1
        self._offsets.append(entry_offset)
        self._lose(cluster, count)
        if len(self._offsets) >= _ENTRIES_AT_ONCE:
            self.write()

    def _lose(self, cluster: int, count: int) -> None:
        lost = self.part_of_disk(cluster, count)
        if lost.length:
            self.lost.add(*lost)

    def write(self) -> None:
        """Write what was collected."""
        write_entries(self._fd, ((offset, 0) for offset in self._offsets))
        self._offsets.clear()


class _PartDoubles(_Mending):
    """Makes copies behind the end of the file, and remembers which entries are to lead to them."""

    def __init__(self, fd: int, header: Header, shared: bitarray, *, dry: bool = False) -> None:
        """With ``dry`` nothing is written."""
        super().__init__(fd, header, shared)
        self.copied = Ranges()
        self._dry = dry
        self._end = self.file_size >> self.cluster_shift
        self._copies = 0
        self._tables = 0
        self._entry_offsets = array("Q")
        self._entries = array("Q")

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        self._tables += 1
        place = self._append(self.header.table_size)
        table = read_table(self._fd, self.header, entry)
        first = index * self.geometry.entries
        for within, found in enumerate(table):
            if found > 1:
                table[within] = self._own_place(first + within, found)
        if sys.byteorder == "big":
            table.byteswap()
        if not self._dry:
            pwrite_all(self._fd, memoryview(table).cast("B"), place)
        self._link(entry_offset, place)

    def _own_place(self, cluster: int, place: int) -> int:
        """Return what an entry of a table's copy leads to."""
        if not self.geometry.valid_cluster_offset(place, self.file_size):
            return 0
        number = place >> self.cluster_shift
        if self.used[number]:
            return self._copy(cluster, place)
        self.used[number] = 1
        return place

    def taken_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        self._link(entry_offset, self._copy(cluster, entry))

    def _copy(self, cluster: int, place: int) -> int:
        target = self._append(1)
        if not self._dry:
            copy_cluster(self._fd, place, target, self.header.cluster_size)
        part = self.part_of_disk(cluster, 1)
        if part.length:
            self.copied.add(*part)
        return target

    def _append(self, count: int) -> int:
        """Return the place of new clusters behind the end of the file."""
        self._copies += count
        _check_amount(self, self._tables, self._copies)
        place = self._end << self.cluster_shift
        self._end += count
        return place

    def _link(self, entry_offset: int, entry: int) -> None:
        self._entry_offsets.append(entry_offset)
        self._entries.append(entry)

    @property
    def growth(self) -> int:
        """How many bytes the copies take."""
        return self._copies << self.cluster_shift

    def finish(self) -> None:
        """Make the copies durable."""
        if self._copies:
            os.fdatasync(self._fd)

    def link(self) -> None:
        """Let the entries lead to the copies, durably."""
        if self._copies:
            write_entries(self._fd, zip(self._entry_offsets, self._entries, strict=True))
            os.fdatasync(self._fd)


def _check_amount(walk: Walk, tables: int, clusters: int) -> None:
    """Raise ImageError if it is too much to copy so many tables, and clusters in all."""
    there_is = max(walk.file_size, _SMALL_BYTES) >> walk.cluster_shift
    if tables > MOST_TABLES or clusters > min(MOST_COPIES, there_is):
        raise ImageError(
            "the tables are tangled: more would have to be copied than there is, or than an accident explains"
        )


def read_table(fd: int, header: Header, offset: int) -> array[int]:
    """Return the entries of a table. Raises OSError."""
    table = array("Q", pread_exact(fd, header.geometry.table_bytes, offset))
    if sys.byteorder == "big":
        table.byteswap()
    return table


def copy_cluster(fd: int, place: int, target: int, length: int) -> None:
    """Copy a cluster within a file. Raises OSError."""
    for start in range(0, length, _COPY_BYTES):
        size = min(_COPY_BYTES, length - start)
        pwrite_all(fd, pread_exact(fd, size, place + start), target + start)
