"""What a connected export does: reads, copies, extents; losing it, and closing it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.extents import Extent, ExtentFlags, merge
from tests.block.remote.peers import Proxy, connected, pattern, read
from tests.support.descriptors import open_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbdstream.block.remote.export import RemoteExport
    from tests.block.remote.peers import Servers

KIB, MIB = 1 << 10, 1 << 20
HOLE_ZERO = ExtentFlags.HOLE | ExtentFlags.ZERO


class Copies:
    """Copies in flight, each with its outcome once there is one."""

    def __init__(self, export: RemoteExport, fd: int) -> None:
        self.export = export
        self.fd = fd
        self.outcomes: list[tuple[int | None, OSError | None]] = []
        self._started = 0
        self._all_done = asyncio.Event()

    def start(self, offset: int, length: int, file_offset: int, **options: Any) -> None:
        self._started += 1
        self.export.copy_soon(offset, length, self.fd, file_offset, self._done, **options)

    async def wait(self) -> list[tuple[int | None, OSError | None]]:
        while len(self.outcomes) < self._started:
            self._all_done.clear()
            await self._all_done.wait()
        return self.outcomes

    def _done(self, mask: int | None, error: OSError | None) -> None:
        self.outcomes.append((mask, error))
        self._all_done.set()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


# What a server says.


async def test_what_the_server_says_is_known_after_connecting(servers: Servers) -> None:
    async with connected(servers.nbdkit("-r", "memory", "3M")) as export:
        assert export.size == export.info.size == 3 * MIB
        assert export.read_only
        assert export.info.read_only
        assert export.info.can_multi_conn
        assert export.info.has_allocation
        assert (export.info.minimum_block, export.info.maximum_block) == (1, 0)
        assert not export.info.tls


async def test_block_sizes_are_told_and_alignment_is_not_the_callers_business(servers: Servers) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=16K", "blocksize-maximum=64K"]
    uri = servers.nbdkit("--filter=blocksize-policy", "pattern", "1M", *policy, "blocksize-error-policy=error")
    async with connected(uri) as export:
        assert (export.info.minimum_block, export.info.preferred_block, export.info.maximum_block) == (
            4096,
            16384,
            65536,
        )
        assert export.minimum_block == 1
        assert await read(export, 100, 300_000) == pattern(100, 300_000)
        assert await read(export, MIB - 10, 10) == pattern(MIB - 10, 10)


# Reading.


@pytest.mark.parametrize("connections", [1, 2, 5])
@pytest.mark.parametrize("tcp", [False, True])
async def test_reads_return_the_exports_bytes(servers: Servers, tcp: bool, connections: int) -> None:
    async with connected(servers.nbdkit("pattern", "64M", tcp=tcp), connections=connections) as export:
        ranges = [(i * 777_777 % (63 * MIB), 1 + i * 9973 % MIB) for i in range(100)]
        answers = await asyncio.gather(*(read(export, offset, length) for offset, length in ranges))
        assert answers == [pattern(offset, length) for offset, length in ranges]


async def test_a_read_may_be_longer_than_any_request(servers: Servers) -> None:
    async with connected(servers.nbdkit("pattern", "80M")) as export:
        data = await read(export, 8, 70 * MIB)
        assert len(data) == 70 * MIB
        assert data[-4096:] == pattern(8 + 70 * MIB - 4096, 4096)
        assert data[32 * MIB - 8 : 32 * MIB + 8] == pattern(32 * MIB, 16)


async def test_what_was_read_is_the_callers(servers: Servers) -> None:
    async with connected(servers.nbdkit("pattern", "1M")) as export:
        (first,) = await export.read(0, 65536)
        await asyncio.gather(*(export.read(i * 65536, 65536) for i in range(1, 16)))
        assert first == pattern(0, 65536)


async def test_reads_from_qemu_nbd(servers: Servers, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB))
    async with connected(servers.qemu_nbd("-r", str(image), export="disk")) as export:
        assert await read(export, 0, MIB) == image.read_bytes()


async def test_a_read_of_nothing_is_empty(servers: Servers) -> None:
    async with connected(servers.nbdkit("memory", "1M")) as export:
        assert await read(export, 0, 0) == b""


async def test_a_range_that_is_not_there_is_refused(servers: Servers) -> None:
    async with connected(servers.nbdkit("memory", "1M")) as export:
        with pytest.raises(OSError, match="no such range") as caught:
            await export.read(MIB - 1, 2)
        assert caught.value.errno == errno.EINVAL


async def test_an_error_of_the_server_fails_that_request_only(servers: Servers) -> None:
    switch = servers.path("failing")
    arguments = ["error-pread=ENOSPC", "error-pread-rate=100%", f"error-pread-file={switch}"]
    async with connected(servers.nbdkit("--filter=error", "pattern", "1M", *arguments)) as export:
        open(switch, "w").close()
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what matters
            await export.read(0, 4096)
        assert caught.value.errno == errno.ENOSPC
        os.unlink(switch)
        assert await read(export, 0, 4096) == pattern(0, 4096)
        assert not export.lost.done()


async def test_a_callback_that_fails_does_not_stop_the_others(servers: Servers) -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))

    def fail(_data: object, _error: OSError | None) -> None:
        msg = "on purpose"
        raise ValueError(msg)

    async with connected(servers.nbdkit("pattern", "1M"), connections=1) as export:
        export.read_soon(0, 512, fail)
        assert await read(export, 0, 512) == pattern(0, 512)
    assert [str(context["exception"]) for context in complaints] == ["on purpose"]


# Copying.


async def test_copies_arrive_in_the_file(servers: Servers, target: int) -> None:
    async with connected(servers.nbdkit("pattern", "32M")) as export:
        copies = Copies(export, target)
        for offset in range(0, 32 * MIB, 512 * KIB):
            copies.start(offset, 512 * KIB, 4096 + offset)
        assert await copies.wait() == [(0, None)] * 64
    assert os.pread(target, 33 * MIB, 0) == bytes(4096) + pattern(0, 32 * MIB)


async def test_units_of_zeroes_are_told_and_not_written(servers: Servers, tmp_path: Path, target: int) -> None:
    image = tmp_path / "image"
    data, nothing = os.urandom(4096), bytes(4096)
    image.write_bytes(data + nothing + nothing + data + nothing[:-1] + b"x" + nothing[:100])
    os.pwrite(target, b"\xff" * 24_000, 0)
    async with connected(servers.nbdkit("file", str(image))) as export:
        copies = Copies(export, target)
        copies.start(0, export.size, 0, zero_unit=4096)
        assert await copies.wait() == [(0b100110, None)]
    filled = b"\xff" * 4096
    assert os.pread(target, 20_580, 0) == data + filled + filled + data + nothing[:-1] + b"x" + filled[:100]


async def test_short_writes_bring_the_same(servers: Servers, target: int) -> None:
    async with connected(servers.nbdkit("pattern", "1M")) as export:
        copies = Copies(export, target)
        copies.start(100, 200_000, 50, short_writes=True)
        assert await copies.wait() == [(0, None)]
    assert os.pread(target, 300_000, 50) == pattern(100, 200_000)


async def test_without_a_unit_zeroes_are_written(servers: Servers, target: int) -> None:
    os.pwrite(target, b"\xff" * 8192, 0)
    async with connected(servers.nbdkit("memory", "1M")) as export:
        copies = Copies(export, target)
        copies.start(0, 8192, 0)
        assert await copies.wait() == [(0, None)]
    assert os.pread(target, 8192, 0) == bytes(8192)


async def test_copies_need_no_alignment(servers: Servers, target: int) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"]
    async with connected(servers.nbdkit("--filter=blocksize-policy", "pattern", "1M", *policy)) as export:
        copies = Copies(export, target)
        copies.start(100, 200_000, 50, zero_unit=1000)
        assert await copies.wait() == [(0, None)]
    assert os.pread(target, 300_000, 50) == pattern(100, 200_000)


async def test_a_failed_write_is_told(servers: Servers) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with connected(servers.nbdkit("pattern", "1M")) as export:
            copies = Copies(export, full)
            copies.start(0, 65536, 0)
            [(mask, error)] = await copies.wait()
            assert mask is None
            assert error is not None
            assert error.errno == errno.ENOSPC
            assert await read(export, 0, 512) == pattern(0, 512)
    finally:
        os.close(full)


async def test_a_failed_read_writes_nothing(servers: Servers, target: int) -> None:
    uri = servers.nbdkit("--filter=error", "pattern", "1M", "error-pread=EIO", "error-pread-rate=100%")
    async with connected(uri) as export:
        copies = Copies(export, target)
        copies.start(0, 65536, 0)
        [(mask, error)] = await copies.wait()
        assert mask is None
        assert error is not None
        assert error.errno == errno.EIO
    assert os.fstat(target).st_size == 0


async def test_a_read_overtakes_the_copies_that_wait(servers: Servers, target: int) -> None:
    uri = servers.nbdkit("-t", "1", "--filter=delay", "pattern", "8M", "rdelay=5ms")
    async with connected(uri, connections=1) as export:
        copies = Copies(export, target)
        for offset in range(0, 8 * MIB, 64 * KIB):
            copies.start(offset, 64 * KIB, offset)
        await read(export, 0, 4096)
        assert len(copies.outcomes) < 64
        await copies.wait()


# Extents.


async def test_extents_are_the_servers(servers: Servers, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(b"x" * MIB)
    for uri in [servers.nbdkit("file", str(image)), servers.qemu_nbd("-r", str(image))]:
        async with connected(uri) as export:
            assert await every_extent(export, 0, 8 * MIB) == [
                Extent(0, MIB, HOLE_ZERO),
                Extent(MIB, MIB, ExtentFlags.DATA),
                Extent(2 * MIB, 6 * MIB, HOLE_ZERO),
            ]
            assert await every_extent(export, MIB + 512, 4096) == [Extent(MIB + 512, 4096, ExtentFlags.DATA)]


async def every_extent(export: RemoteExport, offset: int, length: int) -> list[Extent]:
    extents: list[Extent] = []
    position = offset
    while position < offset + length:
        extents += await export.extents(position, offset + length - position)
        position = extents[-1].end
    return list(merge(extents))


async def test_a_terabyte_of_extents_is_asked_for_in_parts(servers: Servers) -> None:
    async with connected(servers.nbdkit("memory", "1T")) as export:
        [first] = await export.extents(0, export.size)
        assert first == Extent(0, 1 << 30, HOLE_ZERO)


@pytest.mark.parametrize("option", ["--no-sr", "--filter=noextents"])
async def test_what_says_nothing_of_its_extents_is_data(servers: Servers, option: str) -> None:
    async with connected(servers.nbdkit(option, "memory", "8M")) as export:
        assert await every_extent(export, 4096, 4 * MIB) == [Extent(4096, 4 * MIB, ExtentFlags.DATA)]


# Losing the source.


async def test_when_the_server_dies_all_that_waits_fails_and_the_loss_is_told(servers: Servers, target: int) -> None:
    uri = servers.nbdkit("--filter=delay", "pattern", "8M", "rdelay=100")
    async with connected(uri, connections=3) as export:
        copies = Copies(export, target)
        for offset in range(0, 8 * MIB, 64 * KIB):
            copies.start(offset, 64 * KIB, offset)
        reads = [asyncio.ensure_future(read(export, 0, 4096)) for _ in range(5)]
        await asyncio.sleep(0)
        servers.kill()
        assert await export.lost in {"the server closed the connection", "connection reset by peer"}
        failures = [error.errno for _, error in await copies.wait() if error]
        assert len(failures) == 128
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        failures += [outcome.errno or 0 for outcome in outcomes if isinstance(outcome, OSError)]
        assert len(failures) == 133
        assert set(failures) <= {errno.ECONNRESET, errno.ENOTCONN}

        with pytest.raises(OSError, match="not connected") as caught:
            await export.read(0, 512)
        assert caught.value.errno == errno.ENOTCONN


async def test_an_idle_connection_that_closes_is_noticed(servers: Servers) -> None:
    async with connected(servers.nbdkit("memory", "1M")) as export:
        servers.kill()
        assert await export.lost == "the server closed the connection"


async def test_one_lost_connection_of_several_fails_only_what_was_on_it(servers: Servers) -> None:
    # With several threads a connection nbdkit ends itself when one is lost (raw_send_socket: Assertion `sock >= 0').
    upstream = servers.nbdkit("--threads=1", "--filter=delay", "pattern", "8M", "rdelay=50ms").partition("socket=")[2]
    proxy = Proxy(upstream)
    path = servers.path("proxy")
    listener = await asyncio.start_unix_server(proxy, path)
    async with listener, connected(f"nbd+unix:///?socket={path}", connections=3) as export:
        while len(proxy.writers) < 3:
            await read(export, 0, 512)
        # The first reads go to the connections by turns.
        reads = [asyncio.ensure_future(read(export, i * 65536, 65536)) for i in range(12)]
        await read(export, 0, 512)
        proxy.writers[0].transport.abort()
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        assert all(
            outcome == pattern(i * 65536, 65536) for i, outcome in enumerate(outcomes) if isinstance(outcome, bytes)
        )
        assert all(outcome.errno == errno.ECONNRESET for outcome in outcomes if isinstance(outcome, OSError))
        assert not export.lost.done()
        assert await read(export, 0, 65536) == pattern(0, 65536)
    await proxy.close()


# Closing.


async def test_closing_fails_what_is_in_flight(servers: Servers, target: int) -> None:
    uri = servers.nbdkit("--filter=delay", "pattern", "8M", "rdelay=100")
    async with connected(uri) as export:
        copies = Copies(export, target)
        for offset in range(0, 8 * MIB, 64 * KIB):
            copies.start(offset, 64 * KIB, offset)
    assert [error.errno for _, error in copies.outcomes if error] == [errno.ECANCELED] * 128
    with pytest.raises(OSError, match="closed"):
        await export.read(0, 512)
    await export.close()
    servers.kill()


async def test_the_server_is_left_politely(servers: Servers) -> None:
    log = servers.path("log")
    async with connected(servers.nbdkit("--filter=log", "pattern", "1M", f"logfile={log}")) as export:
        await read(export, 0, 512)
    servers_are_told = subprocess.run(["grep", "-c", "Connect", log], capture_output=True, text=True, check=True)
    assert int(servers_are_told.stdout) >= 1


async def test_no_descriptor_is_left(servers: Servers) -> None:
    uri = servers.nbdkit("pattern", "1M")
    gc.collect()  # what tests before left is not counted
    before = len(open_files())
    for _ in range(10):
        async with connected(uri) as export:
            await read(export, 0, 512)
    assert len(open_files()) == before
