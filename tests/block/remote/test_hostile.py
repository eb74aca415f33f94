"""A remote export against servers that break the protocol, or change what they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import SourceError
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SIZE = 1 << 20
OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 7, 8, 10
REP_ACK, REP_INFO, REP_META_CONTEXT = 1, 3, 4
FLAGS = 1 | 1 << 1  # HAS_FLAGS, READ_ONLY
CAN_MULTI_CONN = 1 << 8
CMD_DISC, CMD_BLOCK_STATUS = 2, 7
DONE = 1
REPLY_NONE, REPLY_OFFSET_DATA, REPLY_BLOCK_STATUS = 0, 1, 5


class Peer:
    """The server's end of one connection, scripted: it negotiates well, and then does what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def negotiate(self, size: int = SIZE, flags: int = FLAGS) -> None:
        self.writer.write(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        await self.reader.readexactly(4)
        while True:
            _, option, length = struct.unpack(">8sII", await self.reader.readexactly(16))
            await self.reader.readexactly(length)
            if option == OPT_SET_META_CONTEXT:
                self.reply(option, REP_META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
            elif option == OPT_GO:
                self.reply(option, REP_INFO, struct.pack(">HQH", 0, size, flags))
            elif option != OPT_STRUCTURED_REPLY:
                raise AssertionError(option)
            self.reply(option, REP_ACK)
            if option == OPT_GO:
                return

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.writer.write(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    async def request(self) -> tuple[int, int, int, int]:
        """Return the next command's type, cookie, offset and length."""
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", await self.reader.readexactly(28))
        return command, cookie, offset, length

    def chunk(self, cookie: int, kind: int, data: bytes, flags: int = DONE) -> None:
        self.writer.write(struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data)


@contextlib.asynccontextmanager
async def serving(script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[str]:
    """Run ``script`` for each connection; yields the URI."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await script(Peer(reader, writer))
            await writer.drain()
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    running: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(
        lambda reader, writer: running.append(asyncio.create_task(connection(reader, writer))), "127.0.0.1", 0
    )
    async with server:
        yield f"nbd://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    await asyncio.gather(*running)


async def test_a_size_beyond_what_an_offset_can_hold_is_refused() -> None:
    async def script(peer: Peer) -> None:
        await peer.negotiate(size=1 << 63)

    async with serving(script) as uri:
        with pytest.raises(SourceError, match="cannot connect to") as caught:
            await RemoteExport.connect(uri)
        assert "nbd_" not in str(caught.value)


async def failure_of_a_read(answer: Callable[[Peer, int], None]) -> tuple[OSError, bool]:
    """How a read of 4096 bytes fails, and whether the source is lost with it."""

    async def script(peer: Peer) -> None:
        await peer.negotiate()
        _, cookie, _, _ = await peer.request()
        answer(peer, cookie)

    async with serving(script) as uri:
        export = await RemoteExport.connect(uri)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - returned, for the test to look at
            await export.read(0, 4096)
        lost = export.lost.done()
        await export.close()
        return caught.value, lost


async def test_a_reply_that_leaves_bytes_out_is_an_error() -> None:
    def answer(peer: Peer, cookie: int) -> None:
        peer.chunk(cookie, REPLY_OFFSET_DATA, struct.pack(">Q", 0) + b"x" * 2048)

    error, lost = await failure_of_a_read(answer)
    assert error.errno == errno.EIO
    assert not lost


async def test_a_reply_without_any_data_is_an_error() -> None:
    error, lost = await failure_of_a_read(lambda peer, cookie: peer.chunk(cookie, REPLY_NONE, b""))
    assert error.errno == errno.EIO
    assert not lost


@pytest.mark.parametrize("offset", [4096, 1 << 63])
async def test_data_outside_of_what_was_asked_for_ends_the_connection(offset: int) -> None:
    def answer(peer: Peer, cookie: int) -> None:
        peer.chunk(cookie, REPLY_OFFSET_DATA, struct.pack(">Q", offset) + b"x" * 4096)

    error, lost = await failure_of_a_read(answer)
    assert error.errno in {errno.ECONNRESET, errno.EIO, errno.EINVAL}
    assert lost or error.errno != errno.ECONNRESET


async def test_garbage_in_the_middle_ends_the_connection() -> None:
    error, _ = await failure_of_a_read(lambda peer, _: peer.writer.write(b"HTTP/1.1 400 Bad Request\r\n" * 4))
    assert error.errno == errno.ECONNRESET


async def test_a_reply_to_nobody_ends_the_connection() -> None:
    error, _ = await failure_of_a_read(lambda peer, cookie: peer.chunk(cookie + 99, REPLY_NONE, b""))
    assert error.errno == errno.ECONNRESET


async def test_a_connection_that_ends_within_a_reply_fails_the_read() -> None:
    async def script(peer: Peer) -> None:
        await peer.negotiate()
        _, cookie, _, _ = await peer.request()
        peer.writer.write(struct.pack(">IHHQI", 0x668E33EF, DONE, REPLY_OFFSET_DATA, cookie, 4104) + bytes(100))
        peer.writer.write_eof()

    async with serving(script) as uri:
        export = await RemoteExport.connect(uri)
        with pytest.raises(OSError, match="connection to the source was lost"):
            await export.read(0, 4096)
        assert await export.lost == "the server closed the connection"
        await export.close()


async def extents_told(*entries: int) -> list[Extent]:
    """The extents of 4096 bytes from 8192 on, where a server tells these lengths and flags."""

    async def script(peer: Peer) -> None:
        await peer.negotiate()
        command, cookie, _, _ = await peer.request()
        assert command == CMD_BLOCK_STATUS
        peer.chunk(cookie, REPLY_BLOCK_STATUS, struct.pack(f">{len(entries) + 1}I", 1, *entries))

    async with serving(script) as uri:
        export = await RemoteExport.connect(uri)
        try:
            return await export.extents(8192, 4096)
        finally:
            await export.close()


async def test_extents_beyond_the_range_are_cut() -> None:
    assert await extents_told(1024, 0, 2**32 - 1, 3) == [
        Extent(8192, 1024, ExtentFlags.DATA),
        Extent(9216, 3072, ExtentFlags.HOLE | ExtentFlags.ZERO),
    ]


async def test_flags_that_are_not_of_base_allocation_are_no_flags_of_ours() -> None:
    assert await extents_told(4096, 0xFFFFFFFC) == [Extent(8192, 4096, ExtentFlags.DATA)]


async def test_an_extent_of_no_bytes_is_an_error() -> None:
    with pytest.raises(OSError, match="source"):
        await extents_told(0, 3)


async def test_a_further_connection_to_another_export_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        await peer.negotiate(size=SIZE if first else SIZE * 2, flags=FLAGS | CAN_MULTI_CONN)
        while True:
            command, cookie, offset, length = await peer.request()
            if command == CMD_DISC:
                return
            assert first
            peer.chunk(cookie, REPLY_OFFSET_DATA, struct.pack(">Q", offset) + b"1" * length)

    async with serving(script) as uri:
        export = await RemoteExport.connect(uri, connections=3)
        assert export.info.can_multi_conn
        while caplog.text.count("another export") < 2:
            assert await export.read(0, 512) == [b"1" * 512]
        await export.close()


async def test_one_connection_is_all_where_several_would_see_different_disks() -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.negotiate()
        while (request := await peer.request())[0] != CMD_DISC:
            _, cookie, offset, length = request
            peer.chunk(cookie, REPLY_OFFSET_DATA, struct.pack(">Q", offset) + bytes(length))

    async with serving(script) as uri:
        export = await RemoteExport.connect(uri, connections=4)
        await asyncio.gather(*(export.read(i * 4096, 4096) for i in range(64)))
        await export.close()
    assert connections == 1


async def test_a_failed_copy_never_reaches_the_file() -> None:
    async def script(peer: Peer) -> None:
        await peer.negotiate()
        _, cookie, _, _ = await peer.request()
        peer.chunk(cookie, REPLY_OFFSET_DATA, struct.pack(">Q", 0) + b"x" * 2048)

    fd = os.memfd_create("target")
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    async with serving(script) as uri:
        export = await RemoteExport.connect(uri)
        export.copy_soon(0, 4096, fd, 0, lambda _mask, error: told.set_result(error))
        error = await told
        await export.close()
    assert error is not None
    assert error.errno == errno.EIO
    assert os.fstat(fd).st_size == 0
    os.close(fd)
