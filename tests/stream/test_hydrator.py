"""The hydrator: it comes to its end, whatever gets in its way, within its limits."""

from __future__ import annotations

import asyncio
import errno
import math
import os
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block import overlay as overlay_module
from nbdstream.block.remote import commands
from nbdstream.stream import hydrator as hydrator_module
from nbdstream.stream.hydrator import Hydrator
from nbdstream.stream.line import Line
from nbdstream.stream.source import Source
from nbdstream.stream.throttle import Throttle
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrator_module, "_RETRY_SECONDS", 0.01)


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


async def hydrate(stream: Streamed, throttle: Throttle | None = None) -> None:
    """As the job does it."""
    await Hydrator(stream.hydration, throttle or Throttle()).run()


async def all_is_local(stream: Streamed) -> bool:
    server_reads = len(stream.disk.reads)
    content = await stream.read(0, stream.disk.size)
    return content == stream.disk.data and len(stream.disk.reads) == server_reads


async def test_in_the_end_everything_is_local_and_was_fetched_once(stream: Streamed, disk: SourceDisk) -> None:
    await hydrate(stream)
    assert stream.overlay.below.remote_count == 0
    assert await all_is_local(stream)
    assert stream.fetches.bytes_fetched == disk.size
    assert all(disk.times_read(cluster) == 1 for cluster in range(40))


async def test_zeroes_are_not_fetched(stream: Streamed, disk: SourceDisk) -> None:
    disk.data[10 * CLUSTER : 30 * CLUSTER] = bytes(20 * CLUSTER)
    disk.zeroes.append(range(10 * CLUSTER, 30 * CLUSTER))
    await hydrate(stream)
    assert stream.fetches.bytes_fetched == 20 * CLUSTER
    assert await all_is_local(stream)


async def test_what_is_local_already_is_not_fetched(stream: Streamed, disk: SourceDisk) -> None:
    for cluster in range(0, 40, 2):
        await stream.overlay.write(cluster * CLUSTER, disk.data[cluster * CLUSTER : (cluster + 1) * CLUSTER])
    await hydrate(stream)
    assert stream.fetches.bytes_fetched == 20 * CLUSTER
    assert await all_is_local(stream)


async def test_a_guest_that_writes_meanwhile_keeps_what_it_wrote(stream: Streamed, disk: SourceDisk) -> None:
    hydrating = asyncio.create_task(hydrate(stream))
    for cluster in range(39, -1, -3):
        await stream.overlay.write(cluster * CLUSTER, b"\x99" * CLUSTER)
        disk.data[cluster * CLUSTER : (cluster + 1) * CLUSTER] = b"\x99" * CLUSTER
    await hydrating
    assert await all_is_local(stream)


async def test_only_so_much_is_in_flight(server: SourceServer, tmp_path: Path) -> None:
    await server.stop()
    server.disk = disk = SourceDisk(some_bytes(1 << 20) * 40)
    await server.start()
    async with streamed(server, tmp_path / "large") as stream:
        disk.gate.clear()
        hydrating = asyncio.create_task(hydrate(stream))
        await disk.asked.wait()
        await asyncio.sleep(0.01)
        assert stream.fetches.bytes_in_flight == stream.fetches.line.bytes_to_fill == 2 << 20
        disk.gate.set()
        await hydrating
        assert await all_is_local(stream)


async def test_small_clusters_are_fetched_many_at_a_time(server: SourceServer, tmp_path: Path) -> None:
    async with streamed(server, tmp_path / "small", cluster_size=4096) as stream:
        await hydrate(stream)
        assert len(stream.disk.reads) <= stream.disk.size // (256 << 10)
        assert await all_is_local(stream)


async def test_large_clusters_are_fetched_one_at_a_time(server: SourceServer, tmp_path: Path) -> None:
    async with streamed(server, tmp_path / "large", cluster_size=1 << 20) as stream:
        await hydrate(stream)
        assert await all_is_local(stream)


