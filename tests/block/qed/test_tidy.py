"""Tidying up: no cluster of the file is left unused, whatever happened before and happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.block.qed.tidy import tidy
from tests.support import qed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_records")

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""


class Disk:
    """An overlay over nothing, and what it must hold."""

    def __init__(self, path: str, overlay: Overlay) -> None:
        self.path = path
        self.overlay = overlay
        self.model = bytearray(overlay.size)

    @classmethod
    async def make(cls, path: Path, clusters: int) -> Disk:
        create_file(str(path), clusters * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name=None)
        return cls(str(path), Overlay(await QedImage.open(str(path), writable=True)))

    @property
    def image(self) -> QedImage:
        return self.overlay.image

    async def write(self, cluster: int, data: bytes) -> None:
        await self.overlay.write(cluster * CLUSTER, data)
        self.model[cluster * CLUSTER : cluster * CLUSTER + len(data)] = data

    async def fill(self, first: int, behind: int) -> None:
        for cluster in range(first, behind):
            await self.write(cluster, bytes([cluster % 255 + 1]) * CLUSTER)

    async def discard(self, first: int, behind: int) -> None:
        await self.overlay.discard(first * CLUSTER, (behind - first) * CLUSTER)
        self.model[first * CLUSTER : behind * CLUSTER] = bytes((behind - first) * CLUSTER)

    async def lose_a_race(self, cluster: int) -> None:
        """Allocate a place for a cluster, fill it, and then do not need it."""
        place, _ = self.image.allocate(cluster, 1)
        await self.image.write(place, [b"\xee" * CLUSTER])
        await self.write(cluster, b"\x77" * CLUSTER)
        self.image.release(place, 1)

    async def tidy(self) -> None:
        await tidy(self.image, self.overlay)

    def found(self) -> qed.Check:
        """What qemu-img finds in a copy: it would not open a file that we own."""
        shutil.copyfile(self.path, copy := f"{self.path}-copy")
        return qed.qemu_check(copy)

    async def close(self) -> None:
        await self.overlay.close()
        assert qed.content(self.path) == self.model
        assert self.found().status == 0


async def test_a_file_without_free_clusters_stays_as_it_is(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 10)
    await disk.image.settle()
    size = os.path.getsize(disk.path)
    await disk.tidy()
    assert os.path.getsize(disk.path) == size
    await disk.close()


async def test_after_a_lost_race_nothing_is_left_over(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 5)
    await disk.lose_a_race(5)
    await disk.fill(6, 10)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_the_tail_moves_into_what_was_discarded_and_the_file_becomes_shorter(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 20)
    size = os.path.getsize(disk.path)
    await disk.discard(3, 10)
    await disk.tidy()
    assert disk.found().status == 0
    assert os.path.getsize(disk.path) == size - 7 * CLUSTER
    await disk.close()


async def test_what_was_moved_is_read_from_where_it_is_now(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 20)
    await disk.discard(0, 5)
    await disk.tidy()
    for cluster in range(20):
        buffers = await disk.overlay.read(cluster * CLUSTER, CLUSTER)
        assert b"".join(map(bytes, buffers)) == disk.model[cluster * CLUSTER : (cluster + 1) * CLUSTER]
    await disk.write(19, b"\x99" * CLUSTER)
    await disk.close()


async def test_with_a_table_at_the_end_of_the_file_what_is_free_becomes_data(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", SPAN + 100)
    await disk.fill(0, 10)
    await disk.fill(SPAN, SPAN + 1)
    await disk.discard(SPAN, SPAN + 1)
    await disk.discard(2, 5)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_a_fully_allocated_disk_has_nothing_to_fill_and_leaks_nothing(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 50)
    await disk.fill(0, 50)
    await disk.discard(10, 20)
    for cluster in range(10, 20):
        await disk.lose_a_race(cluster)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_a_fully_allocated_disk_of_two_tables_leaks_nothing(tmp_path: Path) -> None:
    """The table of the second half lies behind all data of the first."""
    disk = await Disk.make(tmp_path / "image", 2 * SPAN)
    await disk.overlay.write(0, b"\x01" * SPAN * CLUSTER)
    disk.model[: SPAN * CLUSTER] = b"\x01" * SPAN * CLUSTER
    place, _ = disk.image.allocate(5, 3)
    await disk.overlay.write(SPAN * CLUSTER, b"\x02" * SPAN * CLUSTER)
    disk.model[SPAN * CLUSTER :] = b"\x02" * SPAN * CLUSTER
    disk.image.release(place, 3)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_a_table_that_was_reserved_and_not_needed_is_given_back(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 3 * SPAN)
    await disk.fill(0, 5)
    place, _ = disk.image.allocate(2 * SPAN, 1)
    disk.image.release(place, 1)
    await disk.fill(5, 10)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_a_discarded_disk_has_no_data_left(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", SPAN)
    await disk.fill(0, 100)
    await disk.discard(0, 100)
    await disk.tidy()
    found = disk.found()
    assert (found.status, found.allocated_clusters) == (0, 0)
    await disk.close()


async def test_a_cluster_that_somebody_is_busy_with_is_left_alone(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 20)
    await disk.discard(0, 1)
    await disk.image.settle()
    before = await disk.image.entry(19)
    held = disk.overlay.hold(19)
    assert held
    with held:
        await disk.tidy()
        assert await disk.image.entry(19) == before
    await disk.close()


async def test_a_held_cluster_waits_with_its_writes(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 2)
    held = disk.overlay.hold(1)
    assert held
    with held:
        assert disk.overlay.hold(1) is None
        assert not disk.overlay.write_now(CLUSTER, b"x", lambda _: None)
        writing = asyncio.create_task(disk.write(1, b"\x55" * CLUSTER))
        await asyncio.sleep(0.01)
        assert not writing.done()
    await writing
    await disk.close()


async def test_a_view_of_a_replaced_cluster_keeps_it_from_being_filled(tmp_path: Path) -> None:
    disk = await Disk.make(tmp_path / "image", 100)
    await disk.fill(0, 20)
    view = disk.overlay.read_now(0, CLUSTER)
    assert view
    await disk.discard(0, 1)
    await disk.tidy()
    assert bytes(view[0]) == b"\x01" * CLUSTER
    del view
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_content_behind_the_image_size_is_moved_too_and_kept(tmp_path: Path) -> None:
    """What lies there is nobody's, but it is not ours to lose (a larger image may have been made smaller)."""
    path = tmp_path / "image"
    disk = await Disk.make(path, 100)
    await disk.fill(0, 20)
    await disk.overlay.close()
    with open(path, "r+b") as file:
        file.seek(48)
        file.write((10 * CLUSTER).to_bytes(8, "little"))
    smaller = Disk(str(path), Overlay(await QedImage.open(str(path), writable=True)))
    smaller.model[:] = disk.model[: 10 * CLUSTER]
    await smaller.discard(0, 5)
    await smaller.tidy()
    assert smaller.found().status == 0
    await smaller.close()
    with open(path, "r+b") as file:
        file.seek(48)
        file.write((100 * CLUSTER).to_bytes(8, "little"))
    assert qed.content(str(path))[10 * CLUSTER :] == disk.model[10 * CLUSTER :]


