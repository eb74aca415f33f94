"""What is fuzzed beside the protocol: QED images from a stranger, and what must hold whatever is in them.

An input is a few changes to a sound image (tests.support.mutations). Whatever becomes of it:

- opening, checking, mapping and reading end with an answer or one of the errors that they are documented to raise;
- an image in which our own simple reader finds nothing wrong is opened, and reads the same;
- one that was opened for writing is sound when it is closed again, and no longer than it was.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from typing import TYPE_CHECKING

from nbdstream.block.overlay import Overlay
from nbdstream.block.qed.check import check
from nbdstream.block.qed.image import QedImage
from nbdstream.errors import ImageError
from tests.support.crash import DamagedError, Image
from tests.support.mutations import CLUSTER, INTERESTING, mutated

if TYPE_CHECKING:
    from nbdstream.block.device import BlockDevice

_EXTENTS = 64
"""An image may say that it has any number; nobody has to hear them all."""


def image(data: bytes) -> None:
    """Open, check, map and read an image, then open it for writing."""
    content = mutated(data[:64])
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        asyncio.run(_use(file.name, content))


async def _use(path: str, content: bytes) -> None:
    _check(path)
    sound = _sound(content)
    try:
        device = Overlay(await QedImage.open(path))
    except ImageError:
        assert sound is None
    else:
        try:
            await _read(device, sound)
            await _map(device)
        finally:
            await device.close()
    with open(path, "rb") as file:
        assert file.read() == content, "reading has changed it"
    await _open_for_writing(path, len(content))


def _check(path: str) -> None:
    with open(path, "rb") as file:
        try:
            check(file.fileno())
        except (ImageError, OSError):
            return


def _sound(content: bytes) -> Image | None:
    """Return the image if there is nothing wrong with it, as far as this simple reader knows."""
    if content[:64] != mutated(b"")[:64]:
        return None
    try:
        return Image(content)
    except DamagedError:
        return None


async def _read(device: BlockDevice, sound: Image | None) -> None:
    for cluster in INTERESTING:
        start = cluster * CLUSTER
        length = min(CLUSTER, device.size - start)
        if length <= 0:
            continue
        try:
            buffers = device.read_now(start, length)
            if buffers is None:
                buffers = await device.read(start, length)
        except OSError:
            assert sound is None, f"cluster {cluster}"
            continue
        data = b"".join(bytes(buffer) for buffer in buffers)
        assert len(data) == length
        if sound is not None:
            assert data == (sound.read(cluster) or bytes(CLUSTER))[:length], f"cluster {cluster}"


async def _map(device: BlockDevice) -> None:
    position = 0
    for _ in range(_EXTENTS):
        if position >= device.size:
            return
        try:
            for extent in await device.extents(position, device.size - position):
                assert extent.offset == position
                assert extent.length > 0
                position = extent.end
        except OSError:
            return
    assert position <= device.size


async def _open_for_writing(path: str, length: int) -> None:
    try:
        opened = await QedImage.open(path, writable=True)
    except ImageError:
        return
    await opened.close()
    assert os.path.getsize(path) <= max(length, 1)
    with open(path, "rb") as file:
        assert not check(file.fileno()).corruptions
