"""A stream that is cut off at any moment: what the guest was promised is there, all else equals the source.

Every system call on the overlay's file is recorded from the first fetch to independence, while a guest writes; then
the states are looked at that a power cut or a kill could leave (tests.support.crash).
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import write_header
from nbdstream.stream import hydrator
from nbdstream.stream import job as job_module
from nbdstream.stream.job import StreamJob
from tests.stream.peers import SourceDisk, SourceServer, Streamed, streamed
from tests.support import qed
from tests.support.crash import SECTOR, DamagedError, Image, Model, Recorder

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 4096
SPAN = 2048
"""Clusters that one L2 table of four clusters maps."""
CLUSTERS = SPAN + 200


def sparse_disk(chance: random.Random) -> SourceDisk:
    """Data here and there, zeroes that are told of and zeroes that are not."""
    disk = SourceDisk(bytes(CLUSTERS * CLUSTER - 512))
    position = 0
    while position < disk.size:
        length = min(disk.size - position, chance.randrange(1, 400) * SECTOR * 8)
        run = range(position, position + length)
        kind = chance.choice(["data", "zeroes", "told", "told"]) if position else "data"
        if kind == "data":
            disk.data[run.start : run.stop] = chance.randbytes(length)
        elif kind == "told":
            disk.zeroes.append(run)
        position += length
    return disk


class Guest:
    """Writes, discards and flushes anywhere, all the time."""

    def __init__(self, stream: Streamed, recorder: Recorder, chance: random.Random) -> None:
        self.stream = stream
        self.recorder = recorder
        self.chance = chance
        self.model = Model(bytes(stream.disk.data).ljust(CLUSTERS * CLUSTER, b"\0"))

    async def run(self, job: asyncio.Task[None]) -> None:
        while not job.done():
            start = self.chance.randrange(CLUSTERS) * CLUSTER
            kind = self.chance.choice(["write", "write", "part", "discard", "flush"])
            if kind == "flush":
                began = self.recorder.now()
                await self.stream.overlay.flush()
                self.model.flushes.append((began, self.recorder.now()))
                continue
            if kind == "part":
                start += self.chance.randrange(8) * SECTOR
            data = bytes(CLUSTER) if kind == "discard" else self.chance.randbytes(SECTOR if kind == "part" else CLUSTER)
            written = self.model.begin(self.recorder.now(), start, data)
            if kind == "discard":
                await self.stream.overlay.discard(start, CLUSTER)
            else:
                await self.stream.overlay.write(start, data)
            self.model.answered(self.recorder.now(), written)


async def run_all(
    server: SourceServer,
    path: Path,
    patch: pytest.MonkeyPatch,
    chance: random.Random,
    *,
    idle: bool = False,
    epoch_bytes: int = 64 * CLUSTER,
) -> Guest:
    """Stream a disk to independence beside a guest, which may be idle; return what happened."""
    patch.setattr(hydrator, "_EPOCH_BYTES", epoch_bytes)
    patch.setattr(hydrator, "_REQUEST_BYTES", 16 * CLUSTER)
    patch.setattr(hydrator, "_BYTES_IN_FLIGHT", 64 * CLUSTER)
    await server.stop()
    server.disk = sparse_disk(chance)
    await server.start()
    async with streamed(server, path, cluster_size=CLUSTER) as stream:
        guest = Guest(stream, Recorder(str(path), patch), chance)
        job = asyncio.create_task(StreamJob(stream.overlay, stream.source).run())
        if not idle:
            await guest.run(job)
        await job
    return guest


def moments(recorder: Recorder, chance: random.Random, count: int) -> list[int]:
    """Moments anywhere, and some from where the backing file's name goes."""
    header = max(event.begin for event in recorder.events if event.kind == "write" and event.offset == 0)
    anywhere = [chance.randrange(recorder.end + 2) for _ in range(count)]
    return anywhere + list(range(header - 5, header + 15))


async def test_a_power_cut_or_kill_at_any_moment_loses_nothing_that_was_promised(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    with monkeypatch.context() as patch:
        guest = await run_all(server, tmp_path / "overlay", patch, chance)
    recorder, crashed = guest.recorder, tmp_path / "crashed"
    for number, moment in enumerate(moments(recorder, chance, 60)):
        state = recorder.power_cut(moment, chance)
        guest.model.check_power_cut(state, moment)
        guest.model.check_killed(recorder, moment)
        if number % 20 == 0:
            crashed.write_bytes(state)
            assert qed.qemu_check(str(crashed)).corruptions == 0


async def test_in_the_end_the_image_is_sound_without_its_source(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with monkeypatch.context() as patch:
        guest = await run_all(server, tmp_path / "overlay", patch, random.Random(seed))
    path = tmp_path / "overlay"
    assert not Image(path.read_bytes()).has_backing
    assert qed.qemu_check(str(path)).corruptions == 0
    guest.model.check_power_cut(path.read_bytes(), guest.recorder.end + 1000)


async def test_a_backing_name_that_goes_too_early_is_found_out(
    server: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The test is tested: nothing is linked before the header changes."""
    right = QedImage.forget_backing

    async def too_early(image: QedImage) -> None:
        write_header(image._fd, image.header.without_backing())
        await right(image)

    async def nothing(*_: object) -> None:
        pass

    chance = random.Random(seed)
    with monkeypatch.context() as patch:
        patch.setattr(QedImage, "forget_backing", too_early)
        patch.setattr(job_module, "tidy", nothing)
        guest = await run_all(server, tmp_path / "overlay", patch, chance, idle=True, epoch_bytes=1 << 40)
    with pytest.raises(DamagedError):
        check_every_moment(guest, chance)


def check_every_moment(guest: Guest, chance: random.Random) -> None:
    for moment in range(guest.recorder.end):
        guest.model.check_power_cut(guest.recorder.power_cut(moment, chance), moment)
