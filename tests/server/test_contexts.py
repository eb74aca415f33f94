from __future__ import annotations

from nbdstream.extents import Extent, ExtentFlags
from nbdstream.server.contexts import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE, descriptors

EXTENTS = [
    Extent(0, 100, ExtentFlags.DATA),
    Extent(100, 50, ExtentFlags.DATA | ExtentFlags.REMOTE, depth=2),
    Extent(150, 25, ExtentFlags.HOLE | ExtentFlags.ZERO, depth=0),
]


def test_each_context_joins_what_is_equal_to_it() -> None:
    assert descriptors(BASE_ALLOCATION, EXTENTS, only_one=False) == [(150, 0), (25, 3)]
    assert descriptors(QEMU_ALLOCATION_DEPTH, EXTENTS, only_one=False) == [(100, 1), (50, 2), (25, 0)]
    assert descriptors(REMOTE, EXTENTS, only_one=False) == [(100, 0), (50, 1), (25, 0)]


def test_only_one_is_the_first_with_all_that_joins_it() -> None:
    assert descriptors(BASE_ALLOCATION, EXTENTS, only_one=True) == [(150, 0)]