async def test_a_rate_limit_holds_and_can_be_lifted_while_it_works(stream: Streamed, disk: SourceDisk) -> None:
    throttle = Throttle(1)  # a byte a second: after the first fetch nothing may go for days
    hydrating = asyncio.create_task(hydrate(stream, throttle))
    while stream.fetches.bytes_fetched == 0:
        await asyncio.sleep(0.001)
    first = stream.fetches.bytes_fetched
    await asyncio.sleep(0.05)
    assert stream.fetches.bytes_fetched == first < disk.size
    throttle.rate = None
    await stream.read(39 * CLUSTER, 1)  # something happens
    await hydrating
    assert await all_is_local(stream)


async def test_a_guest_is_not_limited_by_the_rate(stream: Streamed, disk: SourceDisk) -> None:
    hydrating = asyncio.create_task(hydrate(stream, Throttle(1)))
    while stream.fetches.bytes_fetched == 0:
        await asyncio.sleep(0.001)
    for cluster in range(40):
        assert await stream.read(cluster * CLUSTER, 8) == disk.data[cluster * CLUSTER : cluster * CLUSTER + 8]
    await hydrating


async def test_errors_of_the_source_are_tried_again(stream: Streamed, disk: SourceDisk) -> None:
    await stream.hydration.survey.run()
    disk.error = OSError(errno.EIO, "a bad sector")
    hydrating = asyncio.create_task(hydrate(stream))
    while len(disk.reads) < 20:
        await asyncio.sleep(0.001)
    assert stream.overlay.below.remote_count == 40
    disk.error = None
    await hydrating
    assert await all_is_local(stream)


async def test_a_source_that_goes_and_comes_back_is_only_a_pause(
    stream: Streamed, server: SourceServer, disk: SourceDisk
) -> None:
    disk.gate.clear()
    hydrating = asyncio.create_task(hydrate(stream))
    await disk.asked.wait()
    await server.stop()
    disk.gate.set()
    await server.start()
    await hydrating
    assert await all_is_local(stream)
    assert stream.fetches.bytes_fetched == disk.size


async def test_a_full_disk_is_a_pause(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def full(*_: Any) -> None:
        attempts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "pwrite_all", full)
        hydrating = asyncio.create_task(hydrate(stream))
        while len(attempts) < 10:
            await asyncio.sleep(0.001)
        assert stream.overlay.below.remote_count == 40
    await hydrating
    assert await all_is_local(stream)


async def test_no_room_for_a_table_is_a_pause_too(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hydrator_module, "_EPOCH_BYTES", 4 * CLUSTER)
    monkeypatch.setattr(hydrator_module, "_MOST_UNDURABLE", 8 * CLUSTER)
    monkeypatch.setattr(Source, "memory_for_bulk", 4 * CLUSTER)
    monkeypatch.setattr(hydrator_module, "_REQUEST_BYTES", CLUSTER)
    monkeypatch.setattr(hydrator_module, "_REQUEST_BYTES_BESIDE_GUEST", CLUSTER)
    async with streamed(server, tmp_path / "overlay") as stream:
        table_bytes = 4 * CLUSTER
        pwrite = os.pwrite
        refused: list[int] = []

        def full(fd: int, data: bytes, offset: int) -> int:
            if len(data) == table_bytes and len(refused) < 3:
                refused.append(offset)
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        await hydrate(stream)
        await stream.image.linked()
        assert len(refused) == 3
        assert await all_is_local(stream)


async def test_a_failed_image_ends_it(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.image._epochs, "failed", OSError(errno.EIO, "no barrier"))
    with pytest.raises(ExceptionGroup) as errors:
        await hydrate(stream)
    assert errors.group_contains(OSError, match="no barrier")
    monkeypatch.undo()


async def asked_for(stream: Streamed, guest: Coroutine[Any, Any, Any], throttle: Throttle) -> int:
    """Return how many clusters are asked for when the guest wants something of cluster 34, beside a job."""
    stream.disk.gate.clear()
    hydrating = asyncio.create_task(hydrate(stream, throttle))
    await stream.disk.asked.wait()  # for the first ones: the line is not known yet
    wanting = asyncio.create_task(guest)
    while not (found := read_at(stream.disk, 34)):
        await asyncio.sleep(0.001)
    stream.disk.gate.set()
    throttle.rate = None
    await asyncio.gather(hydrating, wanting)
    return found[0]


