from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nbdstream.block.qed.layout import (
    FEATURE_BACKING_FILE,
    FEATURE_BACKING_FORMAT_NO_PROBE,
    FEATURE_NEED_CHECK,
    HEADER_BYTES,
    MAX_DISK_BYTES,
    Geometry,
    Header,
    decode_backing_name,
    encode_backing_name,
)
from nbdstream.errors import ImageError
from tests.support.qed import USABLE_GEOMETRIES, create, qemu_check, qemu_img, qemu_info, qemu_io, without_backing

if TYPE_CHECKING:
    from pathlib import Path

HEADER = Header(
    cluster_size=4096,
    table_size=2,
    header_size=1,
    features=0,
    compat_features=0,
    autoclear_features=0,
    l1_table_offset=4096,
    image_size=1 << 20,
)
FILE_SIZE = 3 * 4096


def read(path: str) -> Header:
    with open(path, "rb") as file:
        return Header.parse(file.read(HEADER_BYTES), os.path.getsize(path))


def write(path: str, header: Header, name: bytes = b"", file_size: int | None = None) -> str:
    """Make the file of an empty image."""
    with open(path, "wb") as file:
        file.write(header.pack() + name)
        file.truncate(header.l1_table_offset + header.geometry.table_bytes if file_size is None else file_size)
    return path


def first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(200)


