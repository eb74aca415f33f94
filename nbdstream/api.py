"""Streaming a disk from Python.

::

    async with await nbdstream.stream_disk("nbd://host/disk", "overlay.qed", socket="/run/guest.sock") as disk:
        print(nbdstream.stream_disk_info(disk))
        await disk.wait()
"""

from __future__ import annotations

from typing import NamedTuple

from nbdstream.stream.disk import DiskStream
from nbdstream.stream.source import SourceOptions

__all__ = ["DiskInfo", "DiskStream", "stream_disk", "stream_disk_info"]


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
    """Bytes that came from the source since the stream began."""


async def stream_disk(
    source: str,
    overlay: str,
    *,
    socket: str | None = None,
    connections: int = 4,
    speed: int = 0,
    tls_certificates: str | None = None,
) -> DiskStream:
    """Make or resume ``overlay``, a QED image backed by the NBD URI ``source``, and stream all of it in.

    The stream runs in the background, on the running event loop (uvloop is much faster than asyncio's own), until it
    is complete or the returned :class:`DiskStream` is closed; ``await disk.wait()`` waits for the first, ``async with``
    does the second. With ``socket`` the disk is served read-write at that unix socket from before anything is fetched.
    ``speed`` limits what is fetched in the background, in bytes a second; 0 does not. ``tls_certificates`` is the
    directory of ca-cert.pem, client-cert.pem and client-key.pem.

    Raises :class:`nbdstream.errors.NbdstreamError`; nothing has changed on disk then.
    """
    options = SourceOptions(connections=connections, tls_certificates=tls_certificates)
    return await DiskStream.start(source, overlay, socket=socket, options=options, speed=speed)


def stream_disk_info(disk: DiskStream) -> DiskInfo:
    """Return how far a stream has come."""
    progress = disk.progress
    return DiskInfo(disk.path, progress.position, progress.length, disk.independent, progress.rate, progress.fetched)
