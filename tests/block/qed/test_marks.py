"""Marks: never is one missing of what a guest wrote, whatever happened to its owner; and all that can be kept is."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed import record
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.layout import MARKS_OFFSET
from nbdstream.block.qed.marks import AUTOCLEAR_MARKS
from nbdstream.block.qed.opening import create_file, read_header
from nbdstream.block.raw import RawImage
from tests.support import qed

CLUSTER = 65536
CLUSTERS = 64


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files in memory are, for this test."""
    path = tmp_path / "memory"
    path.mkdir()
    monkeypatch.setattr(record, "DIRECTORY", str(path))
    return path


@pytest.fixture
def backing(tmp_path: Path) -> str:
    path = tmp_path / "backing.raw"
    path.write_bytes(b"\x11" * CLUSTERS * CLUSTER)
    return str(path)


@pytest.fixture
def path(tmp_path: Path, backing: str) -> str:
    path = str(tmp_path / "overlay.qed")
    create_file(path, CLUSTERS * CLUSTER, cluster_size=CLUSTER, table_size=4, backing_name=backing)
    return path


class Opened:
    """An overlay as a stream has it; the clusters in ``hydrated`` come from below."""

    def __init__(self, image: QedImage, below: RawImage) -> None:
        self.image = image
        self.overlay = Overlay(image, below)
        self.overlay.begin_streaming(self)

    @classmethod
    async def open(cls, path: str, backing: str) -> Opened:
        return cls(await QedImage.open(path, writable=True, marked=True), await RawImage.open(backing))

    def want(self, offset: int, length: int) -> None:
        pass

    async def read(self, cluster: int, within: int, length: int) -> None:
        pass

    async def keep(self, first: int, behind: int) -> None:
        pass

    async def hydrate(self, cluster: int) -> None:
        place, _ = self.image.allocate(cluster, 1)
        await self.image.write(place, [b"\x11" * self.image.cluster_size])
        self.overlay.adopt(cluster, place, 1, 0)
        await self.image.linked()

    @property
    def written(self) -> list[int]:
        assert self.overlay.written is not None
        return list(self.overlay.written.search(1))

    async def close(self) -> None:
        await self.overlay.close()

    async def kill(self) -> None:
        """End it as a kill -9 does, as far as the files go."""
        await self.image._worker.close()
        await self.image._barriers.close()
        os.close(self.image._fd)
        assert self.overlay.below.device
        await self.overlay.below.close()


async def worked(path: str, backing: str) -> Opened:
    """An overlay of which clusters 0 .. 9 are hydrated and 2, 5, 20 and 21 the guest's."""
    opened = await Opened.open(path, backing)
    for cluster in range(10):
        await opened.hydrate(cluster)
    await opened.overlay.write(2 * CLUSTER + 7, b"in place")
    await opened.overlay.write(20 * CLUSTER, b"x" * 2 * CLUSTER)
    await opened.overlay.discard(5 * CLUSTER, CLUSTER)
    assert opened.written == [2, 5, 20, 21]
    return opened


async def written_at_next_open(path: str, backing: str) -> list[int]:
    opened = await Opened.open(path, backing)
    written = opened.written
    await opened.close()
    return written


EVERYTHING = [*range(10), 20, 21]
THE_GUESTS = [2, 5, 20, 21]


async def test_every_kind_of_write_is_marked_and_no_fetch(path: str, backing: str) -> None:
    opened = await worked(path, backing)
    taken: list[OSError | None] = []
    assert opened.overlay.write_now(3 * CLUSTER, b"at once", taken.append)
    await opened.overlay.write(30 * CLUSTER + 5, b"a part of a remote cluster")
    await opened.overlay.write(40 * CLUSTER - 5, b"across two")
    await opened.overlay.write_zeroes(50 * CLUSTER, 2 * CLUSTER + 9, may_unmap=True)
    assert opened.written == [2, 3, 5, 20, 21, 30, 39, 40, 50, 51, 52]
    await opened.overlay.flush()
    await opened.close()


