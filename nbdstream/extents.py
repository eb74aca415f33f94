"""Extents: what a device says of its contents without reading them.

proto.md, "Metadata querying" and the ``base:allocation`` meta context, name the two flags; QEMU's
``qemu:allocation-depth`` names the depth. All offsets and lengths are bytes.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class ExtentFlags(IntFlag):
    """What is known of an extent. HOLE and ZERO have proto.md's bit values (NBD_STATE_HOLE, NBD_STATE_ZERO)."""

    DATA = 0
    HOLE = 1
    """No space is allocated for it (says nothing of its contents)."""
    ZERO = 2
    """It reads as zeroes."""
    REMOTE = 4
    """It is not local yet: reading it asks the source."""


class Extent(NamedTuple):
    """A run of bytes in one state."""

    offset: int
    length: int
    flags: ExtentFlags
    depth: int = 1
    """Which layer holds it (``qemu:allocation-depth``): 0 none, 1 the top, 2 its backing file, ..."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours in the same state. The input is sorted and free of overlaps."""
    last: Extent | None = None
    for extent in extents:
        if last and last.end == extent.offset and last[2:] == extent[2:]:
            last = last._replace(length=last.length + extent.length)
            continue
        if last:
            yield last
        last = extent
    if last:
        yield last
