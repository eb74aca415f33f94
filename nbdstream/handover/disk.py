"""One disk at the destination: its overlay, its source and its guest's socket, from before it is owned until after."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import read_header
from nbdstream.errors import ImageError
from nbdstream.handover.journal import sync_directory
from nbdstream.handover.manifest import take_stock, write_manifest
from nbdstream.handover.switch import PassThrough, Switch
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.server.sockets import bind_unix, discard
from nbdstream.stream.disk import DiskStream
from nbdstream.stream.events import Listeners
from nbdstream.stream.hydration import Hydration
from nbdstream.stream.preparation import check_origin, create_empty
from nbdstream.stream.source import Source, SourceOptions

if TYPE_CHECKING:
    from nbdstream.uri import NbdUri
    from nbdstream.wire.handover.messages import Disk, Manifest


class DestinationDisk:
    """Use :meth:`open`."""

    def __init__(
        self,
        disk: Disk,
        overlay: Overlay,
        source: Source | None,
        switch: Switch,
        server: NbdServer,
        path: str,
        device: str,
    ) -> None:
        self.disk = disk
        self.path = path
        self.device = device
        """What it is called where QMP wants a device."""
        self._overlay = overlay
        self._source = source
        self._switch = switch
        self._server = server
        self._stream: DiskStream | None = None

    @classmethod
    async def open(
        cls,
        disk: Disk,
        path: str,
        uri: NbdUri,
        options: SourceOptions,
        *,
        device: str,
        socket: str,
        socket_mode: int,
        socket_group: str | None,
        owned: bool,
    ) -> DestinationDisk:
        """Make the overlay, or open the one that this hand-over made, and serve the guest: for reading only, so far.

        ``owned`` says that the overlay must be there: what it holds would be lost. Raises NbdstreamError.
        """
        remote = Source(uri, options=options)
        remote.expect(disk.size)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(remote.close)
            bound = bind_unix(socket, mode=socket_mode, group=socket_group)
            undo.callback(discard, bound)
            if await asyncio.to_thread(_exists, path, uri, owned=owned):
                remote.connect_later("it is not connected yet")
            else:
                await remote.connect()
                await asyncio.to_thread(create_empty, path, uri, disk.size)
            image = await QedImage.open(path, writable=True, marked=True)
            undo.push_async_callback(image.close)
            below = None if image.backing_name is None else remote
            overlay = Overlay(image, below)
            switch = Switch(PassThrough(remote, overlay.size), size=overlay.size, writable=True)
            server = NbdServer([Export("", switch, writable=True)])
            await server.listen_socket(bound, unlink=True)
            undo.pop_all()
        if below is None:
            await remote.close()
        return cls(disk, overlay, below, switch, server, path, device)

    @property
    def stream(self) -> DiskStream | None:
        """The stream, once it has begun."""
        return self._stream

    @property
    def remote(self) -> int:
        """Bytes that are only at the source, as far as that is known."""
        if self._source is None:
            return 0
        progress = self._stream.progress if self._stream else None
        return progress.length - progress.position if progress else self.disk.size

    def allow_writes(self, guest_latency: float | None) -> DiskStream:
        """From the next request on the guest has the overlay: what it writes is marked, what it reads is kept.

        ``guest_latency`` is the objective of the stream, in seconds.
        """
        listeners = Listeners()
        hydration = Hydration(self._overlay, self._source, listeners) if self._source else None
        stream = DiskStream(
            self.path, self._overlay, self._server, hydration, listeners, guest_latency, device=self.device
        )
        self._stream = stream
        self._switch.become(self._overlay)
        return stream

    def hydrate(self, speed: int) -> None:
        """Begin to stream, if anything is remote; ``speed`` is bytes a second, 0 for no limit."""
        assert self._stream
        if not self._stream.independent and self._stream.job is None:
            self._stream.start_job(speed=speed)

    @property
    def problem(self) -> str:
        """Why the source is not to be had; empty if it is, or is not needed."""
        lost = self._source is not None and self._source.lost_since is not None and self.remote > 0
        return f"{self.path}: {self._source.lost_because}" if self._source and lost else ""

    async def wait(self) -> None:
        """Wait until the overlay is independent and durable. Raises NbdstreamError if that cannot be."""
        assert self._stream
        await self._stream.wait()

    async def write_manifest(self, epoch: int, accepted: float) -> Manifest:
        """Write the manifest beside the overlay, durably, and return it. Raises OSError."""
        manifest = await take_stock(self._overlay.image, self.disk, epoch, accepted)
        await asyncio.to_thread(write_manifest, self.path, manifest)
        return manifest

    async def close(self) -> None:
        """Stop serving and streaming. What was written is durable."""
        if self._stream:
            await self._stream.close()
            return
        await self._server.close(1.0)
        if self._source:
            await self._source.close()
        await self._overlay.close()


def _exists(path: str, uri: NbdUri, *, owned: bool) -> bool:
    """Return whether the overlay is there; raises ImageError if it is somebody else's, or is missing."""
    if not os.path.lexists(path):
        if owned:
            raise ImageError(f"{path} is gone, and with it what the guest wrote")
        return False
    _, extension, backing_name = read_header(path)
    # The export's name is this offer's alone: so is an overlay that was made of it.
    check_origin(path, backing_name or (extension.origin if extension else ""), uri)
    return True


def remove_overlay(path: str, uri: NbdUri) -> None:
    """Remove an overlay that this hand-over made, if it is there (*blocking*). Raises ImageError, OSError."""
    if _exists(path, uri, owned=False):
        os.unlink(path)
        sync_directory(os.path.dirname(path))
