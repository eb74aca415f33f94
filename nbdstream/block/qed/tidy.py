"""Leaving no cluster of an image file unused, without stopping those who use it.

Clusters become free inside the file when a fetch loses the race against a guest's write, or when the guest
discards. Data from the end of the file moves into them, and the end is cut off. What cannot be filled that way,
because a table lies at the end, is given to clusters that read as zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nbdstream.block.qed.tables import ZERO

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from nbdstream.block.qed.image import QedImage

_ROUNDS = 4
"""A guest that goes on writing can free and take clusters meanwhile; it is not chased for ever."""


class Guard(Protocol):
    """Who knows what else is going on in the clusters of the disk."""

    def hold(self, cluster: int) -> AbstractContextManager[None] | None:
        """Keep a cluster from being allocated, discarded or written until the context ends; None if it is busy.

        Writes that were taken before may still be on their way to the file.
        """


async def tidy(image: QedImage, guard: Guard, *, fill: bool = True) -> None:
    """Fill or cut off every free cluster of the file. Raises OSError.

    With ``fill``, what is unallocated is taken to read as zero: no cluster of the disk may be remote any more.
    """
    for _ in range(_ROUNDS):
        await image.settle()
        free = sum(length for _, length in image.free_runs)
        if not free:
            break
        moved = await _move_tail(image, guard, image.end - free)
        if not moved and not (fill and await _fill_with_zeroes(image, guard)):
            break
    await image.settle()
    image.cut()


async def _move_tail(image: QedImage, guard: Guard, new_end: int) -> int:
    """Move data that lies behind ``new_end`` into free clusters in front of it; return how many clusters."""
    moved = 0
    for cluster, place in await image.clusters_behind(new_end):
        held = guard.hold(cluster)
        if held is None:
            continue
        with held:
            target = image.allocate_below(new_end)
            if target is None:
                break
            if await image.entry(cluster) != place:
                image.release(target, 1)
                continue
            await image.copy_cluster(place, target)
            image.map(cluster, target, replaced=place)
            moved += 1
    return moved


async def _fill_with_zeroes(image: QedImage, guard: Guard) -> int:
    """Let clusters that read as zero have the free ones, as data; return how many."""
    filled = 0
    for cluster in await image.zero_clusters(sum(length for _, length in image.free_runs) // image.cluster_size):
        held = guard.hold(cluster)
        if held is None:
            continue
        with held:
            if await image.entry(cluster) > ZERO:
                continue
            target = image.allocate_below(image.end)
            if target is None:
                break
            await image.write(target, [bytes(image.cluster_size)])
            image.map(cluster, target)
            filled += 1
    return filled
