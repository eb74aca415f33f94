from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from nbdstream.block import worker
from nbdstream.block.locks import Sharing
from nbdstream.block.raw import RawImage
from nbdstream.errors import ImageError, ImageLockedError
from nbdstream.extents import Extent, ExtentFlags
from tests.support.descriptors import open_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from nbdstream.block.device import Buffer

KiB = 1 << 10
MiB = 1 << 20
SIZE = 10 * MiB + 1000
HOLE = ExtentFlags.HOLE | ExtentFlags.ZERO
DATA = ExtentFlags.DATA


@pytest.fixture
def contents(seed: int) -> bytes:
    """Data, but for a hole in 4 .. 6 MiB."""
    data = bytearray(random.Random(seed).randbytes(SIZE))
    data[4 * MiB : 6 * MiB] = bytes(2 * MiB)
    return bytes(data)


@pytest.fixture
def path(tmp_path: Path, contents: bytes) -> str:
    path = tmp_path / "image.raw"
    with open(path, "wb") as file:
        file.write(contents[: 4 * MiB])
        file.seek(6 * MiB)
        file.write(contents[6 * MiB :])
        file.flush()
        os.fsync(file.fileno())
    return str(path)


@pytest.fixture
async def image(path: str) -> AsyncIterator[RawImage]:
    image = await RawImage.open(path, writable=True)
    yield image
    await image.close()


