"""Run the machine now, move its disk later: serve a disk image, run on it at once, stream it in behind.

From Python, ``open_disk``, ``stream_disk`` and ``stream_disk_info`` do the main job; ``Image`` is a disk image to read
and write.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdstream.api import DiskInfo, DiskStream, SourceOptions, open_disk, stream_disk, stream_disk_info
    from nbdstream.image import Image, ImageInfo

__all__ = [
    "DiskInfo",
    "DiskStream",
    "Image",
    "ImageInfo",
    "SourceOptions",
    "open_disk",
    "stream_disk",
    "stream_disk_info",
]

_MODULES = {"Image": "nbdstream.image", "ImageInfo": "nbdstream.image"}


def __getattr__(name: str) -> Any:
    """Import libnbd only when it is needed: without it, the command says so in a clear sentence."""
    if name in __all__:
        return getattr(importlib.import_module(_MODULES.get(name, "nbdstream.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
