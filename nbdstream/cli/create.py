"""Make a QED image: an empty disk of a given size, or an overlay of a source.

With --backing the source is asked for its size, and the overlay is made as 'nbdstream stream' makes it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nbdstream.block.qed.layout import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from nbdstream.block.qed.opening import create_file
from nbdstream.cli import arguments
from nbdstream.stream.preparation import create_overlay

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``create`` understands."""
    parser.add_argument("overlay", metavar="OVERLAY", help="the image file to make; it must not exist")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--size", type=arguments.size, metavar="BYTES", help="make an empty disk of this size")
    what.add_argument("--backing", metavar="SOURCE", help="make an overlay of this NBD URI")
    parser.add_argument(
        "--cluster-size",
        type=arguments.size,
        default=DEFAULT_CLUSTER_SIZE,
        metavar="N",
        help="bytes, a power of two from 4k on (default: 64k)",
    )
    parser.add_argument(
        "--table-size",
        type=arguments.size,
        default=DEFAULT_TABLE_SIZE,
        metavar="N",
        help="clusters in an L1 or L2 table: 2, 4, 8 or 16 (default: 4)",
    )
    arguments.add_tls_certificates(parser)


async def run(options: argparse.Namespace) -> int:
    """Make the image."""
    geometry = {"cluster_size": options.cluster_size, "table_size": options.table_size}
    if options.backing is None:
        await asyncio.to_thread(create_file, options.overlay, options.size, backing_name=None, **geometry)
    else:
        await create_overlay(options.backing, options.overlay, tls_certificates=options.tls_certificates, **geometry)
    return 0