async def test_a_mark_is_there_before_its_write(path: str, backing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await worked(path, backing)
    seen: list[list[int]] = []
    write = opened.image.write

    async def watched(place: int, buffers: list[bytes]) -> None:
        seen.append(opened.written)
        await write(place, buffers)

    monkeypatch.setattr(opened.image, "write", watched)
    await opened.overlay.write(7 * CLUSTER + 1, b"in place")
    await opened.overlay.write(33 * CLUSTER, bytes(CLUSTER))
    assert 7 in seen[0]
    assert 33 in seen[1]
    await opened.close()


async def test_marks_survive_a_clean_end(path: str, backing: str, memory: Path) -> None:
    await (await worked(path, backing)).close()
    assert os.listdir(memory) == []
    assert await written_at_next_open(path, backing) == THE_GUESTS
    assert await written_at_next_open(path, backing) == THE_GUESTS
    assert qed.qemu_check(path).status == 0


async def test_marks_survive_a_kill(path: str, backing: str) -> None:
    await (await worked(path, backing)).kill()
    assert await written_at_next_open(path, backing) == THE_GUESTS


async def test_after_a_power_cut_everything_local_is_the_guests(path: str, backing: str, memory: Path) -> None:
    await (await worked(path, backing)).kill()
    for name in os.listdir(memory):
        if name.startswith("nbdmarks"):
            os.unlink(memory / name)
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_a_power_cut_while_the_marks_are_saved_leaves_none_that_are_wrong(
    path: str, backing: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their header comes behind a barrier, so half of them are never believed."""
    opened = await worked(path, backing)
    synced: list[bytes] = []
    fdatasync = os.fdatasync

    def recording(fd: int) -> None:
        fdatasync(fd)
        with open(path, "rb") as file:
            file.seek(MARKS_OFFSET)
            synced.append(file.read(8))

    monkeypatch.setattr(os, "fdatasync", recording)
    await opened.close()
    assert synced[-2] == bytes(8)
    assert synced[-1] == b"NBDMARK\1"


async def test_what_qemu_wrote_meanwhile_is_not_taken_for_the_sources(path: str, backing: str) -> None:
    await (await worked(path, backing)).close()
    qed.qemu_io(path, "write -P 7 0 512")
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_a_command_of_ours_that_keeps_no_marks_voids_them(path: str, backing: str) -> None:
    await (await worked(path, backing)).close()
    image = await QedImage.open(path, writable=True)
    assert image.written is None
    await image.close()
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_without_room_in_memory_they_survive_a_clean_end_only(
    path: str, backing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "DIRECTORY", "/nonexistent")
    await (await worked(path, backing)).close()
    assert await written_at_next_open(path, backing) == THE_GUESTS
    opened = await Opened.open(path, backing)
    await opened.kill()
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_an_image_without_room_for_them_keeps_them_while_it_is_open(
    tmp_path: Path, backing: str, memory: Path
) -> None:
    path = str(tmp_path / "qemus.qed")
    qed.create(path, CLUSTERS * CLUSTER, backing=backing, cluster_size=4096)
    opened = await Opened.open(path, backing)
    await opened.hydrate(5)
    await opened.overlay.write(20 * 4096, b"x" * 2 * 4096)
    await opened.overlay.write(30 * 4096 + 7, b"a part")
    assert opened.written == [20, 21, 30]
    await opened.close()
    assert await written_at_next_open(path, backing) == [5, 20, 21, 30]
    assert qed.qemu_check(path).status == 0


async def test_an_image_that_qemu_made_has_them(tmp_path: Path, backing: str) -> None:
    path = str(tmp_path / "qemus.qed")
    qed.create(path, CLUSTERS * CLUSTER, backing=backing)
    await (await worked(path, backing)).close()
    assert await written_at_next_open(path, backing) == THE_GUESTS
    assert qed.qemu_check(path).status == 0


@pytest.mark.parametrize("damage", ["header", "bits", "length"])
async def test_damaged_marks_are_not_believed(path: str, backing: str, damage: str) -> None:
    await (await worked(path, backing)).close()
    with open(path, "r+b") as file:
        file.seek({"header": MARKS_OFFSET, "bits": MARKS_OFFSET + 4096, "length": MARKS_OFFSET + 8}[damage])
        file.write(b"\xff")
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_somebody_elses_file_in_memory_is_not_believed(path: str, backing: str, memory: Path) -> None:
    await (await worked(path, backing)).kill()
    (name,) = [name for name in os.listdir(memory) if name.startswith("nbdmarks")]
    os.chmod(memory / name, 0o666)
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_a_fifo_in_the_place_of_marks_keeps_nobody_waiting(path: str, backing: str, memory: Path) -> None:
    await (await worked(path, backing)).kill()
    (name,) = [name for name in os.listdir(memory) if name.startswith("nbdmarks")]
    os.unlink(memory / name)
    os.mkfifo(memory / name, 0o600)
    assert await written_at_next_open(path, backing) == EVERYTHING


async def test_marks_of_a_copy_are_its_own(path: str, backing: str, tmp_path: Path) -> None:
    """A killed owner's marks belong to its file, not to a copy that was made of it."""
    opened = await worked(path, backing)
    await opened.overlay.flush()
    await opened.kill()
    copy = str(tmp_path / "copy.qed")
    shutil.copyfile(path, copy)
    assert await written_at_next_open(copy, backing) == EVERYTHING
    assert await written_at_next_open(path, backing) == THE_GUESTS


async def test_an_independent_image_has_none(path: str, backing: str, memory: Path) -> None:
    opened = await worked(path, backing)
    opened.overlay.reads_zero(0, CLUSTERS)
    await opened.image.forget_backing()
    opened.overlay.become_independent()
    await opened.overlay.write(0, b"more")
    assert not [name for name in os.listdir(memory) if name.startswith("nbdmarks")]
    assert not read_header(path)[0].autoclear_features & AUTOCLEAR_MARKS
    await opened.image.close()
    assert qed.qemu_check(path).corruptions == 0


async def test_a_disk_with_more_marks_than_a_cluster_holds(tmp_path: Path, backing: str) -> None:
    path = str(tmp_path / "large.qed")
    create_file(path, 1 << 40, cluster_size=CLUSTER, table_size=16, backing_name=backing)
    opened = await Opened.open(path, backing)
    last = (1 << 40) - 512
    await opened.overlay.write(last, bytes(512))
    await opened.close()
    assert await written_at_next_open(path, backing) == [last // CLUSTER]
    assert qed.qemu_check(path).corruptions == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(head=st.binary(max_size=64), length=st.integers(0, 1 << 20))
def test_a_file_in_memory_that_is_no_mark_of_this_image_marks_everything(
    path: str, backing: str, memory: Path, head: bytes, length: int
) -> None:
    async def damaged() -> list[int]:
        await (await worked(path, backing)).kill()
        (name,) = [name for name in os.listdir(memory) if name.startswith("nbdmarks")]
        with open(memory / name, "r+b") as file:
            file.write(head)
            file.truncate(length)
        return await written_at_next_open(path, backing)

    before = Path(path).read_bytes()
    try:
        assert set(asyncio.run(damaged())) >= set(THE_GUESTS)
    finally:
        with open(path, "r+b") as file:
            file.write(before)
            file.truncate(len(before))