# -- QEMU's images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cluster_size", "table_size"), USABLE_GEOMETRIES)
def test_reads_every_geometry_that_qemu_makes(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    path = create(str(tmp_path / "a"), (1 << 20) + 1, cluster_size=cluster_size, table_size=table_size)
    header = read(path)
    assert (header.cluster_size, header.table_size, header.image_size) == (cluster_size, table_size, (1 << 20) + 512)
    assert header.pack() == first_bytes(path)[:HEADER_BYTES]


def test_finds_the_backing_name_that_qemu_stored(tmp_path: Path) -> None:
    path = create(
        str(tmp_path / "a"), 1 << 20, backing="/dev/\N{LATIN SMALL LETTER E WITH ACUTE}t\udce9", backing_format="raw"
    )
    header = read(path)
    start = header.backing_filename_offset
    name = decode_backing_name(first_bytes(path)[start : start + header.backing_filename_size])
    assert (header.has_backing, header.backing_is_raw, name) == (True, True, "/dev/\xe9t\udce9")


def test_a_backing_file_that_qemu_probes_is_not_raw(tmp_path: Path) -> None:
    header = read(create(str(tmp_path / "a"), 1 << 20, backing="/nowhere", backing_format="qcow2"))
    assert (header.has_backing, header.backing_is_raw) == (True, False)


def test_an_image_that_qemu_writes_into_needs_a_check_until_it_is_closed(tmp_path: Path) -> None:
    path = create(str(tmp_path / "a"), 1 << 20)
    qemu_io(path, "write 0 4k", "abort", check=False)
    assert read(path).needs_check
    qemu_io(path, "write 64k 4k")
    assert not read(path).needs_check


# -- our images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cluster_size", "table_size"), USABLE_GEOMETRIES)
def test_qemu_works_with_every_geometry_that_we_make(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    header = Header.new((1 << 20) + 1, cluster_size=cluster_size, table_size=table_size)
    path = write(str(tmp_path / "a"), header)
    qemu_io(path, "write -P 5 1M 512", "read -P 5 1M 512", "read -P 0 0 1M")
    info = qemu_info(path)
    assert (info["virtual-size"], info["cluster-size"]) == ((1 << 20) + 512, cluster_size)
    assert qemu_check(path).status == 0


@pytest.mark.parametrize(("cluster_size", "table_size"), USABLE_GEOMETRIES)
def test_the_largest_image_is_the_largest_that_qemu_opens(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    largest = Geometry(cluster_size, table_size, 1).max_image_size
    header = Header.new(largest, cluster_size=cluster_size, table_size=table_size)
    qemu_io(write(str(tmp_path / "a"), header), f"read {largest - 512} 512", read_only=True)
    too_large = write(str(tmp_path / "b"), dataclasses.replace(header, image_size=largest + 512))
    assert qemu_io(too_large, "read 0 512", read_only=True, check=False).returncode == 1
    with pytest.raises(ImageError, match=str(largest + 1)):
        Header.new(largest + 1, cluster_size=cluster_size, table_size=table_size)


@pytest.mark.parametrize(
    ("cluster_size", "table_size"),
    [(65536, 1), (65536, 0), (65536, 3), (65536, 32), (2048, 4), (1 << 27, 4), (65535, 4), (0, 4), (-65536, 4)],
)
def test_makes_no_image_that_the_format_does_not_know(cluster_size: int, table_size: int) -> None:
    with pytest.raises(ImageError, match="allowed are"):
        Header.new(1 << 20, cluster_size=cluster_size, table_size=table_size)


@pytest.mark.parametrize(("cluster_size", "table_size"), [(4 << 20, 4), (2 << 20, 16), (8 << 20, 2), (64 << 20, 16)])
def test_makes_no_image_that_qemu_cannot_open(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    with pytest.raises(ImageError, match="smaller"):
        Header.new(0, cluster_size=cluster_size, table_size=table_size)
    options = f"cluster_size={cluster_size},table_size={table_size}"
    assert qemu_img("create", "-f", "qed", "-o", options, str(tmp_path / "a"), "1M", check=False).returncode == 1


def test_makes_no_image_of_negative_size() -> None:
    with pytest.raises(ImageError, match="-512"):
        Header.new(-512)


def test_an_image_of_no_bytes_is_possible(tmp_path: Path) -> None:
    assert qemu_info(write(str(tmp_path / "a"), Header.new(0)))["virtual-size"] == 0


@pytest.mark.parametrize("cluster_size", [4096, 8192, 16384, 65536, 1 << 20])
def test_new_images_have_room_for_the_extension(cluster_size: int) -> None:
    assert Header.new(1 << 20, cluster_size=cluster_size, table_size=2, backing_name="x" * 4095).has_extension_area


def test_qemus_images_with_small_clusters_have_no_room_for_the_extension(tmp_path: Path) -> None:
    assert not read(create(str(tmp_path / "a"), 1 << 20, cluster_size=8192)).has_extension_area
    assert read(create(str(tmp_path / "b"), 1 << 20, cluster_size=16384)).has_extension_area


def test_a_backing_name_in_the_middle_of_the_header_leaves_no_room_for_the_extension() -> None:
    header = Header.new(1 << 20, backing_name="nbd://a")
    assert not dataclasses.replace(header, backing_filename_offset=8190).has_extension_area


# -- backing files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize("length", [1, 4095])
def test_qemu_reads_the_backing_name_that_we_stored(tmp_path: Path, cluster_size: int, length: int) -> None:
    name = "a" * length
    header = Header.new(1 << 20, cluster_size=cluster_size, backing_name=name)
    assert qemu_info(write(str(tmp_path / "a"), header, name.encode()))["backing-filename"] == name


def test_stores_a_backing_name_as_qemu_does(tmp_path: Path) -> None:
    name = "nbd+unix:///disk?socket=/run/a%20b"
    path = create(str(tmp_path / "a"), 1 << 20)
    header = read(path).with_backing(name)
    qemu_img("rebase", "-u", "-f", "qed", "-b", name, "-F", "raw", path)
    assert first_bytes(path).startswith(header.pack() + encode_backing_name(name))


def test_forgets_a_backing_name_as_qemu_does(tmp_path: Path) -> None:
    path = create(str(tmp_path / "a"), 1 << 20, backing="/nowhere")
    header = read(path).without_backing()
    qemu_img("rebase", "-u", "-f", "qed", "-b", "", path)
    assert first_bytes(path)[:HEADER_BYTES] == header.pack()


@pytest.mark.parametrize(("cluster_size", "fits"), [(4096, 4032), (8192, 4095)])
def test_an_image_of_qemu_takes_names_as_long_as_qemu_lets_it(tmp_path: Path, cluster_size: int, fits: int) -> None:
    path = create(str(tmp_path / "a"), 1 << 20, cluster_size=cluster_size)
    header = read(path)
    qemu_img("rebase", "-u", "-f", "qed", "-b", "a" * fits, "-F", "raw", path)
    assert header.with_backing("a" * fits) == read(path)
    with pytest.raises(ImageError, match=f"has {fits + 1} bytes"):
        header.with_backing("a" * (fits + 1))


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 4096, "\xe9" * 2048])
def test_refuses_backing_names_that_cannot_be_stored(name: str) -> None:
    with pytest.raises(ImageError, match="name"):
        Header.new(1 << 20, backing_name=name)


def test_an_image_with_unknown_compatible_features_gets_no_backing_file() -> None:
    with pytest.raises(ImageError, match="0x8"):
        dataclasses.replace(HEADER, compat_features=8).with_backing("a")


def test_a_backing_name_of_no_bytes_is_none() -> None:
    header = dataclasses.replace(HEADER, features=FEATURE_BACKING_FILE | FEATURE_BACKING_FORMAT_NO_PROBE)
    assert not header.has_backing


@pytest.mark.parametrize(("stored", "name"), [(b"abc", "abc"), (b"ab\0c", "ab"), (b"\0c", None), (b"", None)])
def test_a_backing_name_ends_at_a_nul(stored: bytes, name: str | None) -> None:
    assert decode_backing_name(stored) == name


@given(st.binary(min_size=1, max_size=4095).filter(lambda name: b"\0" not in name))
def test_every_file_name_survives_as_a_backing_name(name: bytes) -> None:
    decoded = decode_backing_name(name)
    assert decoded is not None
    assert encode_backing_name(decoded) == name


# -- headers that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 8),
        ("cluster_size", 4097),
        ("cluster_size", 2048),
        ("table_size", 1),
        ("table_size", 3),
        ("header_size", 0),
        ("image_size", 513),
        ("image_size", (1 << 32) + 512),
        ("l1_table_offset", 0),
        ("l1_table_offset", 4095),
        ("l1_table_offset", 8192),
        ("l1_table_offset", (1 << 64) - 4096),
    ],
)
def test_says_which_field_is_wrong(field: str, value: int) -> None:
    with pytest.raises(ImageError) as caught:
        Header.parse(dataclasses.replace(HEADER, **{field: value}).pack(), FILE_SIZE)
    text = str(caught.value)
    assert field in text
    assert str(value) in text or hex(value) in text
    assert "\n" not in text


