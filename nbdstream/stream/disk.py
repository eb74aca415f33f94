"""A disk that is run while it is streamed: the overlay, its source, the guest's socket and the job, put together.

One command line serves a disk for its whole life: the first time it makes the overlay, later it resumes it, and once
the overlay is independent it serves it without the source.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Self

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.layout import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from nbdstream.block.qed.opening import create_file, read_header
from nbdstream.errors import ImageError, NbdstreamError, SourceError, WrongSourceError
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.server.sockets import bind_unix, discard
from nbdstream.stream.job import Progress, StreamJob
from nbdstream.stream.source import Source, round_up
from nbdstream.uri import NbdUri, UriError

log = logging.getLogger(__name__)

_DRAIN_SECONDS = 10.0
_DRAIN_SECONDS_WITHOUT_SOURCE = 1.0
"""What waits for a lost source will not be answered in this process; what is local is answered at once."""


class DiskStream:
    """One overlay, being served and streamed. Use :meth:`start`."""

    def __init__(self, path: str, overlay: Overlay, server: NbdServer | None, source: Source | None) -> None:
        self.path = path
        self.overlay = overlay
        self._server = server
        self._source = source
        self._job: StreamJob | None = None
        self._running: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        source: str,
        path: str,
        *,
        socket: str | None = None,
        socket_mode: int = 0o600,
        socket_group: str | None = None,
        connections: int = 4,
        rate: int | None = None,
        tls_certificates: str | None = None,
    ) -> DiskStream:
        """Make or open the overlay, serve it on the unix socket (if given) and begin to stream.

        Raises :class:`NbdstreamError`: nothing is served then, and nothing has changed on disk.
        """
        uri = _parse(source)
        remote = Source(uri, connections=connections, tls_certificates=tls_certificates)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(remote.close)
            bound = None
            if socket:
                bound = bind_unix(socket, mode=socket_mode, group=socket_group)
                undo.callback(discard, bound)
            # Whatever can be refused is refused before the image is opened: opening an image repairs it.
            await _prepare(path, uri, remote, undo, wait=socket is not None)
            image = await QedImage.open(path, writable=True)
            undo.push_async_callback(image.close)
            below = None if image.backing_name is None else remote
            overlay = Overlay(image, below)
            server = None
            if bound:
                server = NbdServer([Export("", overlay, writable=True)])
                await server.listen_socket(bound, unlink=True)
            undo.pop_all()
        disk = cls(path, overlay, server, below)
        disk._begin(rate)
        return disk

    def _begin(self, rate: int | None) -> None:
        if self._source:
            self._job = StreamJob(self.overlay, self._source, rate=rate)
            self._running = asyncio.get_running_loop().create_task(self._job.run())

    @property
    def independent(self) -> bool:
        """Whether the overlay needs no source any more."""
        return self.overlay.image.backing_name is None

    @property
    def progress(self) -> Progress:
        """How far the stream has come."""
        if self._job:
            return self._job.progress
        return Progress(self.overlay.size, self.overlay.size, 0.0, 0, 0)

    @property
    def uris(self) -> list[str]:
        """Where the guest finds its disk."""
        return self._server.uris if self._server else []

    async def wait(self) -> None:
        """Wait until the overlay is independent and durable. Raises NbdstreamError if that cannot be."""
        if self._running:
            try:
                await asyncio.shield(self._running)
            except* OSError as errors:
                raise NbdstreamError(f"{self.path}: streaming failed: {errors.exceptions[0]}") from errors

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop serving and streaming. What was written is durable; the overlay can be resumed.

        Requests that wait for a lost source are never answered: their connections are closed.
        """
        if self._server:
            lost = self._source is not None and not self.independent and not self._source.connected
            await self._server.close(_DRAIN_SECONDS_WITHOUT_SOURCE if lost else _DRAIN_SECONDS)
        if self._running and not self._running.done():
            self._running.cancel()
            await asyncio.wait([self._running])
        if self._source:
            await self._source.close()
        await self.overlay.close()


def _parse(source: str) -> NbdUri:
    try:
        return NbdUri.parse(source)
    except UriError as error:
        raise SourceError(str(error)) from error


def _create(path: str, uri: NbdUri, size: int, cluster_size: int, table_size: int) -> None:
    create_file(
        path,
        round_up(size),
        cluster_size=cluster_size,
        table_size=table_size,
        backing_name=str(uri.canonical()),
        origin_size=size,
    )


async def create_overlay(
    source: str, path: str, *, cluster_size: int, table_size: int, tls_certificates: str | None = None
) -> None:
    """Make an overlay of a source, of the size that it says it has. Raises NbdstreamError."""
    uri = _parse(source)
    remote = Source(uri, connections=1, tls_certificates=tls_certificates)
    try:
        await remote.connect()
        await asyncio.to_thread(_create, path, uri, remote.size, cluster_size, table_size)
    finally:
        await remote.close()


async def _prepare(path: str, uri: NbdUri, source: Source, undo: AsyncExitStack, *, wait: bool) -> None:
    """Make the overlay, or see that the one that exists belongs to this source; connect if it is needed."""
    if not await asyncio.to_thread(os.path.lexists, path):
        await source.connect()
        await asyncio.to_thread(_create, path, uri, source.size, DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE)
        undo.callback(os.unlink, path)
        return
    header, extension, backing_name = await asyncio.to_thread(read_header, path)
    check_origin(path, backing_name or (extension.origin if extension else ""), uri)
    if backing_name is None:
        return
    remembered = extension.origin_size if extension else 0
    # Less than the overlay's own size where that has grown since.
    source.expect(remembered if 0 < remembered <= header.image_size else header.image_size)
    await _connect_or_wait(source, wait=wait)


def check_origin(path: str, origin: str, uri: NbdUri) -> None:
    """Raise ImageError unless ``origin``, of which the image is or was an overlay, is this source."""
    if not origin:
        raise ImageError(f"{path} is no overlay of {uri}: it has no backing file, and remembers none")
    try:
        same = NbdUri.parse(origin).same_source(uri)
    except UriError:
        same = False
    if not same:
        raise ImageError(f"{path} is an overlay of {origin}, not of {uri}")


async def _connect_or_wait(source: Source, *, wait: bool) -> None:
    """Connect to the source of an existing overlay; with ``wait``, one that is away may come later."""
    try:
        await source.connect()
    except SourceError as error:
        if not wait or isinstance(error, WrongSourceError):
            raise
        log.warning("%s: what is local is served, the rest waits", error)
        source.connect_later(str(error))
