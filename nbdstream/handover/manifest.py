"""The manifest beside an overlay that needs its source no more: which disk it is, its epoch, and what it consists of.

It is what the source goes by before it lets go; and where the disk is offered again, its UUID and its epoch go on.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec

from nbdstream.block.qed.tables import UNALLOCATED, ZERO
from nbdstream.block.worker import pwrite_all
from nbdstream.errors import NbdstreamError
from nbdstream.handover.journal import sync_directory
from nbdstream.wire.handover.messages import MAXIMUM_LINE, Manifest

if TYPE_CHECKING:
    from nbdstream.block.qed.image import QedImage
    from nbdstream.wire.handover.messages import Disk

_AT_ONCE = 1 << 16
"""Clusters that are looked up at a time."""


def manifest_path(image: str) -> str:
    """Return where the manifest of an image lies."""
    return f"{image}.manifest"


async def take_stock(image: QedImage, disk: Disk, epoch: int, accepted: float) -> Manifest:
    """Return the manifest of an independent image, by its tables as they are. Raises OSError if they are damaged."""
    clusters = -(-image.size // image.cluster_size)
    data = zero = unallocated = cluster = 0
    while cluster < clusters:
        entry, count = await image.run(cluster, min(_AT_ONCE, clusters - cluster))
        if entry == UNALLOCATED:
            unallocated += count
        elif entry == ZERO:
            zero += count
        else:
            data += count
        cluster += count
    now = int(time.time())
    return Manifest(
        disk.uuid, epoch, disk.size, image.cluster_size, data, zero, unallocated, int(accepted), max(now, int(accepted))
    )


def write_manifest(image: str, manifest: Manifest) -> None:
    """Write it beside the image; it is whole and durable when this returns. Raises OSError."""
    path = manifest_path(image)
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
        pwrite_all(fd, text, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(os.path.dirname(os.path.abspath(path)))


def read_manifest(path: str) -> Manifest | None:
    """Return the manifest in a file; None if there is no such file. Raises NbdstreamError."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(MAXIMUM_LINE), type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NbdstreamError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise NbdstreamError(f"{path} is no manifest: {error}") from error
