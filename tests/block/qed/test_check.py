from __future__ import annotations

import dataclasses
import os
import random
import tracemalloc
from array import array
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed import walk as walk_module
from nbdstream.block.qed.check import KEPT_PROBLEMS, CheckResult, check
from nbdstream.block.qed.layout import Header
from nbdstream.errors import ImageError
from tests.support.qed import (
    SMALL_GEOMETRIES,
    Check,
    RawImage,
    create,
    qemu_check,
    qemu_img,
    qemu_io,
    random_writes,
    write_all,
)

if TYPE_CHECKING:
    from pathlib import Path


def check_path(path: str) -> CheckResult:
    fd = os.open(path, os.O_RDONLY)
    try:
        return check(fd)
    finally:
        os.close(fd)


def in_qemus_terms(result: CheckResult) -> Check:
    return Check(
        result.status,
        result.corruptions,
        result.leaks,
        result.allocated_clusters,
        result.total_clusters,
        result.check_errors,
    )


@pytest.fixture
def image(tmp_path: Path) -> RawImage:
    """The image of qed.md, section 6: 12 clusters, the L2 table from cluster 5 on, data in clusters 9, 10 and 11."""
    path = create(str(tmp_path / "a.qed"), 3 << 30, cluster_size=65536, table_size=4)
    qemu_io(path, "write -z 192k 64k", "write -P 1 0 192k")  # the zeroes first: they need the table and no data
    image = RawImage(path)
    assert image.get(image.l1_offset(0)) == 5 << 16
    assert [image.get(image.l2_offset(cluster)) >> 16 for cluster in range(3)] == [9, 10, 11]
    return image


# -- images that are sound ----------------------------------------------------------------------------------------


def test_an_image_in_order_is_clean(image: RawImage) -> None:
    assert check_path(image.path) == CheckResult(
        total_clusters=3 << 14, allocated_clusters=3, image_end_offset=12 << 16
    )