def forget(path: str) -> None:
    """Take the file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def joined(buffers: Sequence[Buffer] | None) -> bytes:
    assert buffers is not None
    return b"".join(buffers)


def contents_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# -- reading --------------------------------------------------------------------------------------------------


async def test_the_size_is_the_files_to_the_byte(image: RawImage) -> None:
    assert image.size == SIZE


async def test_what_is_in_memory_is_read_at_once(image: RawImage, contents: bytes) -> None:
    for offset, length in [(0, 4096), (123, 4567), (MiB - 5, 10), (0, 4 * MiB), (SIZE - 1000, 1000)]:
        assert joined(image.read_now(offset, length)) == contents[offset : offset + length]


async def test_what_is_not_in_memory_is_not_read_now(path: str, image: RawImage) -> None:
    forget(path)
    assert image.read_now(0, 4096) is None
    assert image.read_now(4 * MiB, 4096) is None


async def test_read_waits_for_the_disk(path: str, image: RawImage, contents: bytes) -> None:
    forget(path)
    assert joined(await image.read(5000, 70_000)) == contents[5000:75_000]
    assert joined(image.read_now(5000, 70_000)) == contents[5000:75_000]


async def test_a_request_over_data_and_holes_can_be_as_large_as_the_image(
    path: str, image: RawImage, contents: bytes
) -> None:
    forget(path)
    assert joined(await image.read(0, SIZE)) == contents


async def test_many_cold_reads_at_a_time(path: str, image: RawImage, contents: bytes, seed: int) -> None:
    forget(path)
    rng = random.Random(seed)
    ranges = [(offset, rng.randrange(1, SIZE - offset)) for offset in (rng.randrange(SIZE - 1) for _ in range(50))]
    for (offset, length), buffers in zip(ranges, await asyncio.gather(*(image.read(*r) for r in ranges)), strict=True):
        assert joined(buffers) == contents[offset : offset + length]


async def test_a_short_request_does_not_wait_for_long_ones(
    path: str, image: RawImage, contents: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(path)
    released = threading.Event()

    def held(call: Callable[..., int]) -> Callable[..., int]:
        def perform(*arguments: object) -> int:
            if "long" in threading.current_thread().name:
                assert released.wait(60)
            return call(*arguments)

        return perform

    monkeypatch.setattr(os, "preadv", held(os.preadv))
    monkeypatch.setattr(os, "pwrite", held(os.pwrite))
    long = [asyncio.create_task(request) for request in (image.read(0, 2 * MiB), image.write(6 * MiB, contents[:MiB]))]
    assert joined(await image.read(3 * MiB, 4096)) == contents[3 * MiB : 3 * MiB + 4096]
    await image.write(8 * MiB, b"short")
    assert not any(request.done() for request in long)
    released.set()
    await asyncio.gather(*long)
    assert contents_of(path)[6 * MiB : 7 * MiB] == contents[:MiB]


async def test_a_sequential_reader_finds_what_it_will_read_in_memory(path: str, image: RawImage) -> None:
    forget(path)
    await image.read(0, 256 * KiB)
    await image.read(256 * KiB, 256 * KiB)
    await image._hints.run(int)  # the hint was given
    # The hint starts the disk, and it does not wait for it: this read does.
    await image._reads.run(os.pread, image._fd, 256 * KiB, 512 * KiB)
    assert image.read_now(512 * KiB, 256 * KiB)


async def test_a_hole_is_never_brought_into_memory(path: str, image: RawImage) -> None:
    assert joined(await image.read(4 * MiB, 2 * MiB)) == bytes(2 * MiB)
    assert image.read_now(4 * MiB, 4096) is None


async def test_a_file_that_became_shorter_is_an_error_for_what_is_missing(
    path: str, image: RawImage, contents: bytes
) -> None:
    os.truncate(path, 8 * MiB)
    assert joined(await image.read(7 * MiB, MiB)) == contents[7 * MiB : 8 * MiB]
    for offset in (8 * MiB - 1, 9 * MiB):
        assert image.read_now(offset, 4096) is None
        with pytest.raises(OSError, match="ends before") as caught:
            await image.read(offset, 4096)
        assert caught.value.errno == errno.EIO


async def test_an_empty_file_is_an_image_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    image = await RawImage.open(str(tmp_path / "empty"))
    assert image.size == 0
    await image.close()


# -- extents --------------------------------------------------------------------------------------------------


async def test_extents_are_what_the_file_system_says(image: RawImage) -> None:
    assert await image.extents(0, SIZE) == [
        Extent(0, 4 * MiB, DATA),
        Extent(4 * MiB, 2 * MiB, HOLE),
        Extent(6 * MiB, SIZE - 6 * MiB, DATA),
    ]
    assert await image.extents(5 * MiB, 10) == [Extent(5 * MiB, 10, HOLE)]


async def test_extents_of_a_fragmented_file_come_in_bounded_portions(tmp_path: Path) -> None:
    path = tmp_path / "fragmented"
    with open(path, "wb") as file:
        for block in range(0, 3000, 2):
            os.pwrite(file.fileno(), b"x", block * 4096)
    image = await RawImage.open(str(path))
    first = await image.extents(0, image.size)
    assert len(first) == 1000
    rest = await image.extents(first[-1].end, image.size - first[-1].end)
    assert rest[0].offset == first[-1].end
    await image.close()


# -- writing --------------------------------------------------------------------------------------------------


async def test_write_now_writes_and_tells(path: str, image: RawImage) -> None:
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    assert image.write_now(100, memoryview(b"written"), told.set_result)
    assert not told.done()
    assert await told is None
    assert contents_of(path)[98:109] == contents_of(path)[98:100] + b"written" + contents_of(path)[107:109]
    assert joined(image.read_now(100, 7)) == b"written"


async def test_whole_pages_are_written_at_once(path: str, image: RawImage, contents: bytes) -> None:
    assert image.write_at_once(4096, memoryview(b"x" * 8192))
    assert contents_of(path)[:16384] == contents[:4096] + b"x" * 8192 + contents[12288:16384]
    assert not image.write_at_once(100, b"a part of a page")


@pytest.mark.parametrize("name", ["write_now", "write", "write_zeroes", "discard", "flush"])
async def test_nothing_is_written_at_once_while_a_thread_works_on_the_file(
    image: RawImage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    released = threading.Event()
    perform = worker._perform
    monkeypatch.setattr(worker, "_perform", lambda *job: (released.wait(60), perform(*job))[1])
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    work: Awaitable[object]
    if name == "write_now":
        image.write_now(0, b"x", told.set_result)
        work = told
    else:
        calls = {
            "write": lambda: image.write(0, b"x"),
            "write_zeroes": lambda: image.write_zeroes(0, 4096, may_unmap=True),
            "discard": lambda: image.discard(0, 4096),
            "flush": image.flush,
        }
        work = asyncio.create_task(calls[name]())
        await asyncio.sleep(0)
    assert not image.write_at_once(MiB, bytes(4096))
    released.set()
    await work
    assert image.write_at_once(MiB, bytes(4096))


async def test_write_now_tells_what_went_wrong(image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    told: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    assert image.write_now(100, b"x", told.set_result)
    error = await told
    assert error
    assert error.errno == errno.ENOSPC


async def test_write_into_a_hole_is_read_back(path: str, image: RawImage) -> None:
    await image.write(5 * MiB, b"no hole any more")
    assert joined(await image.read(5 * MiB - 2, 20)) == b"\0\0no hole any more\0\0"
    assert contents_of(path)[5 * MiB : 5 * MiB + 16] == b"no hole any more"


@pytest.mark.parametrize("may_unmap", [True, False])
async def test_write_zeroes(path: str, image: RawImage, contents: bytes, *, may_unmap: bool) -> None:
    await image.write_zeroes(MiB + 3, MiB, may_unmap=may_unmap)
    assert contents_of(path) == contents[: MiB + 3] + bytes(MiB) + contents[2 * MiB + 3 :]
    assert joined(await image.read(MiB, 2 * MiB)) == contents_of(path)[MiB : 3 * MiB]


@pytest.fixture
async def image_without_zero_range() -> AsyncIterator[RawImage]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # tmpfs makes holes but knows no ZERO_RANGE
        file.write(b"x" * (3 * MiB))
        file.flush()
        image = await RawImage.open(file.name, writable=True)
        yield image
        await image.close()


async def test_zeroes_are_written_where_nothing_else_will_do(image_without_zero_range: RawImage) -> None:
    image = image_without_zero_range
    before = os.fstat(image._fd).st_blocks
    await image.write_zeroes(5, 3 * MiB - 10, may_unmap=False)
    assert os.pread(image._fd, 3 * MiB, 0) == b"xxxxx" + bytes(3 * MiB - 10) + b"xxxxx"
    assert os.fstat(image._fd).st_blocks == before


async def test_writing_zeroes_is_not_fast(image_without_zero_range: RawImage) -> None:
    image = image_without_zero_range
    with pytest.raises(OSError, match="can only be written") as caught:
        await image.write_zeroes(0, MiB, may_unmap=False, fast_only=True)
    assert caught.value.errno == errno.ENOTSUP
    assert os.pread(image._fd, MiB, 0) == b"x" * MiB


async def test_discard_makes_a_hole(image: RawImage) -> None:
    await image.discard(MiB, MiB)
    assert (await image.extents(MiB, MiB)) == [Extent(MiB, MiB, HOLE)]


async def test_a_read_only_image_refuses_every_change(path: str, contents: bytes) -> None:
    image = await RawImage.open(path)
    assert image.read_only
    assert not image.write_now(0, b"x", lambda _error: None)
    assert not image.write_at_once(0, bytes(4096))
    for change in (
        image.write(0, b"x"),
        image.write_zeroes(0, 1, may_unmap=True),
        image.discard(0, 4096),
    ):
        with pytest.raises(OSError, match="read-only") as caught:
            await change
        assert caught.value.errno == errno.EPERM
    await image.flush()
    await image.close()
    assert contents_of(path) == contents


async def test_after_a_failed_flush_nothing_is_written_any_more(
    path: str, image: RawImage, monkeypatch: pytest.MonkeyPatch, contents: bytes
) -> None:
    def failing(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="flushed"):
            await image.flush()
    assert not image.write_now(0, b"x", lambda _error: None)
    assert not image.write_at_once(0, bytes(4096))
    for change in (
        image.write(0, b"x"),
        image.write_zeroes(0, 1, may_unmap=True),
        image.discard(0, 4096),
        image.flush(),
    ):
        with pytest.raises(OSError, match="flushed") as caught:
            await change
        assert caught.value.errno == errno.EIO
    assert contents_of(path) == contents
    assert joined(image.read_now(0, 10)) == contents[:10]


async def test_flush_syncs_the_file(image: RawImage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    await image.flush()
    assert synced == [image._fd]


# -- opening and closing --------------------------------------------------------------------------------------


async def test_a_qed_image_is_not_taken_for_a_raw_one_unless_that_is_said(tmp_path: Path) -> None:
    path = str(tmp_path / "image.qed")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", path, "1M"], check=True)
    with pytest.raises(ImageError) as caught:
        await RawImage.open(path)
    assert str(caught.value) == f"{path} looks like a QED image: say -f qed, or -f raw to export its raw bytes"
    image = await RawImage.open(path, probe=False)
    assert joined(await image.read(0, 4)) == b"QED\0"
    await image.close()


@pytest.mark.parametrize("writable", [True, False])
async def test_an_image_that_another_writes_is_refused(path: str, image: RawImage, *, writable: bool) -> None:
    with pytest.raises(ImageLockedError, match=r"image\.raw is in use by"):
        await RawImage.open(path, writable=writable)


async def test_two_may_read_an_image_and_a_writer_only_when_they_do_not_mind(path: str) -> None:
    first, second = await RawImage.open(path), await RawImage.open(path)
    with pytest.raises(ImageLockedError):
        await RawImage.open(path, writable=True)
    await first.close()
    await second.close()
    bystander = await RawImage.open(path, sharing=Sharing.BYSTANDER)
    writer = await RawImage.open(path, writable=True)
    await bystander.close()
    await writer.close()


async def test_close_lets_go_of_file_and_locks_and_leaves_views_alive(path: str, contents: bytes) -> None:
    image = await RawImage.open(path, writable=True)
    buffers = image.read_now(0, 100)
    await image.close()
    await image.close()
    again = await RawImage.open(path, writable=True)
    assert joined(buffers) == contents[:100]
    await again.close()


async def test_close_waits_for_writes(path: str) -> None:
    image = await RawImage.open(path, writable=True)
    told: list[OSError | None] = []
    for number in range(100):
        image.write_now(number, b"z", told.append)
    await image.close()
    assert told == [None] * 100
    assert contents_of(path)[:100] == b"z" * 100


async def test_a_refused_image_is_closed_again(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    with open(path, "wb") as file:
        file.write(b"QED\0 and nothing else")
    with pytest.raises(ImageError):
        await RawImage.open(path)
    assert path not in open_files()


async def test_a_block_device_is_an_image(path: str, contents: bytes) -> None:
    os.truncate(path, 10 * MiB)
    attach = subprocess.run(["losetup", "--find", "--show", path], check=True, capture_output=True, text=True)
    device = attach.stdout.strip()
    try:
        image = await RawImage.open(device, writable=True)
        assert image.size == 10 * MiB
        await image.write(MiB, b"on the device")
        await image.write_zeroes(2 * MiB, MiB, may_unmap=True)
        await image.write_zeroes(6 * MiB + 100, 1000, may_unmap=True)  # less than a block of it
        await image.discard(7 * MiB, MiB)
        await image.flush()
        expected = contents[:MiB] + b"on the device" + contents[MiB + 13 : 2 * MiB] + bytes(MiB) + contents[3 * MiB :]
        expected = expected[: 6 * MiB + 100] + bytes(1000) + expected[6 * MiB + 1100 :]
        assert joined(await image.read(0, 7 * MiB)) == expected[: 7 * MiB]
        assert await image.extents(0, image.size) == [Extent(0, 10 * MiB, DATA)]
        await image.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
