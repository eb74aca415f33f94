"""Repairing: the disk reads as before but where nothing could be read, QEMU finds the result clean, and a power cut
meanwhile makes nothing worse."""

from __future__ import annotations

import os
import random
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed import record
from nbdstream.block.qed.check import check
from nbdstream.block.qed.layout import Header
from nbdstream.block.qed.mend import Range
from nbdstream.block.qed.opening import create_file, open_file, read_header_of
from nbdstream.block.qed.repair import RepairResult, repair
from nbdstream.block.qed.replay import recorded_links
from nbdstream.errors import ImageError
from tests.support.crash import Recorder
from tests.support.qed import (
    SMALL_GEOMETRIES,
    RawImage,
    content,
    create,
    qemu_check,
    qemu_io,
    random_writes,
    write_all,
)

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""

CLEAN = (0, 0, 0)


def repaired(path: str, *, leaks_only: bool = False) -> RepairResult:
    fd = os.open(path, os.O_RDWR)
    try:
        return repair(fd, leaks_only=leaks_only)
    finally:
        os.close(fd)


def found_by_qemu(path: str) -> tuple[int, int, int]:
    """Status, corruptions and leaks."""
    return qemu_check(path)[:3]


@pytest.fixture
def image(tmp_path: Path) -> RawImage:
    """Two L2 tables: clusters 0 to 9 hold data, and SPAN to SPAN + 4."""
    path = create(str(tmp_path / "image"), (SPAN + 100) * CLUSTER, cluster_size=CLUSTER, table_size=2)
    writes = [f"write -P {cluster + 1} {cluster * CLUSTER} {CLUSTER}" for cluster in range(10)]
    writes += [f"write -P {cluster + 101} {(SPAN + cluster) * CLUSTER} {CLUSTER}" for cluster in range(5)]
    qemu_io(path, *writes)
    return RawImage(path)


def bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Disk:
    """What every cluster of the disk reads as, by code of this module's own; None where nothing can be read."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._file = file.read()
        cluster_size: int
        cluster_size, table_size, header_size, _, _, _, l1, size = struct.unpack_from("<IIIQQQQQ", self._file, 4)
        self._cluster_size = cluster_size
        self._table_bytes: int = table_size * cluster_size
        self._first: int = header_size * cluster_size
        self._l1 = range(l1, l1 + self._table_bytes)
        self.clusters: list[bytes | None] = []
        self.read_from_l1: list[int] = []
        """Those of them that lie, or whose entries do, in the L1 table by mistake."""
        entries = self._table_bytes // 8
        tables = struct.unpack_from(f"<{entries}Q", self._file, l1)
        for cluster in range(-(-size // cluster_size)):
            table = tables[cluster // entries]
            self.clusters.append(self._read(table, cluster) if table else bytes(cluster_size))

    def _fits(self, place: int, length: int) -> bool:
        whole = len(self._file) // self._cluster_size * self._cluster_size
        return place % self._cluster_size == 0 and self._first <= place <= whole - length

    def _read(self, table: int, cluster: int) -> bytes | None:
        if not self._fits(table, self._table_bytes):
            return None
        (entry,) = struct.unpack_from("<Q", self._file, table + 8 * (cluster % (self._table_bytes // 8)))
        if entry in self._l1 or self._l1.start < table + self._table_bytes <= self._l1.stop + self._table_bytes:
            self.read_from_l1.append(cluster)
        if entry <= 1:
            return bytes(self._cluster_size)
        if not self._fits(entry, self._cluster_size):
            return None
        return self._file[entry : entry + self._cluster_size]


# -- leaks --------------------------------------------------------------------------------------------------------


def test_a_clean_image_stays_as_it_is(image: RawImage) -> None:
    before = bytes_of(image.path)
    result = repaired(image.path)
    assert (result.found.status, result.left.status) == (0, 0)
    assert bytes_of(image.path) == before


def test_the_tail_is_cut_off(image: RawImage) -> None:
    size = os.path.getsize(image.path)
    image.extend(5 * CLUSTER + 100)
    result = repaired(image.path, leaks_only=True)
    assert (result.found.leaks, result.leaks_fixed, result.left.status) == (5, 5, 0)
    assert os.path.getsize(image.path) == size
    assert found_by_qemu(image.path) == CLEAN


def test_data_from_the_end_moves_into_what_is_free(image: RawImage) -> None:
    size = os.path.getsize(image.path)
    for cluster in (2, 3, 7):
        image.put(image.l2_offset(cluster), 1)
    before = content(image.path)
    assert repaired(image.path, leaks_only=True).leaks_fixed == 3
    assert os.path.getsize(image.path) == size - 3 * CLUSTER
    assert content(image.path) == before
    assert found_by_qemu(image.path) == CLEAN


def test_a_table_at_the_end_moves_too(image: RawImage) -> None:
    """Nothing but the second table and a cluster of data is behind what becomes free."""
    for cluster in range(SPAN + 1, SPAN + 5):
        image.put(image.l2_offset(cluster), 0)
    for cluster in range(9):
        image.put(image.l2_offset(cluster), 0)
    before = content(image.path)
    repaired(image.path, leaks_only=True)
    assert os.path.getsize(image.path) == (1 + 2 + 2 + 1 + 2 + 1) * CLUSTER
    assert content(image.path) == before
    assert found_by_qemu(image.path) == CLEAN


def test_leaks_of_an_image_with_corruptions_are_not_given_back_alone(image: RawImage) -> None:
    image.put(image.l1_offset(1), 3)
    before = bytes_of(image.path)
    result = repaired(image.path, leaks_only=True)
    assert result.left.status == 2
    assert bytes_of(image.path) == before


@pytest.mark.parametrize("attempt", range(10))
def test_every_leak_is_given_back_wherever_it_is(tmp_path: Path, seed: int, attempt: int) -> None:
    rng = random.Random(seed)
    cluster_size, table_size = rng.choice([*SMALL_GEOMETRIES, (4096, 16)])
    entries = cluster_size * table_size // 8
    size = rng.choice([1 << 20, 2 * entries * cluster_size, 5 * entries * cluster_size])
    size = min(size, 64 << 20)
    path = create(str(tmp_path / "a"), size, cluster_size=cluster_size, table_size=table_size)
    image = RawImage(path)
    for _ in range(3):
        write_all(path, random_writes(rng, size, cluster_size, rng.randrange(15)))
        qemu_io(path, f"write {rng.randrange(size // 512) * 512} 512")
        for index in range(entries):
            table = image.get(image.l1_offset(index)) if index < 8 else 0
            if table and rng.random() < 0.2:
                image.put(image.l1_offset(index), 0)
            elif table:
                for within in rng.sample(range(entries), min(entries, 400)):
                    if rng.random() < 0.5:
                        image.put(table + within * 8, rng.randrange(2))
        image.extend(rng.randrange(3) * cluster_size + rng.choice([0, 512]))
    before = content(path)
    found = qemu_check(path)
    result = repaired(path, leaks_only=True)
    assert result.found.leaks == found.leaks
    assert found_by_qemu(path) == CLEAN
    assert content(path) == before


def test_tables_that_stand_in_each_others_way_are_all_moved(tmp_path: Path) -> None:
    """Header, a leak, L1, a leak, table, a leak, table: no room for a table in front of the last one."""
    header = Header.new(2 * SPAN * CLUSTER, cluster_size=CLUSTER, table_size=2)
    fields = bytearray(header.pack())
    struct.pack_into("<I", fields, 12, 1)
    struct.pack_into("<Q", fields, 40, 2 * CLUSTER)
    path = str(tmp_path / "image")
    with open(path, "wb") as file:
        file.write(fields)
        file.seek(2 * CLUSTER)
        file.write(struct.pack("<2Q", 5 * CLUSTER, 8 * CLUSTER))
        file.seek(5 * CLUSTER)
        file.write(struct.pack("<2Q", 1, 10 * CLUSTER))
        file.seek(10 * CLUSTER)
        file.write(b"\x77" * CLUSTER)
    before = content(path)
    assert found_by_qemu(path) == (3, 0, 3)
    repaired(path)
    assert found_by_qemu(path) == CLEAN
    assert os.path.getsize(path) == 8 * CLUSTER
    assert content(path) == before


# -- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [3, CLUSTER + 512, 1 << 40, (1 << 64) - CLUSTER])
def test_an_entry_that_leads_nowhere_is_dropped_and_told(image: RawImage, entry: int) -> None:
    image.put(image.l2_offset(3), entry)
    result = repaired(image.path)
    assert result.lost.kept == [Range(3 * CLUSTER, CLUSTER)]
    assert (result.corruptions_fixed, result.left.status) == (1, 0)
    assert image.get(image.l2_offset(3)) == 0
    assert found_by_qemu(image.path) == CLEAN


def test_a_table_that_is_nowhere_is_dropped_and_told(image: RawImage) -> None:
    image.put(image.l1_offset(1), 1 << 40)
    result = repaired(image.path)
    assert result.lost.kept == [Range(SPAN * CLUSTER, 100 * CLUSTER)]
    assert found_by_qemu(image.path) == CLEAN


def test_what_lies_behind_the_disk_is_no_loss(image: RawImage) -> None:
    image.put(image.l2_offset(SPAN + 500), 3)
    image.put(image.l1_offset(900), 3)
    assert repaired(image.path).lost.bytes == 0
    assert found_by_qemu(image.path) == CLEAN


def test_two_parts_of_the_disk_in_one_place_get_a_place_each(image: RawImage) -> None:
    image.put(image.l2_offset(20), image.get(image.l2_offset(4)))
    before = content(image.path)
    result = repaired(image.path)
    assert result.copied.kept == [Range(20 * CLUSTER, CLUSTER)]
    assert result.lost.bytes == 0
    assert content(image.path) == before
    assert found_by_qemu(image.path) == CLEAN
    qemu_io(image.path, f"write -P 200 {20 * CLUSTER} {CLUSTER}")
    assert content(image.path)[4 * CLUSTER : 5 * CLUSTER] == b"\x05" * CLUSTER


@pytest.mark.parametrize("target", ["L1", "its table", "the other table"])
def test_data_in_a_table_gets_a_place_of_its_own(image: RawImage, target: str) -> None:
    place = {
        "L1": image.l1_table_offset,
        "its table": image.get(image.l1_offset(0)),
        "the other table": image.get(image.l1_offset(1)),
    }[target]
    image.put(image.l2_offset(20), place)
    before = Disk(image.path).clusters
    assert repaired(image.path).corruptions_fixed > 0
    assert found_by_qemu(image.path) == CLEAN
    after = Disk(image.path).clusters
    assert after[:20] + after[21:] == before[:20] + before[21:]


def test_a_table_that_two_entries_lead_to_becomes_two(image: RawImage) -> None:
    image.put(image.l1_offset(1), image.get(image.l1_offset(0)))
    before = content(image.path)
    assert found_by_qemu(image.path)[0] == 2
    result = repaired(image.path)
    assert result.copied.bytes == 10 * CLUSTER
    assert found_by_qemu(image.path) == CLEAN
    assert content(image.path) == before


def test_a_table_that_is_the_l1_table_is_parted_from_it(image: RawImage) -> None:
    image.put(image.l1_offset(1), image.l1_table_offset)
    repaired(image.path)
    assert found_by_qemu(image.path) == CLEAN
    assert content(image.path)[: 10 * CLUSTER] == b"".join(bytes([i + 1]) * CLUSTER for i in range(10))


@pytest.mark.parametrize("index", [0, 900])
def test_data_that_a_wrong_entry_takes_for_a_table_stays_as_it_is(image: RawImage, index: int) -> None:
    """Nothing that it says as a table is any good, but it is not dropped from the data."""
    image.put(image.l1_offset(index), image.get(image.l2_offset(SPAN + 1)))
    before = Disk(image.path).clusters[SPAN:]
    repaired(image.path)
    assert found_by_qemu(image.path) == CLEAN
    assert Disk(image.path).clusters[SPAN:] == before


def test_need_check_is_cleared(image: RawImage) -> None:
    image.put(16, 2)
    repaired(image.path, leaks_only=True)
    assert image.get(16) == 0


def test_autoclear_features_are_cleared_where_something_changes(image: RawImage) -> None:
    image.put(32, 1 << 50)
    repaired(image.path)
    assert image.get(32) == 1 << 50, "nothing was changed"
    image.extend(CLUSTER)
    repaired(image.path)
    assert image.get(32) == 0


def damage(image: RawImage, rng: random.Random) -> None:
    clusters = os.path.getsize(image.path) // CLUSTER
    tables = [image.get(image.l1_offset(index)) for index in range(2)]
    place = rng.randrange(clusters + 2) * CLUSTER
    value = rng.choice([place, place, place, place + 512, 1, 3, 1 << 63, *tables])
    table = rng.choice(tables)
    if rng.random() < 0.3 or not image.cluster_size <= table < (clusters - 2) * CLUSTER or table % CLUSTER:
        image.put(image.l1_offset(rng.choice([0, 1, 2, 1000])), value)
    else:
        image.put(table + 8 * rng.choice([*range(12), 500]), value)


@pytest.mark.parametrize("attempt", range(15))
def test_any_damage_is_repaired_and_what_could_be_read_is_read(image: RawImage, seed: int, attempt: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 5)):
        damage(image, rng)
    disk = Disk(image.path)
    before = disk.clusters
    try:
        result = repaired(image.path)
    except ImageError:
        assert qemu_check(image.path).corruptions > 100  # too tangled: nothing was changed
        return
    assert found_by_qemu(image.path) == CLEAN
    after = Disk(image.path).clusters
    lost = sum(old is None for old in before)
    assert result.lost.bytes == lost * CLUSTER
    changed = {n for n, (old, new) in enumerate(zip(before, after, strict=True)) if old not in (None, new)}
    # Of all tables the L1 table alone is repaired where it is: what is read from it as if it were data shows that.
    assert changed <= set(disk.read_from_l1)


# -- power cuts ---------------------------------------------------------------------------------------------------


def read_as(content: bytes, path: Path) -> list[bytes | None]:
    path.write_bytes(content)
    return Disk(str(path)).clusters


@pytest.mark.parametrize("attempt", range(4))
def test_a_power_cut_during_a_repair_makes_nothing_worse(
    image: RawImage, tmp_path: Path, seed: int, attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cluster reads as it did or as it will; and the repair is simply made again."""
    rng = random.Random(seed)
    for cluster in rng.sample(range(10), 4):
        image.put(image.l2_offset(cluster), 0)
    image.put(image.l2_offset(20), image.get(image.l2_offset(SPAN + 1)))
    image.put(image.l2_offset(21), 1 << 40)
    image.put(image.l2_offset(SPAN + 30), os.path.getsize(image.path))
    if attempt % 2:
        image.put(image.l1_offset(1), image.get(image.l1_offset(0)))
    before = Disk(image.path).clusters
    recorder = Recorder(image.path, monkeypatch)
    repaired(image.path)
    after = Disk(image.path).clusters
    monkeypatch.undo()
    for _ in range(60):
        state = recorder.power_cut(rng.randrange(1, recorder.end + 2), rng)
        found = read_as(state, tmp_path / "state")
        for cluster, seen in enumerate(found):
            assert seen in (before[cluster], after[cluster]), f"cluster {cluster}"
    repaired(str(tmp_path / "state"))
    assert found_by_qemu(str(tmp_path / "state")) == CLEAN
    assert Disk(str(tmp_path / "state")).clusters == after


