"""Growing: what is new reads as zeroes, whatever lay there before, and a crash leaves the old disk or the new one."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.chain import open_device
from nbdstream.block.growth import grow
from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.errors import ImageError
from tests.support.crash import Image, Recorder
from tests.support.memory import MemoryDevice
from tests.support.qed import RawImage, content, create, qemu_check, qemu_info, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_records")

CLUSTER = 4096
SIZE = 100 * CLUSTER + 512


@pytest.fixture
def path(tmp_path: Path) -> str:
    create_file(str(tmp_path / "image"), SIZE, cluster_size=CLUSTER, table_size=2, backing_name=None)
    return str(tmp_path / "image")


async def opened(path: str, below: bytes | None = None) -> Overlay:
    return Overlay(await QedImage.open(path, writable=True), MemoryDevice(below) if below is not None else None)


async def grown(path: str, size: int, below: bytes | None = None) -> None:
    overlay = await opened(path, below)
    await grow(overlay, size)
    await overlay.close()


@pytest.mark.parametrize("size", [SIZE, SIZE + 512, 101 * CLUSTER, 5000 * CLUSTER, 1 << 30])
async def test_what_is_new_reads_as_zeroes(path: str, size: int) -> None:
    overlay = await opened(path)
    await overlay.write(0, b"\x11" * SIZE)
    await grow(overlay, size)
    assert overlay.size == overlay.image.size == size
    await overlay.write(size - 512, b"\x22" * 512)
    await overlay.close()
    assert qemu_info(path)["virtual-size"] == size
    assert qemu_check(path).status == 0
    if size < 1 << 30:
        expected = bytearray((b"\x11" * SIZE).ljust(size, b"\0"))
        expected[-512:] = b"\x22" * 512
        assert content(path) == expected
    else:
        qemu_io(path, f"read -P 0 {SIZE} {size - SIZE - 512}", f"read -P 0x22 {size - 512} 512")


async def test_a_size_is_rounded_up_to_512(path: str) -> None:
    await grown(path, SIZE + 1)
    assert qemu_info(path)["virtual-size"] == SIZE + 512


async def test_what_lay_behind_the_end_of_the_disk_in_its_last_cluster_does_not_show(path: str) -> None:
    qemu_io(path, f"write -P 0x11 {SIZE - 512} 512")
    image = RawImage(path)
    with open(path, "r+b") as file:
        file.seek(image.get(image.l2_offset(100)) + 512)
        file.write(b"\xee" * (CLUSTER - 512))
    await grown(path, 200 * CLUSTER)
    assert content(path) == (b"\x11" * 512).rjust(SIZE, b"\0").ljust(200 * CLUSTER, b"\0")


async def test_entries_that_somebody_left_behind_the_end_do_not_show(path: str) -> None:
    qemu_io(path, "write -P 0x11 0 8k")
    image = RawImage(path)
    image.put(image.l2_offset(150), image.get(image.l2_offset(1)))
    image.put(image.l2_offset(1), 0)
    await grown(path, 200 * CLUSTER)
    assert content(path) == (b"\x11" * CLUSTER).ljust(200 * CLUSTER, b"\0")
    assert qemu_check(path).status == 0


@pytest.mark.parametrize("local", [True, False], ids=["the last cluster is local", "it is not"])
async def test_a_longer_backing_file_does_not_show(path: str, *, local: bool) -> None:
    below = b"\x33" * 150 * CLUSTER
    overlay = await opened(path, below)
    if local:
        await overlay.write(SIZE - 512, b"\x11" * 512)
    await grow(overlay, 3000 * CLUSTER)
    data = b"".join(bytes(part) for part in await overlay.read(0, 3000 * CLUSTER))
    expected = bytearray(below[:SIZE].ljust(3000 * CLUSTER, b"\0"))
    if local:
        expected[SIZE - 512 : SIZE] = b"\x11" * 512
    assert data == expected
    await overlay.close()
    assert qemu_check(path).status == 0


async def test_only_what_a_backing_file_could_show_takes_tables(path: str) -> None:
    await grown(path, 1 << 31, b"\x33" * SIZE)
    assert os.path.getsize(path) < 20 * CLUSTER


async def test_it_grows_while_it_is_used(path: str, seed: int) -> None:
    rng = random.Random(seed)
    overlay = await opened(path)
    model = bytearray(SIZE)

    async def write(number: int) -> None:
        for _ in range(50):
            offset = number * 25 * CLUSTER + rng.randrange(24 * CLUSTER)
            data = rng.randbytes(rng.randrange(1, CLUSTER))
            model[offset : offset + len(data)] = data
            await overlay.write(offset, data)
            await overlay.flush()

    async def grow_slowly() -> None:
        for clusters in range(101, 140, 3):
            await grow(overlay, clusters * CLUSTER)

    await asyncio.gather(*map(write, range(4)), grow_slowly())
    await overlay.close()
    assert content(path) == model.ljust(137 * CLUSTER, b"\0")


@pytest.mark.parametrize(
    ("size", "match"), [(SIZE - 512, "only grow"), (1 << 60, "cannot have"), (-1000, "cannot have")]
)
async def test_a_size_that_cannot_be_is_refused(path: str, size: int, match: str) -> None:
    overlay = await opened(path)
    with pytest.raises(ImageError, match=match):
        await grow(overlay, size)
    assert overlay.size == SIZE
    await overlay.close()


async def test_what_is_open_for_reading_does_not_grow(path: str) -> None:
    overlay = Overlay(await QedImage.open(path))
    with pytest.raises(ImageError, match="reading only"):
        await grow(overlay, 2 * SIZE)
    await overlay.close()


async def test_what_is_being_streamed_does_not_grow(path: str) -> None:
    overlay = await opened(path, b"\x33" * SIZE)
    overlay.below.remote = ~overlay.image.allocated
    with pytest.raises(ImageError, match="being streamed"):
        await grow(overlay, 2 * SIZE)
    await overlay.close()


async def test_without_its_backing_file_an_image_grows_only_if_that_is_known_to_be_no_longer(tmp_path: Path) -> None:
    unknown = create(str(tmp_path / "unknown"), SIZE, backing="nbd://host/disk")
    device = await open_device(unknown, "qed", [], writable=True, alone=True)
    assert isinstance(device, Overlay)
    with pytest.raises(ImageError, match="--backing-format"):
        await grow(device, 2 * SIZE)
    await device.close()
    known = str(tmp_path / "known")
    create_file(known, SIZE, cluster_size=CLUSTER, table_size=2, backing_name="nbd://host/disk", origin_size=SIZE - 100)
    device = await open_device(known, "qed", [], writable=True, alone=True)
    assert isinstance(device, Overlay)
    await grow(device, 2 * SIZE)
    await device.close()
    assert qemu_info(known)["virtual-size"] == 2 * SIZE


async def test_what_is_below_and_not_at_hand_is_not_taken_for_zeroes(tmp_path: Path) -> None:
    """Leaks in front of a table cannot be cut off, and nothing may be filled with them."""
    path = str(tmp_path / "image")
    create_file(path, 2 << 22, cluster_size=CLUSTER, table_size=2, backing_name="nbd://host/disk", origin_size=2 << 22)
    overlay = await opened(path, b"\x33" * (2 << 22))
    await overlay.write(0, b"x" * 10 * CLUSTER)
    await overlay.write(1 << 22, b"y" * CLUSTER)
    await overlay.close()
    image = RawImage(path)
    for cluster in range(10):
        image.put(image.l2_offset(cluster), 0)
    device = await open_device(path, "qed", [], writable=True, alone=True)
    assert isinstance(device, Overlay)
    await grow(device, 3 << 22)
    await device.close()
    assert [image.get(image.l2_offset(cluster)) for cluster in range(1024)] == [0] * 1024


async def test_a_full_disk_leaves_the_size_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = await opened(path, b"\x33" * 150 * CLUSTER)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="No space"):
            await grow(overlay, 200 * CLUSTER)
    assert overlay.size == SIZE
    await grow(overlay, 200 * CLUSTER)
    await overlay.close()


async def test_a_failed_barrier_for_the_header_is_final(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = await opened(path)
    await overlay.flush()
    syncs = iter([None, OSError(errno.EIO, "Input/output error")])

    def fail_the_second(_fd: int) -> None:
        if error := next(syncs, None):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail_the_second)
        with pytest.raises(OSError, match="could not be made durable"):
            await grow(overlay, 2 * SIZE)
    with pytest.raises(OSError, match="could not be made durable"):
        await overlay.flush()
    await overlay.close()


async def test_a_power_cut_leaves_the_old_disk_or_the_new_one(
    path: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    below = b"\x33" * 150 * CLUSTER
    overlay = await opened(path, below)
    recorder = Recorder(path, monkeypatch)
    await grow(overlay, 120 * CLUSTER)
    end = recorder.end
    await overlay.close()
    sizes = set()
    for _ in range(300):
        image = recorder.power_cut(rng.randrange(1, end + 1), rng)
        size = int.from_bytes(image[48:56], "little")
        sizes.add(size)
        found = Image(image)
        if size != SIZE:
            for cluster in range(SIZE // CLUSTER, 120):
                grown = found.read(cluster)
                assert grown, "what is below would show"
                assert not any(grown[max(0, SIZE - cluster * CLUSTER) :])
    assert sizes == {SIZE, 120 * CLUSTER}
