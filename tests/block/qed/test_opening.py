"""Opening: what a crash left is taken back, what is damaged is refused and stays as it is, a new image is complete."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.extension import EXTENSION_OFFSET
from nbdstream.block.qed.layout import Header
from nbdstream.block.qed.opening import OpenFile, create_file, open_file, opened, read_header
from nbdstream.errors import ImageError
from tests.support import qed
from tests.support.descriptors import open_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_records")

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""


def no_lock(_fd: int) -> None:
    pass


def look(path: str, *, writable: bool = True) -> OpenFile:
    file = open_file(path, no_lock, writable=writable)
    os.close(file.fd)
    return file


def content_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Two L2 tables; clusters 0 and 2 and the first of the second table hold data, 1 is zero."""
    path = qed.create(str(tmp_path / "image"), (SPAN + 100) * CLUSTER, cluster_size=CLUSTER, table_size=2)
    qed.qemu_io(
        path,
        f"write -P 1 0 {CLUSTER}",
        f"write -z {CLUSTER} {CLUSTER}",
        f"write -P 2 {2 * CLUSTER} {CLUSTER}",
        f"write -P 3 {SPAN * CLUSTER} {CLUSTER}",
    )
    return path


# What is found.


def test_every_cluster_that_is_not_unallocated_counts_as_allocated(path: str) -> None:
    allocated = look(path).allocated
    assert len(allocated) == SPAN + 100
    assert list(allocated.search(1)) == [0, 1, 2, SPAN]


def test_a_clean_image_has_no_free_cluster_and_stays_as_it_is(path: str) -> None:
    before = content_of(path)
    file = look(path)
    assert file.space.free == []
    assert file.space.end == len(before)
    assert content_of(path) == before


def test_a_cluster_in_the_middle_that_nothing_leads_to_is_free(path: str) -> None:
    raw = qed.RawImage(path)
    place = raw.get(raw.l2_offset(0))
    raw.put(raw.l2_offset(0), 0)
    assert look(path).space.free == [(place, CLUSTER)]


def test_the_tail_that_a_crash_left_is_given_back(path: str) -> None:
    size = os.path.getsize(path)
    qed.RawImage(path).extend(3 * CLUSTER)
    look(path)
    assert os.path.getsize(path) == size
    assert qed.qemu_check(path).status == 0


def test_a_piece_of_a_cluster_at_the_end_is_given_back(path: str) -> None:
    size = os.path.getsize(path)
    qed.RawImage(path).extend(100)
    look(path)
    assert os.path.getsize(path) == size


def test_what_an_earlier_owner_left_in_the_page_cache_is_made_durable(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.path.samestat(os.fstat(fd), os.stat(path))))
    look(path)
    assert synced == [True]


def test_for_reading_nothing_is_changed(path: str) -> None:
    qed.RawImage(path).extend(3 * CLUSTER)
    before = content_of(path)
    look(path, writable=False)
    assert content_of(path) == before


def test_data_beyond_the_image_size_is_not_free(path: str) -> None:
    """In the last table, and in a table of which nothing lies inside."""
    raw = qed.RawImage(path)
    clusters = {n: raw.get(raw.l2_offset(n)) for n in (2, SPAN)}
    with open(path, "r+b") as file:
        file.seek(48)
        file.write((2 * CLUSTER).to_bytes(8, "little"))
    file_ = look(path)
    assert file_.space.free == []
    assert len(file_.allocated) == 2
    assert file_.allocated.all()
    assert {n: raw.get(raw.l2_offset(n)) for n in (2, SPAN)} == clusters
    assert qed.qemu_check(path).status == 0


