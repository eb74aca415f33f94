"""A disk image from Python.

::

    await nbdstream.Image.create("disk.qed", 10 << 30)
    async with nbdstream.Image.open("disk.qed", writable=True) as image:
        await image.write(4096, b"hello")
        await image.flush()
        async for extent in image.extents():
            print(extent.offset, extent.length, extent.depth)
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from nbdstream.block.chain import open_device
from nbdstream.block.device import all_extents
from nbdstream.block.growth import grow
from nbdstream.block.joining import KernelJoin
from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.layout import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from nbdstream.block.qed.opening import create_file
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nbdstream.block.device import BlockDevice, Buffer
    from nbdstream.block.qed.check import CheckResult
    from nbdstream.extents import Extent

__all__ = ["Image", "ImageInfo"]


class ImageInfo(NamedTuple):
    """What an image is. Sizes are bytes."""

    path: str
    format: str
    """``qed`` or ``raw``."""
    size: int
    """Of the disk."""
    file_size: int
    """What the image file takes of its file system."""
    cluster_size: int | None = None
    """QED alone, like what follows."""
    table_size: int | None = None
    """Clusters in the L1 table, and in each L2 table."""
    backing_name: str | None = None
    """The backing file's name as the image has it; None if it has none."""
    uuid: str | None = None
    """Of an image that nbdstream made; the same as long as it lives."""
    origin: str | None = None
    """The source that it was made an overlay of, if it was, also when it is independent."""


class Image:
    """A disk image and the backing files below it, open. Use :meth:`open`.

    Offsets and lengths are bytes of the disk, and need no alignment. Everything may be called at the same time: what
    overlaps happens in some order. A range that leads out of the disk raises ValueError, as everything does when the
    image is closed. What goes wrong with the file or with what lies below raises OSError: ENOSPC where there is no
    room (try again when there is), EPERM for a change to an image that is open for reading, and EIO, for good, after
    a flush that failed.
    """

    def __init__(self, path: str, device: BlockDevice) -> None:
        self.path = path
        self._device = device
        self._join = KernelJoin()
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        image_format: str = "qed",
        backing_formats: Sequence[str] = (),
    ) -> AsyncIterator[Image]:
        """Open an image for an ``async with``, at whose end it is closed, everything durable.

        ``image_format`` is ``qed`` or ``raw``. ``backing_formats`` are those of the backing files, the next one first:
        images name none, and are not believed. QEMU's image locks are taken, so no QEMU and no other nbdstream uses
        the image in a way that disturbs. An image that a crash has left is put in order if it is opened for writing.

        Raises ImageError, ImageLockedError, SourceError (see :mod:`nbdstream.errors`).
        """
        device = await open_device(os.fspath(path), image_format, backing_formats, writable=writable)
        image = cls(os.fspath(path), device)
        try:
            yield image
        finally:
            await image._close()

    @staticmethod
    async def create(
        path: str | os.PathLike[str],
        size: int,
        *,
        cluster_size: int = DEFAULT_CLUSTER_SIZE,
        table_size: int = DEFAULT_TABLE_SIZE,
    ) -> None:
        """Make an empty QED image for a disk of ``size`` bytes, rounded up to 512; durable when this returns.

        Raises ImageError: the file exists, or cannot be made, or QEMU could not open such a geometry.
        """
        await asyncio.to_thread(
            create_file,
            os.fspath(path),
            size,
            cluster_size=cluster_size,
            table_size=table_size,
            backing_name=None,
        )

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._device.size

    @property
    def read_only(self) -> bool:
        """Whether it was opened for reading only."""
        return self._device.read_only

    async def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the disk."""
        self._check_range(offset, length)
        if not length:
            return b""
        buffers = self._device.read_now(offset, length)
        if buffers is None:
            buffers = await self._device.read(offset, length)
        return b"".join(self._join.join(buffers))

    async def write(self, offset: int, data: Buffer) -> None:
        """Write; ``data`` must not change meanwhile. A power cut can lose it until :meth:`flush`, a kill -9 cannot."""
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        if len(view):
            await self._device.write(offset, view)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make the range read as zeroes. With ``may_unmap`` its space is given back where that can be."""
        self._check_range(offset, length)
        if length:
            await self._device.write_zeroes(offset, length, may_unmap=may_unmap)

    async def discard(self, offset: int, length: int) -> None:
        """Give back the space of the range, where that can be; what is given back reads as zeroes."""
        self._check_range(offset, length)
        if length:
            await self._device.discard(offset, length)

    async def flush(self) -> None:
        """Make durable what was written before this call."""
        self._check_open()
        await self._device.flush()

    async def resize(self, size: int) -> None:
        """Let the disk have ``size`` bytes, rounded up to 512; what is new reads as zeroes. Durable when this returns.

        Raises ImageError: the image is not QED, or open for reading only, or the disk would become smaller, or too
        large for its geometry.
        """
        self._check_open()
        await grow(self._overlay(), size)

    async def extents(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]:
        """Describe the range, to the end of the disk by default, without reading it; neighbours differ.

        An extent's ``depth`` tells which layer holds it: 1 the image itself, 2 its backing file, 0 none of them.
        """
        length = self.size - offset if length is None else length
        self._check_range(offset, length)
        async for extent in all_extents(self._device, offset, length):
            yield extent
            self._check_open()

    def info(self) -> ImageInfo:
        """Return what the image is."""
        self._check_open()
        file_size = os.stat(self.path).st_blocks * 512
        if not isinstance(self._device, Overlay):
            return ImageInfo(self.path, "raw", self.size, file_size)
        image = self._device.image
        extension = image.extension
        return ImageInfo(
            self.path,
            "qed",
            self.size,
            file_size,
            image.cluster_size,
            image.header.table_size,
            image.backing_name,
            str(extension.image_uuid) if extension else None,
            (extension.origin or None) if extension else None,
        )

    async def check(self) -> CheckResult:
        """Look for damage and leaks, as ``nbdstream check`` does; flushes wait until it is done.

        In an image that is open for writing, clusters that are free for what will be written count as leaks.

        Raises ImageError if the image is not QED.
        """
        self._check_open()
        return await self._overlay().image.check()

    def _overlay(self) -> Overlay:
        if not isinstance(self._device, Overlay):
            raise ImageError(f"{self.path} is a raw image: this is for QED images")
        return self._device

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed")

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} leads out of a disk of {self.size} bytes")

    async def _close(self) -> None:
        self._closed = True
        self._join.close()
        await self._device.close()
