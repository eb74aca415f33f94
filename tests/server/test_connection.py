from __future__ import annotations

import asyncio
import errno
import logging
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.extents import Extent, ExtentFlags
from nbdstream.server.contexts import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE
from nbdstream.server.export import Export
from nbdstream.server.limits import Limits
from nbdstream.wire.nbd import REQUEST, Cmd, CmdFlag, Err, Opt, Rep, ReplyFlag, ReplyType
from tests.server.raw_client import RawClient, info_data, option, request, write_request

if TYPE_CHECKING:
    from tests.server.conftest import Harness
    from tests.server.memory_device import MemoryDevice

CONTEXTS = (BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE)


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
async def client(request: pytest.FixtureRequest, harness: Harness, device: MemoryDevice) -> RawClient:
    await harness.serve(Export("disk", device, writable=True, contexts=CONTEXTS))
    contexts = ["base:allocation"] if request.param else []
    return await harness.open(structured=request.param, contexts=contexts)


# -- every command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (1, 1), ((1 << 20) - 5, 5), (0, 1 << 20)])
async def test_read(client: RawClient, device: MemoryDevice, offset: int, length: int, slow: bool) -> None:
    device.slow = slow
    assert await client.read(offset, length) == device.data[offset : offset + length]


async def test_a_read_with_df_is_one_chunk(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    device.slow = True
    client = await harness.open(structured=True)
    chunk = await client.ask(Cmd.READ, 0, 65536, flags=CmdFlag.DF)
    assert (chunk.type, chunk.flags) == (ReplyType.OFFSET_DATA, ReplyFlag.DONE)
    assert chunk.payload[8:] == device.data[:65536]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("length", [1, 4096, 200_000, 700_000])
async def test_write(client: RawClient, device: MemoryDevice, length: int, slow: bool) -> None:
    device.slow = slow
    data = bytes(range(251)) * (length // 251 + 1)
    assert await client.write(12345, data[:length]) == 0
    assert device.data[12345 : 12345 + length] == data[:length]
    assert await client.read(0, 1 << 20) == device.data


async def test_a_write_with_fua_is_flushed_before_it_is_answered(client: RawClient, device: MemoryDevice) -> None:
    assert await client.write(0, b"data", flags=CmdFlag.FUA) == 0
    assert device.calls == [("write", 0, 4), ("flush",)]


async def test_small_writes_are_done_at_once_where_the_device_can(client: RawClient, device: MemoryDevice) -> None:
    device.prompt = True
    length = 60 << 10
    payloads = [bytes([number]) * length for number in range(16)]  # more than the receive buffer holds
    for number, payload in enumerate(payloads):
        client.send(request(Cmd.WRITE, number, number * length, length) + payload)
    replies = [await client.reply() for _ in payloads]
    assert [(reply.cookie, reply.error) for reply in replies] == [(number, 0) for number in range(len(payloads))]
    assert device.calls == [("write_at_once", number * length, length) for number in range(len(payloads))]
    assert device.data[: len(payloads) * length] == b"".join(payloads)


async def test_a_write_at_once_that_fails_is_told(client: RawClient, device: MemoryDevice) -> None:
    device.prompt = True
    device.error = OSError(errno.ENOSPC, "full")
    assert await client.write(0, b"data") == Err.ENOSPC
    device.error = ValueError("a mistake")
    assert await client.write(0, b"data") == Err.EIO


async def test_a_write_with_fua_is_not_done_at_once(client: RawClient, device: MemoryDevice) -> None:
    device.prompt = True
    assert await client.write(0, b"data", flags=CmdFlag.FUA) == 0
    assert device.calls == [("write", 0, 4), ("flush",)]


async def test_the_payload_of_a_write_that_takes_its_time_stays_as_it_was(
    client: RawClient, device: MemoryDevice
) -> None:
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.WRITE, 1, 0, 4096) + b"1" * 4096)
    await asyncio.sleep(0.05)  # so that what comes next lies where this lay in the receive buffer
    client.send(request(Cmd.WRITE, 2, 4096, 4096) + b"2" * 4096)
    await asyncio.sleep(0.05)
    device.gate.set()
    assert {(await client.reply()).cookie, (await client.reply()).cookie} == {1, 2}
    assert device.data[:8192] == b"1" * 4096 + b"2" * 4096


async def test_flush(client: RawClient, device: MemoryDevice) -> None:
    assert (await client.ask(Cmd.FLUSH)).error == 0
    assert device.calls == [("flush",)]


