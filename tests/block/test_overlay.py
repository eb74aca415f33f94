"""The overlay: what is read is what was written, or what lies below; in any order, together, and after closing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.extents import ExtentFlags
from tests.support.memory import MemoryDevice
from tests.support.qed import qemu_check

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 65536


def make(path: Path, size: int, *, backing: bool = True, cluster_size: int = CLUSTER, table_size: int = 4) -> None:
    create_file(
        str(path),
        size,
        cluster_size=cluster_size,
        table_size=table_size,
        backing_name="nbd://nowhere" if backing else None,
    )


async def reopen(path: Path, below: bytes | None) -> Overlay:
    image = await QedImage.open(str(path), writable=True)
    return Overlay(image, None if below is None else MemoryDevice(below))


async def read(overlay: Overlay, offset: int, length: int) -> bytes:
    buffers = overlay.read_now(offset, length)
    if buffers is None:
        buffers = await overlay.read(offset, length)
    data = b"".join(bytes(buffer) for buffer in buffers)
    assert len(data) == length
    return data


async def write(overlay: Overlay, offset: int, data: bytes) -> None:
    if overlay.write_at_once(offset, data):
        return
    answer: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    if overlay.write_now(offset, data, answer.set_result):
        error = await answer
        if error:
            raise error
    else:
        await overlay.write(offset, data)


def clean(path: Path) -> bool:
    result = qemu_check(str(path))
    return not result.corruptions and not result.check_errors


async def test_an_unallocated_cluster_reads_as_what_lies_below(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    assert await read(overlay, CLUSTER - 10, 20) == b"\x11" * 20
    await overlay.close()


async def test_behind_the_end_of_what_lies_below_there_are_zeroes(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * (CLUSTER + 512))
    assert await read(overlay, CLUSTER, 1024) == b"\x11" * 512 + bytes(512)
    assert await read(overlay, 3 * CLUSTER, 512) == bytes(512)
    await overlay.close()


async def test_a_partial_write_keeps_what_lies_below_around_it(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    await write(overlay, CLUSTER + 100, b"new")
    assert await read(overlay, CLUSTER, 200) == b"\x11" * 100 + b"new" + b"\x11" * 97
    await overlay.close()


async def test_a_partial_write_into_a_zero_cluster_keeps_zeroes_around_it(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    await overlay.write_zeroes(0, CLUSTER, may_unmap=True)
    await write(overlay, 100, b"new")
    assert await read(overlay, 0, CLUSTER) == bytes(100) + b"new" + bytes(CLUSTER - 103)
    await overlay.close()


async def test_two_partial_writes_into_one_unallocated_cluster_are_both_there(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    await asyncio.gather(*(write(overlay, i * 1000, bytes([i]) * 10) for i in range(20)))
    data = await read(overlay, 0, CLUSTER)
    assert [data[i * 1000 : i * 1000 + 11] for i in range(20)] == [bytes([i]) * 10 + b"\x11" for i in range(20)]
    await overlay.close()


async def test_a_failing_source_fails_a_partial_write_and_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    assert isinstance(overlay.below.device, MemoryDevice)
    overlay.below.device.error = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        await write(overlay, 5, b"new")
    overlay.below.device.error = None
    assert await read(overlay, 0, 10) == b"\x11" * 10
    await overlay.close()


async def test_discard_of_a_part_of_a_cluster_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    await overlay.discard(100, CLUSTER)
    assert await read(overlay, 0, 2 * CLUSTER) == b"\x11" * 2 * CLUSTER
    await overlay.close()


async def test_discard_of_whole_clusters_hides_what_lies_below(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    await overlay.discard(CLUSTER - 1, CLUSTER + 2)
    assert await read(overlay, 0, 3 * CLUSTER) == b"\x11" * CLUSTER + bytes(CLUSTER) + b"\x11" * CLUSTER
    await overlay.close()


async def test_zeroes_over_zeroes_that_are_not_linked_yet_are_answered_no_earlier(tmp_path: Path) -> None:
    """There is no L2 table, so that the first cannot be noted: a kill would lose both."""
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    first = asyncio.create_task(overlay.write_zeroes(0, CLUSTER, may_unmap=True))
    await asyncio.sleep(0)
    assert 0 in overlay.image.unlinked
    await overlay.discard(0, CLUSTER)
    assert 0 not in overlay.image.unlinked
    await first
    await overlay.close()


async def test_zeroes_that_may_not_unmap_allocate(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER, backing=False)
    overlay = await reopen(tmp_path / "o", None)
    await overlay.write_zeroes(0, 2 * CLUSTER, may_unmap=False)
    extents = await overlay.extents(0, 4 * CLUSTER)
    assert [(e.length, e.flags, e.depth) for e in extents] == [
        (2 * CLUSTER, ExtentFlags.DATA, 1),
        (2 * CLUSTER, ExtentFlags.HOLE | ExtentFlags.ZERO, 0),
    ]
    await overlay.close()


async def test_fast_zeroes_of_part_of_a_cluster_are_refused_and_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "o", 4 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 4 * CLUSTER)
    with pytest.raises(OSError, match="fast") as refused:
        await overlay.write_zeroes(100, CLUSTER, may_unmap=True, fast_only=True)
    assert refused.value.errno == errno.ENOTSUP
    assert await read(overlay, 0, 2 * CLUSTER) == b"\x11" * 2 * CLUSTER
    await overlay.close()


async def test_a_discarded_cluster_of_the_file_is_used_again_only_when_no_view_shows_it(tmp_path: Path) -> None:
    make(tmp_path / "o", 8 * CLUSTER, backing=False)
    overlay = await reopen(tmp_path / "o", None)
    await write(overlay, 0, b"\xaa" * CLUSTER)
    view = overlay.read_now(0, CLUSTER)
    assert view is not None
    await overlay.discard(0, CLUSTER)
    await overlay.image.settle()
    for cluster in range(1, 8):
        await write(overlay, cluster * CLUSTER, b"\xbb" * CLUSTER)
        await overlay.image.settle()
    assert bytes(view[0]) == b"\xaa" * CLUSTER
    await overlay.close()
    assert clean(tmp_path / "o")


@pytest.mark.parametrize("backing", [True, False])
@pytest.mark.parametrize(("cluster_size", "table_size"), [(4096, 2), (65536, 4), (1 << 20, 2)])
async def test_random_operations_at_the_same_time_match_a_model(
    tmp_path: Path, seed: int, cluster_size: int, table_size: int, *, backing: bool
) -> None:
    """What overlaps runs one behind the other, all else together; in between the image is opened anew."""
    chance = random.Random(seed)
    size = 40 * cluster_size + 512
    below = chance.randbytes(size - cluster_size) if backing else None
    model = bytearray((below or b"").ljust(size, b"\0"))
    make(tmp_path / "o", size, backing=backing, cluster_size=cluster_size, table_size=table_size)
    for _ in range(4):
        overlay = await reopen(tmp_path / "o", below)
        for _ in range(12):
            operations = _disjoint_operations(chance, size, cluster_size)
            await asyncio.gather(*(operation(overlay, model) for operation in operations))
            start = chance.randrange(size - 1)
            length = chance.randrange(1, min(size - start, 3 * cluster_size) + 1)
            assert await read(overlay, start, length) == model[start : start + length]
        assert await read(overlay, 0, size) == model
        await overlay.close()
        assert clean(tmp_path / "o")


Operation = Callable[[Overlay, bytearray], Coroutine[None, None, None]]


def _disjoint_operations(chance: random.Random, size: int, cluster_size: int) -> list[Operation]:
    """Return operations on ranges that do not overlap, though they may share clusters."""
    points = [chance.randrange(size // 512) * 512 for _ in range(10)] + [chance.randrange(size) for _ in range(6)]
    edges = sorted({0, size, *(at - at % cluster_size if chance.random() < 0.4 else at for at in points)})
    ranges = [(a, b - a) for a, b in pairwise(edges)]
    return [_operation(chance, start, length) for start, length in ranges]


def _operation(chance: random.Random, start: int, length: int) -> Operation:
    kind = chance.choice(["write", "write", "zero", "allocated zero", "flush", "read"])
    data = chance.randbytes(length)

    async def run(overlay: Overlay, model: bytearray) -> None:
        if kind == "write":
            await write(overlay, start, data)
            model[start : start + length] = data
        elif kind in ("zero", "allocated zero"):
            await overlay.write_zeroes(start, length, may_unmap=kind == "zero")
            model[start : start + length] = bytes(length)
        elif kind == "flush":
            await overlay.flush()
        else:
            assert await read(overlay, start, length) == model[start : start + length]

    return run


async def fresh(path: Path, size: int = 64 * CLUSTER) -> Overlay:
    """Return an empty image without a backing file, with an L2 table (the second cluster is allocated)."""
    make(path, size, backing=False)
    overlay = await reopen(path, None)
    await overlay.write(CLUSTER, b"1" * 4096)
    return overlay


async def test_a_small_write_to_a_new_cluster_is_done_at_once(tmp_path: Path) -> None:
    overlay = await fresh(tmp_path / "o")
    assert overlay.write_at_once(5 * CLUSTER + 8192, b"new" + bytes(4093))
    assert overlay.write_at_once(5 * CLUSTER, b"again" * 4096)
    expected = b"again" * 4096 + bytes(CLUSTER - 5 * 4096)
    assert await read(overlay, 5 * CLUSTER, CLUSTER) == expected
    await overlay.close()
    assert clean(tmp_path / "o")
    overlay = await reopen(tmp_path / "o", None)
    assert await read(overlay, 5 * CLUSTER, CLUSTER) == expected
    await overlay.close()


async def test_of_a_small_write_to_a_new_cluster_only_that_is_stored(tmp_path: Path) -> None:
    overlay = await fresh(tmp_path / "o")
    before = os.stat(tmp_path / "o").st_blocks * 512
    for cluster in range(2, 34):
        await write(overlay, cluster * CLUSTER + 4096, b"x" * 4096)
    await overlay.flush()
    assert os.stat(tmp_path / "o").st_blocks * 512 - before < 32 * CLUSTER / 4
    await overlay.close()
    assert os.path.getsize(tmp_path / "o") % CLUSTER == 0


async def test_the_hole_around_a_small_write_shows_nothing_of_an_earlier_use(tmp_path: Path) -> None:
    overlay = await fresh(tmp_path / "o")
    place, _ = overlay.image.allocate(9, 1)
    await overlay.image.write(place, [b"garbage!" * (CLUSTER // 8)])
    overlay.image.release(place, 1)
    await write(overlay, 9 * CLUSTER, b"x" * 4096)
    assert await read(overlay, 9 * CLUSTER, CLUSTER) == b"x" * 4096 + bytes(CLUSTER - 4096)
    await overlay.close()


async def test_after_the_end_was_cut_off_its_places_are_holes_again(tmp_path: Path) -> None:
    overlay = await fresh(tmp_path / "o")
    place, _ = overlay.image.allocate(9, 1)
    await overlay.image.write(place, [b"garbage!" * (CLUSTER // 8)])
    overlay.image.release(place, 1)
    await overlay.image.settle()
    overlay.image.cut()
    assert overlay.write_at_once(9 * CLUSTER, b"x" * 4096)
    assert await read(overlay, 9 * CLUSTER, CLUSTER) == b"x" * 4096 + bytes(CLUSTER - 4096)
    await overlay.close()


async def test_what_cannot_be_done_at_once_is_left_to_others(tmp_path: Path) -> None:
    make(tmp_path / "o", 8 * CLUSTER)
    overlay = await reopen(tmp_path / "o", b"\x11" * 8 * CLUSTER)
    page = b"x" * 4096
    assert not overlay.write_at_once(0, page)  # what is below has to be read
    await overlay.write(0, page)
    await overlay.flush()
    assert overlay.write_at_once(4096, page)
    assert not overlay.write_at_once(100, b"a part of a page")
    assert not overlay.write_at_once(CLUSTER - 4096, 2 * page)
    held = overlay.hold(0)
    assert held is not None
    with held:
        assert not overlay.write_at_once(0, page)
    await overlay.close()


async def test_a_write_at_once_outlives_a_kill(tmp_path: Path) -> None:
    overlay = await fresh(tmp_path / "o")
    assert overlay.write_at_once(7 * CLUSTER, b"survives" * 512)
    assert 7 in overlay.image.noted
    assert os.path.getsize(tmp_path / "o") >= overlay.image.end
    await overlay.close()