@pytest.mark.parametrize(("cluster_size", "table_size"), SMALL_GEOMETRIES)
def test_an_empty_image_is_clean(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    path = create(str(tmp_path / "a"), 1 << 20, cluster_size=cluster_size, table_size=table_size)
    result = check_path(path)
    assert in_qemus_terms(result) == qemu_check(path) == Check(0, 0, 0, 0, (1 << 20) // cluster_size)
    assert result.image_end_offset == os.path.getsize(path)


def test_an_image_of_no_bytes_is_clean(tmp_path: Path) -> None:
    assert check_path(create(str(tmp_path / "a"), 0)).status == 0


@pytest.mark.parametrize(("cluster_size", "table_size"), SMALL_GEOMETRIES)
def test_counts_what_qemu_counts(tmp_path: Path, seed: int, cluster_size: int, table_size: int) -> None:
    rng = random.Random(seed)
    span = cluster_size * cluster_size * table_size // 8
    size = 2 * span + 5 * 512
    path = create(str(tmp_path / "a"), size, cluster_size=cluster_size, table_size=table_size)
    write_all(path, random_writes(rng, size, cluster_size, 60))
    result = check_path(path)
    assert in_qemus_terms(result) == qemu_check(path)
    assert result.status == 0
    assert result.image_end_offset == os.path.getsize(path)


def test_an_overlay_is_checked_without_its_backing_file(tmp_path: Path) -> None:
    path = create(str(tmp_path / "a"), 1 << 20, backing="nbd://192.0.2.1/none")
    assert check_path(path).status == 0


def test_invents_no_leaks_as_qemu_does(tmp_path: Path) -> None:
    path = create(str(tmp_path / "a"), 32 << 20, cluster_size=4096)
    qemu_io(path, "write 0 32M")
    assert "2 leaked clusters" in qemu_img("check", "-f", "qed", path, check=False).stdout
    assert in_qemus_terms(check_path(path)) == qemu_check(path) == Check(0, 0, 0, 8192, 8192)


# -- leaks --------------------------------------------------------------------------------------------------------


def test_clusters_that_nothing_leads_to_are_leaks(image: RawImage) -> None:
    image.put(image.l2_offset(1), 0)
    image.extend(2 << 16)
    result = check_path(image.path)
    assert (result.status, result.leaks, result.corruptions) == (3, 3, 0)
    assert result.image_end_offset == 12 << 16
    assert in_qemus_terms(result) == qemu_check(image.path)


def test_a_table_that_nothing_leads_to_leaks_with_all_that_it_leads_to(image: RawImage) -> None:
    image.put(image.l1_offset(0), 0)
    result = check_path(image.path)
    assert (result.status, result.leaks) == (3, 7)
    assert in_qemus_terms(result) == qemu_check(image.path)


def test_the_end_of_the_file_that_is_no_whole_cluster_is_ignored(image: RawImage) -> None:
    image.extend(100)
    assert check_path(image.path).status == 0


def test_a_zero_cluster_takes_no_space(image: RawImage) -> None:
    image.put(image.l2_offset(1000), 1)
    result = check_path(image.path)
    assert (result.status, result.allocated_clusters) == (0, 3)


# -- corruptions (qed.md, section 6) ------------------------------------------------------------------------------

C = 65536
N = 4 * C // 8


@pytest.mark.parametrize(
    ("damage", "corruptions"),
    [
        pytest.param([("L2", 0, 9 * C + 512)], 1, id="data not aligned"),
        pytest.param([("L2", 0, 9 * C + 1)], 1, id="data with a low bit"),
        pytest.param([("L2", 0, 2)], 1, id="data at 2"),
        pytest.param([("L2", 0, 13 * C)], 1, id="data behind the file"),
        pytest.param([("L2", 0, 12 * C)], 1, id="data at the file's end"),
        pytest.param([("L2", 0, 2**64 - C)], 1, id="data near 2**64"),
        pytest.param([("L2", 0, 4096)], 1, id="data in the header"),
        pytest.param([("L2", 5, 12 * C), ("size", 0, 512)], 1, id="data in a part of a cluster"),
        pytest.param([("size", 0, -512)], 1, id="data cut off"),
        pytest.param([("L2", 0, 1 * C)], 1, id="data in the L1 table"),
        pytest.param([("L2", 0, 5 * C)], 1, id="data in its own table"),
        pytest.param([("L2", 0, 10 * C)], 1, id="data used twice"),
        pytest.param([("L1", 0, 5 * C + 512)], 1, id="table not aligned"),
        pytest.param([("L1", 0, 1)], 1, id="table at 1"),
        pytest.param([("L1", 0, 20 * C)], 1, id="table behind the file"),
        pytest.param([("L1", 0, 9 * C)], 1, id="table cut off"),
        pytest.param([("L1", 0, 2**64 - 2 * C)], 1, id="table near 2**64"),
        pytest.param([("L1", 1, 5 * C)], 4, id="table used twice"),
        pytest.param([("L1", 0, 1 * C)], 4, id="table is the L1 table"),
        pytest.param([("L1", 1, 6 * C)], 4, id="tables overlap"),
        pytest.param([("L1", N - 1, 5 * C + 8)], 1, id="L1 entry beyond the image's size"),
        pytest.param(
            [("size", 0, 4 * C), ("L1", 1, 12 * C), ("L2", 2 * N - 1, 3)], 1, id="L2 entry beyond the image's size"
        ),
    ],
)
def test_finds_the_corruption_that_qemu_finds(
    image: RawImage, damage: list[tuple[str, int, int]], corruptions: int
) -> None:
    for what, index, value in damage:
        if what == "size":
            image.extend(value)
        else:
            image.put(image.l1_offset(index) if what == "L1" else image.l2_offset(index), value)
    result = check_path(image.path)
    assert (result.status, result.corruptions, len(result.problems)) == (2, corruptions, corruptions)
    assert in_qemus_terms(result) == qemu_check(image.path)


def test_finds_data_in_a_spare_header_cluster(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    header = Header.new(1 << 20, cluster_size=4096)
    with open(path, "wb") as file:
        file.write(header.pack())
        file.truncate(header.l1_table_offset + header.geometry.table_bytes)
    qemu_io(path, "write 0 64k")
    image = RawImage(path)
    image.put(image.l2_offset(3), 2 * 4096)
    assert in_qemus_terms(check_path(path)) == qemu_check(path) == Check(2, 1, 1, 16, 256)


def test_says_where_the_bad_entry_is(image: RawImage) -> None:
    image.put(image.l2_offset(7), 0xDEAD)
    (problem,) = check_path(image.path).problems
    assert (problem.entry_offset, problem.entry) == (image.l2_offset(7), 0xDEAD)
    assert "0xdead" in str(problem)
    assert hex(image.l2_offset(7)) in str(problem)


def test_of_two_entries_to_a_cluster_the_second_is_named(image: RawImage) -> None:
    image.put(image.l2_offset(2), 9 << 16)
    (problem,) = check_path(image.path).problems
    assert (problem.entry_offset, problem.reason) == (image.l2_offset(2), "the cluster is in use already")


def test_a_cut_off_cluster_is_corrupt_where_qemu_rounds_the_size_up(image: RawImage) -> None:
    image.extend(-100)
    assert qemu_check(image.path).status == 0
    assert check_path(image.path).corruptions == 1


@pytest.mark.parametrize("attempt", range(25))
def test_finds_what_qemu_finds_in_images_damaged_at_random(tmp_path: Path, seed: int, attempt: int) -> None:
    rng = random.Random(seed)
    cluster_size, table_size = rng.choice(SMALL_GEOMETRIES)
    entries = cluster_size * table_size // 8
    size = rng.choice([1 << 20, 3 * entries * cluster_size // 2, 4 * entries * cluster_size])
    path = create(str(tmp_path / "a"), size, cluster_size=cluster_size, table_size=table_size)
    write_all(path, random_writes(rng, size, cluster_size, rng.randrange(30)))
    for _ in range(rng.randint(1, 4)):
        _damage_at_random(RawImage(path), rng)
    ours = check_path(path)
    assert in_qemus_terms(ours) == qemu_check(path)


def _damage_at_random(image: RawImage, rng: random.Random) -> None:
    file_size = os.path.getsize(image.path)
    table_offsets = [image.get(image.l1_offset(index)) for index in range(16)]
    tables = [
        table
        for table in table_offsets
        if table and table % image.cluster_size == 0 and table + image.entries * 8 <= file_size
    ]
    anywhere = rng.randrange(file_size // image.cluster_size + 2) * image.cluster_size
    value = rng.choice([anywhere, anywhere, anywhere + 512, anywhere + 1, 0, 1, 2, 1 << 63, *tables])
    match rng.choice(["L1", "L2", "L2", "size"]):
        case "L1":
            image.put(image.l1_offset(rng.choice([*range(4), image.entries - 1])), value)
        case "L2" if tables:
            image.put(rng.choice(tables) + 8 * rng.choice([*range(8), rng.randrange(image.entries)]), value)
        case _:
            # Never into the L1 table: then nobody opens it.
            least = image.l1_table_offset + image.entries * 8
            change = rng.choice([image.cluster_size, 512, -512, -image.cluster_size])
            image.extend(max(change, least - file_size))


# -- limits -------------------------------------------------------------------------------------------------------


def write_full_image(path: str, places: array[int]) -> None:
    """Make an image whose L2 tables hold these entries, whatever they are; its data is a hole."""
    cluster_size = 65536
    header = Header.new(len(places) * cluster_size)
    table_bytes = header.geometry.table_bytes
    first_table = header.l1_table_offset + table_bytes
    tables = range(first_table, first_table + len(places) * 8, table_bytes)
    with open(path, "wb") as file:
        file.write(header.pack())
        file.seek(header.l1_table_offset)
        file.write(array("Q", tables).tobytes())
        file.seek(first_table)
        file.write(places.tobytes())
        file.truncate(tables.stop + len(places) * cluster_size)


def test_memory_does_not_grow_with_the_tables(tmp_path: Path) -> None:
    count = 1 << 18
    data = 65536 * 5 + count * 8
    path = str(tmp_path / "a")
    write_full_image(path, array("Q", range(data, data + count * 65536, 65536)))
    tracemalloc.start()
    try:
        result = check_path(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result.status, result.allocated_clusters, result.fragmented_clusters) == (0, count, 0)
    assert peak < 12 << 20


def test_all_problems_are_counted_and_some_of_them_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    write_full_image(path, array("Q", [3]) * (1 << 18))
    result = check_path(path)
    assert (result.corruptions, len(result.problems)) == (1 << 18, KEPT_PROBLEMS)
    assert in_qemus_terms(result) == qemu_check(path)


def test_a_file_too_large_for_its_bitmap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "MOST_CLUSTERS", 100)
    path = create(str(tmp_path / "a"), 1 << 20, cluster_size=4096)
    os.truncate(path, 100 * 4096)
    assert check_path(path).status == 3
    os.truncate(path, 101 * 4096)
    with pytest.raises(ImageError, match="too many to check"):
        check_path(path)


def test_tables_of_zeroes_in_a_huge_sparse_image_are_quick(tmp_path: Path) -> None:
    header = Header.new(1 << 60, cluster_size=2 << 20, table_size=8)
    path = str(tmp_path / "a")
    with open(path, "wb") as file:
        file.write(header.pack())
        file.truncate(header.l1_table_offset + header.geometry.table_bytes)
    assert dataclasses.astuple(check_path(path))[1:5] == (0, 0, 0, 0)


def test_a_table_that_cannot_be_read_is_a_check_error(image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(fd: int, length: int, offset: int) -> bytes:
        if offset == 5 << 16:
            raise OSError(5, "Input/output error")
        return os.pread(fd, length, offset)

    monkeypatch.setattr(walk_module, "pread_exact", read)
    result = check_path(image.path)
    assert (result.status, result.check_errors, result.corruptions, result.leaks) == (1, 1, 0, 3)


@pytest.mark.parametrize("content", [b"", b"QED\0", bytes(65536), b"QED\0" + bytes(65536)])
def test_refuses_what_is_no_qed_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        check_path(str(path))


def test_nothing_is_changed(image: RawImage) -> None:
    image.put(image.l2_offset(0), 3)
    with open(image.path, "rb") as file:
        before = file.read()
    check_path(image.path)
    with open(image.path, "rb") as file:
        assert file.read() == before