@pytest.mark.parametrize(("offset", "length"), [(4090, 7), (64, 4096), (4294967295, 4294967295)])
def test_says_that_a_backing_name_is_wrong(offset: int, length: int) -> None:
    header = dataclasses.replace(
        HEADER, features=FEATURE_BACKING_FILE, backing_filename_offset=offset, backing_filename_size=length
    )
    with pytest.raises(ImageError, match="backing_filename"):
        Header.parse(header.pack(), FILE_SIZE)


def test_a_backing_name_that_is_not_used_may_be_wrong() -> None:
    header = dataclasses.replace(HEADER, backing_filename_offset=1 << 31, backing_filename_size=1 << 31)
    assert Header.parse(header.pack(), FILE_SIZE) == header


@pytest.mark.parametrize("content", [b"", b"QED", b"QFI\xfb" * 16, bytes(64), b"QED\0", HEADER.pack()[:-1]])
def test_refuses_what_is_no_qed_image(content: bytes) -> None:
    with pytest.raises(ImageError, match="not a QED image"):
        Header.parse(content, len(content))


@given(st.binary(max_size=200), st.integers(0, 1 << 64))
def test_any_bytes_are_a_header_or_an_image_error(data: bytes, file_size: int) -> None:
    for content in (data, b"QED\0" + data):
        with contextlib.suppress(ImageError):
            assert Header.parse(content, file_size).pack() == content[:HEADER_BYTES]


