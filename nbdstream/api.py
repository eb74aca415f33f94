"""Streaming a disk from Python.

::

    async with await nbdstream.open_disk("nbd://host/disk", "overlay.qed", socket="/run/guest.sock") as disk:
        await nbdstream.stream_disk(disk)
        await disk.wait()

streams all of it behind the guest's back. Whoever wants to say when, and how much, goes step by step::

        offset = 0
        while offset < disk.size:
            offset = await nbdstream.stream_disk(disk, offset)

These are the two calls that libvirt's list was shown in 2010, ``virDomainStreamDisk`` and ``virDomainStreamDiskInfo``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, overload

from nbdstream.stream.disk import DEFAULT_STEP_BYTES, DiskStream
from nbdstream.stream.source import SourceOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.stream.job import StreamJob

__all__ = ["DiskInfo", "DiskStream", "SourceOptions", "open_disk", "stream_disk", "stream_disk_info"]


class DiskInfo(NamedTuple):
    """How far the stream of a disk has come."""

    device: str
    """Path of the overlay."""
    position: int
    """Bytes of the disk that need the source no more."""
    size: int
    """Bytes of the disk."""
    independent: bool
    """Whether the source may be released: all is local and durable, and the backing file name is gone."""
    rate: float
    """Bytes a second that came from the source in the last seconds."""
    fetched: int
    """Bytes that came from the source since the disk was opened."""


async def open_disk(
    source: str,
    overlay: str,
    *,
    socket: str | None = None,
    also: Sequence[str] = (),
    options: SourceOptions | None = None,
    guest_latency: float | None = None,
) -> DiskStream:
    """Make or resume ``overlay``, a QED image backed by the NBD URI ``source``; nothing is streamed yet.

    With ``socket`` the disk is served read-write at that unix socket as long as it is open, on the running event loop
    (uvloop is much faster than asyncio's own). What a guest reads there is fetched, and kept. ``also`` names
    further sources of the same disk, to be used while ``source`` is not to be had. ``guest_latency`` has a stream yield
    to the guest, so that 99 % of its requests that need no source take less than so many seconds.

    An overlay that is independent already is opened without the source. Close what is returned, or use ``async with``.
    Raises :class:`nbdstream.errors.NbdstreamError`; nothing has changed on disk then.
    """
    return await DiskStream.start(
        source, overlay, socket=socket, also=also, options=options, guest_latency=guest_latency, job=False
    )


@overload
async def stream_disk(disk: DiskStream, *, speed: int = 0) -> StreamJob: ...


@overload
async def stream_disk(disk: DiskStream, offset: int, length: int = DEFAULT_STEP_BYTES) -> int: ...


async def stream_disk(
    disk: DiskStream, offset: int | None = None, length: int = DEFAULT_STEP_BYTES, *, speed: int = 0
) -> StreamJob | int:
    """Stream all of a disk, or one increment of it; before its guest starts, while it runs, or without one.

    Without an ``offset`` a job begins to stream everything in the background, at ``speed`` bytes a second at most (0 is
    without limit), and is returned; ``await disk.wait()`` waits for its end.

    With an ``offset`` all that is remote of the ``length`` bytes there is made local, and what is returned then is the
    offset to go on from: the next place where something is remote (from the start again, if that is where it is); it is
    the size of the disk when nothing is left. The overlay is independent then.

    Raises :class:`nbdstream.errors.JobError` if the disk is being streamed already, if it is independent and all was
    to be streamed, or if streaming fails; ValueError for an offset or a length that is not one of the disk.
    """
    if offset is None:
        return disk.start_job(speed=speed)
    return (await disk.step(offset, length)).next_offset


def stream_disk_info(disk: DiskStream) -> DiskInfo:
    """Return how far a stream has come."""
    progress = disk.progress
    return DiskInfo(disk.path, progress.position, progress.length, disk.independent, progress.rate, progress.fetched)
