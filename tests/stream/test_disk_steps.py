"""A disk is streamed by a job, or step by step, and by one at a time."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from nbdstream.errors import JobError
from nbdstream.stream.disk import DiskStream, StepResult
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, is_sound, left_alone
from tests.support import qed

pytestmark = pytest.mark.usefixtures("short_pauses")


async def test_without_a_job_nothing_is_fetched_but_what_is_read_is_kept(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    async with await left_alone(server, path) as stream:
        assert stream.job is None
        await asyncio.sleep(0.05)
        assert disk.reads == []
        for _ in range(2):
            await stream.overlay.read(5 * CLUSTER, 10)
        assert len(disk.reads) == 1


async def test_steps_come_to_the_end_and_say_so(server: SourceServer, disk: SourceDisk, path: str) -> None:
    async with await left_alone(server, path) as stream:
        offsets = []
        step = StepResult(0, False)
        while not step.finished:
            offsets.append(step.next_offset)
            step = await stream.step(step.next_offset, 9 * CLUSTER)
            assert stream.independent == step.finished
        assert offsets == [9 * CLUSTER * number for number in range(5)]
        assert step == (disk.size, True)
        assert await stream.step(0) == (disk.size, True)
        await stream.wait()
    assert is_sound(path, disk.data)
    assert all(disk.times_read(cluster) == 1 for cluster in range(40))


async def test_a_step_fetches_what_is_remote_in_its_range_and_no_more(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    zero = range(8 * CLUSTER, 30 * CLUSTER)
    disk.data[zero.start : zero.stop] = bytes(len(zero))
    disk.zeroes.append(zero)
    async with await left_alone(server, path) as stream:
        assert await stream.step(5 * CLUSTER + 1, CLUSTER) == (7 * CLUSTER, False)
        assert [disk.times_read(cluster) for cluster in range(9)] == [0, 0, 0, 0, 0, 1, 1, 0, 0]
        assert await stream.step(7 * CLUSTER, CLUSTER) == (30 * CLUSTER, False)
        assert await stream.step(8 * CLUSTER, 22 * CLUSTER) == (30 * CLUSTER, False)
        assert [disk.times_read(cluster) for cluster in range(8, 31)] == [0] * 23
        assert await stream.step(30 * CLUSTER, 1 << 40) == (0, False)  # and from the start
        assert await stream.step(0) == (disk.size, True)
    assert is_sound(path, disk.data)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, -5), (40 * CLUSTER + 1, 1)])
async def test_a_step_that_is_not_one_of_the_disk_is_refused(
    server: SourceServer, path: str, offset: int, length: int
) -> None:
    async with await left_alone(server, path) as stream:
        with pytest.raises(ValueError, match="disk"):
            await stream.step(offset, length)


async def test_a_disk_is_streamed_by_one_at_a_time(server: SourceServer, disk: SourceDisk, path: str) -> None:
    disk.gate.clear()
    async with await left_alone(server, path) as stream:
        stepping = asyncio.create_task(stream.step(0))
        await disk.asked.wait()
        with pytest.raises(JobError, match="already"):
            stream.start_job()
        disk.gate.set()
        await stepping
    os.unlink(path)
    async with await DiskStream.start(server.uri, path, speed=1) as stream:
        with pytest.raises(JobError, match="already"):
            stream.start_job()
        with pytest.raises(JobError, match="already"):
            await stream.step(0)


async def test_a_job_that_was_cancelled_is_followed_by_another(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    async with await DiskStream.start(server.uri, path, speed=1) as stream:
        assert stream.job
        await stream.job.cancel()
        assert stream.job is None
        assert await stream.step(0, CLUSTER)
        job = stream.start_job(job_id="second")
        assert stream.job is job
        await stream.wait()
        with pytest.raises(JobError, match="independent"):
            stream.start_job()
    assert is_sound(path, disk.data)


async def test_a_step_ends_with_the_disk(server: SourceServer, disk: SourceDisk, path: str) -> None:
    stream = await DiskStream.start(server.uri, path, job=False)
    disk.gate.clear()
    step = asyncio.ensure_future(stream.step())
    await disk.asked.wait()
    async with asyncio.timeout(20):
        await stream.close()
        with pytest.raises(JobError, match="the disk was closed"):
            await step


async def test_a_step_is_the_last_where_the_guest_has_read_the_rest(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    async with await DiskStream.start(server.uri, path, job=False) as stream:
        await stream.step(0, 4 * CLUSTER)
        await stream.overlay.read(8 * CLUSTER, disk.size - 8 * CLUSTER)
        assert await stream.step(4 * CLUSTER, 4 * CLUSTER) == StepResult(disk.size, True)
    assert qed.content(path) == disk.data


async def test_a_step_that_fails_says_why(server: SourceServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with await DiskStream.start(server.uri, path, job=False) as stream:

        async def fail(*_: object) -> None:
            raise ExceptionGroup("tasks", [OSError(errno.EIO, "the image has failed")])

        monkeypatch.setattr(stream, "_hydrate", fail)
        with pytest.raises(JobError, match=r"streaming failed: the image has failed$"):
            await stream.step()
