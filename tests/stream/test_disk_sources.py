"""The source of a disk comes back, is another one, or has moved."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from nbdstream.errors import ImageError, SourceError, WrongSourceError
from nbdstream.stream.disk import DiskStream
from nbdstream.stream.snapshot import DiskState
from nbdstream.stream.source import SourceOptions
from nbdstream.uri import NbdUri
from tests.stream.peers import (
    CLUSTER,
    SourceDisk,
    SourceServer,
    is_sound,
    left_alone,
    some_bytes,
    stop_on_the_way,
    stream_all,
)
from tests.support import qed

pytestmark = pytest.mark.usefixtures("short_pauses")


def another_disk() -> SourceDisk:
    return SourceDisk(some_bytes(40 * CLUSTER + 1)[:-1])


async def replaced(server: SourceServer, disk: SourceDisk) -> None:
    """Another disk is where the source was."""
    await server.stop()
    server.disk = disk
    await server.start()


@pytest.mark.parametrize("socket", [None, "guest"])
async def test_another_disk_of_the_same_size_is_refused_at_a_resume(
    server: SourceServer, path: str, directory: str, socket: str | None
) -> None:
    await stop_on_the_way(server, path)
    await replaced(server, another_disk())
    with pytest.raises(WrongSourceError, match="differs"):
        await DiskStream.start(server.uri, path, socket=socket and f"{directory}/{socket}")
    assert not os.path.exists(f"{directory}/guest")


async def test_another_disk_that_comes_back_is_not_taken(
    server: SourceServer, disk: SourceDisk, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with await DiskStream.start(server.uri, path, speed=1) as stream:
        await stream.overlay.read(0, CLUSTER)
        await replaced(server, another_disk())
        while "differs" not in stream.snapshot().reason:
            await asyncio.sleep(0.001)
        assert stream.snapshot().state is DiskState.DEGRADED
        waiting = asyncio.create_task(stream.overlay.read(39 * CLUSTER, 10))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await replaced(server, disk)
        assert b"".join(map(bytes, await waiting)) == disk.data[39 * CLUSTER : 39 * CLUSTER + 10]
        assert stream.job
        stream.job.speed = 0
        await stream.wait()
    assert is_sound(path, disk.data)


async def test_where_nothing_can_be_compared_the_size_decides_and_the_log_says_so(
    server: SourceServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with await left_alone(server, path) as stream:
        await stream.overlay.write(0, b"x" * CLUSTER)
        await replaced(server, another_disk())
        while stream.snapshot().state is not DiskState.RUNNING or "by its size" not in caplog.text:
            await asyncio.sleep(0.001)


async def test_a_further_source_takes_over(server: SourceServer, disk: SourceDisk, path: str, directory: str) -> None:
    second = SourceServer(f"{directory}/second", disk)
    await second.start()
    async with await DiskStream.start(server.uri, path, also=[second.uri], speed=1) as stream:
        await stream.overlay.read(0, CLUSTER)
        await server.stop()
        await stream.overlay.read(39 * CLUSTER, 10)
        assert stream.snapshot().source == second.uri
        assert stream.job
        stream.job.speed = 0
        await stream.wait()
    await second.stop()
    assert is_sound(path, disk.data)
    await server.start()
    await stream_all(server.uri, path)  # it still belongs to the first


async def test_a_further_source_that_is_wrong_is_not_taken(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    second = SourceServer(f"{directory}/second", another_disk())
    await second.start()
    async with await DiskStream.start(server.uri, path, also=[second.uri], speed=1) as stream:
        await stream.overlay.read(0, CLUSTER)
        await server.stop()
        while "differs" not in stream.snapshot().reason:
            await asyncio.sleep(0.001)
        await server.start()
        assert stream.job
        stream.job.speed = 0
        await stream.wait()
    await second.stop()
    assert is_sound(path, disk.data)


async def test_with_eio_only_what_is_remote_fails(server: SourceServer, disk: SourceDisk, path: str) -> None:
    options = SourceOptions(hold=0.0)
    async with await DiskStream.start(server.uri, path, options=options, speed=1) as stream:
        overlay = stream.overlay
        await overlay.read(0, CLUSTER)
        await server.stop()
        with pytest.raises(OSError, match=r".") as error:
            await overlay.read(30 * CLUSTER, 10)
        assert error.value.errno == errno.EIO
        with pytest.raises(OSError, match=r"."):
            await overlay.write(30 * CLUSTER + 5, b"a part")
        assert b"".join(map(bytes, await overlay.read(0, CLUSTER))) == disk.data[:CLUSTER]
        await overlay.write(5, b"a part of what is local")
        await overlay.write(31 * CLUSTER, b"x" * CLUSTER)
        await overlay.discard(32 * CLUSTER, CLUSTER)
        await overlay.flush()
        await server.start()
        while stream.snapshot().state is DiskState.DEGRADED:
            await asyncio.sleep(0.001)
        assert b"".join(map(bytes, await overlay.read(30 * CLUSTER, 10))) == disk.data[30 * CLUSTER :][:10]
        assert stream.job
        stream.job.speed = 0
        await stream.wait()


async def test_a_source_that_has_moved_is_taken_over(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    for name in ("second", "third"):
        moved = SourceServer(f"{directory}/{name}", disk)
        await moved.start()
        with pytest.raises(ImageError, match="not of"):
            await DiskStream.start(moved.uri, path)
        stream = await DiskStream.start(moved.uri, path, moved=True, speed=1)
        await stream.close()
        assert NbdUri.parse(qed.qemu_info(path)["backing-filename"]).same_source(NbdUri.parse(moved.uri))
        assert qed.qemu_check(path).status == 0
        await moved.stop()
    await moved.start()
    await stream_all(moved.uri, path)
    await stream_all(moved.uri, path)  # it is remembered when it is independent, too
    await moved.stop()
    assert is_sound(path, disk.data)


async def test_a_disk_that_is_another_is_not_taken_over(server: SourceServer, path: str, directory: str) -> None:
    await stop_on_the_way(server, path)
    before = qed.qemu_info(path)["backing-filename"]
    moved = SourceServer(f"{directory}/moved", another_disk())
    await moved.start()
    with pytest.raises(WrongSourceError, match="differs"):
        await DiskStream.start(moved.uri, path, moved=True)
    await moved.stop()
    with pytest.raises(SourceError, match="connect"):
        await DiskStream.start(moved.uri, path, moved=True, socket=f"{directory}/guest")
    assert qed.qemu_info(path)["backing-filename"] == before


async def test_an_independent_image_has_no_source_that_could_move(server: SourceServer, path: str) -> None:
    await stream_all(server.uri, path)
    with pytest.raises(ImageError, match="no source any more"):
        await DiskStream.start(server.uri, path, moved=True)
