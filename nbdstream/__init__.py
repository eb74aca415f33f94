"""Run the machine now, move its disk later: serve a disk image, run on it at once, stream it in behind.

``stream_disk`` and ``stream_disk_info`` are the whole of it from Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdstream.api import DiskInfo, DiskStream, stream_disk, stream_disk_info

__all__ = ["DiskInfo", "DiskStream", "stream_disk", "stream_disk_info"]


def __getattr__(name: str) -> Any:
    """Import libnbd only when it is needed: without it, the command says so in a clear sentence."""
    if name in __all__:
        from nbdstream import api  # noqa: PLC0415 - see above

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
