"""Is this the source that the overlay belongs to? What is local and not the guest's is compared with it.

A wrong disk of the right size would be mixed into the overlay without anybody noticing. So before a source is used
that was away, or that is another server, a sample of clusters that came from the source once is read from it and
compared. Where there are none, its size has to do.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from nbdstream.block.qed.tables import ZERO
from nbdstream.errors import WrongSourceError

if TYPE_CHECKING:
    from bitarray import bitarray

    from nbdstream.block.overlay import Overlay
    from nbdstream.block.remote.export import RemoteExport

_SAMPLES = 16
"""Clusters that are compared: a disk of which a tenth differs passes once in five times, one of which half does never.
Disks that differ in less are two states of one disk, which no sample finds out."""

_COMPARED_BYTES = 64 << 10
"""Of each of them, wherever they are longer."""


async def compare(overlay: Overlay, export: RemoteExport, chance: random.Random | None = None) -> int:
    """Compare a sample of what is local with a source; return how many clusters that was.

    Raises WrongSourceError where they differ, OSError if one of them cannot be read.
    """
    clusters = _sample(overlay, chance or random.Random())
    compared = await asyncio.gather(*(_same(overlay, export, cluster) for cluster in clusters))
    return sum(compared)


def _sample(overlay: Overlay, chance: random.Random) -> list[int]:
    """Return the first, the last, and some more of the clusters that hold what the source holds."""
    remote = overlay.below.remote
    if remote is None or overlay.written is None:
        return []
    theirs: bitarray = ~(remote | overlay.zero | overlay.written[: len(remote)])
    first = theirs.find(1)
    if first < 0:
        return []
    last = theirs.find(1, right=True)
    places = [chance.randrange(first, last + 1) for _ in range(_SAMPLES - 2)]
    return sorted({first, last, *(theirs.find(1, place) for place in places)})


async def _same(overlay: Overlay, export: RemoteExport, cluster: int) -> bool:
    """Compare a cluster; False if the guest has written to it meanwhile, or it is none of the source's."""
    cluster_size = overlay.image.cluster_size
    offset = cluster * cluster_size
    length = min(cluster_size, _COMPARED_BYTES, export.size - offset)
    entry = await overlay.image.entry(cluster)
    if length <= 0 or entry <= ZERO:
        return False
    here = await overlay.image.read(entry, length)
    there = b"".join(await export.read(offset, length))
    assert overlay.written is not None
    if overlay.written[cluster]:
        return False
    if here != there:
        raise WrongSourceError(f"{export.uri.without_credentials()} is another disk: it differs at {offset}")
    return True