@pytest.mark.parametrize("flags", [0, CmdFlag.FUA])
async def test_trim(client: RawClient, device: MemoryDevice, flags: int) -> None:
    assert (await client.ask(Cmd.TRIM, 512, 4096, flags=flags)).error == 0
    assert device.calls == [("discard", 512, 4096)] + [("flush",)] * bool(flags)


async def test_cache_reads_in_small_steps(harness: Harness, device: MemoryDevice) -> None:
    device.size = 5 << 20
    await harness.serve_device(device)
    client = await harness.open()
    assert (await client.ask(Cmd.CACHE, 100, (5 << 20) - 100)).error == 0
    assert 0 < device.most_reading <= 1 << 20


@pytest.mark.parametrize(
    ("flags", "may_unmap", "fast_only"),
    [(0, True, False), (CmdFlag.NO_HOLE, False, False), (CmdFlag.FAST_ZERO, True, True)],
)
async def test_write_zeroes(
    client: RawClient, device: MemoryDevice, flags: int, may_unmap: bool, fast_only: bool
) -> None:
    assert (await client.ask(Cmd.WRITE_ZEROES, 4096, 8192, flags=flags)).error == 0
    assert device.calls == [("write_zeroes", 4096, 8192, may_unmap, fast_only)]
    assert await client.read(4096, 8192) == bytes(8192)


async def test_zeroes_that_would_not_be_fast_are_refused_with_enotsup(client: RawClient, device: MemoryDevice) -> None:
    before = bytes(device.data)
    assert (await client.ask(Cmd.WRITE_ZEROES, 1, 4096, flags=CmdFlag.FAST_ZERO)).error == Err.ENOTSUP
    assert device.data == before


@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES])
async def test_nothing_is_asked_of_the_device_for_a_length_of_0(
    client: RawClient, device: MemoryDevice, command: Cmd
) -> None:
    device.error = OSError(errno.EIO, "must not be called")
    assert (await client.ask(command, 512, 0)).error == 0


EXTENTS = [
    Extent(0, 4096, ExtentFlags.DATA),
    Extent(4096, 4096, ExtentFlags.HOLE | ExtentFlags.ZERO, depth=0),
    Extent(8192, 8192, ExtentFlags.DATA, depth=2),
    Extent(16384, 4096, ExtentFlags.REMOTE, depth=2),
]


async def status(client: RawClient, offset: int, length: int, *, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
    """Block status by context id."""
    client.send(request(Cmd.BLOCK_STATUS, 1, offset, length, flags=flags))
    found = {}
    while True:
        chunk = await client.reply()
        assert chunk.type == ReplyType.BLOCK_STATUS
        (number,) = struct.unpack_from("!I", chunk.payload)
        assert number not in found
        found[number] = list(struct.iter_unpack("!II", chunk.payload[4:]))
        if chunk.flags & ReplyFlag.DONE:
            return found


async def test_block_status_tells_every_context_its_own(harness: Harness, device: MemoryDevice) -> None:
    device.answers = EXTENTS
    await harness.serve(Export("disk", device, writable=False, contexts=CONTEXTS))
    client = await harness.open(structured=True, contexts=[context.name for context in CONTEXTS])
    assert list((await status(client, 0, 20480)).values()) == [
        [(4096, 0), (4096, 3), (12288, 0)],
        [(4096, 1), (4096, 0), (12288, 2)],
        [(16384, 0), (4096, 1)],
    ]


async def test_block_status_with_req_one_gives_one_extent(harness: Harness, device: MemoryDevice) -> None:
    device.answers = EXTENTS
    await harness.serve(Export("disk", device, writable=False, contexts=CONTEXTS))
    client = await harness.open(structured=True, contexts=["base:allocation", REMOTE.name])
    assert list((await status(client, 1024, 10240, flags=CmdFlag.REQ_ONE)).values()) == [[(3072, 0)], [(10240, 0)]]


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (errno.EDQUOT, Err.ENOSPC),
        (errno.EFBIG, Err.ENOSPC),
        (errno.ENOSPC, Err.ENOSPC),
        (errno.EROFS, Err.EPERM),
        (errno.EIO, Err.EIO),
        (errno.ENOTCONN, Err.EIO),
        (errno.ENOTSUP, Err.EINVAL),
        (errno.ENOTTY, Err.EINVAL),
    ],
)
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE])
async def test_what_the_device_refuses_is_told_with_a_value_of_proto_md(
    client: RawClient, device: MemoryDevice, error: int, value: Err, slow: bool, command: Cmd
) -> None:
    device.slow = slow
    device.error = OSError(error, "no")
    payload = b"data" if command == Cmd.WRITE else b""
    assert (await client.ask(command, 0, 4, payload=payload)).error == value
    device.error = None
    assert await client.read(0, 4) == device.data[:4]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("command", [Cmd.READ, Cmd.WRITE])
