"""A walk through all tables of a QED image file: which clusters are in use, and which entries are wrong.

Everything that must know the whole of an image goes this way: checking it, opening it for writing, repairing it. An
image may come from a stranger, so a walk reads no table twice, skips what is a hole in the file, and needs one bit of
memory for each cluster of the file, however the tables are tangled.

Everything here blocks: run it in a thread.
"""

from __future__ import annotations

import os
import sys
from array import array
from typing import TYPE_CHECKING

from bitarray.util import zeros

from nbdstream.block.files import runs
from nbdstream.block.worker import pread_exact
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bitarray import bitarray

    from nbdstream.block.qed.layout import Header

MOST_CLUSTERS = 1 << 31
"""The largest file that is walked: its bitmap takes 256 MiB. (128 TiB in clusters of 64 KiB.)"""

_READ_BYTES = 256 << 10
_PAGE_BYTES = 4096
_ZEROES = bytes(_READ_BYTES)


class Walk:
    """One walk, in the order of the disk; what comes first has a cluster of the file, what comes second finds it taken.

    The methods without an underscore but :meth:`run` are for subclasses to hear of what is found. Entries beyond the
    image's size are walked like all others. An *entry offset* is where in the file an entry is.
    """

    def __init__(self, fd: int, header: Header, links: Iterable[tuple[int, int]] = ()) -> None:
        """``links``: clusters and their entries, to be taken for the tables' own (they win).

        Raises ImageError if the file has too many clusters.
        """
        self.header = header
        self.geometry = header.geometry
        self.cluster_shift = header.cluster_size.bit_length() - 1
        self.file_size = os.fstat(fd).st_size
        if self.file_size >> self.cluster_shift > MOST_CLUSTERS:
            msg = (
                f"the file has {self.file_size} bytes, too many to check: "
                f"at most {MOST_CLUSTERS * header.cluster_size} are possible"
            )
            raise ImageError(msg)
        self.used: bitarray = zeros(self.file_size >> self.cluster_shift)
        """The clusters of the file that are in use. One that the file's end cuts off is none."""
        self._fd = fd
        self._links: dict[int, dict[int, int]] = {}
        for cluster, entry in links:
            index, within = divmod(cluster, self.geometry.entries)
            self._links.setdefault(index, {})[within] = entry

    def run(self) -> None:
        """Walk. Raises OSError if the L1 table cannot be read, and whatever the subclass raises."""
        self.used[: self.header.header_size] = 1
        l1 = self.header.l1_table_offset
        self.take_table(l1)
        for offset, entries in self._read_table(l1, {}):
            first = (offset - l1) // 8
            for index, entry in enumerate(entries):
                if entry:
                    self._walk_l2(first + index, offset + index * 8, entry)

    # -- what is found ----------------------------------------------------------------------------------------

    def bad_table(self, index: int, entry_offset: int, entry: int) -> None:
        """Called for an L1 entry that leads to where no table can be."""

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        """Called for an L1 entry that leads to a table of which ``overlap`` clusters are in use already.

        Such a table is not looked into.
        """

    def table_found(self, index: int, offset: int) -> None:
        """Called for an L2 table before its entries are looked at."""

    def unreadable_table(self, error: OSError) -> None:
        """Called when an L2 table cannot be read, or not all of it."""
        raise error

    def entries_found(self, cluster: int, entries: array[int], places: list[int]) -> None:
        """Called for a part of an L2 table before it is looked at closer.

        ``entries`` begin with the one for ``cluster``; ``places`` are those that lead to data, or should. Parts in
        which nothing but UNALLOCATED stands are left out.
        """

    def bad_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        """Called for an L2 entry that leads to where no cluster can be."""

    def taken_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        """Called for an L2 entry that leads to a cluster that is in use already."""

    # -- walking ----------------------------------------------------------------------------------------------

    def clusters_of_table(self, offset: int) -> slice:
        """Return which clusters of the file a table has that lies at ``offset``."""
        first = offset >> self.cluster_shift
        return slice(first, first + self.header.table_size)

    def take_table(self, offset: int) -> int:
        """Mark the clusters of a table as used. Return how many of them were already."""
        clusters = self.clusters_of_table(offset)
        overlap = self.used[clusters].count()
        self.used[clusters] = 1
        return overlap

    def _walk_l2(self, index: int, entry_offset: int, entry: int) -> None:
        if not self.geometry.valid_table_offset(entry, self.file_size):
            self.bad_table(index, entry_offset, entry)
            return
        overlap = self.take_table(entry)
        if overlap:
            self.taken_table(index, entry_offset, entry, overlap)
            return
        self.table_found(index, entry)
        first = index * self.geometry.entries
        try:
            for offset, entries in self._read_table(entry, self._links.get(index, {})):
                self._take_entries(first + (offset - entry) // 8, offset, entries)
        except OSError as error:
            self.unreadable_table(error)

    def _read_table(self, table: int, links: dict[int, int]) -> Iterator[tuple[int, array[int]]]:
        """Return a table in parts, each with its offset in the file. Parts that are all zero are left out."""
        for part, length in self._parts(table, everything=bool(links)):
            data = pread_exact(self._fd, length, part)
            if data == _ZEROES[:length] and not links:
                continue
            entries = array("Q", data)
            if sys.byteorder == "big":
                entries.byteswap()
            first = (part - table) // 8
            for within, entry in links.items():
                if first <= within < first + len(entries):
                    entries[within - first] = entry
            yield part, entries

    def _parts(self, table: int, *, everything: bool) -> Iterator[tuple[int, int]]:
        """Return (offset, length) of what must be read of a table: not its holes, unless ``everything`` is wanted."""
        end = table + self.geometry.table_bytes
        position = table
        while position < end:
            if not everything:
                data = next((run for run in runs(self._fd, position, end) if run.data), None)
                if data is None:
                    return
                position = max(position, data.offset - data.offset % _PAGE_BYTES)
                stop = min(end, -(-data.end // _PAGE_BYTES) * _PAGE_BYTES)
            else:
                stop = end
            while position < stop:
                length = min(_READ_BYTES, stop - position)
                yield position, length
                position += length

    def _take_entries(self, cluster: int, offset: int, entries: array[int]) -> None:
        places = [entry for entry in entries if entry > 1]
        self.entries_found(cluster, entries, places)
        if not places:
            return
        if self._are_valid(places):
            shift = self.cluster_shift
            taken = [place >> shift for place in places]
            if not self.used[taken].any() and len(set(taken)) == len(taken):
                self.used[taken] = 1
                return
        for index, entry in enumerate(entries):
            if entry > 1:
                self._take_entry(cluster + index, offset + index * 8, entry)

    def _are_valid(self, places: list[int]) -> bool:
        """Tell whether whole clusters can be at all these places."""
        bits = 0
        for place in places:
            bits |= place
        valid = self.geometry.valid_cluster_offset
        return (
            not bits % self.header.cluster_size
            and valid(min(places), self.file_size)
            and valid(max(places), self.file_size)
        )

    def _take_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        if not self.geometry.valid_cluster_offset(entry, self.file_size):
            self.bad_entry(cluster, entry_offset, entry)
            return
        number = entry >> self.cluster_shift
        if self.used[number]:
            self.taken_entry(cluster, entry_offset, entry)
        self.used[number] = 1
