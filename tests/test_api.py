"""Streaming a disk from Python: what the README shows."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

import nbdstream
from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import JobError, NbdstreamError
from nbdstream.server.export import Export
from nbdstream.server.server import NbdServer
from tests.support import qed
from tests.support.client import NbdClient
from tests.support.memory import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONTENT = bytes(range(256)) * 4096
CLUSTER = 65536


@pytest.fixture
async def directory() -> AsyncIterator[str]:
    path = tempfile.mkdtemp(prefix="nbdstream-")
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def source(directory: str) -> AsyncIterator[str]:
    server = NbdServer([Export("disk", MemoryDevice(CONTENT), writable=False)])
    await server.listen_unix(f"{directory}/source")
    yield server.uris[0]
    await server.close(1)


async def test_a_disk_is_streamed_and_told_of(source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "overlay.qed")
    async with await nbdstream.open_disk(source, path) as disk:
        info = nbdstream.stream_disk_info(disk)
        assert (info.device, info.position, info.size, info.fetched) == (path, 0, len(CONTENT), 0)
        assert not info.independent
        await nbdstream.stream_disk(disk)
        await disk.wait()
        info = nbdstream.stream_disk_info(disk)
        assert (info.position, info.independent, info.fetched) == (len(CONTENT), True, len(CONTENT))
    assert qed.content(path) == CONTENT


async def test_a_disk_is_streamed_step_by_step_to_the_same_image(source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "overlay.qed")
    async with await nbdstream.open_disk(source, path) as disk:
        offsets = [0]
        while offsets[-1] < disk.size:
            offsets.append(await nbdstream.stream_disk(disk, offsets[-1], 300_000))
            assert nbdstream.stream_disk_info(disk).position >= offsets[-1]
        assert disk.independent
        assert offsets == [0, 327680, 655360, 983040, len(CONTENT)]
    assert qed.content(path) == CONTENT
    assert qed.qemu_check(path).status == 0


async def test_a_disk_is_served_while_it_is_streamed(source: str, tmp_path: Path, directory: str) -> None:
    path = str(tmp_path / "overlay.qed")
    async with await nbdstream.open_disk(source, path, socket=f"{directory}/guest") as disk:
        guest = await RemoteExport.connect(disk.uris[0])
        assert b"".join(await guest.read(1 << 19, 256)) == CONTENT[:256]
        assert await nbdstream.stream_disk(disk, 0, 65536) == 65536
        job = await nbdstream.stream_disk(disk, speed=1)
        assert b"".join(await guest.read(1 << 18, 256)) == CONTENT[:256]
        assert not nbdstream.stream_disk_info(disk).independent
        job.speed = 0
        await disk.wait()
        assert b"".join(await guest.read(0, len(CONTENT))) == CONTENT
        await guest.close()


async def test_steps_are_taken_before_a_guest_comes_beside_it_and_when_it_has_gone(
    source: str, tmp_path: Path, directory: str
) -> None:
    path, model = str(tmp_path / "overlay.qed"), bytearray(CONTENT)
    async with await nbdstream.open_disk(source, path, socket=f"{directory}/guest") as disk:
        offset = await nbdstream.stream_disk(disk, 0, 4 * CLUSTER)
        assert nbdstream.stream_disk_info(disk).position == offset == 4 * CLUSTER
        with await asyncio.to_thread(NbdClient, f"{directory}/guest") as guest:
            for cluster in (1, 6, 12):  # what is local, what the next step streams, what a later one does
                place = cluster * CLUSTER + 1000
                await asyncio.to_thread(guest.write, place, b"guest")
                model[place : place + 5] = b"guest"
            offset = await nbdstream.stream_disk(disk, offset, 4 * CLUSTER)
            assert offset == 8 * CLUSTER
            assert nbdstream.stream_disk_info(disk).position >= 9 * CLUSTER, "what was written in part is local, too"
            assert await asyncio.to_thread(guest.read, 5 * CLUSTER, 4 * CLUSTER) == model[5 * CLUSTER : 9 * CLUSTER]
        while offset < disk.size:
            offset = await nbdstream.stream_disk(disk, offset, 4 * CLUSTER)
        assert nbdstream.stream_disk_info(disk).independent
    assert qed.content(path) == model
    assert qed.qemu_check(path).status == 0


async def test_one_stream_at_a_time(source: str, tmp_path: Path) -> None:
    async with await nbdstream.open_disk(source, str(tmp_path / "overlay.qed")) as disk:
        await nbdstream.stream_disk(disk, speed=1)
        with pytest.raises(JobError, match="already"):
            await nbdstream.stream_disk(disk)
        with pytest.raises(JobError, match="already"):
            await nbdstream.stream_disk(disk, 0)


async def test_an_independent_disk_needs_no_source_and_says_so(source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "overlay.qed")
    async with await nbdstream.open_disk(source, path) as disk:
        await nbdstream.stream_disk(disk)
        await disk.wait()
    async with await nbdstream.open_disk(source, path) as disk:
        assert await nbdstream.stream_disk(disk, 0) == disk.size
        info = nbdstream.stream_disk_info(disk)
        assert info == (path, len(CONTENT), len(CONTENT), True, 0.0, 0)


async def test_what_cannot_be_is_one_kind_of_error(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for uri, path in ((source, tmp_path / "file"), ("nonsense", tmp_path / "new"), (source, tmp_path / "no" / "dir")):
        with pytest.raises(NbdstreamError):
            await nbdstream.open_disk(uri, str(path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = nbdstream.nothing_like_it
