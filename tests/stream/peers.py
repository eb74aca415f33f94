"""Sources for the tests of streaming: our own server over a disk with switches, which can go away and come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from typing import TYPE_CHECKING

from nbdstream.block.device import BlockDevice, Buffer
from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.extents import Extent, ExtentFlags, merge
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from nbdstream.stream.disk import DiskStream
from nbdstream.stream.events import Event, Listeners
from nbdstream.stream.hydration import Hydration
from nbdstream.stream.source import Source, SourceOptions, round_up
from nbdstream.uri import NbdUri
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

CLUSTER = 65536


def some_bytes(length: int) -> bytes:
    """Bytes of which no cluster is zero, and none like another."""
    return random.Random(length).randbytes(length)


class SourceDisk(BlockDevice):
    """A disk in memory. ``zeroes`` and ``holes`` are byte ranges that it says read as zero, or are not allocated."""

    read_only = True

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.zeroes: list[range] = []
        self.holes: list[range] = []
        self.longest_extent = 1 << 40
        self.reads: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.gated: range | None = None
        """Where reads wait for the gate; None: everywhere."""
        self.asked = asyncio.Event()

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        self.reads.append((offset, length))
        self.asked.set()
        if self.gated is None or offset in self.gated:
            await self.gate.wait()
        if self.error:
            raise self.error
        return [bytes(self.data[offset : offset + length])]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if self.error:
            raise self.error
        end = min(offset + length, offset + self.longest_extent)
        edges = {edge for run in (*self.zeroes, *self.holes) for edge in (run.start, run.stop) if offset < edge < end}
        pieces = itertools.pairwise(sorted({offset, end, *edges}))
        return list(merge(Extent(start, stop - start, self._flags(start)) for start, stop in pieces))

    def _flags(self, position: int) -> ExtentFlags:
        flags = ExtentFlags.DATA
        if any(position in run for run in self.zeroes):
            flags |= ExtentFlags.HOLE | ExtentFlags.ZERO
        if any(position in run for run in self.holes):
            flags |= ExtentFlags.HOLE
        return flags

    def times_read(self, cluster: int) -> int:
        """How many reads had to do with a cluster."""
        start = cluster * CLUSTER
        return sum(offset < start + CLUSTER and offset + length > start for offset, length in self.reads)

    async def close(self) -> None:
        pass


class SourceServer:
    """Our NBD server over a disk, at a unix socket."""

    def __init__(self, path: str, disk: SourceDisk) -> None:
        self.path = path
        self.disk = disk
        self.uri = f"nbd+unix:///?socket={path}"
        self._server: NbdServer | None = None

    async def start(self) -> None:
        self._server = NbdServer([Export("", self.disk, writable=False)])
        await self._server.listen_unix(self.path)

    async def stop(self) -> None:
        """Go away at once. What is in flight is not answered."""
        if self._server:
            server, self._server = self._server, None
            await server.close(0.0)

    def source(self, *, connections: int = 1) -> Source:
        return Source(NbdUri.parse(self.uri), options=SourceOptions(connections=connections))


class Streamed:
    """An overlay whose clusters are fetched from a source when they are needed, and not otherwise."""

    def __init__(self, overlay: Overlay, source: Source, disk: SourceDisk) -> None:
        self.overlay = overlay
        self.image = overlay.image
        self.source = source
        self.disk = disk
        self.events: list[Event] = []
        self.hydration = Hydration(overlay, source, Listeners([self.events.append]))
        self.fetches = self.hydration.fetches

    async def read(self, offset: int, length: int) -> bytes:
        buffers = self.overlay.read_now(offset, length)
        if buffers is None:
            buffers = await self.overlay.read(offset, length)
        return b"".join(map(bytes, buffers))

    async def kept(self) -> None:
        """Wait until all that was fetched is in the file: who reads has its bytes before."""
        while self.fetches.bytes_in_flight:
            await asyncio.sleep(0.001)

    async def fetch(self, first: int, behind: int) -> None:
        """Have clusters read, and in the file."""
        await self.read(first * CLUSTER, (behind - first) * CLUSTER)
        await self.kept()

    def is_remote(self, cluster: int) -> bool:
        assert self.overlay.below.remote is not None
        return bool(self.overlay.below.remote[cluster])


@contextlib.asynccontextmanager
async def streamed(server: SourceServer, path: Path, *, cluster_size: int = CLUSTER) -> AsyncIterator[Streamed]:
    """An overlay of a running server."""
    source = server.source()
    await source.connect()
    size = round_up(source.size)
    create_file(str(path), size, cluster_size=cluster_size, table_size=4, backing_name=server.uri)
    image = await QedImage.open(str(path), writable=True, marked=True)
    try:
        yield Streamed(Overlay(image, source), source, server.disk)
    finally:
        server.disk.gate.set()
        await source.close()
        await image.close()


async def stream_all(uri: str, path: str) -> DiskStream:
    async with await DiskStream.start(uri, path) as disk:
        await disk.wait()
        assert disk.independent
    return disk


async def stop_on_the_way(server: SourceServer, path: str, clusters: int = 10) -> None:
    """Leave an overlay behind that has some clusters."""
    disk = await DiskStream.start(server.uri, path, speed=1)
    try:
        for cluster in range(clusters):
            await disk.overlay.read(cluster * CLUSTER, 1)
    finally:
        await disk.close()


def is_sound(path: str, content: bytes | bytearray) -> bool:
    return (
        qed.qemu_check(path).status == 0
        and "backing-filename" not in qed.qemu_info(path)
        and qed.content(path) == content
    )


async def left_alone(server: SourceServer, path: str) -> DiskStream:
    return await DiskStream.start(server.uri, path, job=False)
