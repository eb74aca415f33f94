"""Checking a QED image: what ``qemu-img check`` finds, in the same terms, less the leaks that it invents.

All tables are walked once, in the order of the disk. A cluster of the file that two entries lead to, an entry that
leads to no cluster, a table that overlaps another one: each is a *corruption*. A cluster that nothing leads to is a
*leak*: wasted space, no danger. Entries beyond the image's size are checked like all others.

(QEMU divides the file's size by the cluster size less one, so that it sees one leak too many in every
``cluster_size - 1`` clusters. We do not.)

Everything here blocks: run it in a thread. Memory: one bit for each cluster of the file.
"""

from __future__ import annotations

import os
import sys
from array import array
from dataclasses import dataclass, field
from operator import ne
from typing import TYPE_CHECKING, NamedTuple

from bitarray.util import zeros

from nbdstream.block.qed.layout import HEADER_BYTES, Header
from nbdstream.block.worker import pread_exact
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_CLUSTERS = 1 << 31
"""The largest file that is checked: its bitmap takes 256 MiB. (128 TiB in clusters of 64 KiB.)"""

KEPT_PROBLEMS = 1000
"""How many problems a result describes. A damaged image can have millions; all are counted."""

_READ_BYTES = 256 << 10
_ZEROES = bytes(_READ_BYTES)


class Problem(NamedTuple):
    """One table entry that is wrong."""

    entry_offset: int
    """Where the entry is, in the file."""
    entry: int
    """What it says."""
    reason: str

    def __str__(self) -> str:
        """Return one line for people."""
        return f"entry {self.entry:#x} at offset {self.entry_offset:#x} of the file: {self.reason}"


@dataclass(slots=True)
class CheckResult:
    """What a check found. The fields are QAPI's (ImageCheck), clusters are counted where nothing else is said."""

    total_clusters: int
    """Of the disk."""
    check_errors: int = 0
    """Tables that could not be read; what they lead to counts as leaks."""
    corruptions: int = 0
    leaks: int = 0
    allocated_clusters: int = 0
    """L2 entries that lead to data (or should)."""
    fragmented_clusters: int = 0
    """Of those, the ones that do not lie right behind the one before."""
    image_end_offset: int = 0
    """Where the last cluster in use ends, bytes in the file."""
    problems: list[Problem] = field(default_factory=list)
    """The first of the corruptions, at most ``KEPT_PROBLEMS``."""

    @property
    def status(self) -> int:
        """The exit code of ``qemu-img check``: 0 clean, 1 not completely checked, 2 corrupt, 3 leaks only."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0


def check(fd: int) -> CheckResult:
    """Check the image in an open file, which nobody may change meanwhile. It is only read.

    Raises ImageError if it is no QED image that can be opened, OSError if its header cannot be read.
    """
    size = os.fstat(fd).st_size
    header = Header.parse(os.pread(fd, HEADER_BYTES, 0), size)
    if size // header.cluster_size > MOST_CLUSTERS:
        msg = (
            f"the file has {size} bytes, too many to check: at most {MOST_CLUSTERS * header.cluster_size} are possible"
        )
        raise ImageError(msg)
    return _Walk(fd, header, size).run()


class _Walk:
    """One walk through all tables of an image."""

    def __init__(self, fd: int, header: Header, file_size: int) -> None:
        self._fd = fd
        self._header = header
        self._geometry = header.geometry
        self._file_size = file_size
        self._cluster_size = header.cluster_size
        self._cluster_shift = header.cluster_size.bit_length() - 1
        # A cluster that the file's end cuts off is none (nor is it a leak).
        self._used = zeros(file_size >> self._cluster_shift)
        self._last_data = 0  # the data cluster that was seen last in this table
        self._result = CheckResult(-(-header.image_size // header.cluster_size))

    def run(self) -> CheckResult:
        self._used[: self._header.header_size] = 1
        l1 = self._header.l1_table_offset
        self._take_table(l1)
        try:
            for offset, entries in self._read_table(l1):
                for index, entry in enumerate(entries):
                    if entry:
                        self._check_l1_entry(offset + index * 8, entry)
        except OSError:
            self._result.check_errors += 1
        self._result.leaks = self._used.count(0)
        self._result.image_end_offset = (self._used.find(1, right=True) + 1) * self._cluster_size
        return self._result

    def _check_l1_entry(self, entry_offset: int, entry: int) -> None:
        if not self._geometry.valid_table_offset(entry, self._file_size):
            self._report(entry_offset, entry, "no L2 table can be there")
            return
        overlap = self._take_table(entry)
        if overlap:
            # Not looked into: so no table is read twice, however the image is tangled.
            for _ in range(overlap):
                self._report(entry_offset, entry, "the L2 table would overlap what is in use already")
            return
        self._last_data = 0
        try:
            for offset, entries in self._read_table(entry):
                self._check_l2_entries(offset, entries)
        except OSError:
            self._result.check_errors += 1

    def _take_table(self, offset: int) -> int:
        """Mark the clusters of a table as used. Return how many of them were already."""
        first = offset >> self._cluster_shift
        clusters = slice(first, first + self._header.table_size)
        overlap = self._used[clusters].count()
        self._used[clusters] = 1
        return overlap

    def _read_table(self, offset: int) -> Iterator[tuple[int, array[int]]]:
        """Return a table in parts, each with its offset in the file. Parts that are all zero are left out."""
        for part in range(offset, offset + self._geometry.table_bytes, _READ_BYTES):
            length = min(_READ_BYTES, offset + self._geometry.table_bytes - part)
            data = pread_exact(self._fd, length, part)
            if data == _ZEROES[:length]:
                continue
            entries = array("Q", data)
            if sys.byteorder == "big":
                entries.byteswap()
            yield part, entries

    def _check_l2_entries(self, offset: int, entries: array[int]) -> None:
        places = [entry for entry in entries if entry > 1]
        if not places:
            return
        self._result.allocated_clusters += len(places)
        self._count_fragments(places)
        if self._are_valid(places):
            shift = self._cluster_shift
            clusters = [place >> shift for place in places]
            if not self._used[clusters].any() and len(set(clusters)) == len(clusters):
                self._used[clusters] = 1
                return
        for index, entry in enumerate(entries):
            if entry > 1:
                self._check_l2_entry(offset + index * 8, entry)

    def _count_fragments(self, places: list[int]) -> None:
        size = self._cluster_size
        expected = [self._last_data + size if self._last_data else places[0]]
        expected += [place + size for place in places[:-1]]
        self._result.fragmented_clusters += sum(map(ne, places, expected))
        self._last_data = places[-1]

    def _are_valid(self, places: list[int]) -> bool:
        """Tell whether whole clusters can be at all these places."""
        bits = 0
        for place in places:
            bits |= place
        valid = self._geometry.valid_cluster_offset
        return (
            not bits % self._cluster_size
            and valid(min(places), self._file_size)
            and valid(max(places), self._file_size)
        )

    def _check_l2_entry(self, entry_offset: int, entry: int) -> None:
        if not self._geometry.valid_cluster_offset(entry, self._file_size):
            self._report(entry_offset, entry, "no cluster can be there")
            return
        cluster = entry >> self._cluster_shift
        if self._used[cluster]:
            self._report(entry_offset, entry, "the cluster is in use already")
        self._used[cluster] = 1

    def _report(self, entry_offset: int, entry: int, reason: str) -> None:
        self._result.corruptions += 1
        if len(self._result.problems) < KEPT_PROBLEMS:
            self._result.problems.append(Problem(entry_offset, entry, reason))
