"""A block device in memory: something known to lie below an overlay, which can be slow or broken on purpose."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nbdstream.block.device import BlockDevice, Buffer
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Sequence


class MemoryDevice(BlockDevice):
    """Bytes that are only read. Every read lets everybody else on the loop have a turn first."""

    read_only = True

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        self.reads.append((offset, length))
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.error:
            raise self.error
        return [self.data[offset : offset + length]]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, ExtentFlags.DATA)]

    async def close(self) -> None:
        pass
