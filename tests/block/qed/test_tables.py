"""Tables: lookups in pages, sectors written whole, and a memory that stays bounded."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed import tables as tables_module
from nbdstream.block.qed.layout import HEADER_BYTES, Header
from nbdstream.block.qed.opening import create_file
from nbdstream.block.qed.tables import PAGE_ENTRIES, SECTOR_ENTRIES, UNALLOCATED, ZERO, Tables
from nbdstream.errors import ImageError
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[str], Tables]]:
    fds = []

    def load(path: str) -> Tables:
        fd = os.open(path, os.O_RDWR)
        fds.append(fd)
        return Tables.load(fd, Header.parse(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size))

    yield load
    for fd in fds:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """An image of three L2 tables, of which QEMU made the first and the third."""
    path = qed.create(str(tmp_path / "image"), (2 * SPAN + 600) * CLUSTER, cluster_size=CLUSTER, table_size=2)
    qed.qemu_io(path, f"write 0 {CLUSTER}", f"write -z {CLUSTER} {CLUSTER}", f"write {(2 * SPAN + 599) * CLUSTER} 512")
    return path


def entry(tables: Tables, cluster: int) -> int:
    page = tables.load_page(cluster // PAGE_ENTRIES)
    return page[cluster % PAGE_ENTRIES]


def test_the_entries_are_those_that_qemu_wrote(path: str, load: Callable[[str], Tables]) -> None:
    tables, raw = load(path), qed.RawImage(path)
    for cluster in (0, 1, 2, 2 * SPAN + 599):
        assert entry(tables, cluster) == raw.get(raw.l2_offset(cluster))
    assert entry(tables, 1) == ZERO


def test_without_a_table_everything_is_unallocated(path: str, load: Callable[[str], Tables]) -> None:
    tables = load(path)
    assert entry(tables, SPAN) == UNALLOCATED
    page = tables.page_now(SPAN // PAGE_ENTRIES)
    assert page is not None
    assert not any(page)


def test_a_page_that_was_empty_holds_what_was_linked_to_it(path: str, load: Callable[[str], Tables]) -> None:
    tables = load(path)
    page = tables.page_now(1)
    assert page is not None
    assert not any(page)
    links = [(PAGE_ENTRIES + 5, ZERO), (PAGE_ENTRIES + 6, ZERO)]
    tables.link({}, links)
    tables.linked({}, links)
    page = tables.page_now(1)
    assert page is not None
    assert list(page[4:8]) == [UNALLOCATED, ZERO, ZERO, UNALLOCATED]


def test_tables_beyond_the_image_size_have_pages_too(path: str, load: Callable[[str], Tables]) -> None:
    with open(path, "r+b") as file:
        file.seek(48)
        file.write((600 * CLUSTER).to_bytes(8, "little"))
    tables = load(path)
    assert list(tables.pages()) == [0, 1, 4, 5]
    assert tables.present_pages() == [0, 1]
    assert tables.page_count == 2


def test_absent_counts_up_to_the_end_of_the_missing_table(path: str, load: Callable[[str], Tables]) -> None:
    tables = load(path)
    assert tables.absent(0) == 0
    assert tables.absent(SPAN) == SPAN
    assert tables.absent(SPAN + 10) == SPAN - 10


def test_present_pages_are_those_of_existing_tables_inside_the_disk(path: str, load: Callable[[str], Tables]) -> None:
    assert load(path).present_pages() == [0, 1, 4, 5]


@pytest.mark.parametrize("place", [CLUSTER + 512, 1, 1 << 40, (1 << 64) - CLUSTER])
def test_an_l1_entry_where_no_table_can_be_is_refused(path: str, load: Callable[[str], Tables], place: int) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l1_offset(1), place)
    with pytest.raises(ImageError, match="L1 entry 1"):
        load(path)


def test_a_page_in_memory_is_had_at_once_and_only_read_once(
    path: str, load: Callable[[str], Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = load(path)
    reads = []
    preadv = os.preadv

    def counted(*args: object) -> int:
        reads.append(args)
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", counted)
    tables.keep_page(0, tables.load_page(0))
    assert tables.page_now(0) is tables.page_now(0)
    assert not reads


def test_a_page_that_would_have_to_be_waited_for_is_not_had_at_once(
    path: str, load: Callable[[str], Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = load(path)

    def would_block(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", would_block)
    assert tables.page_now(0) is None
    tables.keep_page(0, tables.load_page(0))
    assert tables.page_now(0) is not None


def test_no_more_pages_are_kept_than_allowed(
    path: str, load: Callable[[str], Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_module, "CACHED_PAGES", 2)
    tables = load(path)
    for page in (0, 1, 4, 5):
        tables.keep_page(page, tables.load_page(page))
        assert len(tables._cache) <= 2


def test_a_link_changes_one_sector_of_the_file(path: str, load: Callable[[str], Tables]) -> None:
    tables, raw = load(path), qed.RawImage(path)
    with open(path, "rb") as file:
        before = file.read()
    tables.link({}, [(SECTOR_ENTRIES * 2 + 1, ZERO)])
    with open(path, "rb") as file:
        after = file.read()
    changed = raw.l2_offset(SECTOR_ENTRIES * 2 + 1)
    assert after[changed : changed + 8] == struct.pack("<Q", ZERO)
    assert after[:changed] == before[:changed]
    assert after[changed + 8 :] == before[changed + 8 :]


def test_links_are_written_in_whole_aligned_sectors_and_neighbours_together(
    path: str, load: Callable[[str], Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, raw = load(path), qed.RawImage(path)
    writes = []
    pwrite = os.pwrite

    def recorded(fd: int, data: bytes, offset: int) -> int:
        writes.append((offset, len(data)))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", recorded)
    tables.link({}, [(SECTOR_ENTRIES * n + 3, ZERO) for n in (1, 2, 4)])
    start = raw.l2_offset(0)
    assert writes == [(start + 512, 1024), (start + 4 * 512, 512)]


def test_what_was_linked_is_seen_in_pages_that_are_kept(path: str, load: Callable[[str], Tables]) -> None:
    tables = load(path)
    page = tables.page_now(0)
    assert page is not None
    tables.link({}, [(7, ZERO)])
    assert page[7] == UNALLOCATED
    tables.linked({}, [(7, ZERO)])
    page = tables.page_now(0)
    assert page is not None
    assert page[7] == ZERO


def test_a_new_table_is_written_whole_and_reachable_only_when_linked(path: str, load: Callable[[str], Tables]) -> None:
    tables, raw = load(path), qed.RawImage(path)
    place = os.path.getsize(path)
    os.truncate(path, place + CLUSTER)
    links = [(SPAN + 5, ZERO), (SPAN + 700, ZERO)]
    tables.write_new_tables({1: place}, links)
    assert os.path.getsize(path) == place + 2 * CLUSTER
    assert raw.get(raw.l1_offset(1)) == 0
    assert entry(tables, SPAN + 5) == UNALLOCATED
    tables.link({1: place}, links)
    tables.linked({1: place}, links)
    assert raw.get(raw.l1_offset(1)) == place
    assert [entry(tables, SPAN + n) for n in (4, 5, 6, 700)] == [0, ZERO, 0, ZERO]
    assert qed.qemu_check(path).status == 0


def test_data_behind_a_place_is_found_last_first(path: str, load: Callable[[str], Tables]) -> None:
    tables, raw = load(path), qed.RawImage(path)
    first, last = raw.get(raw.l2_offset(0)), raw.get(raw.l2_offset(2 * SPAN + 599))
    assert tables.clusters_behind(first) == [(2 * SPAN + 599, last), (0, first)]
    assert tables.clusters_behind(first + 1) == [(2 * SPAN + 599, last)]
    assert tables.clusters_behind(last + 1) == []


def test_clusters_without_data_are_found_only_where_there_is_a_table_and_the_disk_reaches(
    path: str, load: Callable[[str], Tables]
) -> None:
    found = load(path).zero_clusters(1 << 20)
    assert found[:2] == [1, 2]
    assert set(found) == {*range(1, SPAN), *range(2 * SPAN, 2 * SPAN + 599)}
    assert len(load(path).zero_clusters(10)) == 10


def test_an_l1_table_of_several_pages_is_linked_in_the_right_place(
    tmp_path: Path, load: Callable[[str], Tables]
) -> None:
    path = str(tmp_path / "image")
    create_file(path, 600 * SPAN * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name=None)
    tables = load(path)
    place = os.path.getsize(path)
    tables.write_new_tables({550: place}, [])
    tables.link({550: place}, [])
    assert qed.RawImage(path).get(qed.RawImage(path).l1_offset(550)) == place
    assert [(index, entry) for index, entry in enumerate(load(path).l1) if entry] == [(550, place)]


@pytest.mark.parametrize("first", [UNALLOCATED, ZERO, 100 * CLUSTER, (1 << 62) - CLUSTER * SPAN])
@pytest.mark.parametrize("cut", [1, 2, 63, 300, 800])
@pytest.mark.parametrize("start", [0, 5, PAGE_ENTRIES - 1])
def test_entries_are_followed_as_far_as_they_go(
    path: str, load: Callable[[str], Tables], first: int, cut: int, start: int
) -> None:
    step = CLUSTER if first > ZERO else 0
    tables, raw = load(path), qed.RawImage(path)
    for cluster in range(PAGE_ENTRIES + 10):
        raw.put(raw.l2_offset(cluster), first + cluster * step)
    raw.put(raw.l2_offset(cut), 77 * CLUSTER + 1)
    expected = min(PAGE_ENTRIES, cut if cut > start else PAGE_ENTRIES) - start
    assert tables.follow_now(start, first + start * step, step, 1 << 40) == expected
    assert tables.follow_now(start, first + start * step, step, 3) == min(3, expected)
    assert tables.follow_now(start, first + (start + 1) * CLUSTER, step, 10) == 0


def test_a_table_that_is_nowhere_is_an_error_where_it_is_asked_for(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l1_offset(2), 12345)
    fd = os.open(path, os.O_RDONLY)
    try:
        tables = Tables.load(fd, Header.parse(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size), strict=False)
        assert entry(tables, 1) == ZERO
        with pytest.raises(OSError, match="L1 entry 2 leads to no table"):
            tables.page_now(2 * SPAN // PAGE_ENTRIES)
    finally:
        os.close(fd)
