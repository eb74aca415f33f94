"""What must be true of a source and a destination, whatever has happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdstream.wire.handover.destination import OWNER
from nbdstream.wire.handover.vocabulary import Phase
from tests.wire.handover.sides import KEEPER, BrokenError

if TYPE_CHECKING:
    from tests.wire.handover.sides import DestinationSide, SourceSide


def check_pair(source: SourceSide, destination: DestinationSide) -> None:
    """Raise BrokenError if two hosts in these states break a rule."""
    granted = source.disk.phase not in KEEPER
    if destination.destroyed:
        return
    if source.guest and destination.ran:
        raise BrokenError("two guests run")
    if source.rival and destination.ran:
        raise BrokenError("two destinations were granted the disks")
    if source.disposed and not destination.whole:
        raise BrokenError("the source is released, and the destination is not independent")
    if destination.disk.phase in OWNER:
        if not granted:
            raise BrokenError("two owners by their journals")
        if destination.disk.epoch != source.disk.epoch:
            raise BrokenError("the owner's epoch is not the one that was granted")
    check_owner(source, destination)
    if source.hidden and source.guest:
        raise BrokenError("the guest runs on images that are hidden")


def check_owner(_: SourceSide, destination: DestinationSide) -> None:
    """Raise BrokenError if a destination whose guest may have run is not the owner any more, or its overlay is gone."""
    if destination.ran and destination.disk.phase not in OWNER:
        raise BrokenError("a guest could write, and its host does not know that it owns the disks")
    if destination.ran and not destination.overlay:
        raise BrokenError("a guest could write, and its overlay is gone")


def end_problem(source: SourceSide, destination: DestinationSide) -> str | None:
    """Return what is wrong with a pair that nothing more happens to; None if exactly one of them owns the disks."""
    resting = source.disk.phase in (Phase.OFFERED, Phase.DECLINED)
    keeps = resting and not (source.fence or source.hidden or source.disposed)
    if destination.destroyed:
        lost = source.disk.phase is Phase.RELEASED
        return None if keeps or (lost and destination.whole) else "nobody owns the disks"
    owns = destination.disk.phase in OWNER and destination.writes
    if keeps == owns:
        return "there are two owners" if keeps else "nobody owns the disks"
    if owns and not (destination.disk.phase is Phase.RELEASED and source.disk.phase is Phase.RELEASED):
        return "it does not come to its end"
    return None
