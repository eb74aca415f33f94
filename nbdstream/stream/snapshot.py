"""The state of a disk at one moment, for whoever watches it."""

from __future__ import annotations

from bisect import bisect_left
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.block.overlay import Overlay


class DiskState(Enum):
    """What a disk can do now."""

    RUNNING = "running"
    """It needs its source, and has it."""
    DEGRADED = "degraded"
    """Its source is away: what is remote has to wait. Everything local, and flush, goes on."""
    INDEPENDENT = "independent"
    """It needs no source any more."""


class Latency(NamedTuple):
    """How long the guest's requests took in the last seconds. Times are in seconds."""

    requests: int
    """How many were measured; with 0 the times mean nothing."""
    p50: float
    """Half of them took no longer."""
    p99: float
    """All but a hundredth of them took no longer."""


class Amounts(NamedTuple):
    """What a range of the disk consists of, in bytes.

    The first three make up all of it; the others are a part of these.
    """

    local: int
    """Data in the overlay."""
    zero: int
    """It reads as zero, and takes no room."""
    remote: int
    """It is only at the source."""
    in_flight: int
    """Of the remote: it is being fetched."""
    written: int
    """Of the local and zero: the guest wrote it."""


class Snapshot(NamedTuple):
    """A disk at one moment."""

    device: str
    path: str
    """Of the overlay."""
    state: DiskState
    reason: str
    """Why it is degraded, for people; else empty."""
    since: float | None
    """Since when it is degraded (``time.time()``)."""
    full_since: float | None
    """Since when the overlay's disk has no room for what is fetched."""
    source: str
    """The URI of the source that is used, without credentials; empty if independent."""
    waiting: int
    """How many of the guest's requests wait for the source now."""
    fetch_rate: float
    """Bytes a second that came from the source in the last seconds."""
    read_rate: float
    """Bytes a second that the guest read."""
    write_rate: float
    """Bytes a second that the guest wrote."""
    latency: Latency
    """Of the guest's requests that needed no source."""
    remote_latency: Latency
    """Of those that did."""
    amounts: Amounts
    """Of the whole disk."""


def disk_map(overlay: Overlay, in_flight: Sequence[int], columns: int) -> list[Amounts]:
    """Return what a disk consists of, from its start to its end, in at most ``columns`` parts of the same length.

    ``in_flight`` are the clusters that are being fetched, sorted. A part is at least a cluster.
    """
    cluster_size = overlay.image.cluster_size
    clusters = -(-overlay.size // cluster_size)
    columns = min(columns, clusters)
    edges = [clusters * column // columns for column in range(columns + 1)] if columns else [0, 0]
    return [
        _amounts(overlay, first, behind, bisect_left(in_flight, behind) - bisect_left(in_flight, first))
        for first, behind in pairwise(edges)
    ]


def _amounts(overlay: Overlay, first: int, behind: int, in_flight: int) -> Amounts:
    cluster_size = overlay.image.cluster_size
    length = min(behind * cluster_size, overlay.size) - first * cluster_size
    bits = overlay.below.remote
    remote = bits.count(1, first, behind) if bits is not None else 0
    zero = overlay.zero.count(1, first, behind)
    written = 0
    if overlay.written is not None and bits is not None:
        # What the guest wrote may be marked before it is there.
        written = (overlay.written[first:behind] & ~bits[first:behind]).count()
    # The last cluster may reach beyond the disk, and is counted whole.
    remote, zero = min(length, remote * cluster_size), min(length, zero * cluster_size)
    in_flight, written = min(length, in_flight * cluster_size), min(length, written * cluster_size)
    return Amounts(max(0, length - remote - zero), zero, remote, in_flight, written)
