"""The job: from an overlay that needs its source to one that does not; nothing is left over, and nobody is cut off."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

import pytest

from nbdstream.stream.job import JobStatus, StreamJob
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


async def finished(stream: Streamed, job: StreamJob) -> str:
    """Run the job to its end and close the image; return its path."""
    await job.run()
    await stream.image.close()
    return stream.image.path


def keep_only(disk: SourceDisk, *clusters: int) -> None:
    """Make all other clusters of the source zero."""
    for cluster in set(range(40)).difference(clusters):
        run = range(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        disk.data[run.start : run.stop] = bytes(CLUSTER)
        disk.zeroes.append(run)


async def test_in_the_end_the_overlay_is_a_sound_image_without_a_backing_file(
    stream: Streamed, disk: SourceDisk
) -> None:
    job = StreamJob(stream.overlay, stream.source)
    seen = [job.status]
    running = asyncio.create_task(job.run())
    await asyncio.sleep(0)
    seen.append(job.status)
    await running
    assert [*seen, job.status] == [JobStatus.CREATED, JobStatus.RUNNING, JobStatus.CONCLUDED]
    assert stream.image.backing_name is None
    assert not stream.source.connected
    await stream.image.close()
    path = stream.image.path
    assert "backing-filename" not in qed.qemu_info(path)
    assert qed.qemu_check(path).status == 0
    assert qed.content(path) == disk.data


async def test_progress_goes_from_nothing_to_everything(stream: Streamed, disk: SourceDisk) -> None:
    disk.data[:CLUSTER] = bytes(CLUSTER)
    disk.zeroes.append(range(CLUSTER))
    job = StreamJob(stream.overlay, stream.source)
    assert job.progress[:2] == (0, disk.size)
    await job.run()
    progress = job.progress
    assert (progress.position, progress.length) == (disk.size, disk.size)
    assert progress.fetched == progress.allocated == disk.size - CLUSTER
    assert progress.rate > 0


async def test_the_last_cluster_counts_no_more_than_the_disk_has_of_it(server: SourceServer, tmp_path: Path) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(CLUSTER + 512))
    await server.start()
    async with streamed(server, tmp_path / "partial") as stream:
        job = StreamJob(stream.overlay, stream.source)
        assert job.progress.position == 0
        await job.run()
        assert job.progress.position == CLUSTER + 512


async def test_a_fetch_that_lost_its_race_and_is_late_leaks_nothing(stream: Streamed, disk: SourceDisk) -> None:
    """The guest makes a cluster local while it is being fetched; all others are there before that fetch ends."""
    keep_only(disk, 0, 20)
    disk.gated = range(CLUSTER)
    disk.gate.clear()
    job = StreamJob(stream.overlay, stream.source)
    running = asyncio.create_task(job.run())
    await disk.asked.wait()
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    asyncio.get_running_loop().call_later(0.1, disk.gate.set)
    await running
    await stream.image.close()
    assert qed.qemu_check(stream.image.path).status == 0
    assert qed.content(stream.image.path)[:CLUSTER] == b"\x99" * CLUSTER


async def test_a_reader_of_a_late_fetch_gets_its_data_at_the_end_of_the_job(
    stream: Streamed, disk: SourceDisk
) -> None:
    keep_only(disk, 0)
    disk.gate.clear()
    job = StreamJob(stream.overlay, stream.source)
    reading = asyncio.create_task(stream.read(0, 10))
    await disk.asked.wait()
    running = asyncio.create_task(job.run())
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    asyncio.get_running_loop().call_later(0.05, disk.gate.set)
    assert await reading == b"\x99" * 10
    await running


async def test_what_guests_do_all_the_time_is_there_and_nothing_leaks(stream: Streamed, disk: SourceDisk) -> None:
    job = StreamJob(stream.overlay, stream.source)
    model = bytearray(disk.data)
    running = asyncio.create_task(job.run())
    number = 0
    while not running.done():
        number += 1
        start = number * 7 % 40 * CLUSTER
        data = bytes([number % 256]) * (CLUSTER if number % 3 else 512)
        if number % 5:
            await stream.overlay.write(start, data)
            model[start : start + len(data)] = data
        else:
            await stream.overlay.discard(start, CLUSTER)
            model[start : start + CLUSTER] = bytes(CLUSTER)
    await running
    await stream.image.close()
    assert qed.content(stream.image.path) == model
    assert qed.qemu_check(stream.image.path).corruptions == 0


async def test_a_failed_barrier_fails_the_job_and_the_backing_file_stays(
    stream: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="durable"):
            await StreamJob(stream.overlay, stream.source).run()
    assert stream.image.backing_name is not None


async def test_a_cancelled_job_can_be_begun_again(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    running = asyncio.create_task(StreamJob(stream.overlay, stream.source).run())
    await disk.asked.wait()
    running.cancel()
    await asyncio.wait([running])
    disk.gate.set()
    assert stream.image.backing_name is not None
    path = await finished(stream, StreamJob(stream.overlay, stream.source))
    assert qed.content(path) == disk.data
