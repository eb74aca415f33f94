"""What lies below an image: which clusters are asked for there, what they read as, and how they are described."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.below import Below
from nbdstream.extents import Extent, ExtentFlags
from tests.support.memory import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA = bytes(range(1, 101))


class NobodyKeeps:
    """A keeper that is never asked."""

    def want(self, offset: int, length: int) -> None:
        raise AssertionError("nobody asks it")

    async def read(self, cluster: int, within: int, length: int) -> memoryview | None:
        raise AssertionError("nobody asks it")

    async def keep(self, first: int, behind: int) -> None:
        raise AssertionError("nobody asks it")


def streaming(remote: Sequence[bool]) -> Below:
    below = Below(MemoryDevice(DATA))
    below.begin_streaming(bitarray(remote), NobodyKeeps())
    return below


async def content(below: Below, offset: int, length: int) -> bytes:
    return b"".join(map(bytes, await below.read(offset, length)))


def test_without_a_device_nothing_is_below() -> None:
    below = Below(None)
    assert not below.has(0)
    assert below.run(0, 7) == 7


def test_all_that_is_unallocated_is_in_a_backing_file() -> None:
    below = Below(MemoryDevice(DATA))
    assert below.has(0)
    assert below.run(3, 9) == 9


def test_of_a_stream_only_remote_clusters_are_below() -> None:
    below = streaming([True, True, False, False, False, True])
    assert [below.has(cluster) for cluster in range(6)] == [True, True, False, False, False, True]
    assert [below.run(cluster, 6 - cluster) for cluster in range(6)] == [2, 1, 3, 2, 1, 1]
    assert below.run(2, 2) == 2, "no further than asked for"


@given(st.lists(st.booleans(), min_size=1), st.data())
def test_remote_clusters_are_counted(remote: list[bool], data: st.DataObject) -> None:
    below = streaming(remote)
    for _ in range(5):
        first = data.draw(st.integers(0, len(remote) - 1))
        behind = data.draw(st.integers(first, len(remote)))
        below.mark_local(first)
        below.mark_zero(first, behind)
        assert below.remote is not None
        assert below.remote_count == below.remote.count()
        assert not below.remote[first:behind].any()
        assert not below.has(first)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(10, 20, DATA[10:30]), (90, 20, DATA[90:] + bytes(10)), (100, 5, bytes(5)), (200, 5, bytes(5))],
)
async def test_behind_the_end_of_what_is_below_there_are_zeroes(offset: int, length: int, expected: bytes) -> None:
    assert await content(Below(MemoryDevice(DATA)), offset, length) == expected


async def test_what_was_forgotten_reads_as_zeroes() -> None:
    below = streaming([True])
    below.forget()
    assert await content(below, 0, 10) == bytes(10)
    assert not below.has(0)
    assert below.keeper is None


async def test_a_source_is_described_without_being_asked() -> None:
    below = streaming([True])
    assert await below.extents(0, 50) == [Extent(0, 50, ExtentFlags.REMOTE, depth=2)]


async def test_a_backing_file_describes_itself_one_layer_down() -> None:
    below = Below(MemoryDevice(DATA))
    assert await below.extents(10, 200) == [Extent(10, 90, ExtentFlags.DATA, depth=2)]
    hole = Extent(100, 5, ExtentFlags.HOLE | ExtentFlags.ZERO, depth=0)
    assert await below.extents(100, 5) == [hole], "and behind its end there is nothing"
