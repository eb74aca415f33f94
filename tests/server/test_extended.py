"""Extended headers, by a client that says what it is told to: 64-bit lengths, and everything in 32-byte headers."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.extents import Extent, ExtentFlags
from nbdstream.server.contexts import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH
from nbdstream.server.export import Export
from nbdstream.wire.nbd import Cmd, CmdFlag, Err, ReplyFlag, ReplyType, TransmissionFlag
from tests.server.memory_device import MemoryDevice
from tests.server.raw_client import Chunk, RawClient, extended_request

if TYPE_CHECKING:
    from tests.server.conftest import Harness

HUGE = 1 << 50
CONTEXTS = ["base:allocation", "qemu:allocation-depth"]


@pytest.fixture
async def client(harness: Harness, device: MemoryDevice) -> RawClient:
    await harness.serve(Export("disk", device, writable=True, contexts=(BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH)))
    return await harness.open("disk", extended=True, contexts=CONTEXTS)


class HugeDevice(MemoryDevice):
    """It says that it has a petabyte, and keeps what it was asked to do to it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.size = HUGE
        self.answers = [Extent(0, 1 << 40, ExtentFlags.DATA), Extent(1 << 40, HUGE - (1 << 40), ExtentFlags.HOLE)]
        self.ranges: list[tuple[int, int]] = []
        self.may_unmap: set[bool] = set()
        self.fast_only: list[bool] = []

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast_only: bool = False) -> None:
        self.ranges.append((offset, length))
        self.may_unmap.add(may_unmap)
        self.fast_only.append(fast_only)

    async def discard(self, offset: int, length: int) -> None:
        self.ranges.append((offset, length))


@pytest.fixture
async def petabyte() -> HugeDevice:
    return HugeDevice()


@pytest.fixture
async def huge(harness: Harness, petabyte: HugeDevice) -> RawClient:
    await harness.serve(Export("disk", petabyte, writable=True, contexts=(BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH)))
    return await harness.open("disk", extended=True, contexts=CONTEXTS)


async def test_the_flags_offer_the_payload_of_block_status(client: RawClient) -> None:
    assert client.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert client.flags & TransmissionFlag.SEND_DF


@pytest.mark.parametrize("slow", [False, True])
async def test_read(client: RawClient, device: MemoryDevice, slow: bool) -> None:
    device.slow = slow
    chunk = await client.ask(Cmd.READ, 4096, 1 << 19)
    assert (chunk.type, chunk.flags) == (ReplyType.OFFSET_DATA, ReplyFlag.DONE)
    assert chunk.payload == struct.pack("!Q", 4096) + device.data[4096 : 4096 + (1 << 19)]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("length", [1, 4096, 700_000])
