"""The L1 and L2 tables of a QED image: read in pages, validated, and kept in a bounded cache.

An L2 table is never held whole. A *page* is 4 KiB of it, 512 entries, numbered ``cluster // 512``; since a
table holds a multiple of 512 entries, that number alone says which L2 table and which part of it is meant.
So the memory for tables is bounded whatever the geometry, and a lookup is one dictionary access.

What the file holds is what the cache holds: only :meth:`Tables.link` changes entries, file first.
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
from array import array
from typing import TYPE_CHECKING

from nbdstream.block.worker import pread_exact, pwrite_all
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nbdstream.block.qed.layout import Header

PAGE_BYTES = 4096
PAGE_ENTRIES = PAGE_BYTES // 8
SECTOR_BYTES = 512
"""What a disk writes atomically; tables are written in no smaller units (qed.md: so does QEMU)."""
SECTOR_ENTRIES = SECTOR_BYTES // 8

CACHED_PAGES = 8192
"""32 MiB of tables, which map 256 GiB at the default geometry: more than a guest works on at a time."""

UNALLOCATED = 0
"""L2 entry: the cluster is in the backing file, or reads as zero where there is none (qed_spec)."""
ZERO = 1
"""L2 entry: the cluster reads as zero (qed_spec)."""

BAD_TABLE = 1
"""Stands in an L1 table in memory for what leads to no table (no table is at an odd place)."""

_NO_TABLE = memoryview(bytes(PAGE_BYTES)).cast("Q")
"""The page that stands for an L2 table that does not exist."""


# Numbers of so many digits of 64 bits: 1, 1, 1, ... and, from the lowest on, 0, 1, 2, ...
_ONES = [((1 << 64 * count) - 1) // ((1 << 64) - 1) for count in range(PAGE_ENTRIES + 1)]
_RAMP = list(itertools.accumulate((digit << 64 * digit for digit in range(PAGE_ENTRIES)), initial=0))


class Tables:
    """The tables of one image file.

    Methods that end in ``_now`` never block. Those marked *blocking* are for a thread; only one thread at a time
    may be in :meth:`link`.
    """

    def __init__(self, fd: int, header: Header, l1: array[int]) -> None:
        self._fd = fd
        self._header = header
        self._geometry = geometry = header.geometry
        self._pages_per_table = geometry.entries // PAGE_ENTRIES
        self._cache: dict[int, memoryview] = {}
        self.l1 = l1
        """Offsets of the L2 tables, 0 where there is none. Those that lie beyond the image size hold clusters, too."""

    @classmethod
    def load(cls, fd: int, header: Header, *, strict: bool = True) -> Tables:
        """Read and validate the L1 table (*blocking*).

        Raises ImageError if an entry is no place for a table; if not ``strict``, what it should lead to is EIO.
        """
        geometry = header.geometry
        l1 = array("Q", pread_exact(fd, geometry.table_bytes, header.l1_table_offset))
        if struct.pack("=H", 1) != struct.pack("<H", 1):
            l1.byteswap()
        size = os.fstat(fd).st_size
        for index, offset in enumerate(l1):
            if offset and not geometry.valid_table_offset(offset, size):
                if strict:
                    msg = (
                        f"damaged QED image: L1 entry {index} leads to {offset:#x}, where no table can be; "
                        f"'nbdstream check' tells more"
                    )
                    raise ImageError(msg)
                l1[index] = BAD_TABLE
        return cls(fd, header, l1)

    def header_changed(self, header: Header) -> None:
        """Take over a header with another size or backing file; the geometry and the tables stay where they are."""
        self._header = header

    @property
    def page_count(self) -> int:
        """How many pages it takes to map the whole image size."""
        clusters = -(-self._header.image_size // self._geometry.cluster_size)
        return -(-clusters // PAGE_ENTRIES)

    def pages(self) -> Iterator[int]:
        """Return the pages of those L2 tables that exist, those beyond the image size among them."""
        per_table = self._pages_per_table
        for index, place in enumerate(self.l1):
            if place:
                yield from range(index * per_table, (index + 1) * per_table)

    def present_pages(self) -> list[int]:
        """Return the pages of L2 tables that exist and map a part of the image size."""
        behind = self.page_count
        return [page for page in self.pages() if page < behind]

    def clusters_behind(self, place: int) -> list[tuple[int, int]]:
        """Return (cluster, where) of the data that lies at ``place`` or behind it, the last first (*blocking*)."""
        found = [
            (page * PAGE_ENTRIES + position, entry)
            for page in self.present_pages()
            for position, entry in enumerate(self.load_page(page))
            if entry >= place
        ]
        return sorted(found, key=lambda pair: -pair[1])

    def zero_clusters(self, most: int) -> list[int]:
        """Return clusters that are ZERO or UNALLOCATED though they have an L2 table (*blocking*)."""
        found: list[int] = []
        for page in self.present_pages():
            found += [page * PAGE_ENTRIES + i for i, entry in enumerate(self.load_page(page)) if entry <= ZERO]
            if len(found) >= most:
                break
        clusters = -(-self._header.image_size // self._geometry.cluster_size)
        return [cluster for cluster in found[:most] if cluster < clusters]

    def follow_now(self, cluster: int, entry: int, step: int, most: int) -> int:
        """Return how many clusters from ``cluster`` on have the entries ``entry``, ``entry + step``, and so on.

        ``most`` at most, and none beyond the page of ``cluster``, or where that would have to be read first.
        """
        page, within = divmod(cluster, PAGE_ENTRIES)
        entries = self.page_now(page)
        if entries is None:
            return 0
        count = min(most, PAGE_ENTRIES - within)
        # All at once, as one long number: in Python that is a hundred times faster than one by one.
        found = int.from_bytes(entries[within : within + count].tobytes(), "little")
        wrong = found ^ (entry * _ONES[count] + step * _RAMP[count])
        return count if not wrong else min(count, (wrong & -wrong).bit_length() - 1 >> 6)

    def page_now(self, page: int) -> memoryview | None:
        """Return the 512 entries of a page (format Q), or None if reading them would block."""
        cached = self._cache.get(page)
        if cached is not None:
            return cached
        offset = self._page_offset(page)
        if offset == 0:
            return _NO_TABLE
        buffer = bytearray(PAGE_BYTES)
        try:
            if os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) != PAGE_BYTES:
                return None
        except OSError:  # EAGAIN: not in the page cache; EOPNOTSUPP: a file system without RWF_NOWAIT
            return None
        return self._keep(page, buffer)

    def load_page(self, page: int) -> memoryview:
        """Return the entries of a page (*blocking*). Not kept: :meth:`keep_page` does that, on the loop."""
        offset = self._page_offset(page)
        if offset == 0:
            return _NO_TABLE
        return memoryview(bytearray(pread_exact(self._fd, PAGE_BYTES, offset))).cast("Q")

    def keep_page(self, page: int, entries: memoryview) -> None:
        """Cache a page that :meth:`load_page` returned, unless it was linked to meanwhile."""
        if entries is not _NO_TABLE:
            self._keep(page, entries.obj)

    def _keep(self, page: int, buffer: object) -> memoryview:
        entries = memoryview(buffer).cast("B").cast("Q")  # type: ignore[arg-type]  # any buffer
        if buffer == _NO_TABLE.obj:
            entries = _NO_TABLE  # as most are in a large disk with little in it: these take no memory
        if len(self._cache) >= CACHED_PAGES:
            del self._cache[next(iter(self._cache))]
        self._cache[page] = entries
        return entries

    def _page_offset(self, page: int) -> int:
        """Return where in the file a page is, 0 if its L2 table does not exist."""
        index, part = divmod(page, self._pages_per_table)
        table = self.l1[index]
        if table == BAD_TABLE:
            raise OSError(errno.EIO, f"damaged: L1 entry {index} leads to no table")
        return table + part * PAGE_BYTES if table else 0

    def absent(self, cluster: int) -> int:
        """Return how many clusters from ``cluster`` on are UNALLOCATED since there is no L2 table; 0 if there is."""
        index, within = divmod(cluster, self._geometry.entries)
        return 0 if self.l1[index] else self._geometry.entries - within

    def l1_index(self, cluster: int) -> int:
        """Return which L1 entry leads to a cluster."""
        return cluster // self._geometry.entries

    # -- writing ----------------------------------------------------------------------------------------------

    def write_new_tables(self, tables: Mapping[int, int], links: Iterable[tuple[int, int]]) -> None:
        """Write whole L2 tables that nothing refers to yet, with those of ``links`` that belong there (*blocking*).

        ``tables`` maps L1 index to file offset. They may reach the disk in any order before the barrier, since the
        L1 entries that make them reachable are written behind it.
        """
        contents = {index: array("Q", bytes(self._geometry.table_bytes)) for index in tables}
        for cluster, entry in links:
            table = contents.get(self.l1_index(cluster))
            if table is not None:
                table[cluster % self._geometry.entries] = entry
        for index, offset in tables.items():
            pwrite_all(self._fd, memoryview(contents[index]).cast("B"), offset)

    def link(self, tables: Mapping[int, int], links: Iterable[tuple[int, int]]) -> None:
        """Write links into the page cache of the file: what they lead to must be durable (*blocking*).

        Links into ``tables`` are in there already; those get their L1 entries here.
        """
        pages: dict[int, list[tuple[int, int]]] = {}
        for cluster, entry in links:
            if self.l1_index(cluster) not in tables:
                pages.setdefault(cluster // PAGE_ENTRIES, []).append((cluster % PAGE_ENTRIES, entry))
        for page, entries in pages.items():
            _update_page(self._fd, self._page_offset(page), entries)
        by_page: dict[int, list[tuple[int, int]]] = {}
        for index, offset in tables.items():
            by_page.setdefault(index // PAGE_ENTRIES, []).append((index % PAGE_ENTRIES, offset))
        for part, entries in by_page.items():
            _update_page(self._fd, self._header.l1_table_offset + part * PAGE_BYTES, entries)

    def linked(self, tables: Mapping[int, int], links: Iterable[tuple[int, int]]) -> None:
        """Take over into memory what :meth:`link` has written (on the loop)."""
        for index, offset in tables.items():
            self.l1[index] = offset
        for cluster, entry in links:
            page = self._cache.get(cluster // PAGE_ENTRIES)
            if page is _NO_TABLE:
                del self._cache[cluster // PAGE_ENTRIES]
            elif page is not None:
                page[cluster % PAGE_ENTRIES] = entry


def write_entries(fd: int, entries: Iterable[tuple[int, int]]) -> None:
    """Change entries, each given by its offset in the file, whole sectors at a time (*blocking*)."""
    pages: dict[int, list[tuple[int, int]]] = {}
    for offset, entry in entries:
        pages.setdefault(offset // PAGE_BYTES, []).append((offset % PAGE_BYTES // 8, entry))
    for page, found in pages.items():
        _update_page(fd, page * PAGE_BYTES, found)


def _update_page(fd: int, offset: int, entries: list[tuple[int, int]]) -> None:
    """Change entries of the page at ``offset`` of the file, whole sectors at a time."""
    buffer = bytearray(pread_exact(fd, PAGE_BYTES, offset))
    for position, entry in entries:
        struct.pack_into("<Q", buffer, position * 8, entry)
    for start, end in _sector_runs(position for position, _ in entries):
        pwrite_all(fd, memoryview(buffer)[start:end], offset + start)


def _sector_runs(positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Return the byte ranges, in whole sectors, that hold these entries."""
    start = end = -1
    for sector in sorted({position // SECTOR_ENTRIES for position in positions}):
        if sector * SECTOR_BYTES != end:
            if end > 0:
                yield start, end
            start = sector * SECTOR_BYTES
        end = (sector + 1) * SECTOR_BYTES
    yield start, end
