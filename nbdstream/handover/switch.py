"""Devices of a hand-over: one that becomes another while it is in use, and what it is before that."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from nbdstream.block.device import BlockDevice, zero_buffers
from nbdstream.block.files import open_image
from nbdstream.block.locks import Sharing, take_locks
from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.worker import pread_exact
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.block.device import Buffer

_VERBS = ("read_now", "read", "write_at_once", "write_now", "write", "write_zeroes", "discard", "flush", "extents")


class Switch(BlockDevice):
    """A device that is another one at every time. Its clients stay connected, and ask for what it is now."""

    def __init__(self, device: BlockDevice, *, size: int, writable: bool) -> None:
        """Begin as ``device``. ``writable`` is what is told to clients, whatever the devices are."""
        self.size = size
        self.read_only = not writable
        self.become(device)

    def become(self, device: BlockDevice) -> None:
        """Be another device from the next request on; whoever made the old one closes it."""
        self.device = device
        for verb in _VERBS:  # not by a method that passes on: the guest's requests come by here for ever
            setattr(self, verb, getattr(device, verb))

    @property
    def hydrating(self) -> bool:
        """Whether what it is now hydrates."""
        return self.device.hydrating

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:  # pragma: no cover - see become
        """Read from what it is now."""
        return await self.device.read(offset, length)

    async def extents(self, offset: int, length: int) -> list[Extent]:  # pragma: no cover - see become
        """Describe what it is now."""
        return await self.device.extents(offset, length)

    async def close(self) -> None:
        """Close what it is now."""
        await self.device.close()


class PassThrough(BlockDevice):
    """What a guest has before its host owns the disk: it reads from the source, unkept, and writes nothing."""

    read_only = True

    def __init__(self, below: BlockDevice, size: int) -> None:
        """``size`` may be larger than that of ``below``: an overlay's is a multiple of 512."""
        self.below = below
        self.size = size

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Ask the source."""
        inside = max(0, min(length, self.below.size - offset))
        found = await self.below.read(offset, inside) if inside else []
        return [*found, *zero_buffers(length - inside)]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Say nothing of what may change: all of it may be data."""
        return [Extent(offset, length, ExtentFlags.DATA)]

    async def close(self) -> None:
        """Nothing to let go of: the source belongs to others."""


class FreshReads(BlockDevice):
    """An image that its guest is writing: opened anew for every read, so that nothing is known from earlier.

    It takes byte 100 of QEMU's locks and no other. It is there for the few reads of a destination that is being
    prepared (a QEMU looks at the first sector), not for data.
    """

    read_only = True

    def __init__(self, path: str, image_format: str, size: int) -> None:
        self._path = path
        self._format = image_format
        self.size = size

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Read what is there now. Raises OSError."""
        if self._format == "raw":
            return [await asyncio.to_thread(_read_raw, self._path, offset, length)]
        image = Overlay(await QedImage.open(self._path, sharing=Sharing.BYSTANDER))
        try:
            return [b"".join(await image.read(offset, length))]
        finally:
            await image.close()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Say nothing of what may change: all of it may be data."""
        return [Extent(offset, length, ExtentFlags.DATA)]

    async def close(self) -> None:
        """Nothing is open."""


def _read_raw(path: str, offset: int, length: int) -> bytes:
    fd = open_image(path, writable=False)
    try:
        take_locks(fd, Sharing.BYSTANDER, path)
        return bytes(pread_exact(fd, length, offset))
    finally:
        os.close(fd)
