"""Giving an overlay another backing file name: whatever happens meanwhile, it has the old name or the new one."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdstream.block.qed.extension import EXTENSION_OFFSET
from nbdstream.block.qed.layout import HEADER_BYTES, SECTOR_BYTES, encode_backing_name
from nbdstream.block.worker import pread_exact, pwrite_all
from nbdstream.errors import ImageError

if TYPE_CHECKING:
    from nbdstream.block.qed.extension import Extension
    from nbdstream.block.qed.layout import Header


def replace_backing(
    fd: int, header: Header, extension: Extension | None, name: str, origin_size: int
) -> tuple[Header, Extension | None]:
    """Let the image at ``fd`` have another backing file, and remember it as where it came from (*blocking*).

    Returns header and extension as they are then, durably. Raises ImageError if there is no room for the name.
    """
    data = encode_backing_name(name)
    new = replace(header, backing_filename_offset=_place_beside(header, len(data)), backing_filename_size=len(data))
    pwrite_all(fd, data, new.backing_filename_offset)
    os.fdatasync(fd)
    pwrite_all(fd, new.pack(), 0)  # it lies in one sector: all of it changes, or nothing
    os.fdatasync(fd)
    if extension:
        extension = replace(extension, origin=name, origin_size=origin_size)
        _write_changed_sectors(fd, extension.pack(), EXTENSION_OFFSET)
        os.fdatasync(fd)
    return new, extension


def _place_beside(header: Header, length: int) -> int:
    """Return where a name of ``length`` bytes lies neither on the header nor on the present name."""
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    behind = EXTENSION_OFFSET if header.has_extension_area else header.geometry.header_bytes
    if HEADER_BYTES + length <= start:
        return HEADER_BYTES
    if end + length <= behind:
        return end
    raise ImageError(f"the header of this image has no room for a second backing file name of {length} bytes")


def _write_changed_sectors(fd: int, data: bytes, offset: int) -> None:
    """Write what differs: of a short name that is one sector, which a power cut cannot tear.

    (A torn extension is none: the image forgets who it is, and nothing else.)
    """
    old = pread_exact(fd, len(data), offset)
    for at in range(0, len(data), SECTOR_BYTES):
        sector = data[at : at + SECTOR_BYTES]
        if sector != old[at : at + SECTOR_BYTES]:
            pwrite_all(fd, sector, offset + at)