async def test_an_unexpected_exception_is_logged_and_the_connection_lives(
    client: RawClient, device: MemoryDevice, caplog: pytest.LogCaptureFixture, slow: bool, command: Cmd
) -> None:
    device.slow = slow
    device.error = RuntimeError("a defect")
    payload = b"data" if command == Cmd.WRITE else b""
    assert (await client.ask(command, 0, 4, payload=payload)).error == Err.EIO
    assert "a defect" in caplog.text
    device.error = None
    assert await client.read(0, 4) == device.data[:4]


@pytest.mark.parametrize("slow", [False, True])
async def test_a_device_that_reads_too_little_is_an_io_error(
    client: RawClient, device: MemoryDevice, slow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device.slow = slow
    del device.data[100:]
    assert (await client.ask(Cmd.READ, 0, 200)).error == Err.EIO
    assert await client.read(0, 100) == device.data
    assert caplog.records[0].levelno == logging.ERROR


async def test_structured_errors_say_why(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    client = await harness.open(structured=True)
    chunk = await client.ask(Cmd.READ, 1 << 20, 1)
    assert chunk.type == ReplyType.ERROR
    assert b"past the end" in chunk.payload


async def test_the_payload_of_a_refused_write_is_consumed(client: RawClient, device: MemoryDevice) -> None:
    for length in (10, 600_000):
        client.send(write_request(1, (1 << 20) - 1, bytes(length)) + request(Cmd.READ, 2, 0, 4))
        assert (await client.reply()).error == Err.ENOSPC
        assert (await client.reply(4)).payload[-4:] == device.data[:4]


async def test_a_stream_that_cannot_be_followed_ends_its_connection_only(
    client: RawClient, harness: Harness, device: MemoryDevice
) -> None:
    other = await harness.open()
    client.send(bytes(REQUEST.size))
    assert await client.closed()
    assert await other.read(0, 4) == device.data[:4]


# -- batches, portions, order -------------------------------------------------------------------------------


async def test_a_batch_of_requests_is_answered_whole(client: RawClient, device: MemoryDevice) -> None:
    client.send(b"".join(request(Cmd.READ, cookie, cookie * 64, 64) for cookie in range(5000)))
    for _ in range(5000):
        chunk = await client.reply(64)
        assert chunk.payload[-64:] == device.data[chunk.cookie * 64 : chunk.cookie * 64 + 64]


async def test_requests_that_arrive_byte_by_byte_are_understood(client: RawClient, device: MemoryDevice) -> None:
    for stream, length in ((request(Cmd.READ, 1, 8, 4), 4), (write_request(2, 100, b"hello"), 0)):
        for byte in stream:
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        chunk = await client.reply(length)
        assert chunk.error == 0
        assert chunk.payload[-4:] == device.data[8:12] * bool(length)
    assert device.data[100:105] == b"hello"


async def test_a_slow_request_does_not_hold_up_the_next(client: RawClient, device: MemoryDevice) -> None:
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.READ, 1, 0, 16) + request(Cmd.FLUSH, 2))
    assert (await client.reply()).cookie == 2
    device.gate.set()
    assert (await client.reply(16)).cookie == 1


async def test_requests_sent_right_behind_go_are_answered(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device)
    client = await harness.connect()
    await client.greet()
    client.send(option(Opt.GO, info_data("")) + request(Cmd.READ, 1, 0, 16))
    assert (await client.reader.readexactly(20 + 12 + 20))[-8:-4] == struct.pack("!I", Rep.ACK)
    assert (await client.reply(16)).payload == device.data[:16]


# -- bounds -------------------------------------------------------------------------------------------------


async def test_bytes_in_flight_are_bounded_and_all_is_answered(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(bytes_in_flight=100_000))
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(b"".join(request(Cmd.READ, cookie, 0, 30_000) for cookie in range(50)))
    await harness.until(lambda: device.reading)
    device.gate.set()
    cookies = {(await client.reply(30_000)).cookie for _ in range(50)}
    assert cookies == set(range(50))
    assert device.most_reading <= 100_000


