"""What a device knows to be zero is not sent, to clients that can be told so."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.device import ZEROES, Buffer, zero_buffers
from nbdstream.server.export import Export
from nbdstream.wire.nbd import Cmd, CmdFlag, ReplyFlag, ReplyType
from tests.server.memory_device import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.server.conftest import Harness

PAGE = 4096
SIZE = 4 << 20


class SparseDevice(MemoryDevice):
    """Every other MiB is a hole, from the second on."""

    def __init__(self) -> None:
        super().__init__(SIZE, read_only=True)
        for start in range(0, SIZE, 2 << 20):
            self.data[start : start + (1 << 20)] = b"x" * (1 << 20)

    def read_now(self, offset: int, length: int) -> Sequence[Buffer] | None:
        return None if self.slow else self._buffers(offset, length)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        return self._buffers(offset, length)

    def _buffers(self, offset: int, length: int) -> list[Buffer]:
        found: list[Buffer] = []
        end = offset + length
        while offset < end:
            count = min(end, (offset // len(ZEROES) + 1) * len(ZEROES)) - offset
            hole = offset // len(ZEROES) % 2
            # In several pieces, which are one chunk all the same.
            found += zero_buffers(count) if hole else [bytes(self.data[offset : offset + 1])] * (count > 1)
            found += [] if hole else [bytes(self.data[offset + (count > 1) : offset + count])]
            offset += count
        return found


@pytest.fixture
async def sparse(harness: Harness) -> SparseDevice:
    device = SparseDevice()
    await harness.serve(Export("disk", device, writable=False))
    return device


CASES = [
    (0, PAGE, ["data"]),
    (1 << 20, PAGE, ["hole"]),
    ((1 << 20) - 512, 1024, ["data", "hole"]),
    ((2 << 20) - 512, 1024, ["hole", "data"]),
    (0, SIZE, ["data", "hole", "data", "hole"]),
    ((1 << 20) + 1, 1, ["hole"]),
]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize(("offset", "length", "parts"), CASES)
async def test_a_hole_is_a_chunk_of_its_own(
    harness: Harness, sparse: SparseDevice, slow: bool, extended: bool, offset: int, length: int, parts: list[str]
) -> None:
    sparse.slow = slow
    client = await harness.open(structured=not extended, extended=extended)
    chunks = [await client.ask(Cmd.READ, offset, length)]
    while not chunks[-1].flags & ReplyFlag.DONE:
        chunks.append(await client.reply())
    kinds = {ReplyType.OFFSET_DATA: "data", ReplyType.OFFSET_HOLE: "hole"}
    assert [kinds[ReplyType(chunk.type or 0)] for chunk in chunks] == parts
    read = bytearray(b"?" * length)
    at = offset
    for chunk in chunks:
        (start,) = struct.unpack_from("!Q", chunk.payload)
        assert start == at
        if chunk.type == ReplyType.OFFSET_HOLE:
            data = bytes(struct.unpack("!QI", chunk.payload)[1])
        else:
            data = chunk.payload[8:]
        read[start - offset : start - offset + len(data)] = data
        at += len(data)
    assert read == sparse.data[offset : offset + length]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("offset", "length", "_parts"), CASES)
async def test_with_df_zeroes_are_sent(
    harness: Harness, sparse: SparseDevice, slow: bool, offset: int, length: int, _parts: list[str]
) -> None:
    sparse.slow = slow
    client = await harness.open(structured=True)
    chunk = await client.ask(Cmd.READ, offset, length, flags=CmdFlag.DF)
    assert (chunk.type, chunk.flags) == (ReplyType.OFFSET_DATA, ReplyFlag.DONE)
    assert chunk.payload[8:] == sparse.data[offset : offset + length]


@pytest.mark.parametrize("slow", [False, True])
async def test_simple_replies_have_the_zeroes_in_them(harness: Harness, sparse: SparseDevice, slow: bool) -> None:
    sparse.slow = slow
    client = await harness.open()
    assert await client.read(0, SIZE) == sparse.data
