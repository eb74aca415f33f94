"""The survey: only what the source promises to be zero is not fetched, to the cluster."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.stream import allocation
from nbdstream.stream.allocation import Survey
from nbdstream.stream.source import Source
from nbdstream.uri import NbdUri
from tests.stream.peers import CLUSTER, SourceDisk, SourceServer, Streamed, some_bytes, streamed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def stream(server: SourceServer, tmp_path: Path) -> AsyncIterator[Streamed]:
    async with streamed(server, tmp_path / "overlay") as stream:
        yield stream


async def surveyed(stream: Streamed) -> list[int]:
    """Survey, and return the clusters that need not be fetched."""
    survey = Survey(stream.overlay, stream.source)
    await survey.run()
    assert survey.done
    assert survey.position == stream.overlay.size
    remote = stream.overlay.below.remote
    assert remote is not None
    assert stream.overlay.below.remote_count == remote.count()
    return list(remote.search(0))


def sparse(disk: SourceDisk, *runs: range) -> None:
    for run in runs:
        disk.data[run.start : run.stop] = bytes(len(run))
    disk.zeroes += runs


async def test_without_zeroes_everything_is_fetched(stream: Streamed) -> None:
    assert await surveyed(stream) == []


async def test_whole_clusters_of_zeroes_are_not_fetched(stream: Streamed, disk: SourceDisk) -> None:
    sparse(disk, range(3 * CLUSTER, 6 * CLUSTER), range(39 * CLUSTER, 40 * CLUSTER))
    assert await surveyed(stream) == [3, 4, 5, 39]


async def test_clusters_that_are_zero_in_part_are_fetched(stream: Streamed, disk: SourceDisk) -> None:
    sparse(disk, range(3 * CLUSTER + 512, 6 * CLUSTER - 512), range(8 * CLUSTER - 512, 9 * CLUSTER + 512))
    assert await surveyed(stream) == [4, 8]


async def test_a_run_of_zeroes_that_comes_in_pieces_is_one(stream: Streamed, disk: SourceDisk) -> None:
    """Of pieces shorter than a cluster each, and cut nowhere near its edges."""
    sparse(disk, range(2 * CLUSTER, 30 * CLUSTER))
    disk.longest_extent = CLUSTER // 3
    assert await surveyed(stream) == list(range(2, 30))


async def test_a_hole_that_promises_nothing_is_fetched(stream: Streamed, disk: SourceDisk) -> None:
    disk.holes.append(range(40 * CLUSTER))
    assert await surveyed(stream) == []


async def test_what_is_not_zero_is_counted_in_bytes(stream: Streamed, disk: SourceDisk) -> None:
    sparse(disk, range(512, 40 * CLUSTER - 1024))
    survey = Survey(stream.overlay, stream.source)
    await survey.run()
    assert survey.data_bytes == 512 + 1024


async def test_what_is_known_to_be_zero_is_read_without_the_source(stream: Streamed, disk: SourceDisk) -> None:
    sparse(disk, range(3 * CLUSTER, 6 * CLUSTER))
    await surveyed(stream)
    assert await stream.read(3 * CLUSTER, 3 * CLUSTER) == bytes(3 * CLUSTER)
    assert disk.reads == []


async def test_what_the_guest_wrote_stays_local(stream: Streamed, disk: SourceDisk) -> None:
    await stream.overlay.write(4 * CLUSTER, b"\x44" * CLUSTER)
    sparse(disk, range(3 * CLUSTER, 6 * CLUSTER))
    assert await surveyed(stream) == [3, 4, 5]
    assert await stream.read(4 * CLUSTER, 4) == b"\x44" * 4


async def test_what_lies_behind_the_end_of_the_source_counts_as_zero(server: SourceServer, tmp_path: Path) -> None:
    await server.stop()
    server.disk = disk = SourceDisk(some_bytes(2 * CLUSTER + 1000))
    await server.start()
    sparse(disk, range(CLUSTER + 10, 2 * CLUSTER + 1000))
    async with streamed(server, tmp_path / "partial") as stream:
        assert await surveyed(stream) == [2]


async def test_progress_is_told_on_the_way_and_at_the_end(stream: Streamed, disk: SourceDisk) -> None:
    disk.longest_extent = 10 * CLUSTER
    survey = Survey(stream.overlay, stream.source)
    seen: list[tuple[int, bool]] = []
    survey.on_progress = lambda: seen.append((survey.position, survey.done))
    await survey.run()
    assert [position for position, _ in seen] == sorted(position for position, _ in seen)
    assert seen[-1] == (40 * CLUSTER, True)


async def test_a_source_that_answers_with_an_error_is_asked_again(
    stream: Streamed, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_RETRY_SECONDS", 0.01)
    disk.error = OSError(errno.EIO, "a bad sector")
    survey = Survey(stream.overlay, stream.source)
    running = asyncio.ensure_future(survey.run())
    await asyncio.sleep(0.05)
    assert not running.done()
    disk.error = None
    await running
    assert survey.done


async def test_a_source_that_is_closed_ends_the_survey(stream: Streamed) -> None:
    await stream.source.close()
    with pytest.raises(OSError, match="closed") as error:
        await Survey(stream.overlay, stream.source).run()
    assert error.value.errno == errno.ECANCELED


@pytest.mark.parametrize("option", ["--no-sr", "--filter=noextents"])
async def test_a_source_that_tells_nothing_of_its_allocation_is_fetched_whole(
    directory: str, tmp_path: Path, option: str
) -> None:
    path = f"{directory}/nbdkit"
    nbdkit = subprocess.Popen(["nbdkit", "-f", option, "-U", path, "memory", "1M"])
    source = Source(NbdUri.parse(f"nbd+unix:///?socket={path}"))
    source.expect(1 << 20)
    source.connect_later("not started yet")
    try:
        await source.present()
        assert source.export.info.has_allocation == (option != "--no-sr")
        create_file(
            str(tmp_path / "o"), 1 << 20, cluster_size=CLUSTER, table_size=4, backing_name=str(source.uri.canonical())
        )
        image = await QedImage.open(str(tmp_path / "o"), writable=True)
        stream = Streamed(Overlay(image, source), source, SourceDisk(b""))
        assert await surveyed(stream) == []
        await image.close()
    finally:
        await source.close()
        nbdkit.kill()
        nbdkit.wait()