def test_unknown_autoclear_features_are_cleared_by_a_writer_alone(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(32, 1 << 40)
    look(path, writable=False)
    assert raw.get(32) == 1 << 40
    assert look(path).header.autoclear_features == 0
    assert raw.get(32) == 0


def test_the_lock_is_taken_before_anything_is_read_or_changed(path: str) -> None:
    qed.RawImage(path).extend(3 * CLUSTER)
    before = content_of(path)

    def locked(fd: int) -> None:
        assert content_of(path) == before
        raise ImageError(f"{path}: somebody has it")

    with pytest.raises(ImageError, match="somebody has it"):
        open_file(path, locked, writable=True)
    assert content_of(path) == before


# What a killed owner noted.


@pytest.fixture
def own(tmp_path: Path) -> Iterator[str]:
    """An image that we made: it has a UUID, and so can have a record."""
    path = str(tmp_path / "own")
    create_file(path, 3 * SPAN * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name=None)
    yield path
    close_record(look(path))


def close_record(file: OpenFile) -> None:
    if file.record:
        file.record.close()


def kill(path: str, *clusters: int) -> dict[int, int]:
    """Leave an image as its owner does who is killed after these clusters were written; return where they are."""
    file = open_file(path, no_lock, writable=True)
    assert file.record
    places = {}
    for number, cluster in enumerate(clusters):
        places[cluster] = file.space.end + number * CLUSTER
        os.pwrite(file.fd, bytes([number + 1]) * CLUSTER, places[cluster])
        file.record.note(cluster, places[cluster])
    os.close(file.fd)
    return places


def test_links_that_were_noted_only_are_in_the_tables_when_a_writer_has_opened_the_image(own: str) -> None:
    places = kill(own, 5, SPAN + 7, 5)
    file = look(own)
    raw = qed.RawImage(own)
    assert {cluster: raw.get(raw.l2_offset(cluster)) for cluster in places} == places
    assert list(file.allocated.search(1)) == [5, SPAN + 7]
    assert qed.content(own)[5 * CLUSTER : 6 * CLUSTER] == b"\x03" * CLUSTER
    assert qed.qemu_check(own).corruptions == 0


def test_links_that_were_noted_are_replayed_once(own: str) -> None:
    kill(own, 5)
    close_record(look(own))
    raw = qed.RawImage(own)
    raw.put(raw.l2_offset(5), 1)
    look(own)
    assert raw.get(raw.l2_offset(5)) == 1


def test_for_reading_links_that_were_noted_count_and_the_file_stays_as_it_is(own: str) -> None:
    places = kill(own, 5, SPAN + 7)
    before = content_of(own)
    assert look(own, writable=False).links == list(places.items())
    assert content_of(own) == before


def test_what_was_noted_is_void_when_a_stranger_has_written_since(own: str) -> None:
    """QEMU clears autoclear features that it does not know when it opens an image for writing."""
    kill(own, 5)
    qed.qemu_io(own, f"write -P 9 {5 * CLUSTER} {CLUSTER}")
    assert qed.RawImage(own).get(32) == 0
    look(own)
    assert qed.content(own)[5 * CLUSTER : 6 * CLUSTER] == b"\x09" * CLUSTER


def test_a_record_is_of_one_file_and_not_of_its_copy(own: str, tmp_path: Path) -> None:
    kill(own, 5)
    (tmp_path / "copy").write_bytes(content_of(own))
    file = look(str(tmp_path / "copy"))
    assert not file.allocated.any()
    close_record(file)


# What is refused, byte for byte unchanged.


def refused(path: str, match: str, *, writable: bool = True) -> None:
    before = content_of(path)
    opened = open_files().count(path)
    with pytest.raises(ImageError, match=match) as error:
        look(path, writable=writable)
    assert path in str(error.value)
    assert "\n" not in str(error.value)
    assert content_of(path) == before
    assert open_files().count(path) == opened


@pytest.mark.parametrize("writable", [True, False])
def test_an_image_cut_off_in_its_l1_table_is_refused(path: str, *, writable: bool) -> None:
    os.truncate(path, CLUSTER + 512)
    refused(path, "truncated", writable=writable)


def test_an_image_cut_off_in_front_of_an_l2_table_is_refused(path: str) -> None:
    raw = qed.RawImage(path)
    os.truncate(path, raw.get(raw.l1_offset(1)) + CLUSTER)
    refused(path, "L1 entry 1")


def test_an_image_cut_off_in_front_of_its_last_data_is_refused(path: str) -> None:
    qed.qemu_io(path, f"write {5 * CLUSTER} {CLUSTER}")
    qed.RawImage(path).extend(-512)
    refused(path, "L2 entry")


@pytest.mark.parametrize("entry", [2, CLUSTER + 512, 0x1000 - 8, 1 << 40, (1 << 64) - CLUSTER])
def test_an_l2_entry_that_leads_to_no_cluster_is_refused(path: str, entry: int) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l2_offset(50), entry)
    refused(path, "L2 entry")


