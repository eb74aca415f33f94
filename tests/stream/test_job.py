"""The job: from an overlay that needs its source to one that does not; nothing is left over, and nobody is cut off."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

import pytest

from nbdstream.errors import JobError
from nbdstream.stream import hydrator
from nbdstream.stream.events import Completed, JobStatus, StatusChanged
from nbdstream.stream.job import StreamJob
from nbdstream.stream.source import Source
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


def started(stream: Streamed) -> StreamJob:
    """A job that runs."""
    job = StreamJob("job0", stream.hydration)
    job.start()
    return job


async def finished(stream: Streamed, job: StreamJob) -> str:
    """Wait for the end of the job and close the image; return its path."""
    await job.wait()
    assert not job.error
    await stream.image.close()
    return stream.image.path


def keep_only(disk: SourceDisk, *clusters: int) -> None:
    """Make all other clusters of the source zero."""
    for cluster in set(range(40)).difference(clusters):
        run = range(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        disk.data[run.start : run.stop] = bytes(CLUSTER)
        disk.zeroes.append(run)


def told(stream: Streamed) -> list[str]:
    """The job's events: its states in lower case, the others by name."""
    return [event.status.value if isinstance(event, StatusChanged) else type(event).__name__ for event in stream.events]


async def test_in_the_end_the_overlay_is_a_sound_image_without_a_backing_file(
    stream: Streamed, disk: SourceDisk
) -> None:
    await started(stream).wait()
    assert stream.image.backing_name is None
    assert not stream.source.connected
    await stream.image.close()
    path = stream.image.path
    assert "backing-filename" not in qed.qemu_info(path)
    assert qed.qemu_check(path).status == 0
    assert qed.content(path) == disk.data


async def test_it_goes_through_the_states_of_a_qemu_job_and_tells(stream: Streamed, disk: SourceDisk) -> None:
    job = StreamJob("job0", stream.hydration, speed=1 << 30)
    assert job.status is JobStatus.CREATED
    job.start()
    await job.wait()
    assert job.finished
    assert told(stream) == ["created", "running", "waiting", "pending", "Completed", "concluded", "null"]
    completed = next(event for event in stream.events if isinstance(event, Completed))
    assert (completed.job, completed.speed, completed.error) == ("job0", 1 << 30, "")
    assert completed.progress[:2] == (disk.size, disk.size)


async def test_a_pause_holds_until_it_is_resumed(
    stream: Streamed, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "memory_for_bulk", 4 * CLUSTER)
    monkeypatch.setattr(hydrator, "_REQUEST_BYTES", CLUSTER)
    monkeypatch.setattr(hydrator, "_REQUEST_BYTES_BESIDE_GUEST", CLUSTER)
    disk.gate.clear()
    job = started(stream)
    await disk.asked.wait()
    job.pause()
    disk.gate.set()
    while stream.fetches.bytes_in_flight:  # what was asked for before is kept
        await asyncio.sleep(0.001)
    asked = len(disk.reads)
    assert job.status is JobStatus.PAUSED
    assert await stream.read(15 * CLUSTER, 5) == disk.data[15 * CLUSTER : 15 * CLUSTER + 5]
    await asyncio.sleep(0.05)
    assert len(disk.reads) == asked + 1
    job.resume()
    await job.wait()
    assert told(stream)[:4] == ["created", "running", "paused", "running"]
    assert stream.hydration.hydrated


async def test_what_cannot_be_done_now_is_refused(stream: Streamed) -> None:
    job = StreamJob("job0", stream.hydration, speed=1)
    for verb in (job.pause, job.resume):
        with pytest.raises(JobError, match="created"):
            verb()
    job.start()
    with pytest.raises(JobError, match="running"):
        job.resume()
    job.pause()
    with pytest.raises(JobError, match="paused"):
        job.pause()
    await job.cancel()
    for verb in (job.pause, job.resume, job.start):
        with pytest.raises(JobError, match="null"):
            verb()
    with pytest.raises(JobError, match="null"):
        await job.cancel()


