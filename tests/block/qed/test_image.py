"""An open QED image: lookups, views, writes and runs; what is written is what QEMU reads."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.block.qed.tables import UNALLOCATED, ZERO
from nbdstream.errors import ImageError, ImageLockedError
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_records")

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "image")
    create_file(path, 3 * SPAN * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name=None)
    return path


@pytest.fixture
async def image(path: str) -> AsyncIterator[QedImage]:
    image = await QedImage.open(path, writable=True)
    yield image
    await image.close()


async def store(image: QedImage, cluster: int, data: bytes) -> int:
    place, _ = image.allocate(cluster, 1)
    await image.write(place, [data])
    image.map(cluster, place)
    return place


@pytest.mark.parametrize(("cluster_size", "table_size"), qed.SMALL_GEOMETRIES)
async def test_what_qemu_wrote_is_read(tmp_path: Path, seed: int, cluster_size: int, table_size: int) -> None:
    size = 40 * cluster_size
    path = qed.create(str(tmp_path / "image"), size, cluster_size=cluster_size, table_size=table_size)
    model = bytearray(size)
    qed.write_all(path, qed.random_writes(random.Random(seed), size, cluster_size, 20), model)
    image = await QedImage.open(path)
    for cluster in range(40):
        entry = await image.entry(cluster)
        data = bytes(await image.view(entry, cluster_size)) if entry > ZERO else bytes(cluster_size)
        assert data == model[cluster * cluster_size : (cluster + 1) * cluster_size]
    await image.close()


async def test_what_was_written_and_closed_is_read_by_qemu(path: str, image: QedImage) -> None:
    await store(image, 1, b"\x01" * CLUSTER)
    await store(image, 2 * SPAN, b"\x02" * CLUSTER)
    image.map(5, ZERO)
    await image.close()
    content = qed.content(path)
    assert content[CLUSTER : 2 * CLUSTER] == b"\x01" * CLUSTER
    assert content[2 * SPAN * CLUSTER : (2 * SPAN + 1) * CLUSTER] == b"\x02" * CLUSTER
    assert content.count(0) == len(content) - 2 * CLUSTER
    assert qed.qemu_check(path).status == 0


async def test_what_was_mapped_is_seen_before_it_is_linked(image: QedImage) -> None:
    place = await store(image, 7, b"\x07" * CLUSTER)
    assert image.entry_now(7) == place
    assert 7 in image.unlinked
    await image.linked()
    assert image.entry_now(7) == place
    assert 7 not in image.unlinked


async def test_a_run_is_clusters_that_lie_one_behind_the_other(image: QedImage) -> None:
    place, count = image.allocate(10, 3)
    assert count == 3
    for index in range(3):
        image.map(10 + index, place + index * CLUSTER)
    other, _ = image.allocate(13, 1)
    image.map(13, other)
    image.map(14, ZERO)
    image.map(15, ZERO)
    assert await image.run(10, 100) == (place, 4)
    assert await image.run(11, 2) == (place + CLUSTER, 2)
    assert await image.run(14, 100) == (ZERO, 2)
    await image.linked()
    assert await image.run(10, 100) == (place, 4)
    assert await image.run(0, 100) == (UNALLOCATED, 10)


async def test_while_some_are_unlinked_a_run_is_told_in_parts(image: QedImage, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = image.allocate(3, 1)
    image.map(3, place)
    looked_up: list[int] = []
    entry_now = image.entry_now

    def looking(cluster: int) -> int | None:
        looked_up.append(cluster)
        return entry_now(cluster)

    monkeypatch.setattr(image, "entry_now", looking)
    entry, count = await image.run(4, 1 << 24)
    assert (entry, 0 < count <= 16) == (UNALLOCATED, True)
    assert len(looked_up) <= 17


async def test_a_run_goes_on_over_tables_that_do_not_exist(image: QedImage) -> None:
    assert await image.run(5, 3 * SPAN - 5) == (UNALLOCATED, 3 * SPAN - 5)


async def test_a_gap_ends_a_run(image: QedImage) -> None:
    first = await store(image, 0, bytes(CLUSTER))
    image.allocate(0, 1)
    await store(image, 1, bytes(CLUSTER))
    assert await image.run(0, 2) == (first, 1)


async def test_a_view_shows_what_is_written_in_a_batch(image: QedImage) -> None:
    place = await store(image, 0, b"\x01" * CLUSTER)
    answer: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    assert image.write_now(place + 5, b"abc", answer.set_result)
    assert await answer is None
    assert bytes(await image.view(place, 10)) == b"\x01" * 5 + b"abc" + b"\x01" * 2


async def test_a_view_of_what_is_in_memory_is_had_at_once(image: QedImage) -> None:
    place = await store(image, 0, b"\x01" * CLUSTER)
    view = image.view_now(place, CLUSTER)
    assert view is not None
    assert bytes(view) == b"\x01" * CLUSTER


async def test_beyond_the_reach_of_the_mapping_data_is_read_all_the_same(
    image: QedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await store(image, 0, b"\x01" * CLUSTER)
    monkeypatch.setattr(image._mapping, "reach", place)
    assert image.view_now(place, CLUSTER) is None
    assert bytes(await image.view(place, CLUSTER)) == b"\x01" * CLUSTER


async def test_a_view_of_what_the_file_does_not_have_is_an_error(image: QedImage) -> None:
    with pytest.raises(OSError, match="ends before") as error:
        await image.view(image.end, CLUSTER)
    assert error.value.errno == errno.EIO


async def test_an_entry_that_was_damaged_meanwhile_is_an_error_and_not_data(path: str) -> None:
    image = await QedImage.open(path, writable=True)
    await store(image, 0, b"\x01" * CLUSTER)
    await image.close()
    image = await QedImage.open(path)
    raw = qed.RawImage(path)
    raw.put(raw.l2_offset(3), 1 << 40)
    with pytest.raises(OSError, match="damaged") as error:
        await image.entry(3)
    assert error.value.errno == errno.EIO
    await image.close()


async def test_released_clusters_are_allocated_again(image: QedImage) -> None:
    await store(image, 0, bytes(CLUSTER))
    place, count = image.allocate(1, 4)
    end = image.end
    await store(image, 9, bytes(CLUSTER))
    image.release(place, count)
    assert image.free_runs == [(place, count * CLUSTER)]
    assert image.allocate(1, 4) == (place, 4)
    assert image.end == end + CLUSTER


async def test_a_table_lies_in_front_of_the_data_that_needs_it(path: str, image: QedImage) -> None:
    place = await store(image, SPAN, bytes(CLUSTER))
    await image.linked()
    raw = qed.RawImage(path)
    assert raw.get(raw.l1_offset(1)) == place - 2 * CLUSTER


async def test_closing_gives_back_what_was_never_mapped(path: str, image: QedImage) -> None:
    await store(image, 0, bytes(CLUSTER))
    size = image.end
    place, count = image.allocate(1, 10)
    await image.write(place, [bytes(count * CLUSTER)])
    image.release(place, count)
    await image.close()
    assert os.path.getsize(path) == size
    assert qed.qemu_check(path).status == 0


async def test_closing_makes_durable_what_was_mapped(path: str, image: QedImage) -> None:
    place = await store(image, 0, b"\x01" * CLUSTER)
    await image.close()
    await image.close()
    raw = qed.RawImage(path)
    assert raw.get(raw.l2_offset(0)) == place


async def test_a_second_writer_is_refused_and_a_closed_image_is_free(path: str, image: QedImage) -> None:
    with pytest.raises(ImageLockedError, match=path):
        await QedImage.open(path, writable=True)
    with pytest.raises(ImageLockedError, match=path):
        await QedImage.open(path)
    assert qed.qemu_img("info", path, check=False).returncode == 1
    await image.close()
    await (await QedImage.open(path)).close()


async def test_a_refused_image_is_not_kept_locked(path: str) -> None:
    raw = qed.RawImage(path)
    raw.put(raw.l1_offset(0), 512)
    with pytest.raises(ImageError, match="L1 entry 0"):
        await QedImage.open(path, writable=True)
    raw.put(raw.l1_offset(0), 0)
    await (await QedImage.open(path, writable=True)).close()


async def test_the_backing_name_goes_when_everything_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "overlay")
    create_file(path, 10 * CLUSTER, cluster_size=CLUSTER, table_size=2, backing_name="nbd://nowhere")
    image = await QedImage.open(path, writable=True)
    await store(image, 0, b"\x01" * CLUSTER)
    await image.forget_backing()
    assert image.backing_name is None
    copy = tmp_path / "copy"
    copy.write_bytes((tmp_path / "overlay").read_bytes())
    assert "backing-filename" not in qed.qemu_info(str(copy))
    assert qed.content(str(copy)) == b"\x01" * CLUSTER + bytes(9 * CLUSTER)
    await image.close()


async def test_the_header_changes_behind_the_links(path: str, image: QedImage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("pwrite", "fdatasync"):
        call = getattr(os, name)

        def recorded(fd: int, *args: object, _call: object = call, _name: str = name) -> object:
            calls.append("header" if args and args[1] == 0 else _name)
            return _call(fd, *args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, recorded)
    await store(image, 0, b"\x01" * CLUSTER)
    await image.forget_backing()
    assert calls[-3:] == ["fdatasync", "header", "fdatasync"]
    assert "header" not in calls[:-2]


async def test_writes_fail_as_the_file_does(image: QedImage, monkeypatch: pytest.MonkeyPatch) -> None:
    place = await store(image, 0, bytes(CLUSTER))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        patch.setattr(os, "pwritev", full)
        answer: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        assert image.write_now(place, b"x", answer.set_result)
        error = await answer
        assert error is not None
        assert error.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            await image.write(place, [b"x"])
    await image.write(place, [b"x"])
