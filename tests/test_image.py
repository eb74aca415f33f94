"""``nbdstream.Image``: what a library user does with an image, and what is said when it cannot be done."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

import nbdstream
from nbdstream.errors import ImageError, ImageLockedError
from nbdstream.extents import Extent, ExtentFlags
from tests.support.qed import content, create, qemu_check, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
async def path(tmp_path: Path) -> str:
    await nbdstream.Image.create(tmp_path / "disk.qed", SIZE)
    return str(tmp_path / "disk.qed")


async def test_what_was_written_is_read_by_us_and_by_qemu(path: str) -> None:
    async with nbdstream.Image.open(path, writable=True) as image:
        await image.write(1000, b"hello" * 100)
        await image.write(MIB, bytearray(b"\x22") * MIB)
        await image.write_zeroes(MIB + 5, 1000)
        await image.discard(2 * MIB - 65536, 65536)
        assert await image.read(998, 10) == b"\0\0hellohel"
        assert await image.read(SIZE - 10, 10) == bytes(10)
        assert await image.read(17, 0) == b""
        await image.flush()
        found = await image.check()
        assert (found.corruptions, found.leaks) == (0, 1), "the discarded cluster is kept for later"
    expected = bytearray(SIZE)
    expected[1000:1500] = b"hello" * 100
    expected[MIB : 2 * MIB - 65536] = b"\x22" * (MIB - 65536)
    expected[MIB + 5 : MIB + 1005] = bytes(1000)
    assert content(path) == expected
    assert qemu_check(path).status == 0
    async with nbdstream.Image.open(path) as image:
        assert await image.read(0, SIZE) == expected


async def test_everything_may_be_called_at_the_same_time(path: str, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(SIZE)
    parts = [rng.randbytes(5000) for _ in range(SIZE // 5000)]
    async with nbdstream.Image.open(path, writable=True) as image:
        writes = [image.write(index * 5000, part) for index, part in enumerate(parts)]
        reads = [image.read(rng.randrange(SIZE - 9000), 9000) for _ in range(50)]
        await asyncio.gather(*writes, *reads, image.flush(), image.check(), image.resize(SIZE + MIB))
        model[: len(parts) * 5000] = b"".join(parts)
        assert await image.read(0, SIZE) == model
        assert image.size == SIZE + MIB


async def test_extents_tell_which_layer_holds_what(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x11" * MIB)
    middle = create(str(tmp_path / "middle.qed"), 3 * MIB, backing="base.raw")
    top = create(str(tmp_path / "top.qed"), SIZE, backing="middle.qed", backing_format="qed")
    qemu_io(middle, "write -P 2 2M 512k")
    qemu_io(top, "write -P 3 512k 64k", "write -z 3M 64k")
    async with nbdstream.Image.open(top, backing_formats=["qed", "raw"]) as image:
        zero = ExtentFlags.HOLE | ExtentFlags.ZERO
        assert [extent async for extent in image.extents()] == [
            Extent(0, 512 << 10, ExtentFlags.DATA, 3),
            Extent(512 << 10, 64 << 10, ExtentFlags.DATA, 1),
            Extent(576 << 10, 448 << 10, ExtentFlags.DATA, 3),
            Extent(MIB, MIB, zero, 0),
            Extent(2 * MIB, 512 << 10, ExtentFlags.DATA, 2),
            Extent(2 * MIB + (512 << 10), 512 << 10, zero, 0),
            Extent(3 * MIB, 64 << 10, zero, 1),
            Extent(3 * MIB + (64 << 10), MIB - (64 << 10), zero, 0),
        ]
        assert [extent async for extent in image.extents(600 << 10, 4096)] == [
            Extent(600 << 10, 4096, ExtentFlags.DATA, 3)
        ]
        assert await image.read(511 << 10, 2048) == b"\x11" * 1024 + b"\x03" * 1024


async def test_info_tells_what_it_is(path: str, tmp_path: Path) -> None:
    async with nbdstream.Image.open(path, writable=True) as image:
        await image.write(0, b"x" * MIB)
        info = image.info()
    assert info[:3] == (path, "qed", SIZE)
    assert info.file_size > MIB
    assert (info.cluster_size, info.table_size, info.backing_name) == (65536, 4, None)
    assert info.uuid
    (tmp_path / "raw").write_bytes(bytes(1000))
    async with nbdstream.Image.open(tmp_path / "raw", image_format="raw") as image:
        file_size = os.stat(tmp_path / "raw").st_blocks * 512
        assert image.info() == nbdstream.ImageInfo(str(tmp_path / "raw"), "raw", 1000, file_size)


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, -1), (SIZE, 1), (SIZE - 1, 2), (1 << 70, 1)])
async def test_a_range_out_of_the_disk_is_a_value_error(path: str, offset: int, length: int) -> None:
    async with nbdstream.Image.open(path, writable=True) as image:
        for call in (image.read, image.write_zeroes, image.discard):
            with pytest.raises(ValueError, match="leads out of a disk of"):
                await call(offset, length)


async def test_a_closed_image_says_so(path: str) -> None:
    async with nbdstream.Image.open(path) as image:
        pass
    with pytest.raises(ValueError, match="is closed"):
        await image.read(0, 1)
    with pytest.raises(ValueError, match="is closed"):
        await image.flush()


async def test_an_image_open_for_reading_is_not_written(path: str) -> None:
    async with nbdstream.Image.open(path) as image:
        assert image.read_only
        for change in (image.write(0, b"x"), image.write_zeroes(0, 1), image.discard(0, 1)):
            with pytest.raises(OSError, match="read-only") as refused:
                await change
            assert refused.value.errno == errno.EPERM
        with pytest.raises(ImageError, match="reading only"):
            await image.resize(2 * SIZE)


async def test_an_image_that_is_open_is_not_opened_for_writing_again(path: str) -> None:
    async with nbdstream.Image.open(path):
        async with nbdstream.Image.open(path) as second:
            assert await second.read(0, 1) == b"\0"
        with pytest.raises(ImageLockedError):
            async with nbdstream.Image.open(path, writable=True):
                pass


async def test_raw_images_are_read_and_written_too(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\x11" * 100_000)
    async with nbdstream.Image.open(tmp_path / "raw", image_format="raw", writable=True) as image:
        await image.write(3, b"abc")
        assert await image.read(0, 8) == b"\x11\x11\x11abc\x11\x11"
        with pytest.raises(ImageError, match="raw image"):
            await image.resize(200_000)
        with pytest.raises(ImageError, match="raw image"):
            await image.check()


async def test_it_is_closed_whatever_happens_inside(path: str) -> None:
    async def fail() -> None:
        async with nbdstream.Image.open(path, writable=True) as image:
            await image.write(0, b"x" * 4096)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    qemu_io(path, "read -P 0x78 0 4096", "write 0 512")


async def test_a_large_read_comes_from_many_places(path: str, seed: int) -> None:
    rng = random.Random(seed)
    async with nbdstream.Image.open(path, writable=True) as image:
        order = list(range(SIZE // 65536))
        rng.shuffle(order)
        for cluster in order[:40]:
            await image.write(cluster * 65536, bytes([cluster + 1]) * 65536)
        data = await image.read(100, SIZE - 100)
    expected = b"".join(bytes([c + 1 if c in order[:40] else 0]) * 65536 for c in range(SIZE // 65536))
    assert data == expected[100:]
