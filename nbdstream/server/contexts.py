"""Meta contexts: what BLOCK_STATUS tells of a device's extents (proto.md, "Metadata querying")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class MetaContext(NamedTuple):
    """A meta context that an export offers."""

    name: str
    status: Callable[[Extent], int]
    """The status flags of an extent."""


BASE_ALLOCATION: Final = MetaContext(
    "base:allocation", lambda extent: int(extent.flags & (ExtentFlags.HOLE | ExtentFlags.ZERO))
)
"""proto.md: bit 0 HOLE, bit 1 ZERO."""

QEMU_ALLOCATION_DEPTH: Final = MetaContext("qemu:allocation-depth", lambda extent: extent.depth)
"""QEMU, docs/interop/nbd.rst: 0 unallocated, 1 the top layer, 2 its backing file, and so on."""

REMOTE: Final = MetaContext("x-nbdstream:remote", lambda extent: int(bool(extent.flags & ExtentFlags.REMOTE)))
"""Ours, for an overlay that is being filled: bit 0 is set where reading has to ask the source. (proto.md keeps
``x-`` for namespaces that nobody registered.)"""

LAYERED_CONTEXTS: Final = (BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, REMOTE)
"""For a device that is layered on another."""


def descriptors(context: MetaContext, extents: Sequence[Extent], *, only_one: bool) -> list[tuple[int, int]]:
    """Return (length, status flags) of contiguous extents, neighbours of equal status joined.

    ``only_one`` leaves the first (REQ_ONE).
    """
    joined: list[tuple[int, int]] = []
    for extent in extents:
        status = context.status(extent)
        if joined and joined[-1][1] == status:
            joined[-1] = (joined[-1][0] + extent.length, status)
        elif joined and only_one:
            break
        else:
            joined.append((extent.length, status))
    return joined
