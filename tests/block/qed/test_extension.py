from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.qed.extension import EXTENSION_BYTES, EXTENSION_OFFSET, MAX_ORIGIN_BYTES, Extension
from nbdstream.block.qed.layout import Header
from tests.support.qed import qemu_check, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

ORIGIN = "nbds://host.example/disk?tls-verify-peer=1"

extensions = st.builds(
    Extension,
    st.uuids(),
    st.binary(max_size=MAX_ORIGIN_BYTES).map(os.fsdecode),
    st.integers(0, (1 << 64) - 1),
)


@given(extensions)
def test_what_is_packed_is_parsed(extension: Extension) -> None:
    area = extension.pack()
    assert len(area) == EXTENSION_BYTES
    assert Extension.parse(area) == extension


def test_the_layout_in_the_file() -> None:
    area = Extension(UUID(int=0x0102), "nbd://a", 1 << 40).pack()
    magic, version, checksum = struct.unpack_from("<8sII", area)
    assert (magic, version, checksum) == (b"NBDSTRM\0", 1, zlib.crc32(area[16:]))
    assert struct.unpack_from("<16sQH7s", area, 16) == (bytes(14) + b"\1\2", 1 << 40, 7, b"nbd://a")
    assert not any(area[16 + 26 + 7 :])


def test_every_new_image_is_another_one() -> None:
    assert Extension.new().image_uuid != Extension.new().image_uuid


def test_a_new_extension_remembers_its_origin() -> None:
    extension = Extension.new(ORIGIN, 1000)
    assert (extension.origin, extension.origin_size) == (ORIGIN, 1000)


@pytest.mark.parametrize(("origin", "size"), [("a" * 4096, 0), ("a", -1), ("a", 1 << 64)])
def test_what_does_not_fit_is_not_packed(origin: str, size: int) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        Extension.new(origin, size).pack()


@given(extensions, st.integers(0, EXTENSION_BYTES - 1), st.integers(1, 255))
def test_a_damaged_byte_anywhere_leaves_nothing_known(extension: Extension, position: int, flip: int) -> None:
    area = bytearray(extension.pack())
    area[position] ^= flip
    assert Extension.parse(bytes(area)) is None


@given(st.integers(0, EXTENSION_BYTES - 1))
def test_a_short_area_leaves_nothing_known(length: int) -> None:
    assert Extension.parse(Extension.new(ORIGIN).pack()[:length]) is None


def test_an_empty_area_leaves_nothing_known() -> None:
    assert Extension.parse(bytes(EXTENSION_BYTES)) is None


@given(st.binary(min_size=1, max_size=100), st.integers(0, 3))
def test_no_contents_are_an_error_even_with_a_right_checksum(payload: bytes, version: int) -> None:
    payload = payload.ljust(EXTENSION_BYTES - 16, b"\xff")
    area = struct.pack("<8sII", b"NBDSTRM\0", version, zlib.crc32(payload)) + payload
    extension = Extension.parse(area)
    if version != 1 or payload[24] + 256 * payload[25] > MAX_ORIGIN_BYTES:
        assert extension is None
    else:
        assert extension is not None
        assert Extension.parse(extension.pack()) == extension


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_qemu_never_touches_it(tmp_path: Path, cluster_size: int) -> None:
    path, source = str(tmp_path / "a.qed"), str(tmp_path / "source.raw")
    with open(source, "wb") as file:
        file.truncate(1 << 20)
    header = Header.new(1 << 20, cluster_size=cluster_size, backing_name=source)
    extension = Extension.new(source, 1 << 20)
    with open(path, "wb") as file:
        file.write(header.pack() + source.encode())
        file.seek(EXTENSION_OFFSET)
        file.write(extension.pack())
        file.truncate(header.l1_table_offset + header.geometry.table_bytes)

    def found() -> Extension | None:
        with open(path, "rb") as file:
            file.seek(EXTENSION_OFFSET)
            return Extension.parse(file.read(EXTENSION_BYTES))

    qemu_io(path, "write -P 1 0 300k", "write -z 512k 128k", "flush")
    assert found() == extension
    qemu_img("rebase", "-u", "-f", "qed", "-b", "", path)
    assert found() == extension
    qemu_io(path, "write -P 2 700k 100k")  # sets NEED_CHECK, and clears it
    assert found() == extension
    qemu_img("rebase", "-u", "-f", "qed", "-b", "n" * 4000, "-F", "raw", path)
    assert found() == extension
    qemu_img("rebase", "-u", "-f", "qed", "-b", "", path)
    qemu_img("check", "-r", "all", "-f", "qed", path)
    qemu_img("resize", "-f", "qed", path, "2M")
    assert found() == extension
    assert qemu_check(path).status == 0
