"""Fetches: each cluster once, whoever asks; never over what the guest wrote; and what cannot be kept passes through."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.tables import UNALLOCATED, ZERO
from nbdstream.block.remote import commands
from nbdstream.block.worker import pwrite_all
from nbdstream.stream.fetch import Fetch
from nbdstream.stream.source import Request
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


class Storing:
    """What was fetched is written to the file as soon as that is allowed."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.allowed = threading.Event()

    def store(self, fd: int, data: bytes, offset: int) -> None:
        self.begun.set()
        self.allowed.wait(10)
        pwrite_all(fd, data, offset)


@pytest.fixture
def storing(monkeypatch: pytest.MonkeyPatch) -> Storing:
    storing = Storing()
    monkeypatch.setattr(commands, "pwrite_all", storing.store)
    return storing


def cluster_of(disk: SourceDisk, cluster: int) -> bytes:
    return bytes(disk.data[cluster * CLUSTER : (cluster + 1) * CLUSTER])


async def asked(disk: SourceDisk, times: int = 1) -> None:
    """Wait until the source was asked so many times."""
    while len(disk.reads) < times:
        await asyncio.sleep(0.001)


async def finish(stream: Streamed, first: int, most: int) -> OSError | None:
    """Fetch as the hydrator does, and wait for the end."""
    ended: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()

    def on_finished(finished: Fetch, error: OSError | None) -> None:
        if finished.first == first:
            ended.set_result(error)

    stream.fetches.on_finished = on_finished
    stream.fetches.begin(first, most)
    return await ended


async def test_what_a_guest_reads_is_kept(stream: Streamed, disk: SourceDisk) -> None:
    assert await stream.read(CLUSTER + 5, 100) == disk.data[CLUSTER + 5 : CLUSTER + 105]
    await stream.kept()
    assert not stream.is_remote(1)
    assert await stream.read(CLUSTER, CLUSTER) == cluster_of(disk, 1)
    assert disk.reads == [(CLUSTER, CLUSTER)]
    assert stream.fetches.bytes_fetched == CLUSTER


async def test_nobody_waits_until_what_was_fetched_is_in_the_file(
    stream: Streamed, disk: SourceDisk, storing: Storing
) -> None:
    assert await stream.read(CLUSTER + 5, 100) == disk.data[CLUSTER + 5 : CLUSTER + 105]
    assert stream.is_remote(1)
    assert await stream.read(CLUSTER, 5) == disk.data[CLUSTER : CLUSTER + 5]
    await stream.overlay.write(CLUSTER + 10, b"new")
    assert not stream.is_remote(1)
    storing.allowed.set()
    await stream.kept()
    expected = bytearray(cluster_of(disk, 1))
    expected[10:13] = b"new"
    assert await stream.read(CLUSTER, CLUSTER) == expected
    assert disk.reads == [(CLUSTER, CLUSTER)]


async def test_nobody_waits_for_what_is_stored_before_it(
    stream: Streamed, disk: SourceDisk, storing: Storing
) -> None:
    stream.fetches.begin(0, 2)
    await asyncio.to_thread(storing.begun.wait, 10)
    stream.fetches.begin(2, 2)
    await asked(disk, 2)
    for cluster in range(4):  # two that are being stored, two that wait for that or are still on their way
        assert await stream.read(cluster * CLUSTER + 5, 100) == cluster_of(disk, cluster)[5:105]
    assert await stream.read(4 * CLUSTER, CLUSTER) == cluster_of(disk, 4)
    assert all(stream.is_remote(cluster) for cluster in range(5))
    storing.allowed.set()
    await stream.kept()
    assert [await stream.read(cluster * CLUSTER, CLUSTER) for cluster in range(5)] == [
        cluster_of(disk, cluster) for cluster in range(5)
    ]
    assert not any(stream.is_remote(cluster) for cluster in range(5))


async def test_a_read_of_several_clusters_asks_for_all_at_once_and_waits_for_none_to_be_stored(
    stream: Streamed, disk: SourceDisk, storing: Storing
) -> None:
    await stream.overlay.write(2 * CLUSTER, b"local".ljust(CLUSTER))
    disk.gate.clear()
    reader = asyncio.create_task(stream.read(CLUSTER + 5, 3 * CLUSTER))
    await asked(disk, 2)
    disk.gate.set()
    expected = cluster_of(disk, 1)[5:] + b"local".ljust(CLUSTER) + cluster_of(disk, 3) + cluster_of(disk, 4)[:5]
    assert await reader == expected
    assert sorted(disk.reads) == [(CLUSTER, CLUSTER), (3 * CLUSTER, 2 * CLUSTER)]
    assert stream.is_remote(1)
    storing.allowed.set()
    await stream.kept()