async def test_write(client: RawClient, device: MemoryDevice, length: int, slow: bool) -> None:
    device.slow = slow
    data = bytes(range(251)) * (length // 251 + 1)
    chunk = await client.ask(Cmd.WRITE, 12345, payload=data[:length], flags=CmdFlag.FUA)
    assert (chunk.type, chunk.flags, chunk.payload) == (ReplyType.NONE, ReplyFlag.DONE, b"")
    assert device.data[12345 : 12345 + length] == data[:length]
    assert device.calls[-1] == ("flush",)


async def test_errors_are_extended_replies_and_the_stream_stays_in_step(
    client: RawClient, device: MemoryDevice
) -> None:
    client.send(
        extended_request(Cmd.READ, 1, device.size, 1)
        + extended_request(Cmd.READ, 2, 0, 4, payload=b"unexpected")
        + extended_request(Cmd.WRITE, 3, device.size, payload=b"data")
        + extended_request(Cmd.WRITE, 4, 0, 4, flags=CmdFlag.DF)
        + b"data"
        + extended_request(99, 5)
        + extended_request(Cmd.FLUSH, 6)
    )
    replies = sorted([await client.reply() for _ in range(6)], key=lambda chunk: chunk.cookie)
    assert [reply.error for reply in replies] == [Err.EINVAL, Err.EINVAL, Err.ENOSPC, Err.EINVAL, Err.EINVAL, 0]
    assert [reply.offset for reply in replies] == [device.size, 0, device.size, 0, 0, 0]


def extents(chunk: Chunk) -> tuple[int, list[tuple[int, int]]]:
    """The context id, and the extents."""
    assert chunk.type == ReplyType.BLOCK_STATUS_EXT
    number, count = struct.unpack_from("!II", chunk.payload)
    found = list(struct.iter_unpack("!QQ", chunk.payload[8:]))
    assert len(found) == count
    return number, found


async def test_block_status_tells_of_extents_of_any_length(huge: RawClient) -> None:
    first, second = await huge.ask(Cmd.BLOCK_STATUS, 0, HUGE), await huge.reply()
    assert (first.flags, second.flags) == (0, ReplyFlag.DONE)
    assert extents(first) == (1, [(1 << 40, 0), (HUGE - (1 << 40), 1)])
    assert extents(second) == (2, [(HUGE, 1)])


async def test_block_status_can_be_limited_to_a_context(huge: RawClient) -> None:
    wanted = struct.pack("!QI", 4096, 2)
    chunk = await huge.ask(Cmd.BLOCK_STATUS, 512, payload=wanted)
    assert chunk.flags == ReplyFlag.DONE
    assert extents(chunk) == (2, [(4096, 1)])
    assert (await huge.ask(Cmd.BLOCK_STATUS, 512, payload=struct.pack("!QI", 4096, 3))).error == Err.EINVAL
    one = await huge.ask(Cmd.BLOCK_STATUS, 0, payload=struct.pack("!QI", HUGE, 1), flags=CmdFlag.REQ_ONE)
    assert extents(one) == (1, [(1 << 40, 0)])


async def test_trim_reaches_beyond_4_gib_in_steps(huge: RawClient, petabyte: HugeDevice) -> None:
    length = (5 << 30) + 4096
    assert (await huge.ask(Cmd.TRIM, 512, length)).error == 0
    at = 512
    for offset, count in petabyte.ranges:
        assert offset == at
        assert count <= 1 << 30
        at += count
    assert at == 512 + length


@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE, CmdFlag.FAST_ZERO])
async def test_zeroes_reach_beyond_4_gib_in_steps(huge: RawClient, petabyte: HugeDevice, flags: int) -> None:
    assert (await huge.ask(Cmd.WRITE_ZEROES, 0, 6 << 30, flags=flags)).error == 0
    assert petabyte.ranges == [(step << 30, 1 << 30) for step in range(6)]
    assert petabyte.may_unmap == {not flags & CmdFlag.NO_HOLE}
    # Only the first step may still be refused: then nothing has been changed.
    assert petabyte.fast_only == [bool(flags & CmdFlag.FAST_ZERO)] + [False] * 5


async def test_a_read_above_the_maximum_payload_is_refused(huge: RawClient) -> None:
    assert (await huge.ask(Cmd.READ, 0, (64 << 20) + 1)).error == Err.EOVERFLOW
    assert (await huge.ask(Cmd.READ, 0, 1 << 40)).error == Err.EOVERFLOW


async def test_a_payload_above_the_maximum_ends_the_connection(huge: RawClient) -> None:
    huge.send(extended_request(Cmd.WRITE, 1, 0, (64 << 20) + 1, flags=CmdFlag.PAYLOAD_LEN))
    assert await huge.closed()


async def test_requests_may_come_a_byte_at_a_time(client: RawClient, device: MemoryDevice) -> None:
    stream = extended_request(Cmd.WRITE, 1, 10, payload=b"data")
    stream += extended_request(Cmd.BLOCK_STATUS, 2, 0, payload=struct.pack("!QI", 4096, 1))
    stream += extended_request(Cmd.READ, 3, 10, 4)
    for byte in stream:
        client.send(bytes([byte]))
        await client.writer.drain()
    replies = {chunk.cookie: chunk for chunk in [await client.reply() for _ in range(3)]}
    assert replies[1].error == 0
    assert extents(replies[2]) == (1, [(4096, 0)])
    assert replies[3].payload[8:] == b"data" == device.data[10:14]
