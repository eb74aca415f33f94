"""Epochs: no link is on the disk before what it leads to, whatever a crash leaves; and how barriers are shared.

A disk of 4 KiB clusters is written to by several at once, and every system call on its file recorded. From the record
the states are made that a power cut or a kill could leave at any moment (tests.support.crash).
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import create_file
from nbdstream.block.qed.tables import ZERO
from nbdstream.block.qed.tidy import tidy
from tests.support import qed
from tests.support.crash import SECTOR, DamagedError, Image, Model, Recorder, check_order
from tests.support.memory import MemoryDevice
from tests.support.mistakes import answer_before_the_link, link_before_the_barrier, no_barrier, reuse_at_once

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("own_records")

CLUSTER = 4096
SPAN = 1024
"""Clusters that one L2 table of two clusters maps."""
SIZE = 3 * SPAN * CLUSTER
ROUNDS = 12

Mistake = Callable[[pytest.MonkeyPatch], None]


def make(path: Path, size: int = SIZE) -> str:
    create_file(str(path), size, cluster_size=CLUSTER, table_size=2, backing_name="nbd://nowhere")
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return make(tmp_path / "image")


@pytest.fixture
async def image(path: str) -> AsyncIterator[QedImage]:
    image = await QedImage.open(path, writable=True)
    yield image
    await image.close()


async def store(image: QedImage, cluster: int, data: bytes = b"\x11" * CLUSTER) -> int:
    """Write a new cluster, and map it; return its place."""
    place, _ = image.allocate(cluster, 1)
    await image.write(place, [data])
    image.map(cluster, place)
    return place


class Barriers:
    """Counts fdatasyncs, holds them up, and makes them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.error: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self._sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.count += 1
        self.gate.wait(10)
        if self.error:
            error, self.error = self.error, None
            raise error
        self._sync(fd)


@pytest.fixture
def barriers(monkeypatch: pytest.MonkeyPatch) -> Barriers:
    return Barriers(monkeypatch)


# Sharing.