@st.composite
def damaged_headers(draw: st.DrawFn) -> tuple[Header, int]:
    """Headers of which one or two fields are unusual, most often wrong, with a file size (in whole sectors)."""
    unusual = draw(st.sets(st.sampled_from([*Header.__dataclass_fields__, "file_size"]), min_size=1, max_size=2))

    def pick(field: str, usual: int, *others: int) -> int:
        return draw(st.sampled_from(others)) if field in unusual else usual

    cluster_size = pick("cluster_size", 4096, 65536, 1 << 20, 4 << 20, 64 << 20, 1 << 27, 2048, 6000, 0)
    table_size = pick("table_size", 2, 0, 1, 3, 4, 8, 16, 32, 1 << 31)
    header_size = pick("header_size", 1, 2, 3, (1 << 20) - 1, 1 << 20, (1 << 32) - 1)
    largest = Geometry(cluster_size, table_size, header_size).max_image_size
    start, table_bytes = header_size * cluster_size, cluster_size * table_size
    near = [start + clusters * cluster_size for clusters in (-1, 1, 2, 3)]
    l1 = pick("l1_table_offset", start, 0, start + 512, (1 << 64) - cluster_size, *near) % (1 << 64)
    end = min(l1 + table_bytes, 8 << 40)
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=header_size,
        features=pick("features", draw(st.sampled_from([0, 5])), 1, 2, 4, 7, 8, 1 << 63),
        compat_features=pick("compat_features", 0, 1, 1 << 63),
        autoclear_features=pick("autoclear_features", 0, 1, 1 << 63),
        l1_table_offset=l1,
        image_size=pick("image_size", 1 << 20, 0, 512, 100, largest, largest + 512, abs(largest - 512), MAX_DISK_BYTES),
        backing_filename_offset=pick("backing_filename_offset", 64, 0, 4091, 4092, 65536, (1 << 32) - 1),
        backing_filename_size=pick("backing_filename_size", 5, 0, 4032, 4033, 4095, 4096, (1 << 32) - 1),
    )
    file_size = pick("file_size", end, 512, start, end - 512, end - cluster_size, end + 512, end + cluster_size)
    return header, max(512, file_size & ~511)


@settings(max_examples=150)
@given(damaged_headers())
def test_accepts_what_qemu_opens(damaged: tuple[Header, int]) -> None:
    """A header_size of 0 apart, which QEMU accepts, and files that end within a sector: it rounds up.

    A disk of 2**63 bytes QEMU opens as well (with 2 MiB clusters and tables of 8), but it cannot read it.
    """
    header, file_size = damaged
    with tempfile.TemporaryDirectory() as directory:
        path = write(os.path.join(directory, "a"), header, b"/name", file_size)
        result = qemu_io(without_backing(path), "length", read_only=True, check=False)
        try:
            read(path)
            accepted = True
        except ImageError:
            accepted = False
    event(f"accepted: {accepted}")
    assert accepted == (result.returncode == 0), result.stderr


def test_refuses_a_disk_larger_than_qemu_can_read(tmp_path: Path) -> None:
    header = dataclasses.replace(
        HEADER, cluster_size=2 << 20, table_size=8, l1_table_offset=2 << 20, image_size=1 << 63
    )
    path = write(str(tmp_path / "a"), header)
    assert qemu_io(path, "read 0 512", read_only=True, check=False).returncode == 1
    with pytest.raises(ImageError, match="image_size"):
        read(path)


# -- derived numbers ----------------------------------------------------------------------------------------------


@given(st.sampled_from(USABLE_GEOMETRIES), st.data())
def test_the_indices_of_a_position_lead_to_its_cluster(geometry: tuple[int, int], data: st.DataObject) -> None:
    this = Geometry(*geometry, 1)
    position = data.draw(st.integers(0, this.max_image_size - 1))
    l1_index, l2_index = this.l1_index(position), this.l2_index(position)
    assert 0 <= l1_index < this.entries
    assert 0 <= l2_index < this.entries
    assert this.cluster_index(position) == l1_index * this.entries + l2_index
    assert 0 <= position - l1_index * this.l2_span - l2_index * this.cluster_size < this.cluster_size


@pytest.mark.parametrize(
    ("offset", "cluster", "table"),
    [(0, False, False), (4096, True, True), (8192, True, True), (12288, True, False), (16384, False, False)]
    + [(offset, False, False) for offset in (4097, 5000, (1 << 64) - 4096, (1 << 64) - 8192, 1)],
)
def test_a_place_is_valid_if_all_of_it_is_behind_the_header_and_in_the_file(
    offset: int, cluster: bool, table: bool
) -> None:
    geometry = Geometry(4096, 2, 1)
    file_size = 16384 + 4095  # the end of a file that is no whole cluster does not count
    assert geometry.valid_cluster_offset(offset, file_size) == cluster
    assert geometry.valid_table_offset(offset, file_size) == table


def test_writing_clears_what_is_to_be_cleared_and_nothing_else() -> None:
    header = dataclasses.replace(HEADER, features=FEATURE_NEED_CHECK, compat_features=1, autoclear_features=6)
    assert header.without_autoclear() == dataclasses.replace(header, autoclear_features=0)
