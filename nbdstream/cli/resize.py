"""Make the disk of a QED image larger. What is new reads as zeroes; it never becomes smaller.

Nobody may have the image open. A backing file that may be longer than the disk has to be opened for this
(--backing-format), so that nothing of it shows in what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdstream.block.chain import open_device
from nbdstream.block.growth import grow
from nbdstream.block.overlay import Overlay
from nbdstream.cli import arguments

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``resize`` understands."""
    parser.add_argument("image", metavar="IMAGE", help="a QED image")
    parser.add_argument("size", type=_size, metavar="[+]SIZE", help="the new size in bytes, or by how much it grows")
    arguments.add_backing_format(parser)


def _size(text: str) -> tuple[bool, int]:
    """Return whether a size is to be added, and the size."""
    return text.startswith("+"), arguments.size(text.removeprefix("+"))


async def run(options: argparse.Namespace) -> int:
    """Resize."""
    more, size = options.size
    device = await open_device(options.image, "qed", options.backing_format, writable=True, alone=True)
    try:
        assert isinstance(device, Overlay)
        await grow(device, device.size + size if more else size)
    finally:
        await device.close()
    return 0