async def test_a_flush_is_one_barrier_when_everything_is_linked(image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    await image.linked()
    barriers.count = 0
    await image.flush()
    assert barriers.count == 1


async def test_linking_is_one_barrier_however_many_wait(image: QedImage, barriers: Barriers) -> None:
    for cluster in range(0, SIZE // CLUSTER, 50):
        await store(image, cluster)
    await asyncio.gather(*(image.linked() for _ in range(30)))
    assert barriers.count == 1
    assert not image.unlinked


async def test_flushes_that_come_together_share_a_barrier(image: QedImage, barriers: Barriers) -> None:
    await asyncio.gather(*(image.flush() for _ in range(100)))
    assert barriers.count == 1


async def test_a_flush_that_comes_during_a_barrier_waits_for_the_next(image: QedImage, barriers: Barriers) -> None:
    first = asyncio.create_task(image.flush())
    while not barriers.count:
        await asyncio.sleep(0)
    later = [asyncio.create_task(image.flush()) for _ in range(10)]
    await asyncio.gather(first, *later)
    assert barriers.count == 2


async def test_a_nudge_links_without_anybody_waiting(image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    image.nudge()
    while image.unlinked:
        await asyncio.sleep(0)
    assert barriers.count == 1


async def test_nothing_is_synced_when_nobody_asks(image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    await asyncio.sleep(0.01)
    assert (barriers.count, image.backlog) == (0, 1)


async def test_one_who_waits_no_more_does_not_disturb_the_others(image: QedImage) -> None:
    await store(image, 0)
    first, second = asyncio.create_task(image.linked()), asyncio.create_task(image.linked())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert not image.unlinked


# Failing.


async def test_a_failed_barrier_is_final(path: str, image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    await image.linked()
    with open(path, "rb") as file:
        before = file.read(8 * CLUSTER)
    place = await store(image, 1)
    barriers.error = OSError(errno.ENOSPC, "No space left on device")
    for request in (image.linked(), image.flush(), image.linked(), image.write(place, [b"x"])):
        with pytest.raises(OSError, match="durable") as error:
            await request
        assert error.value.errno == errno.EIO
    assert not image.write_now(place, b"x", lambda _: None)
    assert barriers.count == 2, "nothing is tried again"
    with open(path, "rb") as file:
        assert file.read(8 * CLUSTER) == before, "nothing is linked"
    assert image.failed is not None


async def test_all_that_wait_hear_of_a_failed_barrier(image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    barriers.error = OSError(errno.EIO, "Input/output error")
    answers = await asyncio.gather(image.linked(), image.flush(), image.linked(), return_exceptions=True)
    assert all(isinstance(answer, OSError) and answer.errno == errno.EIO for answer in answers)


async def test_a_barrier_behind_one_that_failed_links_nothing(path: str, image: QedImage, barriers: Barriers) -> None:
    await store(image, 0)
    with open(path, "rb") as file:
        before = file.read(8 * CLUSTER)
    barriers.gate.clear()
    barriers.error = OSError(errno.EIO, "Input/output error")
    growing = asyncio.create_task(image.set_size(SIZE))
    while not barriers.count:
        await asyncio.sleep(0)
    linking = asyncio.create_task(image.linked())
    await asyncio.sleep(0.01)
    barriers.gate.set()
    answers = await asyncio.gather(growing, linking, return_exceptions=True)
    assert all(isinstance(answer, OSError) and answer.errno == errno.EIO for answer in answers)
    with open(path, "rb") as file:
        assert file.read(8 * CLUSTER) == before, "nothing is linked"


async def test_what_was_local_can_still_be_read_after_a_failed_barrier(image: QedImage, barriers: Barriers) -> None:
    place = await store(image, 0)
    barriers.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="durable"):
        await image.flush()
    assert await image.entry(0) == place
    assert bytes(await image.view(place, 10)) == b"\x11" * 10


@pytest.fixture
def limit_file_size() -> Iterator[Any]:
    """Files end at a number of bytes: writes behind it fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


async def test_links_that_find_no_room_for_their_table_wait_until_there_is_some(
    path: str, image: QedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store(image, 0)
    await image.linked()
    place = await store(image, SPAN)
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset + len(data) > place + CLUSTER or len(data) == 2 * CLUSTER:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space") as error:
        await image.linked()
    assert error.value.errno == errno.ENOSPC
    assert image.failed is None
    await image.flush()
    assert await image.entry(SPAN) == place
    monkeypatch.setattr(os, "pwrite", pwrite)
    await image.linked()
    raw = qed.RawImage(path)
    assert raw.get(raw.l2_offset(SPAN)) == place


async def test_a_full_disk_does_not_keep_links_into_tables_that_exist_from_a_later_epoch(
    path: str, image: QedImage, limit_file_size: Any
) -> None:
    await store(image, 0)
    await image.linked()
    place = await store(image, 1)
    image.map(SPAN, ZERO)
    limit_file_size(os.path.getsize(path))
    with pytest.raises(OSError, match=r"large|space"):
        await image.linked()
    limit_file_size(resource.RLIM_INFINITY)
    await image.linked()
    raw = qed.RawImage(path)
    assert (raw.get(raw.l2_offset(1)), raw.get(raw.l2_offset(SPAN))) == (place, ZERO)


async def test_a_flush_on_a_full_disk_makes_durable_what_was_answered(
    path: str, image: QedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush comes while an epoch is about to fail for want of room for a table."""
    await store(image, 0)
    await image.linked()
    place = await store(image, 1)
    assert image.note(1), "it may be answered now"
    await store(image, SPAN)
    raw = qed.RawImage(path)
    made_durable: list[int] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) == 2 * CLUSTER:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    def barrier(fd: int) -> None:
        made_durable.append(raw.get(raw.l2_offset(1)))
        fdatasync(fd)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "fdatasync", barrier)
    linking = asyncio.create_task(image.linked())
    while image.backlog:  # until the epoch has begun
        await asyncio.sleep(0)
    await image.flush()
    assert made_durable[-1] == place
    with pytest.raises(OSError, match="No space"):
        await linking
    monkeypatch.setattr(os, "pwrite", pwrite)


# Replaced clusters.


async def test_a_replaced_cluster_is_free_one_barrier_after_the_link_that_replaced_it(image: QedImage) -> None:
    place = await store(image, 0)
    await store(image, 1)
    await image.linked()
    image.map(0, ZERO, replaced=place)
    await image.linked()
    await asyncio.sleep(0.01)
    assert image.free_runs == [], "the link to ZERO may not be on the disk yet"
    await image.settle()
    assert image.free_runs == [(place, CLUSTER)]


async def test_a_cluster_mapped_anew_before_its_epoch_leads_to_the_last_place(path: str, image: QedImage) -> None:
    first = await store(image, 0)
    second, _ = image.allocate(0, 1)
    await image.write(second, [b"\x22" * CLUSTER])
    image.map(0, second, replaced=first)
    await image.linked()
    raw = qed.RawImage(path)
    assert raw.get(raw.l2_offset(0)) == second
    assert not image.unlinked


async def test_a_cluster_changed_again_while_its_links_are_written_keeps_the_last_change(image: QedImage) -> None:
    place = await store(image, 0)
    await image.linked()
    image.map(0, ZERO, replaced=place)
    again = await store(image, 0)
    linking = asyncio.create_task(image.linked())
    while image.backlog:  # until the epoch has begun
        await asyncio.sleep(0)
    image.map(0, ZERO, replaced=again)
    await linking
    assert await image.entry(0) == ZERO


# What a crash leaves.


class Writers:
    """Writes to a disk all over the place, and keeps a model of what it may be after a crash."""

    def __init__(self, overlay: Overlay, recorder: Recorder, below: bytes, chance: random.Random) -> None:
        self.overlay = overlay
        self.recorder = recorder
        self.model = Model(below)
        self.chance = chance

    async def write(self, offset: int, data: bytes) -> None:
        await self._do(offset, data, self.overlay.write(offset, data))

    async def zero(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        await self._do(offset, bytes(length), self.overlay.write_zeroes(offset, length, may_unmap=may_unmap))

    async def _do(self, offset: int, data: bytes, request: Any) -> None:
        written = self.model.begin(self.recorder.now(), offset, data)
        await request
        self.model.answered(self.recorder.now(), written)

    async def flush(self) -> None:
        began = self.recorder.now()
        await self.overlay.flush()
        self.model.flushes.append((began, self.recorder.now()))

    async def some(self, count: int) -> None:
        """Do ``count`` things at once. Few clusters of each table, so that much is written again."""
        clusters = self.chance.sample([*range(10), *range(SPAN, SPAN + 10), *range(3 * SPAN - 10, 3 * SPAN)], count)
        await asyncio.gather(*(self._one(cluster) for cluster in clusters))

    async def _one(self, cluster: int) -> None:
        start, chance = cluster * CLUSTER, self.chance
        kind = chance.choice(["whole", "whole", "parts", "parts", "zero", "zero", "flush"])
        if kind == "whole":
            await self.write(start, chance.randbytes(CLUSTER))
        elif kind == "parts":
            await asyncio.gather(*(self.write(start + n * SECTOR, chance.randbytes(SECTOR)) for n in (0, 3, 7)))
        elif kind == "zero":
            await self.zero(start, CLUSTER, may_unmap=chance.random() < 0.8)
        else:
            await self.flush()


async def run_writers(
    path: str, patch: pytest.MonkeyPatch, chance: random.Random, *, mistake: Mistake | None = None
) -> Writers:
    """Write for some rounds to a new overlay, of a disk that is not empty or with tidying up now and then."""
    tidied = chance.random() < 0.5
    below = b"" if tidied else chance.randbytes(16 * CLUSTER)
    recorder = Recorder(path, patch)
    if mistake:
        mistake(patch)
    overlay = Overlay(await QedImage.open(path, writable=True), MemoryDevice(below))
    writers = Writers(overlay, recorder, below, chance)
    for number in range(ROUNDS):
        await writers.some(6)
        if tidied and number % 3 == 2:
            await tidy(overlay.image, overlay)
    await writers.some(3)
    await overlay.close()
    return writers


def check_all(writers: Writers, path: Path, *, samples: int) -> None:
    """Look at many crash states; show qemu-img a few of them."""
    recorder, model, chance = writers.recorder, writers.model, writers.chance
    for number in range(samples):
        moment = chance.randrange(recorder.end + 2)
        state = recorder.power_cut(moment, chance)
        model.check_power_cut(state, moment)
        if number % 25 == 0:
            path.write_bytes(state)
            found = qed.qemu_check(str(path))
            assert (found.corruptions, found.check_errors) == (0, 0)
        model.check_killed(recorder, moment)


async def test_no_power_cut_and_no_kill_damages_the_image_or_loses_what_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for attempt in range(3):
        path = make(tmp_path / f"image{attempt}")
        with monkeypatch.context() as patch:
            writers = await run_writers(path, patch, random.Random(seed + attempt))
        check_all(writers, tmp_path / "crashed", samples=200)


async def test_every_subset_of_the_writes_of_a_small_run_is_a_sound_image(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocating, overwriting, replacing, in one L2 table that is new and then not."""
    recorder = Recorder(path, monkeypatch)
    overlay = Overlay(await QedImage.open(path, writable=True), MemoryDevice(b""))
    writers = Writers(overlay, recorder, b"", random.Random(0))
    await asyncio.gather(writers.write(0, b"a" * CLUSTER), writers.write(5 * CLUSTER, b"b" * SECTOR))
    await writers.write(70 * CLUSTER, b"c" * CLUSTER)  # its link is in another sector of the table
    await writers.zero(0, CLUSTER)
    await writers.flush()
    await writers.write(0, b"d" * CLUSTER)
    await overlay.close()
    for moment in range(recorder.end + 2):
        for state in recorder.every_power_cut(moment):
            writers.model.check_power_cut(state, moment)
        writers.model.check_killed(recorder, moment)


async def test_a_crashed_image_is_opened_again_and_leaks_nothing_any_more(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    with monkeypatch.context() as patch:
        writers = await run_writers(path, patch, chance)
    crashed = tmp_path / "crashed"
    for _ in range(15):
        moment = chance.randrange(writers.recorder.end + 2)
        crashed.write_bytes(writers.recorder.power_cut(moment, chance))
        overlay = Overlay(await QedImage.open(str(crashed), writable=True), MemoryDevice(writers.model.below))
        if not writers.model.below:
            await tidy(overlay.image, overlay)
        await overlay.close()
        writers.model.check_power_cut(crashed.read_bytes(), moment)
        if not writers.model.below:
            assert Image(crashed.read_bytes()).unused == 0


async def test_every_link_comes_behind_a_barrier_that_began_when_its_data_was_written(
    path: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    recorder = Recorder(path, monkeypatch)
    overlay = Overlay(await QedImage.open(path, writable=True), MemoryDevice(b"\x11" * SIZE))
    clusters = chance.sample(range(3 * SPAN), 200)

    async def write(part: list[int]) -> None:
        for cluster in part:
            await overlay.write(cluster * CLUSTER, chance.randbytes(chance.choice([CLUSTER, 512])))

    await asyncio.gather(*(write(clusters[n::8]) for n in range(8)))
    await overlay.close()
    assert check_order(recorder) >= 200 + 3


# The tests are tested: what they are for must not get past them.


@pytest.mark.parametrize("mistake", [link_before_the_barrier, no_barrier, reuse_at_once, answer_before_the_link])
async def test_a_wrong_order_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, mistake: Mistake
) -> None:
    for attempt in range(40):  # chance decides what is tried: a few runs do, nearly always
        path = make(tmp_path / f"image{attempt}")
        with monkeypatch.context() as patch:
            writers = await run_writers(path, patch, random.Random(seed + attempt), mistake=mistake)
        try:
            for _ in range(300):
                moment = writers.chance.randrange(writers.recorder.end + 2)
                writers.model.check_power_cut(writers.recorder.power_cut(moment, writers.chance), moment)
                writers.model.check_killed(writers.recorder, moment)
        except DamagedError:
            return
    pytest.fail("nobody has noticed")