@pytest.mark.parametrize("entry", [1, 512, 1 << 40])
@pytest.mark.parametrize("index", [0, 1, 1000])
def test_an_l1_entry_that_leads_to_no_table_is_refused(path: str, index: int, entry: int) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l1_offset(index), entry)
    refused(path, f"L1 entry {index} ")


def test_an_l2_entry_beyond_the_image_size_that_leads_nowhere_is_refused(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l2_offset(SPAN + 900), 1 << 40)
    refused(path, "L2 entry")


def test_data_that_two_entries_lead_to_is_refused(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l2_offset(50), raw.get(raw.l2_offset(0)))
    refused(path, "used twice")


def test_a_table_that_two_entries_lead_to_is_refused(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l1_offset(1), raw.get(raw.l1_offset(0)))
    refused(path, "used twice")


@pytest.mark.parametrize("target", ["header", "L1", "L2"])
def test_data_in_the_place_of_something_else_is_refused(path: str, target: str) -> None:
    raw = qed.RawImage(path)
    place = {"header": 0, "L1": raw.l1_table_offset, "L2": raw.get(raw.l1_offset(0))}[target]
    raw.put(raw.l2_offset(50), place or CLUSTER - 4096 + 8)
    refused(path, "used twice|L2 entry")


def test_what_qemu_did_not_finish_is_dropped_by_a_writer_and_told(path: str, caplog: pytest.LogCaptureFixture) -> None:
    raw = qed.RawImage(path)
    raw.put(16, 2)
    raw.put(raw.l2_offset(50), 1 << 40)
    before = content_of(path)
    look(path, writable=False)
    assert content_of(path) == before
    file = look(path)
    assert not file.header.needs_check
    assert not file.allocated[50]
    assert (raw.get(16), raw.get(raw.l2_offset(50))) == (0, 0)
    assert f"4096 bytes of the disk were never stored (at {50 * CLUSTER}+4096)" in caplog.text
    assert qed.qemu_check(path).corruptions == 0


