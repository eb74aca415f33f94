"""QED images written by us and by QEMU: the same operations make the same disks and maps, and a check finds nothing.

Three images go through each run: one that only we write, its twin that only qemu-io writes, and one that is handed
back and forth. A run has phases; in each, every image is opened once, written, read, and closed. Behind it both
sides read all three, map them and check them. What is known to be wrong with QEMU (qed.md section 3) is kept out
of its way: see :meth:`Disk.for_qemu`.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from nbdstream.block.chain import open_device
from nbdstream.block.growth import grow
from nbdstream.block.overlay import Overlay
from nbdstream.extents import ExtentFlags
from tests.support import qed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nbdstream.block.device import BlockDevice

SECTOR = 512
_ZERO_KINDS = ("zero", "unmap", "discard")


class Operation(NamedTuple):
    """One request. ``byte`` is what a write fills its range with."""

    kind: str
    """write, zero (may not unmap), unmap (zeroes that may), discard, read or flush."""
    offset: int
    length: int
    byte: int = 0


class Geometry(NamedTuple):
    """What an image is like."""

    cluster_size: int
    table_size: int
    size: int
    """Of the disk: a multiple of 512, not always of the cluster size."""
    backing: int | None
    """Bytes that the backing file has, None if there is none."""
    backing_is_qed: bool = False


@dataclass
class Disk:
    """An image file, and what its disk must read as."""

    path: str
    geometry: Geometry
    model: bytearray
    zeroed: set[int] = field(default_factory=set)
    """Clusters that may be zero clusters."""

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        return len(self.model)

    def apply(self, operation: Operation, *, discards: bool) -> None:
        """Do it to the model. QEMU's QED ignores a discard, we make zeroes of whole clusters."""
        kind, offset, length, byte = operation
        size, end = self.geometry.cluster_size, offset + length
        whole = range(-(-offset // size), -(-end // size) if end == self.size else end // size)
        if kind == "write":
            self.model[offset:end] = bytes([byte]) * length
            self.zeroed.difference_update(whole)
        elif kind in ("zero", "unmap"):
            self.model[offset:end] = bytes(length)
            self.zeroed.update(whole)
        elif kind == "discard" and discards and whole:
            start, end = whole.start * size, min(whole.stop * size, self.size)
            self.model[start:end] = bytes(end - start)
            self.zeroed.update(whole)

    def for_qemu(self, operation: Operation) -> Operation:
        """Return the operation, on whole clusters where QEMU would get a part wrong.

        Around a write into a part of a zero cluster it stores what the backing file has (bug 1).
        """
        size, end = self.geometry.cluster_size, operation.offset + operation.length
        if operation.kind not in ("write", "zero", "unmap") or self.geometry.backing is None:
            return operation
        touched = range(operation.offset // size, -(-end // size))
        if self.zeroed.isdisjoint(touched):
            return operation
        start, end = touched.start * size, min(touched.stop * size, self.size)
        return operation._replace(offset=start, length=end - start)


async def do_ours(disk: Disk, operations: Sequence[Operation]) -> None:
    device = await open_ours(disk, writable=True)
    try:
        for operation in operations:
            kind, offset, length, byte = operation
            if kind == "write":
                await device.write(offset, bytes([byte]) * length)
            elif kind in ("zero", "unmap"):
                await device.write_zeroes(offset, length, may_unmap=kind == "unmap")
            elif kind == "discard":
                await device.discard(offset, length)
            elif kind == "flush":
                await device.flush()
            else:
                assert await read(device, offset, length) == disk.model[offset : offset + length], operation
            disk.apply(operation, discards=True)
        assert await read(device, 0, device.size) == disk.model
    finally:
        await device.close()


_COMMANDS = {
    "write": "write -q -P {byte} {offset} {length}",
    "zero": "write -q -z {offset} {length}",
    "unmap": "write -q -z -u {offset} {length}",
    "discard": "discard -q {offset} {length}",
    "flush": "flush",
}


def do_qemu(disk: Disk, operations: Sequence[Operation]) -> None:
    commands = []
    for asked in operations:
        operation = disk.for_qemu(asked)
        if operation.kind == "read":
            commands += reads(disk.model, operation)
        else:
            commands.append(_COMMANDS[operation.kind].format(**operation._asdict()))
        disk.apply(operation, discards=False)
    result = subprocess.run(
        ["qemu-io", "-f", "qed", disk.path],
        input="\n".join([*commands, "quit", ""]),
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in result.stdout.splitlines() if line.replace("qemu-io> ", "").strip()]
    assert result.returncode == 0, result.stderr
    assert not said, said[:10]
    assert not result.stderr, result.stderr


def reads(model: bytearray, operation: Operation) -> list[str]:
    """Return reads that compare with the model: at most three runs of one byte each, where the read begins."""
    commands, at = [], operation.offset
    for byte, run in groupby(model[operation.offset : operation.offset + operation.length]):
        length = sum(1 for _ in run)
        commands.append(f"read -q -P {byte} {at} {length}")
        at += length
        if len(commands) == 3:
            break
    return commands


async def grow_ours(disk: Disk, size: int) -> None:
    device = await open_ours(disk, writable=True)
    assert isinstance(device, Overlay)
    try:
        await grow(device, size)
    finally:
        await device.close()
    cluster_size = disk.geometry.cluster_size
    disk.zeroed.update(range(disk.size // cluster_size, -(-size // cluster_size)))  # where the backing file would show
    disk.model.extend(bytes(size - disk.size))


async def grow_qemu(disk: Disk, size: int) -> None:
    """Grow it by QEMU, or by us where QEMU refuses: the backing file is longer than the disk."""
    if (disk.geometry.backing or 0) > disk.size:
        await grow_ours(disk, size)
        return
    qed.qemu_img("resize", "-q", "-f", "qed", disk.path, str(size))
    disk.model.extend(bytes(size - disk.size))


async def open_ours(disk: Disk, *, writable: bool = False) -> BlockDevice:
    below = [] if disk.geometry.backing is None else ["qed" if disk.geometry.backing_is_qed else "raw"]
    return await open_device(disk.path, "qed", below, writable=writable)


async def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buffers = device.read_now(offset, length)
    if buffers is None:
        buffers = await device.read(offset, length)
    return b"".join(bytes(buffer) for buffer in buffers)


async def our_map(device: BlockDevice) -> list[qed.MapEntry]:
    """Return our extents as qemu-img map tells them, equal neighbours joined."""
    runs: list[qed.MapEntry] = []
    position = 0
    while position < device.size:
        for extent in await device.extents(position, device.size - position):
            zero, data = bool(extent.flags & ExtentFlags.ZERO), not extent.flags & ExtentFlags.HOLE
            depth = extent.depth - 1 if extent.depth else 0
            runs.append(qed.MapEntry(extent.offset, extent.length, depth, bool(extent.depth), zero, data))
            position = extent.end
    return normalised(runs)


def normalised(runs: list[qed.MapEntry]) -> list[qed.MapEntry]:
    """Join equal neighbours. What no layer has is nobody's: its depth means nothing, and it reads as zero."""
    joined: list[qed.MapEntry] = []
    for run in runs:
        if not run.present:
            run = run._replace(depth=0)  # noqa: PLW2901
        if joined and joined[-1][2:] == run[2:]:
            run = run._replace(start=joined[-1].start, length=joined.pop().length + run.length)  # noqa: PLW2901
        joined.append(run)
    return joined


async def examine(disk: Disk) -> None:
    check = qed.qemu_check(disk.path)
    assert (check.status, check.corruptions, check.leaks) in ((0, 0, 0), (3, 0, check.leaks)), check
    assert qed.content(disk.path) == disk.model
    device = await open_ours(disk)
    try:
        assert await read(device, 0, device.size) == disk.model
        assert await our_map(device) == normalised(qed.qemu_map(disk.path))
    finally:
        await device.close()


class Run:
    """Three images of one geometry."""

    def __init__(self, directory: str, geometry: Geometry, chance: random.Random) -> None:
        self.geometry = geometry
        backing, below = None, b""
        if geometry.backing is not None:
            below = b"".join(
                chance.choice([bytes(4096), bytes([chance.randrange(1, 256)]) * 4096])
                for _ in range(-(-geometry.backing // 4096))
            )[: geometry.backing]
            backing = f"{directory}/backing"
            with open(backing, "wb") as file:
                file.write(below)
            if geometry.backing_is_qed:
                qed.qemu_img("convert", "-f", "raw", "-O", "qed", backing, f"{backing}.qed")
                backing = f"{backing}.qed"
        model = below[: geometry.size].ljust(geometry.size, b"\0")
        self.ours, self.theirs, self.shared = (
            Disk(self._create(f"{directory}/{name}", backing), geometry, bytearray(model))
            for name in ("ours", "theirs", "shared")
        )

    def _create(self, path: str, backing: str | None) -> str:
        kind = "qed" if self.geometry.backing_is_qed else "raw"
        geometry = self.geometry
        return qed.create(
            path,
            geometry.size,
            cluster_size=geometry.cluster_size,
            table_size=geometry.table_size,
            backing=backing,
            backing_format=kind,
        )

    async def phase(self, operations: Sequence[Operation], *, shared_is_ours: bool) -> None:
        """Do the operations to all three images, and compare."""
        await do_ours(self.ours, operations)
        do_qemu(self.theirs, operations)
        if shared_is_ours:
            await do_ours(self.shared, operations)
        else:
            do_qemu(self.shared, operations)
        for disk in (self.ours, self.theirs, self.shared):
            await examine(disk)
        assert not qed.qemu_check(self.theirs.path).leaks
        if not any(operation.kind == "discard" for operation in operations):
            # The models are the same but for what was discarded before.
            self._compare_twins()

    async def grow(self, size: int, *, shared_is_ours: bool) -> None:
        """Make all three disks larger."""
        await grow_ours(self.ours, size)
        await grow_qemu(self.theirs, size)
        await (grow_ours if shared_is_ours else grow_qemu)(self.shared, size)
        self.geometry = self.geometry._replace(size=size)

    def _compare_twins(self) -> None:
        if self.ours.model == self.theirs.model:
            assert qed.qemu_compare(self.ours.path, self.theirs.path, second_format="qed")


def random_geometry(chance: random.Random) -> Geometry:
    cluster_size, table_size = chance.choice([(4096, 2), (4096, 4), (8192, 2), (16384, 4), (65536, 2), (65536, 4)])
    return geometry_of(
        cluster_size,
        table_size,
        clusters=chance.choice([1, 5, 40, 40, cluster_size * table_size // 8 + 5 if cluster_size == 4096 else 20]),
        cut=chance.choice([0, SECTOR, cluster_size - SECTOR, chance.randrange(cluster_size // SECTOR) * SECTOR]),
        backing=chance.choice(["none", "none", "short", "equal", "long"]),
        backing_is_qed=chance.random() < 0.3,
    )


def geometry_of(
    cluster_size: int, table_size: int, *, clusters: int, cut: int, backing: str, backing_is_qed: bool
) -> Geometry:
    """Return the geometry of a disk of so many clusters, less ``cut`` bytes."""
    size = clusters * cluster_size - cut
    lengths = {
        "none": None,
        "short": max(SECTOR, size // 2 // SECTOR * SECTOR),
        "equal": size,
        "long": size + 3 * cluster_size + SECTOR,
    }
    return Geometry(cluster_size, table_size, size, lengths[backing], backing_is_qed)


_KINDS = {"write": 8, "zero": 2, "unmap": 2, "discard": 1, "read": 4, "flush": 1}


def random_operations(chance: random.Random, geometry: Geometry, count: int) -> list[Operation]:
    return [random_operation(chance, geometry) for _ in range(count)]


def random_operation(chance: random.Random, geometry: Geometry) -> Operation:
    unit = chance.choice([SECTOR, SECTOR, geometry.cluster_size, 1])
    length = min(unit * chance.randint(1, chance.choice([1, 4, 20])), geometry.size, 3 * geometry.cluster_size)
    offset = chance.randrange(geometry.size - length + 1) // unit * unit
    kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
    return Operation(kind, offset, length, chance.randrange(1, 256))


@st.composite
def operations_of(draw: st.DrawFn, geometry: Geometry) -> list[Operation]:
    sectors = geometry.size // SECTOR
    operations = []
    for _ in range(draw(st.integers(1, 25))):
        first = draw(st.integers(0, sectors - 1))
        most = min(sectors - first, 3 * geometry.cluster_size // SECTOR)
        length = draw(st.integers(1, most))
        kind = draw(st.sampled_from(list(_KINDS)))
        operations.append(Operation(kind, first * SECTOR, length * SECTOR, draw(st.integers(1, 255))))
    return operations


GEOMETRIES = st.builds(
    geometry_of,
    st.sampled_from([4096, 8192, 65536]),
    st.sampled_from([2, 4]),
    clusters=st.integers(1, 30),
    cut=st.integers(0, 7).map(lambda sectors: sectors * SECTOR),
    backing=st.sampled_from(["none", "short", "equal", "long"]),
    backing_is_qed=st.booleans(),
)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_the_same_operations_make_the_same_disk(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    geometry = data.draw(GEOMETRIES)
    run = Run(str(tmp_path_factory.mktemp("run")), geometry, random.Random(0))
    for _ in range(data.draw(st.integers(1, 2))):
        operations = data.draw(operations_of(geometry))
        asyncio.run(run.phase(operations, shared_is_ours=data.draw(st.booleans())))
        if data.draw(st.booleans()):
            geometry = geometry._replace(size=geometry.size + data.draw(st.integers(1, 40)) * SECTOR)
            asyncio.run(run.grow(geometry.size, shared_is_ours=data.draw(st.booleans())))


async def run_for(tmp_path: Path, seed: int, *, seconds: float, operations: int) -> Counter[str]:
    """Make run after run until the time is over; return what was done."""
    done: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    number = 0
    while time.monotonic() < deadline:
        chance = random.Random(seed + number)
        directory = tmp_path / str(number)
        directory.mkdir()
        run = Run(str(directory), geometry := random_geometry(chance), chance)
        try:
            for _ in range(4):
                some = random_operations(chance, run.geometry, chance.randint(1, operations))
                await run.phase(some, shared_is_ours=chance.random() < 0.5)
                done["operations"] += 3 * len(some)
                done["phases"] += 1
                if chance.random() < 0.4:
                    more = chance.choice([SECTOR, geometry.cluster_size, 5 * geometry.cluster_size + SECTOR])
                    await run.grow(run.geometry.size + more, shared_is_ours=chance.random() < 0.5)
                    done["grown"] += 1
        except BaseException:
            print(f"seed {seed + number}, run {number}: {geometry}")
            raise
        done["runs"] += 1
        for path in directory.iterdir():
            path.unlink()
        number += 1
    return done


async def test_long_random_runs_make_the_same_disks(tmp_path: Path, seed: int) -> None:
    print(await run_for(tmp_path, seed, seconds=8, operations=200))


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_millions_of_operations_make_the_same_disks(tmp_path: Path, seed: int) -> None:
    """For as long as NBDSTREAM_SOAK_SECONDS says, half an hour unless it is given."""
    seconds = float(os.environ.get("NBDSTREAM_SOAK_SECONDS", "1800"))
    print(await run_for(tmp_path, seed, seconds=seconds, operations=5000))