async def test_payloads_in_flight_are_bounded_and_all_are_written(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(bytes_in_flight=400_000))
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    for cookie in range(8):
        client.send(write_request(cookie, 0, bytes([cookie]) * 300_000))
    await harness.until(lambda: device.writing)
    device.gate.set()
    assert {(await client.reply()).cookie for _ in range(8)} == set(range(8))
    assert [call[0] for call in device.calls] == ["write"] * 8
    assert device.most_writing <= 400_000


async def test_one_request_is_let_in_however_long_it_is(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(bytes_in_flight=1000))
    client = await harness.open()
    device.slow = True
    assert len(await client.read(0, 1 << 20)) == 1 << 20


async def test_requests_in_flight_are_bounded(harness: Harness, device: MemoryDevice) -> None:
    await harness.serve_device(device, limits=Limits(requests_in_flight=4))
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(b"".join(request(Cmd.READ, cookie, 0, 1) for cookie in range(20)))
    await harness.until(lambda: device.reading)
    device.gate.set()
    assert {(await client.reply(1)).cookie for _ in range(20)} == set(range(20))
    assert device.most_reading <= 4


async def test_a_client_that_does_not_read_is_not_answered_without_bound(
    harness: Harness, device: MemoryDevice
) -> None:
    server = await harness.serve_device(device, limits=Limits(reply_backlog=1 << 20))
    client = await harness.open()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    wanted = 1000
    client.send(b"".join(request(Cmd.READ, cookie, 0, 1 << 20) for cookie in range(wanted)))
    other = await harness.open()
    for _ in range(100):
        await other.read(0, 4)
    served = server.exports[0].bytes_read
    assert served < 50 << 20
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for cookie in range(100):
        assert (await client.reply(1 << 20)).cookie == cookie


# -- the end ------------------------------------------------------------------------------------------------


async def test_disc_finishes_what_is_in_flight_and_closes(client: RawClient, device: MemoryDevice) -> None:
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.READ, 1, 0, 16) + request(Cmd.DISC, 2) + request(Cmd.READ, 3, 0, 16))
    await asyncio.sleep(0)
    device.gate.set()
    assert (await client.reply(16)).cookie == 1
    assert await client.reader.read() == b""


async def test_a_client_that_closes_its_sending_side_behind_disc_gets_its_replies(
    client: RawClient, device: MemoryDevice
) -> None:
    device.slow = True
    client.send(request(Cmd.READ, 1, 0, 16) + request(Cmd.DISC, 2))
    client.writer.write_eof()
    assert (await client.reply(16)).payload[-16:] == device.data[:16]
    assert await client.reader.read() == b""


async def test_a_client_that_vanishes_leaves_nothing_behind(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(request(Cmd.READ, 1, 0, 16) * 10)
    await harness.until(lambda: device.reading)
    client.writer.transport.abort()
    await harness.until(lambda: server.connection_count == 0)
    assert device.reading == 0
    assert server.exports[0].connections == 0


async def test_a_client_that_vanishes_with_its_first_request_leaves_nothing_behind(
    harness: Harness, device: MemoryDevice
) -> None:
    server = await harness.serve_device(device)
    device.slow = True
    for _ in range(20):
        client = await harness.open()
        client.send(request(Cmd.READ, 1, 0, 16))
        client.writer.transport.abort()
    await harness.until(lambda: server.connection_count == 0)


async def test_a_write_is_finished_though_its_client_has_vanished(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    client = await harness.open()
    device.slow = True
    device.gate.clear()
    client.send(write_request(1, 0, b"data"))
    await harness.until(lambda: server.exports[0].requests)
    client.writer.transport.abort()
    await harness.until(lambda: server.exports[0].connections == 0)
    assert server.connection_count == 1
    device.gate.set()
    await harness.until(lambda: server.connection_count == 0)
    assert device.data[:4] == b"data"


async def test_a_client_that_vanishes_within_a_payload_writes_nothing(harness: Harness, device: MemoryDevice) -> None:
    server = await harness.serve_device(device)
    before = bytes(device.data)
    for length in (100, 500_000):
        client = await harness.open()
        client.send(write_request(1, 0, bytes(length))[:-1])
        await client.close()
        await harness.until(lambda: server.connection_count == 0)
    assert device.data == before


async def test_counters_tell_what_was_served(client: RawClient, harness: Harness) -> None:
    await client.read(0, 4096)
    await client.write(0, b"data")
    (export,) = harness.servers[0].exports
    assert (export.connections, export.requests, export.bytes_read, export.bytes_written) == (1, 2, 4096, 4)