def test_an_image_that_qemu_did_not_close_is_opened_as_it_is_if_nothing_is_wrong(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = content_of(path)
    qed.RawImage(path).put(16, 2)
    look(path)
    assert content_of(path) == before
    assert not caplog.records


def test_data_that_two_entries_lead_to_is_refused_whoever_did_not_close_the_image(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(16, 2)
    raw.put(raw.l2_offset(50), raw.get(raw.l2_offset(0)))
    refused(path, "used twice")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    refused(str(tmp_path / "raw"), "not a QED image")


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in [
        ("", "is a directory"),
        ("nothing", "cannot be opened: No such file"),
        ("pipe", "is neither a regular file nor a block device"),
    ]:
        with pytest.raises(ImageError, match=f"^{tmp_path / name} {why}"):
            look(str(tmp_path / name))


def test_what_goes_wrong_while_a_file_is_open_names_it(path: str) -> None:
    with pytest.raises(ImageError, match=f"^{path}: no luck$"), opened(path):
        raise ImageError("no luck")


# Making.


@pytest.mark.parametrize(("cluster_size", "table_size"), qed.SMALL_GEOMETRIES)
def test_qemu_finds_a_new_image_clean_and_of_the_size_asked_for(
    tmp_path: Path, cluster_size: int, table_size: int
) -> None:
    path = str(tmp_path / "image")
    create_file(path, 1 << 20, cluster_size=cluster_size, table_size=table_size, backing_name="nbd://host/disk")
    info = qed.qemu_info(path)
    assert info["virtual-size"] == 1 << 20
    assert info["cluster-size"] == cluster_size
    assert info["backing-filename"] == "nbd://host/disk"
    assert qed.qemu_check(path).status == 0
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_new_image_remembers_where_it_came_from(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    create_file(
        path, 1 << 20, cluster_size=65536, table_size=4, backing_name="nbd://host/disk", origin_size=(1 << 20) - 100
    )
    header, extension, name = read_header(path)
    assert name == "nbd://host/disk"
    assert header.backing_is_raw
    assert extension is not None
    assert (extension.origin, extension.origin_size) == ("nbd://host/disk", (1 << 20) - 100)


def test_a_damaged_extension_is_none(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    create_file(path, 1 << 20, cluster_size=65536, table_size=4, backing_name="nbd://host/disk")
    qed.RawImage(path).put(EXTENSION_OFFSET + 40, 12345)
    assert read_header(path)[1] is None
    assert look(path).extension is None


def test_an_image_that_qemu_made_gets_an_identity_when_it_is_written_to(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "image"), 1 << 20, backing="nbd://host/disk")
    assert look(path, writable=False).extension is None
    given = look(path).extension
    assert given is not None
    assert (given.origin, given.origin_size) == ("nbd://host/disk", 0)
    qed.qemu_img("rebase", "-u", "-f", "qed", "-b", "", path)
    qed.qemu_io(path, "write -P 7 0 64k")
    assert look(path).extension == given
    assert qed.qemu_check(path).status == 0


def test_what_somebody_else_keeps_in_the_header_stays(tmp_path: Path) -> None:
    path = qed.create(str(tmp_path / "image"), 1 << 20)
    qed.RawImage(path).put(EXTENSION_OFFSET + 8000, 12345)
    assert look(path).extension is None
    assert qed.RawImage(path).get(EXTENSION_OFFSET + 8000) == 12345


def test_a_file_that_exists_is_not_made_anew(path: str) -> None:
    before = content_of(path)
    with pytest.raises(ImageError, match="exists"):
        create_file(path, 1 << 20, cluster_size=65536, table_size=4, backing_name=None)
    assert content_of(path) == before


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_an_image_that_cannot_be_finished_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ImageError, match="No space left"):
        create_file(str(tmp_path / "image"), 1 << 20, cluster_size=65536, table_size=4, backing_name=None)
    assert os.listdir(tmp_path) == []


def without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the file system be one that cannot make files without a name."""
    real = os.open

    def refusing(path: str, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("fails", [False, True])
def test_where_files_cannot_be_made_without_a_name_an_image_appears_whole_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    without_tmpfile(monkeypatch)
    seen = []

    def sync(_fd: int) -> None:
        seen.append(os.listdir(tmp_path))
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    path = str(tmp_path / "image")
    if fails:
        with pytest.raises(ImageError, match="No space left"):
            create_file(path, 1 << 20, cluster_size=65536, table_size=4, backing_name=None)
        assert os.listdir(tmp_path) == []
        return
    create_file(path, 1 << 20, cluster_size=65536, table_size=4, backing_name=None)
    assert [name.endswith(".unfinished") for name in seen[0]] == [True]
    assert os.listdir(tmp_path) == ["image"]
    assert qed.qemu_check(path).status == 0
    with pytest.raises(ImageError, match="exists"):
        create_file(path, 1 << 20, cluster_size=65536, table_size=4, backing_name=None)
    assert os.listdir(tmp_path) == ["image"]


def test_an_image_of_an_impossible_size_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot have"):
        create_file(str(tmp_path / "image"), 1 << 60, cluster_size=4096, table_size=2, backing_name=None)
    assert os.listdir(tmp_path) == []


def test_a_backing_file_name_that_does_not_fit_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="name"):
        create_file(str(tmp_path / "image"), 1 << 20, cluster_size=4096, table_size=2, backing_name="n" * 4096)
    assert os.listdir(tmp_path) == []


def test_an_image_without_room_for_the_extension_has_none(path: str) -> None:
    assert Header.parse(content_of(path)[:64], os.path.getsize(path)).has_extension_area is False
    assert read_header(path)[1] is None
