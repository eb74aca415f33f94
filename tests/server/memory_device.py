"""A device that is a bytearray: small, exact, and with switches for what a test wants to see from the server."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from nbdstream.block.device import BlockDevice, Buffer, WriteDone
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Sequence


class MemoryDevice(BlockDevice):
    """Blocks in memory. Reads are answered at once unless ``slow`` is set; then they wait for ``gate``."""

    hydrating = False

    def __init__(self, data: bytes | int, *, read_only: bool = False, minimum_block: int = 1) -> None:
        self.data = bytearray(data)
        self.size = len(self.data)
        self.read_only = read_only
        self.minimum_block = minimum_block
        self.slow = False
        self.prompt = False
        """Whether writes are done at once."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: BaseException | None = None
        self.calls: list[tuple[object, ...]] = []
        self.answers: list[Extent] | None = None
        self.reading = self.most_reading = 0
        self.writing = self.most_writing = 0

    def read_now(self, offset: int, length: int) -> Sequence[Buffer] | None:
        if self.slow:
            return None
        self._fail()
        return [bytes(self.data[offset : offset + length])]

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        self.reading += length
        self.most_reading = max(self.most_reading, self.reading)
        try:
            await self.gate.wait()
            self._fail()
        finally:
            self.reading -= length
        middle = offset + length // 2
        return [bytes(self.data[offset:middle]), bytes(self.data[middle : offset + length])]

    def write_at_once(self, offset: int, data: Buffer) -> bool:
        if self.slow or not self.prompt:
            return False
        self._fail()
        self.calls.append(("write_at_once", offset, len(data)))
        self.data[offset : offset + len(data)] = data
        return True

    def write_now(self, offset: int, data: Buffer, done: WriteDone) -> bool:
        if self.slow:
            return False
        self._fail()
        self.calls.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data
        asyncio.get_running_loop().call_soon(done, None)
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        self.writing += len(data)
        self.most_writing = max(self.most_writing, self.writing)
        await self.gate.wait()
        self.writing -= len(data)
        self._fail()
        self.calls.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool = False) -> None:
        self._fail()
        self.calls.append(("write_zeroes", offset, length, may_unmap, fast_only))
        if fast_only and offset % 4096:
            raise OSError(errno.ENOTSUP, "not fast")
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        self._fail()
        self.calls.append(("discard", offset, length))

    async def flush(self) -> None:
        self._fail()
        self.calls.append(("flush",))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self._fail()
        if self.answers is None:
            return [Extent(offset, length, ExtentFlags.DATA)]
        end = offset + length
        cut = [extent for extent in self.answers if extent.end > offset and extent.offset < end]
        return [
            extent._replace(offset=max(extent.offset, offset), length=min(extent.end, end) - max(extent.offset, offset))
            for extent in cut
        ]

    async def close(self) -> None:
        self.calls.append(("close",))

    def _fail(self) -> None:
        if self.error:
            raise self.error