async def test_a_new_speed_holds_at_once(stream: Streamed, disk: SourceDisk) -> None:
    job = StreamJob("job0", stream.hydration, speed=1)  # a byte a second: nothing behind the first fetch
    job.start()
    while stream.fetches.bytes_fetched == 0:
        await asyncio.sleep(0.001)
    assert job.speed == 1
    job.speed = 0
    async with asyncio.timeout(0.9):  # it looks around once a second by itself
        while not stream.hydration.hydrated:
            await asyncio.sleep(0.001)
    await job.wait()


async def test_progress_goes_from_nothing_to_everything(stream: Streamed, disk: SourceDisk) -> None:
    disk.data[:CLUSTER] = bytes(CLUSTER)
    disk.zeroes.append(range(CLUSTER))
    job = StreamJob("job0", stream.hydration)
    assert job.progress[:2] == (0, disk.size)
    job.start()
    await job.wait()
    progress = job.progress
    assert (progress.position, progress.length) == (disk.size, disk.size)
    assert progress.fetched == progress.allocated == disk.size - CLUSTER
    assert progress.rate > 0


async def test_the_last_cluster_counts_no_more_than_the_disk_has_of_it(server: SourceServer, tmp_path: Path) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(CLUSTER + 512))
    await server.start()
    async with streamed(server, tmp_path / "partial") as stream:
        job = StreamJob("job0", stream.hydration)
        assert job.progress.position == 0
        job.start()
        await job.wait()
        assert job.progress.position == CLUSTER + 512


async def test_a_fetch_that_lost_its_race_and_is_late_leaks_nothing(stream: Streamed, disk: SourceDisk) -> None:
    """The guest makes a cluster local while it is being fetched; all others are there before that fetch ends."""
    keep_only(disk, 0, 20)
    disk.gated = range(CLUSTER)
    disk.gate.clear()
    job = started(stream)
    await disk.asked.wait()
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    asyncio.get_running_loop().call_later(0.1, disk.gate.set)
    await job.wait()
    await stream.image.close()
    assert qed.qemu_check(stream.image.path).status == 0
    assert qed.content(stream.image.path)[:CLUSTER] == b"\x99" * CLUSTER


async def test_a_reader_of_a_late_fetch_gets_its_data_at_the_end_of_the_job(stream: Streamed, disk: SourceDisk) -> None:
    keep_only(disk, 0)
    disk.gate.clear()
    reading = asyncio.create_task(stream.read(0, 10))
    await disk.asked.wait()
    job = started(stream)
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    asyncio.get_running_loop().call_later(0.05, disk.gate.set)
    assert await reading == b"\x99" * 10
    await job.wait()


async def test_what_guests_do_all_the_time_is_there_and_nothing_leaks(stream: Streamed, disk: SourceDisk) -> None:
    model = bytearray(disk.data)
    job = started(stream)
    number = 0
    while not job.finished:
        number += 1
        start = number * 7 % 40 * CLUSTER
        data = bytes([number % 256]) * (CLUSTER if number % 3 else 512)
        if number % 5:
            await stream.overlay.write(start, data)
            model[start : start + len(data)] = data
        else:
            await stream.overlay.discard(start, CLUSTER)
            model[start : start + CLUSTER] = bytes(CLUSTER)
    await job.wait()
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
        job = started(stream)
        await job.wait()
    assert "durable" in job.error
    assert stream.image.backing_name is not None
    assert told(stream)[-5:] == ["OperationFailed", "aborting", "Completed", "concluded", "null"]
    assert any(isinstance(event, Completed) and event.error == job.error for event in stream.events)


async def test_a_mistake_of_ours_ends_the_job_with_an_error(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.hydration.survey, "run", lambda _until: asyncio.sleep(0, 1 / 0))
    job = started(stream)
    await job.wait()
    assert "internal error" in job.error


async def test_a_cancelled_job_can_be_begun_again(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    job = started(stream)
    await disk.asked.wait()
    await job.cancel()
    disk.gate.set()
    assert stream.image.backing_name is not None
    assert told(stream)[-4:] == ["aborting", "Cancelled", "concluded", "null"]
    path = await finished(stream, started(stream))
    assert qed.content(path) == disk.data
    assert all(disk.times_read(cluster) == 1 for cluster in range(40))


async def test_a_job_can_be_cancelled_before_its_first_step(stream: Streamed) -> None:
    await started(stream).cancel()
    assert told(stream) == ["created", "running", "aborting", "Cancelled", "concluded", "null"]
