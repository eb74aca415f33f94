"""Opening whatever an operator names: an image with the layers below it, or an export.

Only the operator names a format. QED stores none for its backing file, and a guest that can write a header
into a raw disk must not choose what its host opens.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.image import QedImage
from nbdstream.block.raw import RawImage
from nbdstream.block.remote.export import RemoteExport
from nbdstream.errors import ImageError
from nbdstream.uri import is_nbd_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdstream.block.device import BlockDevice

MOST_LAYERS = 64
"""Of a backing chain: every layer costs threads and address space, and each needs its format on the command line."""


async def open_device_or_uri(
    name: str,
    image_format: str | None,
    backing_formats: Sequence[str],
    *,
    tls_certificates: str | None = None,
    alone: bool = False,
) -> BlockDevice:
    """Open an image, or an export by its NBD URI, for reading. See :func:`open_device`."""
    if is_nbd_uri(name):
        if image_format == "qed" or backing_formats:
            raise ImageError(f"{name}: what is behind an NBD URI is raw")
        return await RemoteExport.connect(name, connections=1, tls_certificates=tls_certificates)
    return await open_device(name, image_format, backing_formats, writable=False, alone=alone)


async def open_device(
    path: str, image_format: str | None, backing_formats: Sequence[str], *, writable: bool, alone: bool = False
) -> BlockDevice:
    """Open an image and what lies below it.

    ``image_format`` None means raw, but refuses what looks like a QED image. ``backing_formats`` are those of the
    layers below, the next one first. ``alone`` leaves an image without its backing file if no format for that is
    given; otherwise that is an error, since part of the disk would be missing. Raises NbdstreamError.
    """
    return await _open_layers(path, image_format, backing_formats, [], writable=writable, alone=alone)


async def _open_layers(
    path: str,
    image_format: str | None,
    backing_formats: Sequence[str],
    above: list[os.stat_result],
    *,
    writable: bool = False,
    alone: bool = False,
) -> BlockDevice:
    """Open an image and what lies below it; ``above`` are the files of the layers that lie above it."""
    if image_format != "qed":
        if backing_formats:
            raise ImageError(f"{path}: a raw image has no backing file")
        return await RawImage.open(path, writable=writable, probe=image_format is None)
    image = await QedImage.open(path, writable=writable)
    try:
        below = await _open_below(image, backing_formats, [*above, os.fstat(image.fd)], alone=alone)
    except BaseException:
        await image.close()
        raise
    return Overlay(image, below)


async def _open_below(
    image: QedImage, formats: Sequence[str], above: list[os.stat_result], *, alone: bool
) -> BlockDevice | None:
    name = image.backing_name
    if name is None:
        if formats:
            raise ImageError(f"{image.path} has no backing file: say fewer formats with --backing-format")
        return None
    if not formats:
        if alone:
            return None
        raise ImageError(f"{image.path} has the backing file {name}: say --backing-format raw or qed to have it opened")
    if len(formats) > MOST_LAYERS:
        raise ImageError(f"{image.path}: a backing chain of more than {MOST_LAYERS} layers is not opened")
    if is_nbd_uri(name):
        return await open_device_or_uri(name, formats[0], formats[1:])
    path = _resolve(image.path, name)
    _check_loop(image.path, path, above)
    return await _open_layers(path, formats[0], formats[1:], above)


def _check_loop(overlay: str, path: str, above: list[os.stat_result]) -> None:
    """Raise ImageError if a backing file is one of the images that lie above it."""
    with suppress(OSError):  # opening it will say what is wrong
        about = os.stat(path)
        if any(os.path.samestat(about, other) for other in above):
            raise ImageError(f"{overlay}: its backing file {path} is one of its overlays: the chain has no end")


def _resolve(overlay: str, name: str) -> str:
    """Return the path of a backing file; a relative name begins at the overlay's directory (as QEMU has it)."""
    if name.startswith("json:"):
        raise ImageError(f"{overlay}: its backing file {name} is a json: name: only paths and NBD URIs are opened")
    if ":" in name.split("/", 1)[0]:
        raise ImageError(f"{overlay}: its backing file {name} names a protocol: only paths and NBD URIs are opened")
    return os.path.join(os.path.dirname(overlay), name)
