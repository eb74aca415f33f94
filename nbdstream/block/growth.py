"""Making the disk of a QED image larger, while it is used. Smaller it never becomes.

What is new reads as zeroes. So whatever would show there is covered first: the rest of the cluster in which the disk
ended, a backing file that is longer than the disk was, entries that somebody left behind the disk's end. Only when all
of that is durable does the header get the new size: a power cut leaves the disk as large as it was, or as it is to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray.util import ones

from nbdstream.block.qed.tables import UNALLOCATED, ZERO
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from nbdstream.block.overlay import Overlay


async def grow(overlay: Overlay, size: int) -> None:
    """Give a disk ``size`` bytes, rounded up to 512; durable when this returns.

    Raises ImageError: it would become smaller, or larger than its geometry allows, or it is still being streamed, or
    what lies below is not known. Raises OSError: the file system is full, or broken. The size is as it was then.
    """
    image = overlay.image
    new = image.header.with_size(size).image_size
    if overlay.read_only:
        raise ImageError(f"{image.path} is open for reading only")
    if overlay.below.remote is not None:
        raise ImageError(f"{image.path} is being streamed: it can grow when it is independent")
    if new == overlay.size:
        return
    below_end = _below_end(overlay)
    overlay.zero.extend(ones(max(0, -(-new // image.cluster_size) - len(overlay.zero))))
    await _cover_tail(overlay, below_end)
    await _cover_clusters(overlay, new, below_end)
    await overlay.flush()
    await image.set_size(new)
    overlay.size = new


def _below_end(overlay: Overlay) -> int:
    """Return where what is below ends, in bytes."""
    if overlay.below.device is not None:
        return overlay.below.device.size
    image = overlay.image
    if image.backing_name is None:
        return 0
    extension = image.extension
    if extension is not None and extension.origin == image.backing_name and 0 < extension.origin_size <= overlay.size:
        return extension.origin_size
    raise ImageError(
        f"{image.path} has the backing file {image.backing_name}, which may be longer than the disk: say "
        f"--backing-format raw or qed to have it opened, since nothing of it must show behind the disk's present end"
    )


async def _cover_tail(overlay: Overlay, below_end: int) -> None:
    """Have zeroes in the rest of the cluster in which the disk ends."""
    cluster_size = overlay.image.cluster_size
    rest = -overlay.size % cluster_size
    if not rest:
        return
    entry = await overlay.image.entry(overlay.size // cluster_size)
    if entry > ZERO or (entry == UNALLOCATED and below_end > overlay.size):
        await overlay.write_zeroes(overlay.size, rest, may_unmap=False)


async def _cover_clusters(overlay: Overlay, new_size: int, below_end: int) -> None:
    """Have zero clusters behind the end of the disk where anything else would show."""
    image = overlay.image
    cluster_size = image.cluster_size
    cluster, behind = -(-overlay.size // cluster_size), -(-new_size // cluster_size)
    while cluster < behind:
        entry, count = await image.run(cluster, behind - cluster)
        shows = entry > ZERO
        if entry == UNALLOCATED and cluster * cluster_size < below_end:
            count = min(count, -(-below_end // cluster_size) - cluster)
            shows = True
        if shows:
            await overlay.write_zeroes(cluster * cluster_size, count * cluster_size, may_unmap=True)
        cluster += count
