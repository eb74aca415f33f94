"""Checking a QED image: what ``qemu-img check`` finds, in the same terms, less the leaks that it invents.

A cluster of the file that two entries lead to, an entry that leads to no cluster, a table that overlaps another one:
each is a *corruption*. A cluster that nothing leads to is a *leak*: wasted space, no danger. Entries beyond the
image's size are checked like all others.

(QEMU divides the file's size by the cluster size less one, so that it sees one leak too many in every
``cluster_size - 1`` clusters. We do not.)

Everything here blocks: run it in a thread. Memory: one bit for each cluster of the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from operator import ne
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.block.qed.layout import HEADER_BYTES, Header
from nbdstream.block.qed.walk import Walk

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable

KEPT_PROBLEMS = 1000
"""How many problems a result describes. A damaged image can have millions; all are counted."""


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


def check(fd: int, links: Iterable[tuple[int, int]] = ()) -> CheckResult:
    """Check the image in an open file, which nobody may change meanwhile. It is only read.

    ``links`` are clusters and L2 entries that count as if the tables held them. Raises ImageError if it is no QED image
    that can be opened, OSError if its header cannot be read.
    """
    header = Header.parse(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size)
    return _Check(fd, header, links).result()


class _Check(Walk):
    """A walk that counts."""

    def __init__(self, fd: int, header: Header, links: Iterable[tuple[int, int]]) -> None:
        super().__init__(fd, header, links)
        self._table = -1  # the L2 table that was seen last
        self._last_data = 0  # where the data lies that was seen last in it
        self._result = CheckResult(-(-header.image_size // header.cluster_size))

    def result(self) -> CheckResult:
        result = self._result
        try:
            self.run()
        except OSError as error:
            self.unreadable_table(error)
        result.leaks = self.used.count(0)
        result.image_end_offset = (self.used.find(1, right=True) + 1) * self.header.cluster_size
        return result

    def bad_table(self, index: int, entry_offset: int, entry: int) -> None:
        self._report(entry_offset, entry, "no L2 table can be there")

    def taken_table(self, index: int, entry_offset: int, entry: int, overlap: int) -> None:
        self._report(entry_offset, entry, "the L2 table would overlap what is in use already", overlap)

    def unreadable_table(self, error: OSError) -> None:
        self._result.check_errors += 1

    def entries_found(self, cluster: int, entries: array[int], places: list[int]) -> None:
        if not places:
            return
        self._result.allocated_clusters += len(places)
        table = cluster // self.geometry.entries
        if table != self._table:
            self._table, self._last_data = table, 0
        size = self.header.cluster_size
        expected = [self._last_data + size if self._last_data else places[0]]
        expected += [place + size for place in places[:-1]]
        self._result.fragmented_clusters += sum(map(ne, places, expected))
        self._last_data = places[-1]

    def bad_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        self._report(entry_offset, entry, "no cluster can be there")

    def taken_entry(self, cluster: int, entry_offset: int, entry: int) -> None:
        self._report(entry_offset, entry, "the cluster is in use already")

    def _report(self, entry_offset: int, entry: int, reason: str, count: int = 1) -> None:
        self._result.corruptions += count
        kept = self._result.problems
        kept += [Problem(entry_offset, entry, reason)] * min(count, KEPT_PROBLEMS - len(kept))
