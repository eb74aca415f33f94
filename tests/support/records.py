"""What killed owners leave in memory of their images: the record and the marks."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from nbdstream.block.qed.record import DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def forget_records(directory: str | Path) -> None:
    """Remove those of all images in a directory and below it: nobody will open them again."""
    left = [name for name in os.listdir(DIRECTORY) if name.startswith("nbd")]
    images = set(_identities(directory)) if left else set()
    for name in left:
        if name.split("-", 6)[-1] in images:
            os.unlink(f"{DIRECTORY}/{name}")


def _identities(directory: str | Path) -> Iterator[str]:
    """Device and inode of each file, as names of records end with them."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                about = os.lstat(os.path.join(parent, name))
                yield f"{about.st_dev:x}-{about.st_ino:x}"
