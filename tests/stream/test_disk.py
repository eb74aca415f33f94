"""A disk for its whole life: made, resumed, independent; and whatever is refused leaves everything as it was."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.opening import create_file, read_header
from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import (
    ImageError,
    ImageLockedError,
    JobError,
    ListenError,
    NbdstreamError,
    SourceError,
    WrongSourceError,
)
from nbdstream.stream import source as source_module
from nbdstream.stream.disk import DiskStream, StepResult
from nbdstream.stream.events import ErrorAction, Event, Operation, OperationFailed, SourceBack, SourceLost
from nbdstream.stream.governor import FLOOR
from nbdstream.stream.preparation import check_origin, create_overlay
from nbdstream.stream.snapshot import DiskState, Latency
from nbdstream.stream.source import SourceOptions
from nbdstream.uri import NbdUri
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, some_bytes
from tests.support import qed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "overlay.qed")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_FIRST_PAUSE_SECONDS", 0.01)


async def stream_all(uri: str, path: str) -> DiskStream:
    async with await DiskStream.start(uri, path) as disk:
        await disk.wait()
        assert disk.independent
    return disk


async def stop_on_the_way(server: SourceServer, path: str, clusters: int = 10) -> None:
    """Leave an overlay behind that has some clusters."""
    disk = await DiskStream.start(server.uri, path, speed=1)
    try:
        for cluster in range(clusters):
            await disk.overlay.read(cluster * CLUSTER, 1)
    finally:
        await disk.close()


def is_sound(path: str, content: bytes | bytearray) -> bool:
    return (
        qed.qemu_check(path).status == 0
        and "backing-filename" not in qed.qemu_info(path)
        and qed.content(path) == content
    )


# The life of a disk.


async def test_an_overlay_is_made_and_becomes_independent(server: SourceServer, disk: SourceDisk, path: str) -> None:
    stream = await stream_all(server.uri, path)
    assert stream.progress.fetched == disk.size
    assert is_sound(path, disk.data)


async def test_on_the_way_qemu_sees_an_overlay_of_the_source(server: SourceServer, path: str) -> None:
    await stop_on_the_way(server, path)
    info = qed.qemu_info(path)
    assert NbdUri.parse(info["backing-filename"]).same_source(NbdUri.parse(server.uri))
    assert qed.qemu_check(path).status == 0


async def test_a_resumed_overlay_does_not_fetch_again_what_it_has(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    await stop_on_the_way(server, path, clusters=10)
    local = qed.qemu_check(path).allocated_clusters
    assert local >= 10
    disk.reads.clear()
    stream = await stream_all(server.uri, path)
    assert stream.progress.fetched == disk.size - local * CLUSTER
    assert is_sound(path, disk.data)


async def test_what_was_written_before_a_stop_is_there_after_resuming(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    stream = await DiskStream.start(server.uri, path, speed=1)
    await stream.overlay.write(39 * CLUSTER + 5, b"here")
    await stream.close()
    await stream_all(server.uri, path)
    disk.data[39 * CLUSTER + 5 : 39 * CLUSTER + 9] = b"here"
    assert is_sound(path, disk.data)


async def test_an_independent_overlay_is_served_without_its_source(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    await stream_all(server.uri, path)
    await server.stop()
    async with await DiskStream.start(server.uri, path, socket=f"{directory}/guest") as stream:
        assert stream.independent
        await stream.wait()
        assert stream.progress == (disk.size, disk.size, 0.0, 0, 0)
        guest = await RemoteExport.connect(stream.uris[0])
        assert b"".join(await guest.read(0, disk.size)) == disk.data
        await stream.overlay.flush()
        while not stream.snapshot().latency.requests:
            await guest.read(0, disk.size)
            await asyncio.sleep(0.01)
        assert stream.snapshot().remote_latency.requests == 0
        await guest.close()


async def test_the_guest_is_served_before_anything_is_fetched(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    disk.gate.clear()
    async with await DiskStream.start(server.uri, path, socket=f"{directory}/guest") as stream:
        assert os.stat(f"{directory}/guest").st_mode & 0o777 == 0o600
        guest = await RemoteExport.connect(stream.uris[0])
        reading = asyncio.create_task(guest.read(5 * CLUSTER, 100))
        await disk.asked.wait()
        disk.gate.set()
        assert b"".join(await reading) == disk.data[5 * CLUSTER : 5 * CLUSTER + 100]
        await stream.wait()
        assert b"".join(await guest.read(0, disk.size)) == disk.data
        await guest.close()
    assert not os.path.exists(f"{directory}/guest")
    assert is_sound(path, disk.data)


async def test_a_size_that_is_no_multiple_of_512_is_rounded_up_and_remembered(server: SourceServer, path: str) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(CLUSTER + 700))
    await server.start()
    await stop_on_the_way(server, path, clusters=1)
    assert qed.qemu_info(path)["virtual-size"] == CLUSTER + 1024
    extension = read_header(path)[1]
    assert extension is not None
    assert extension.origin_size == CLUSTER + 700
    await stream_all(server.uri, path)
    assert is_sound(path, server.disk.data + bytes(324))


async def test_an_empty_source_is_independent_at_once(server: SourceServer, path: str) -> None:
    await server.stop()
    server.disk = SourceDisk(b"")
    await server.start()
    stream = await stream_all(server.uri, path)
    assert stream.progress[:2] == (0, 0)
    assert qed.qemu_info(path)["virtual-size"] == 0
    assert "backing-filename" not in qed.qemu_info(path)


async def test_a_resume_with_a_socket_serves_what_is_local_and_waits_for_the_source(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    await stop_on_the_way(server, path, clusters=10)
    await server.stop()
    async with await DiskStream.start(server.uri, path, socket=f"{directory}/guest") as stream:
        guest = await RemoteExport.connect(stream.uris[0])
        assert b"".join(await guest.read(0, 100)) == disk.data[:100]
        waiting = asyncio.create_task(guest.read(39 * CLUSTER, 100))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await server.start()
        assert b"".join(await waiting) == disk.data[39 * CLUSTER : 39 * CLUSTER + 100]
        await stream.wait()
        await guest.close()
    assert is_sound(path, disk.data)


async def test_with_its_source_away_a_disk_can_be_closed(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    stream = await DiskStream.start(server.uri, path, socket=f"{directory}/guest")
    guest = await RemoteExport.connect(stream.uris[0])
    waiting = asyncio.create_task(guest.read(39 * CLUSTER, 100))
    await asyncio.sleep(0.01)
    await stream.close()
    with pytest.raises(OSError, match=r"."):
        await waiting
    await guest.close()
    assert qed.qemu_check(path).corruptions == 0


async def test_whoever_waits_hears_that_streaming_failed(
    server: SourceServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await DiskStream.start(server.uri, path)

    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(NbdstreamError, match="streaming failed") as error:
            await stream.wait()
    assert path in str(error.value)
    await stream.close()


async def test_a_disk_is_closed_once_however_often_that_is_asked(server: SourceServer, path: str) -> None:
    stream = await DiskStream.start(server.uri, path, speed=1)
    async with asyncio.timeout(10):
        await asyncio.gather(stream.close(), stream.close())
        await stream.close()
    assert qed.qemu_check(path).status == 0


async def test_a_disk_that_is_closed_while_it_is_used_leaves_nobody_waiting(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    disk.gate.clear()
    stream = await DiskStream.start(server.uri, path, socket=f"{directory}/guest", job=False)
    guest = await RemoteExport.connect(stream.uris[0])
    waiting = [asyncio.ensure_future(each) for each in (stream.wait(), stream.step(), guest.read(9 * CLUSTER, 512))]
    await disk.asked.wait()
    closing = asyncio.ensure_future(stream.close())
    await asyncio.sleep(0)
    disk.gate.set()
    async with asyncio.timeout(10):
        await closing
        waited, stepped, _ = await asyncio.gather(*waiting, return_exceptions=True)
    assert "the disk was closed" in str(waited)
    assert isinstance(stepped, JobError | StepResult)
    await guest.close()


async def test_a_closed_disk_says_so(server: SourceServer, path: str) -> None:
    stream = await DiskStream.start(server.uri, path, job=False)
    await stream.close()
    with pytest.raises(NbdstreamError, match="the disk was closed"):
        await stream.wait()
    with pytest.raises(JobError, match="the disk was closed"):
        await stream.step()
    with pytest.raises(JobError, match="the disk was closed"):
        stream.start_job()
    assert stream.progress.position == 0
    assert stream.snapshot().path == path


# What is refused.


async def refused(uri: str, path: str, error: type[NbdstreamError], match: str, *, socket: str | None = None) -> None:
    """Nothing is made, changed, or kept open."""
    existed = os.path.lexists(path)
    before = qed_bytes(path) if existed else b""
    others = set(threading.enumerate())  # of tests in which a side died, as far as one process can
    with pytest.raises(error, match=match) as raised:
        await DiskStream.start(uri, path, socket=socket)
    assert "\n" not in str(raised.value)
    assert os.path.lexists(path) == existed
    if existed:
        assert qed_bytes(path) == before
    async with asyncio.timeout(5):  # the thread of a source that was tried ends by and by
        while kept(path, others):
            await asyncio.sleep(0.001)


def kept(path: str, others: set[threading.Thread]) -> list[str]:
    """What is still there of an image and of a source: descriptors, threads that are none of the ``others``."""
    threads = set(threading.enumerate()) - others
    found = [thread.name for thread in threads if thread.name.startswith(("qed", "nbd-source"))]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in found if path in name or not name.startswith(("/", "pipe:", "socket:", "anon_inode:"))]


def qed_bytes(path: str) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read()


async def test_a_source_that_is_not_there_makes_no_overlay(directory: str, path: str) -> None:
    uri = f"nbd+unix:///?socket={directory}/nobody"
    await refused(uri, path, SourceError, "nobody")
    await refused(uri, path, SourceError, "nobody", socket=f"{directory}/guest")
    assert not os.path.exists(f"{directory}/guest")


async def test_without_a_socket_a_resume_needs_its_source(server: SourceServer, path: str) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    await refused(server.uri, path, SourceError, "connect")


@pytest.mark.parametrize("uri", ["nbd+unix:///", "http://host/disk", "/disk.raw", "nbd://host:port/"])
async def test_what_is_no_nbd_uri_is_refused(path: str, uri: str) -> None:
    await refused(uri, path, SourceError, ".")


@pytest.mark.parametrize("socket", [None, "guest"])
async def test_a_source_of_another_size_is_refused(
    server: SourceServer, path: str, directory: str, socket: str | None
) -> None:
    await stop_on_the_way(server, path)
    await server.stop()
    server.disk = SourceDisk(some_bytes(41 * CLUSTER))
    await server.start()
    await refused(server.uri, path, WrongSourceError, "another disk", socket=socket and f"{directory}/{socket}")


async def test_an_overlay_of_another_source_is_refused(server: SourceServer, path: str) -> None:
    create_file(path, 40 * CLUSTER, cluster_size=CLUSTER, table_size=4, backing_name="nbd://elsewhere/disk")
    await refused(server.uri, path, ImageError, "nbd://elsewhere/disk")


async def test_an_image_that_was_independent_of_another_source_is_refused(server: SourceServer, path: str) -> None:
    await stream_all(server.uri, path)
    await refused("nbd://elsewhere/disk", path, ImageError, "elsewhere")


async def test_an_image_that_never_was_an_overlay_is_refused(server: SourceServer, path: str) -> None:
    qed.create(path, 40 * CLUSTER)
    await refused(server.uri, path, ImageError, "remembers none")


async def test_a_file_that_is_no_qed_image_is_refused(server: SourceServer, path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(1 << 20))
    await refused(server.uri, path, ImageError, "not a QED image")


async def test_a_directory_and_a_dangling_link_are_refused(server: SourceServer, path: str, tmp_path: Path) -> None:
    await refused(server.uri, str(tmp_path), ImageError, "directory")
    os.symlink("nowhere", path)
    await refused(server.uri, path, ImageError, "No such file")


async def test_a_directory_that_does_not_exist_is_refused(server: SourceServer, tmp_path: Path) -> None:
    await refused(server.uri, str(tmp_path / "missing" / "overlay"), ImageError, "No such file")


async def test_an_overlay_that_somebody_has_open_is_refused(server: SourceServer, path: str) -> None:
    async with await DiskStream.start(server.uri, path, speed=1):
        with pytest.raises(ImageLockedError, match=path):
            await DiskStream.start(server.uri, path)


async def test_a_socket_that_cannot_be_had_makes_no_overlay(server: SourceServer, path: str, directory: str) -> None:
    await refused(server.uri, path, ListenError, ".", socket=server.path)
    await refused(server.uri, path, ListenError, ".", socket=f"{directory}/missing/guest")


async def test_a_full_disk_makes_no_overlay(server: SourceServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    await refused(server.uri, path, ImageError, "No space left")


# Making alone.


async def test_an_overlay_made_alone_is_one_that_can_be_streamed(
    server: SourceServer, disk: SourceDisk, path: str
) -> None:
    await create_overlay(server.uri, path, cluster_size=4096, table_size=16)
    info = qed.qemu_info(path)
    assert (info["virtual-size"], info["cluster-size"]) == (disk.size, 4096)
    assert disk.reads == []
    await stream_all(server.uri, path)
    assert is_sound(path, disk.data)


async def test_credentials_are_not_written_into_the_image(server: SourceServer, path: str) -> None:
    await stop_on_the_way(server, path)
    with open(path, "rb") as file:
        head = file.read(CLUSTER)
    assert b"socket=" in head
    assert os.path.isabs(NbdUri.parse(qed.qemu_info(path)["backing-filename"]).socket or "")


async def test_the_origin_is_compared_as_a_source_and_not_as_a_text(path: str) -> None:
    create_file(path, CLUSTER, cluster_size=CLUSTER, table_size=4, backing_name="nbd://host/disk")
    check_origin(path, "nbd://host/disk", NbdUri.parse("nbd://host:10809/disk"))
    with pytest.raises(ImageError, match="nbd://host/disk"):
        check_origin(path, "nbd://host/disk", NbdUri.parse("nbd://host/other"))


# A job, or step by step.


async def left_alone(server: SourceServer, path: str) -> DiskStream:
    return await DiskStream.start(server.uri, path, job=False)


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


# What there is to see.


async def test_a_snapshot_follows_a_disk_through_its_life(server: SourceServer, disk: SourceDisk, path: str) -> None:
    zero = range(10 * CLUSTER, 20 * CLUSTER)
    disk.data[zero.start : zero.stop] = bytes(len(zero))
    disk.zeroes.append(zero)
    events: list[Event] = []
    async with await left_alone(server, path) as stream:
        stream.listeners.append(events.append)
        assert stream.snapshot().state is DiskState.RUNNING
        assert stream.snapshot().amounts == (0, 0, 40 * CLUSTER, 0, 0)
        await stream.step(0, 15 * CLUSTER)
        assert stream.snapshot().amounts == (10 * CLUSTER, 10 * CLUSTER, 20 * CLUSTER, 0, 0)
        assert [part.remote for part in stream.map(4)] == [0, 0, 10 * CLUSTER, 10 * CLUSTER]
        assert stream.map(1000) == [*stream.map(40)]
        await stream.overlay.write(2 * CLUSTER, disk.data[2 * CLUSTER : 3 * CLUSTER])
        await stream.overlay.write(12 * CLUSTER, bytes(100))
        assert stream.snapshot().amounts == (11 * CLUSTER, 9 * CLUSTER, 20 * CLUSTER, 0, 2 * CLUSTER)
        await server.stop()
        waiting = asyncio.create_task(stream.overlay.read(30 * CLUSTER, 1))
        while stream.snapshot().state is DiskState.RUNNING or not stream.snapshot().waiting:
            await asyncio.sleep(0.001)
        degraded = stream.snapshot()
        assert degraded.state is DiskState.DEGRADED
        assert degraded.reason
        assert degraded.since
        assert degraded.amounts.in_flight == CLUSTER
        await server.start()
        await waiting
        assert stream.snapshot().state is DiskState.RUNNING
        assert [type(event) for event in events] == [SourceLost, SourceBack]
        await stream.step(0, disk.size)
        assert stream.snapshot().state is DiskState.INDEPENDENT
        assert stream.snapshot().amounts == (31 * CLUSTER, 9 * CLUSTER, 0, 0, 0)


async def test_a_job_is_told_that_its_source_is_lost(server: SourceServer, path: str) -> None:
    events: list[Event] = []
    async with await DiskStream.start(server.uri, path, speed=1) as stream:
        stream.listeners.append(events.append)
        await server.stop()
        while not any(isinstance(event, SourceLost) for event in events):
            await asyncio.sleep(0.001)
        failed = next(event for event in events if isinstance(event, OperationFailed))
        assert (failed.job, failed.operation, failed.action) == ("disk0", Operation.READ, ErrorAction.STOP)
        assert failed.reason


# The source that comes back, another one, and one that has moved.


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


async def test_a_disk_that_is_streamed_is_the_source_of_another_stream(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    """A guest moves on while its disk is still on its way: what the first overlay lacks comes through it."""
    further = f"{directory}/further.qed"
    async with await DiskStream.start(server.uri, path, socket=f"{directory}/first", speed=1) as first:
        await first.overlay.write(7 * CLUSTER, b"x" * CLUSTER)
        disk.data[7 * CLUSTER : 8 * CLUSTER] = b"x" * CLUSTER
        async with await DiskStream.start(first.uris[0], further) as second:
            await second.wait()
        assert first.snapshot().amounts.remote == 0  # what passed through is kept
    assert is_sound(further, disk.data)


async def test_a_job_yields_to_a_guest_that_is_slow_and_still_comes_to_its_end(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    disk.gate.clear()
    stream = await DiskStream.start(server.uri, path, socket=f"{directory}/guest", guest_latency=0.001)
    guest = await RemoteExport.connect(stream.uris[0])
    asyncio.get_running_loop().call_later(0.1, disk.gate.set)
    writing = [asyncio.create_task(stream.overlay.write(39 * CLUSTER, b"x" * CLUSTER)) for _ in range(2)]
    await asyncio.gather(*writing)
    disk.data[39 * CLUSTER :] = b"x" * CLUSTER
    stream._looked(Latency(1000, 0.01, 0.1))
    governor = stream._governor
    assert governor
    assert governor.rate == FLOOR
    async with asyncio.timeout(30):
        await stream.wait()
    assert b"".join(await guest.read(0, disk.size)) == disk.data
    await guest.close()
    await stream.close()


async def test_what_the_guest_waits_for_is_shown(
    server: SourceServer, disk: SourceDisk, path: str, directory: str
) -> None:
    async with await DiskStream.start(server.uri, path, socket=f"{directory}/guest", job=False) as stream:
        guest = await RemoteExport.connect(stream.uris[0])
        for _ in range(2):
            for cluster in range(20):
                await guest.read(cluster * CLUSTER, 512)
        while not stream.snapshot().remote_latency.requests:
            await asyncio.sleep(0.01)
        seen = stream.snapshot()
        assert 1 <= seen.remote_latency.requests <= 20  # some were read ahead
        assert seen.latency.requests >= 20
        assert 0 < seen.latency.p50 <= seen.latency.p99
        assert seen.read_rate > 0
        await guest.close()


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