async def test_what_was_read_stays_while_other_data_arrives(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    stream.fetches.begin(0, 2)
    reader = asyncio.create_task(stream.overlay.read(CLUSTER, CLUSTER))
    await asked(disk)
    disk.gate.set()
    [data] = await reader
    await stream.kept()
    for first in range(2, 10, 2):
        await finish(stream, first, 2)
    assert data == cluster_of(disk, 1)


async def test_what_was_fetched_leaves_nothing_for_the_garbage_collector(stream: Streamed) -> None:
    gc.collect()
    gc.disable()
    try:
        await stream.read(CLUSTER + 5, 100)
        await stream.overlay.write(2 * CLUSTER + 10, b"new")
        await stream.kept()
        assert await finish(stream, 14, 2) is None
        async with asyncio.timeout(5):  # the thread that stored the last one lets go of it after it has said so
            while any(isinstance(each, (Fetch, Request, commands.Copy)) for each in gc.get_objects()):
                await asyncio.sleep(0.001)
    finally:
        gc.enable()


async def test_readers_of_one_cluster_share_a_fetch(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    readers = [asyncio.create_task(stream.read(3 * CLUSTER + n, 10)) for n in range(10)]
    await asked(disk)
    readers += [asyncio.create_task(stream.read(3 * CLUSTER + n, 10)) for n in range(10, 20)]
    await asyncio.sleep(0.01)
    disk.gate.set()
    assert await asyncio.gather(*readers) == [disk.data[3 * CLUSTER + n : 3 * CLUSTER + n + 10] for n in range(20)]
    assert disk.times_read(3) == 1


async def test_a_reader_joins_what_is_fetched_in_the_background(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    stream.fetches.begin(0, 4)
    reader = asyncio.create_task(stream.read(2 * CLUSTER, CLUSTER))
    await asked(disk)
    disk.gate.set()
    assert await reader == cluster_of(disk, 2)
    assert disk.times_read(2) == 1


async def test_a_read_of_local_and_remote_clusters_fetches_the_remote_ones_alone(
    stream: Streamed, disk: SourceDisk
) -> None:
    await finish(stream, 2, 2)
    disk.reads.clear()
    assert await stream.read(0, 6 * CLUSTER) == disk.data[: 6 * CLUSTER]
    assert sorted(disk.reads) == [(0, 2 * CLUSTER), (4 * CLUSTER, 2 * CLUSTER)]


async def test_a_fetch_ends_in_front_of_what_is_local_or_in_flight_and_after_a_megabyte(
    stream: Streamed, disk: SourceDisk
) -> None:
    await finish(stream, 5, 1)
    disk.gate.clear()
    assert stream.fetches.begin(8, 2).behind == 10
    assert stream.fetches.begin(2, 100).behind == 5
    assert stream.fetches.begin(6, 100).behind == 8
    assert stream.fetches.begin(10, 100).behind == 26
    assert stream.fetches.is_in_flight(25)
    assert not stream.fetches.is_in_flight(26)
    assert stream.fetches.bytes_in_flight == 23 * CLUSTER


async def test_what_the_guest_wrote_during_a_fetch_wins(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    reader = asyncio.create_task(stream.read(0, 10))
    await asked(disk)
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    disk.gate.set()
    await reader
    assert await stream.read(0, CLUSTER) == b"\x99" * CLUSTER
    await stream.kept()
    await stream.image.settle()
    assert stream.image.end - sum(length for _, length in stream.image.free_runs) == (1 + 4 + 4 + 1) * CLUSTER


async def test_who_waits_for_a_fetch_reads_what_was_written_meanwhile(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    reading = asyncio.create_task(stream.read(0, 10))
    await disk.asked.wait()
    await stream.overlay.write(0, b"\x99" * CLUSTER)
    disk.gate.set()
    assert await reading == b"\x99" * 10


async def test_a_discard_during_a_fetch_wins(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    reader = asyncio.create_task(stream.read(0, 10))
    await asked(disk)
    await stream.overlay.discard(0, CLUSTER)
    disk.gate.set()
    await reader
    assert await stream.read(0, CLUSTER) == bytes(CLUSTER)


async def test_a_write_that_begins_before_and_ends_after_a_fetch_wins(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    reader = asyncio.create_task(stream.read(0, 10))
    await asked(disk)
    disk.gate.set()
    writes = [asyncio.create_task(stream.overlay.write(0, bytes([n]) * CLUSTER)) for n in (1, 2, 3)]
    await asyncio.gather(reader, *writes)
    assert await stream.read(0, CLUSTER) == b"\x03" * CLUSTER


async def test_a_partial_write_keeps_what_the_source_has_around_it(stream: Streamed, disk: SourceDisk) -> None:
    disk.gate.clear()
    writes = [asyncio.create_task(stream.overlay.write(CLUSTER + 100 * n, b"new")) for n in range(5)]
    await asked(disk)
    disk.gate.set()
    await asyncio.gather(*writes)
    expected = bytearray(cluster_of(disk, 1))
    for n in range(5):
        expected[100 * n : 100 * n + 3] = b"new"
    assert await stream.read(CLUSTER, CLUSTER) == expected
    assert disk.times_read(1) == 1


async def test_zeroes_that_are_fetched_become_zero_clusters(stream: Streamed, disk: SourceDisk) -> None:
    disk.data[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    assert await finish(stream, 0, 4) is None
    assert await stream.image.entry(0) > ZERO
    assert [await stream.image.entry(cluster) for cluster in (1, 2)] == [ZERO, ZERO]
    assert await stream.image.entry(3) > ZERO
    assert await stream.read(0, 4 * CLUSTER) == disk.data[: 4 * CLUSTER]
    assert stream.image.free_runs == [(await stream.image.entry(0) + CLUSTER, 2 * CLUSTER)]


async def test_a_last_cluster_that_the_source_does_not_fill_is_whole_in_the_file(
    server: SourceServer, tmp_path: Path
) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(2 * CLUSTER + 1000))
    await server.start()
    path = tmp_path / "partial"
    async with streamed(server, path) as stream:
        assert await stream.read(2 * CLUSTER, 1024) == server.disk.data[2 * CLUSTER :] + bytes(24)
        await stream.image.linked()
        assert path.stat().st_size % CLUSTER == 0
        assert await stream.read(2 * CLUSTER, 1024) == server.disk.data[2 * CLUSTER :] + bytes(24)
    assert qed.qemu_check(str(path)).status == 0


async def test_a_last_cluster_is_told_of_when_the_image_has_failed(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.stop()
    server.disk = SourceDisk(some_bytes(CLUSTER + 1000))
    await server.start()
    async with streamed(server, tmp_path / "partial") as stream:
        monkeypatch.setattr(stream.image._epochs, "failed", OSError(errno.EIO, "no barrier"))
        async with asyncio.timeout(5):
            with pytest.raises(OSError, match=r"."):
                await stream.fetches.keep(1, 2)
        monkeypatch.undo()


async def test_an_error_of_the_source_is_the_readers_and_leaves_the_cluster_remote(
    stream: Streamed, disk: SourceDisk
) -> None:
    end = stream.image.end
    disk.error = OSError(errno.EIO, "a bad sector")
    for request in (stream.read(0, 10), stream.overlay.write(0, b"new")):
        with pytest.raises(OSError, match=r".") as error:
            await request
        assert error.value.errno == errno.EIO
    assert stream.is_remote(0)
    assert await stream.image.entry(0) == UNALLOCATED
    await stream.image.settle()
    assert (stream.image.end, stream.image.free_runs) == (end, [])
    disk.error = None
    assert await stream.read(0, 10) == disk.data[:10]


async def test_on_a_full_disk_reads_pass_through_and_are_not_kept(
    stream: Streamed, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "pwrite_all", full)
        assert await stream.read(CLUSTER, 100) == disk.data[CLUSTER : CLUSTER + 100]
        await stream.kept()
        assert stream.is_remote(1)
        assert await finish(stream, 5, 1) is not None
    assert await stream.read(CLUSTER, 100) == disk.data[CLUSTER : CLUSTER + 100]
    await stream.kept()
    assert not stream.is_remote(1)


async def test_while_the_source_is_away_what_is_local_is_read_and_written_and_the_rest_waits(
    stream: Streamed, server: SourceServer, disk: SourceDisk
) -> None:
    await stream.read(0, 10)
    await stream.kept()
    await server.stop()
    while stream.source.connected:
        await asyncio.sleep(0.001)
    remote = asyncio.create_task(stream.read(CLUSTER, 10))
    partial = asyncio.create_task(stream.overlay.write(2 * CLUSTER + 10, b"new"))
    await stream.overlay.write(3 * CLUSTER, b"\x33" * CLUSTER)
    await stream.overlay.write(5, b"here")
    await stream.overlay.flush()
    assert await stream.read(5, 4) == b"here"
    assert await stream.read(3 * CLUSTER, 4) == b"\x33" * 4
    assert not remote.done()
    assert not partial.done()
    await server.start()
    assert await remote == disk.data[CLUSTER : CLUSTER + 10]
    await partial
    assert await stream.read(2 * CLUSTER + 9, 5) == disk.data[2 * CLUSTER + 9 : 2 * CLUSTER + 10] + b"new" + bytes(
        disk.data[2 * CLUSTER + 13 : 2 * CLUSTER + 14]
    )


async def test_a_cluster_found_to_be_zero_while_it_is_fetched_is_not_stored(stream: Streamed, disk: SourceDisk) -> None:
    disk.data[:CLUSTER] = bytes(CLUSTER)
    disk.gate.clear()
    reader = asyncio.create_task(stream.read(0, 10))
    await asked(disk)
    stream.overlay.reads_zero(0, 1)
    disk.gate.set()
    assert await reader == bytes(10)
    assert await stream.image.entry(0) == UNALLOCATED


# Read ahead.


async def in_sequence(stream: Streamed, clusters: range, length: int = CLUSTER) -> None:
    """Read as a guest that goes through its disk."""
    for cluster in clusters:
        assert await stream.read(cluster * CLUSTER, length) == cluster_of(stream.disk, cluster)[:length]


async def test_a_sequential_reader_finds_what_comes_next(stream: Streamed, disk: SourceDisk) -> None:
    await in_sequence(stream, range(2))
    while stream.fetches.bytes_in_flight:
        await asyncio.sleep(0.001)
    assert not stream.is_remote(5)
    await in_sequence(stream, range(2, 40))
    assert all(disk.times_read(cluster) == 1 for cluster in range(40))
    assert len(disk.reads) < 20


async def test_what_comes_along_is_shared_by_those_who_wait(stream: Streamed, disk: SourceDisk) -> None:
    stream.fetches.along = lambda: 1 << 30
    disk.gate.clear()
    readers = []
    for number, cluster in enumerate((24, 12, 5, 0)):
        readers.append(asyncio.create_task(stream.read(cluster * CLUSTER, 10)))
        await asked(disk, number + 1)
    disk.gate.set()
    await asyncio.gather(*readers)
    assert [length // CLUSTER for _, length in disk.reads] == [16, 9, 6, 5]


async def test_a_random_reader_is_left_alone(stream: Streamed, disk: SourceDisk) -> None:
    for cluster in (30, 3, 17, 9, 38):
        await stream.read(cluster * CLUSTER, 512)
    assert len(disk.reads) == 5


async def test_what_is_read_ahead_holds_up_nobody(stream: Streamed, disk: SourceDisk) -> None:
    """The reader gets what it asked for while what comes behind is still on its way."""
    await stream.read(0, CLUSTER)
    disk.gated = range(2 * CLUSTER, disk.size)
    disk.gate.clear()
    await stream.read(CLUSTER, CLUSTER)
    assert stream.fetches.bytes_in_flight > 0
    assert stream.fetches.waiting == 0
    joined = asyncio.create_task(stream.read(3 * CLUSTER, CLUSTER))
    await asyncio.sleep(0.01)
    assert not joined.done()
    disk.gate.set()
    assert await joined == cluster_of(disk, 3)
    assert disk.times_read(3) == 1


async def test_nothing_is_read_ahead_of_a_source_that_is_away(
    stream: Streamed, server: SourceServer, disk: SourceDisk
) -> None:
    await stream.fetch(0, 1)
    await server.stop()
    while stream.source.connected:
        await asyncio.sleep(0.001)
    reading = asyncio.create_task(stream.read(CLUSTER, CLUSTER))
    await asyncio.sleep(0.01)
    assert stream.fetches.bytes_in_flight == CLUSTER
    await server.start()
    assert await reading == cluster_of(disk, 1)
