"""Large images cost what is in them, not what they could hold. Times are of the processor: the machine is shared."""

from __future__ import annotations

import struct
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from tests.support.processes import NBDSTREAM, run

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 65536
TABLE = 4 * CLUSTER
ENTRIES = TABLE // 8
SPAN = ENTRIES * CLUSTER
"""Bytes of the disk that one L2 table maps: 2 GiB."""
MIB = 1 << 20


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    """Of the processor."""
    memory: int
    """The most that was resident, in bytes."""


# From a process of its own, since each begins with the largest size that its parent ever had (getrusage(2)).
_COST = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
os._exit(os.waitstatus_to_exitcode(status))
"""


def cost(*arguments: str) -> Cost:
    """Run an nbdstream command, which must succeed."""
    seconds, kilobytes = run(sys.executable, "-uSc", _COST, NBDSTREAM, *arguments).stdout.split()
    return Cost(float(seconds), int(kilobytes) << 10)


def make(path: Path, tables: int, clusters_each: int) -> str:
    """Make a sparse image of 1 TiB, of which each of the first ``tables`` L2 tables maps so many clusters."""
    places = range(TABLE // CLUSTER + 1, 1 << 62, TABLE // CLUSTER)  # the L2 tables, in clusters
    with open(path, "wb") as file:
        file.write(struct.pack("<4sIIIQQQQQII", b"QED\0", CLUSTER, 4, 1, 0, 0, 0, CLUSTER, 1 << 40, 0, 0))
        file.seek(CLUSTER)
        file.write(struct.pack(f"<{tables}Q", *(places[index] * CLUSTER for index in range(tables))))
        data = places[tables] * CLUSTER
        for index in range(tables):
            file.seek(places[index] * CLUSTER)
            run = range(data, data + clusters_each * CLUSTER, CLUSTER)
            file.write(struct.pack(f"<{clusters_each}Q", *run))
            data = run.stop
        file.truncate(data)
    return str(path)


@pytest.fixture
def terabyte(tmp_path: Path) -> str:
    """1 TiB with a cluster of data in every 2 GiB."""
    return make(tmp_path / "terabyte", (1 << 40) // SPAN, 1)


@pytest.mark.parametrize("writable", [False, True])
async def test_a_terabyte_is_opened_read_and_mapped_within_a_second(terabyte: str, *, writable: bool) -> None:
    begun = time.process_time()
    device = Overlay(await QedImage.open(terabyte, writable=writable))
    assert await device.read((1 << 40) - CLUSTER, CLUSTER)
    position = extents = 0
    while position < device.size:
        found = await device.extents(position, device.size - position)
        position, extents = found[-1].end, extents + len(found)
    assert extents == 2 * (1 << 40) // SPAN
    taken = time.process_time() - begun
    await device.close()
    assert taken < 1


def test_the_map_of_a_terabyte_takes_hardly_any_memory(terabyte: str, tmp_path: Path) -> None:
    little = cost("map", "-f", "qed", make(tmp_path / "little", 1, 1))
    much = cost("map", "-f", "qed", terabyte)
    print(little, much)
    assert much.memory < little.memory + 16 * MIB


def test_a_check_takes_memory_for_what_is_allocated_and_seconds(tmp_path: Path) -> None:
    """64 GiB, sparse: a million clusters."""
    little = cost("check", make(tmp_path / "little", 1, 1))
    much = cost("check", make(tmp_path / "much", 32, ENTRIES))
    print(little, much)
    assert much.seconds < 5
    assert much.memory < little.memory + 16 * MIB