def read_at(disk: SourceDisk, cluster: int) -> list[int]:
    """Return how many clusters were asked for by the requests that begin with this one."""
    return [length // CLUSTER for offset, length in disk.reads if offset == cluster * CLUSTER]


@pytest.fixture
def fast_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "bytes_within", lambda _line, _seconds: 1 << 30)


@pytest.mark.usefixtures("fast_line")
async def test_a_guests_read_brings_along_what_follows(stream: Streamed) -> None:
    assert await asked_for(stream, stream.read(34 * CLUSTER + 5, 10), Throttle()) == 3


async def test_on_a_slow_line_nothing_comes_along(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "bytes_within", lambda _line, _seconds: CLUSTER - 1)
    assert await asked_for(stream, stream.read(34 * CLUSTER + 5, 10), Throttle()) == 1


@pytest.mark.usefixtures("fast_line")
async def test_with_a_job_that_is_limited_nothing_comes_along(stream: Streamed) -> None:
    assert await asked_for(stream, stream.read(34 * CLUSTER + 5, 10), Throttle(CLUSTER)) == 1


@pytest.mark.usefixtures("fast_line")
async def test_with_a_partial_write_nothing_comes_along(stream: Streamed) -> None:
    assert await asked_for(stream, stream.overlay.write(34 * CLUSTER + 5, b"new"), Throttle()) == 1
    stream.disk.data[34 * CLUSTER + 5 : 34 * CLUSTER + 8] = b"new"
    assert await all_is_local(stream)


@pytest.mark.usefixtures("fast_line")
async def test_while_the_job_is_paused_nothing_comes_along(stream: Streamed, disk: SourceDisk) -> None:
    hydrator = Hydrator(stream.hydration, Throttle())
    hydrator.pause()
    hydrating = asyncio.create_task(hydrator.run())
    await asyncio.sleep(0)
    await stream.read(34 * CLUSTER, 10)
    assert disk.reads == [(34 * CLUSTER, CLUSTER)]
    hydrator.resume()
    await hydrating


@pytest.mark.usefixtures("fast_line")
async def test_after_the_job_nothing_comes_along(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    hydrating = asyncio.create_task(hydrate(stream))
    await disk.asked.wait()
    hydrating.cancel()
    await asyncio.wait([hydrating])
    disk.gate.set()
    await stream.read(34 * CLUSTER, 10)
    assert read_at(disk, 34) == [1]


async def most_undurable(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hydrate by single clusters, four at a time; return how many waited for a barrier at most."""
    monkeypatch.setattr(hydrator_module, "_REQUEST_BYTES", CLUSTER)
    monkeypatch.setattr(hydrator_module, "_REQUEST_BYTES_BESIDE_GUEST", CLUSTER)
    monkeypatch.setattr(Source, "memory_for_bulk", 4 * CLUSTER)
    most = 0
    finished = stream.overlay.adopt

    def adopt(*args: Any) -> None:
        nonlocal most
        finished(*args)
        most = max(most, stream.image.backlog)

    monkeypatch.setattr(stream.overlay, "adopt", adopt)
    await hydrate(stream)
    assert await all_is_local(stream)
    return most


async def test_an_undurable_backlog_is_linked_on_the_way(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrator_module, "_EPOCH_BYTES", 4 * CLUSTER)
    monkeypatch.setattr(hydrator_module, "_MOST_UNDURABLE", 8 * CLUSTER)
    # What was in flight then, and what had been asked for before that was seen.
    assert await most_undurable(stream, monkeypatch) <= 8 + 2 * 4


async def test_less_may_be_undurable_while_the_guest_flushes(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrator_module, "_MOST_UNDURABLE_BESIDE_FLUSHES", 4 * CLUSTER)
    monkeypatch.setattr(overlay_module, "_FLUSHES_AGAIN_SECONDS", math.inf)
    await stream.overlay.flush()
    assert await most_undurable(stream, monkeypatch) <= 4 + 2 * 4


async def test_without_flushes_nobody_waits_for_a_barrier(stream: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrator_module, "_MOST_UNDURABLE_BESIDE_FLUSHES", 4 * CLUSTER)
    assert await most_undurable(stream, monkeypatch) == 40