def test_a_repair_that_finds_no_room_changes_no_entry(image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    image.put(image.l2_offset(20), image.get(image.l2_offset(4)))
    before = bytes_of(image.path)
    room = os.statvfs(image.path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda _fd: os.statvfs_result((*room[:4], 0, *room[5:])))
        with pytest.raises(ImageError, match="has room for 0"):
            repaired(image.path)
    assert bytes_of(image.path) == before


def test_what_a_killed_owner_acknowledged_is_linked_before_anything_is_repaired(
    tmp_path: Path, own_records: None
) -> None:
    path = str(tmp_path / "own")
    create_file(path, SPAN * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name=None)
    with open(path, "r+b") as file:
        opened = open_file(path, lambda _fd: None, writable=True)
        assert opened.record
        place = opened.space.end + 3 * CLUSTER
        os.pwrite(opened.fd, b"\x11" * CLUSTER, place)
        opened.record.note(7, place)
        os.close(opened.fd)
        header, extension, _ = read_header_of(file.fileno())
        found = check(file.fileno(), recorded_links(file.fileno(), header, extension))
        assert (found.status, found.leaks) == (3, 4)
    result = repaired(path)
    assert result.left.status == 0
    assert content(path) == bytes(7 * CLUSTER) + b"\x11" * CLUSTER + bytes((SPAN - 8) * CLUSTER)
    assert os.listdir(record.DIRECTORY) == []
    assert RawImage(path).get(32) == 0
