"""What answers for a cluster that the image does not have: a backing file, a source that is streamed from, or nothing.

Behind the end of the backing file there are zeroes. While an image is streamed, a bit for each cluster says whether
the source has to be asked at all; those are the *remote* clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nbdstream.block.device import zero_buffers
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitarray import bitarray

    from nbdstream.block.device import BlockDevice, Buffer


class Keeper(Protocol):
    """Who makes remote clusters local when somebody needs them (copy-on-read)."""

    def want(self, offset: int, length: int) -> None:
        """Have what is remote in this range on its way: somebody is going to :meth:`read` it."""

    async def read(self, cluster: int, within: int, length: int) -> Buffer | None:
        """Return bytes of a cluster if they are there before it is local, which it becomes; None: :meth:`keep` it."""

    async def keep(self, first: int, behind: int) -> None:
        """Make the remote ones among clusters ``first .. behind-1`` local, or leave them (a full disk).

        Raises OSError if their contents cannot be had.
        """


class Below:
    """What lies below one image. Clusters that are asked for here are UNALLOCATED in the image."""

    def __init__(self, device: BlockDevice | None) -> None:
        self.device = device
        self.keeper: Keeper | None = None
        """Who keeps what is read of a source, while streaming."""
        self.remote: bitarray | None = None
        """While streaming: the clusters that are unallocated and not known to read as zero. None: all that are
        unallocated are here."""
        self.remote_count = 0
        """How many bits of ``remote`` are set."""

    def begin_streaming(self, remote: bitarray, keeper: Keeper) -> None:
        """Take these clusters to be remote, and have ``keeper`` keep what is read of them."""
        self.remote, self.remote_count = remote, remote.count()
        self.keeper = keeper

    def forget(self) -> None:
        """There is nothing below any more: no cluster is remote."""
        self.device = self.keeper = self.remote = None

    def has(self, cluster: int) -> bool:
        """Whether an unallocated cluster is to be asked for here (else it reads as zero)."""
        if self.remote is not None:
            return bool(self.remote[cluster])
        return self.device is not None

    def run(self, cluster: int, count: int) -> int:
        """Return how many of ``count`` unallocated clusters are here, or are not, like the first."""
        if self.remote is None:
            return count
        other = self.remote.find(not self.remote[cluster], cluster, cluster + count)
        return count if other < 0 else other - cluster

    def mark_local(self, cluster: int) -> None:
        """Note that the image has a cluster now, or is about to."""
        if self.remote is not None and self.remote[cluster]:
            self.remote[cluster] = 0
            self.remote_count -= 1

    def mark_zero(self, first: int, behind: int) -> None:
        """Note that clusters ``first .. behind-1`` read as zero: they need not be asked for."""
        if self.remote is not None:
            self.remote_count -= self.remote.count(1, first, behind)
            self.remote[first:behind] = 0

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read; what is remote is not kept. Raises OSError."""
        if self.device is None:  # it was taken away meanwhile: what is still unallocated reads as zero
            return zero_buffers(length)
        inside = max(0, min(length, self.device.size - offset))
        if not inside:
            return zero_buffers(length)
        buffers = self.device.read_now(offset, inside)
        if buffers is None:
            buffers = await self.device.read(offset, inside)
        return [*buffers, *zero_buffers(length - inside)]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe what is here, with the depths it has for the image; a source that is streamed from is not asked."""
        if self.remote is not None:
            return [remote_extent(offset, length)]
        if self.device is None or offset >= self.device.size:
            return [Extent(offset, length, ExtentFlags.HOLE | ExtentFlags.ZERO, depth=0)]
        extents = await self.device.extents(offset, min(length, self.device.size - offset))
        return [extent._replace(depth=extent.depth + 1 if extent.depth else 0) for extent in extents]

    async def close(self) -> None:
        """Close the backing file."""
        if self.device:
            await self.device.close()


def remote_extent(offset: int, length: int) -> Extent:
    """Return the extent of what is below and was not asked."""
    return Extent(offset, length, ExtentFlags.REMOTE, depth=2)
