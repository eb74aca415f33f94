"""Repairing a QED image in place, as ``check -r`` does. All of it blocks.

What an earlier owner left unfinished comes first: its page cache, its record of acknowledged links. Then damage, if it
is to be repaired, then leaks. Leaks are given back only if there is no damage any more: what was lost could be in them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from nbdstream.block.qed.check import CheckResult, check
from nbdstream.block.qed.compact import compact
from nbdstream.block.qed.layout import FEATURE_NEED_CHECK, Header
from nbdstream.block.qed.mend import Ranges, drop_bad_entries, find_shared, measure_doubles, part_doubles
from nbdstream.block.qed.opening import read_header_of, write_header
from nbdstream.block.qed.record import remove_record
from nbdstream.block.qed.replay import links_to_replay, replay
from nbdstream.block.qed.tables import Tables
from nbdstream.errors import ImageError


@dataclass(slots=True)
class RepairResult:
    """What was wrong, and what became of it."""

    found: CheckResult
    """What a check found, once the record of a killed owner was replayed."""
    left: CheckResult
    """What a check finds now."""
    lost: Ranges = field(default_factory=Ranges)
    """What of the disk could not be read, and is unallocated now: it shows what is in the backing file, or zeroes."""
    copied: Ranges = field(default_factory=Ranges)
    """What of the disk shared its place in the file with something else, and has a copy now. It reads as before, but
    only one of those that shared a place can be what was written."""

    @property
    def corruptions_fixed(self) -> int:
        """As in QAPI's ImageCheck."""
        return self.found.corruptions - self.left.corruptions

    @property
    def leaks_fixed(self) -> int:
        """As in QAPI's ImageCheck."""
        return max(0, self.found.leaks - self.left.leaks)


def repair(fd: int, *, leaks_only: bool = False) -> RepairResult:
    """Repair the image in an open file, on which the caller has a writer's locks.

    A crash meanwhile leaves an image that is no worse than before. Raises ImageError: it is no QED image, or its tables
    are so tangled that nothing was changed. Raises OSError: a disk that is full or broken; run it again.
    """
    header, extension, _ = read_header_of(fd)
    os.fdatasync(fd)
    if links := links_to_replay(fd, header, extension):
        replay(fd, header, Tables.load(fd, header, strict=False), links)
    found = check(fd)
    result = RepairResult(found, found)
    if found.check_errors:
        return result
    if not found.status and not header.needs_check and not links:
        return result
    if found.corruptions and not leaks_only:
        shared = find_shared(fd, header)
        _check_room(fd, measure_doubles(fd, header, shared))
    if header.autoclear_features:  # what others promised there, and the record, is not kept up from here on
        header = header.without_autoclear()
        write_header(fd, header)
    if extension:
        remove_record(fd, extension.image_uuid)
    if found.corruptions and not leaks_only:
        result.lost = drop_bad_entries(fd, header, shared)
        result.copied = part_doubles(fd, header, shared)
        result.left = check(fd)
    if not result.left.corruptions:
        if result.left.leaks:
            header = compact(fd, header)
            result.left = check(fd)
        _set_clean(fd, header)
    return result


def _check_room(fd: int, needed: int) -> None:
    """Raise ImageError unless the file system has room for that many bytes."""
    about = os.fstatvfs(fd)
    room = about.f_bavail * about.f_frsize
    if needed > room:
        raise ImageError(f"copies of what is used twice take {needed} bytes, the file system has room for {room}")


def _set_clean(fd: int, header: Header) -> None:
    if header.needs_check:
        write_header(fd, replace(header, features=header.features & ~FEATURE_NEED_CHECK))
