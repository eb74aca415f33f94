"""A disk for its whole life: made, resumed, independent; and what there is to see of it."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from nbdstream.block.qed.opening import create_file, read_header
from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import ImageError, JobError, NbdstreamError
from nbdstream.stream.disk import DiskStream, StepResult
from nbdstream.stream.events import ErrorAction, Event, Operation, OperationFailed, SourceBack, SourceLost
from nbdstream.stream.governor import FLOOR
from nbdstream.stream.preparation import check_origin, create_overlay
from nbdstream.stream.snapshot import DiskState, Latency
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