@pytest.mark.parametrize("clusters", [64, SPAN + 64])
async def test_while_a_guest_goes_on_writing_its_content_is_right_and_in_the_end_nothing_leaks(
    tmp_path: Path, seed: int, clusters: int
) -> None:
    chance = random.Random(seed)
    disk = await Disk.make(tmp_path / "image", clusters)
    for first in range(0, clusters, 8):
        await disk.fill(first, first + chance.randrange(9))
    stop = False

    async def guest(mine: list[int]) -> None:
        while not stop:
            cluster = chance.choice(mine)
            kind = chance.choice(["write", "part", "discard", "race"])
            if kind == "write":
                await disk.write(cluster, chance.randbytes(CLUSTER))
            elif kind == "part":
                await disk.write(cluster, chance.randbytes(512))
            elif kind == "discard":
                await disk.discard(cluster, cluster + 1)
            else:
                await disk.lose_a_race(cluster)
            await asyncio.sleep(0)

    everything = list(range(clusters))
    guests = [asyncio.create_task(guest(everything[number::4])) for number in range(4)]
    for _ in range(10):
        await disk.tidy()
    stop = True
    await asyncio.gather(*guests)
    await disk.tidy()
    assert disk.found().status == 0
    await disk.close()


async def test_random_histories_leave_nothing_over(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for attempt in range(8):
        clusters = chance.choice([20, SPAN, 2 * SPAN + 17])
        disk = await Disk.make(tmp_path / f"image{attempt}", clusters)
        for _ in range(40):
            first = chance.randrange(clusters)
            behind = min(clusters, first + chance.randrange(1, 20))
            await chance.choice([disk.fill, disk.fill, disk.discard])(first, behind)
            if chance.random() < 0.2:
                await disk.lose_a_race(first)
        await disk.tidy()
        assert disk.found().status == 0
        await disk.close()
