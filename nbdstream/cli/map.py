"""List the extents of an image or an export: which hold data, which read as zero, and which are not local.

Lines of offset, length, type and description, as nbdinfo --map prints them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from nbdstream.block.chain import open_device_or_uri
from nbdstream.block.device import all_extents
from nbdstream.cli import arguments
from nbdstream.extents import Extent, ExtentFlags

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``map`` understands."""
    parser.add_argument("image", metavar="IMAGE|URI", help="an image file, or an NBD URI")
    arguments.add_format(parser)
    arguments.add_backing_format(parser)
    arguments.add_json(parser)
    arguments.add_tls_certificates(parser)


async def run(options: argparse.Namespace) -> int:
    """Print the map."""
    device = await open_device_or_uri(
        options.image, options.format, options.backing_format, tls_certificates=options.tls_certificates, alone=True
    )
    try:
        await (_print_json if options.json else _print)(all_extents(device, 0, device.size))
    finally:
        await device.close()
    return 0


async def _print(extents: AsyncIterator[Extent]) -> None:
    """Print lines as they become known: a map can be longer than the memory."""
    async for extent in extents:
        kind = extent.flags & (ExtentFlags.HOLE | ExtentFlags.ZERO)
        sys.stdout.write(f"{extent.offset:>12} {extent.length:>12} {int(kind):>4}  {_describe(extent)}\n")


async def _print_json(extents: AsyncIterator[Extent]) -> None:
    before = "[\n"
    async for extent in extents:
        sys.stdout.write(before + json.dumps(_as_json(extent)))
        before = ",\n"
    sys.stdout.write("[]\n" if before.startswith("[") else "\n]\n")


def _describe(extent: Extent) -> str:
    words = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}
    text = words[int(extent.flags & (ExtentFlags.HOLE | ExtentFlags.ZERO))]
    return "backing" if extent.flags & ExtentFlags.REMOTE else text


def _as_json(extent: Extent) -> dict[str, object]:
    return {
        "offset": extent.offset,
        "length": extent.length,
        "type": int(extent.flags & (ExtentFlags.HOLE | ExtentFlags.ZERO)),
        "description": _describe(extent),
        "depth": extent.depth,
    }
